"""From the words of the command line to a `RunSpec`: Hydra composes, everything is checked, all faults come at once.

No torch and no transformers here: a wrong word is answered in a fraction of a second, on any machine.

    runs = [compose_run(words) for words in expand(["llm=phi2", "vt=clip,siglip"], multirun=True)]
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from tinylmm.config.checks import check_all, check_leaves, check_strays
from tinylmm.config.experiments import search_path
from tinylmm.config.faults import faults_of, paths_by_leaf
from tinylmm.config.from_model import take_parts
from tinylmm.config.groups import DEFAULT_GROUPS, EXPERIMENTS, group_choices, screen_user_files
from tinylmm.config.overrides import Vocabulary, Words, check_words, choice_fault, is_sweep, redacted
from tinylmm.config.spec import PretrainedPart, RunSpec
from tinylmm.errors import ConfigError, Fault

log = logging.getLogger(__name__)

_HYDRA_PACKAGES = ("hydra._internal.core_plugins.", "tinylmm.")
_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError)
"""What Hydra and OmegaConf raise over files and words; `_translated` makes faults of them."""


def expand(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """Return the overrides of every run asked for, in the order in which Hydra's own sweeper runs them.

    Args:
        overrides: words of the command line, sweeps among them (`vt=clip,siglip`).
        multirun: whether `-m` was given; an experiment with `hydra.mode: MULTIRUN` counts as if it were.

    Raises:
        ConfigError: a sweep without `-m`, or, in a sweep, any fault of words and of the first run.
    """
    if not multirun and not any("experiments" in word or "hydra." in word for word in overrides):
        return [list(overrides)]
    with _session() as (loader, vocabulary):
        words = check_words(overrides, vocabulary, loader)
        fixed = [word for word in words.good if not is_sweep(word, loader)]
        try:
            cfg = _load(fixed, vocabulary)
        except ConfigError as error:
            raise ConfigError([*words.faults, *error.faults]) from error
        params = cfg.hydra.sweeper.get("params") or {}
        swept = [f"{key}={value}" for key, value in params.items()]
        if not multirun and str(cfg.hydra.mode or "").rsplit(".", 1)[-1] != "MULTIRUN":
            if not swept:
                return [list(overrides)]
            what = f"is a sweep over {', '.join(params)}, which runs only if you ask for it."
            raise ConfigError([*words.faults, Fault("experiments", what, "Add -m (multirun).")])
        added = check_words(swept, vocabulary, loader)
        given = [word for word in words.good if not word.startswith("hydra.")]
        parser = OverridesParser.create(config_loader=loader)
        batches = BasicSweeper.split_arguments(parser.parse_overrides([*added.good, *given]), None)
        # without the signs, which only Hydra needs: these words are recorded and shown
        runs = [[word.lstrip("+") for word in run] for batch in batches for run in batch]
        faults = [*words.faults, *added.faults]
        if faults:
            first = check_words(runs[0], vocabulary, loader)
            _finish(list(first.good), faults, vocabulary)
        return runs


def compose_run(overrides: Sequence[str]) -> RunSpec:
    """Return the checked spec of one run.

    Args:
        overrides: words of the command line, or one list of `expand`.

    Raises:
        ConfigError: with every fault found in words, files and values.
    """
    with _session() as (loader, vocabulary):
        words = _without_sweeps(check_words(overrides, vocabulary, loader), loader)
        return _finish(list(words.good), list(words.faults), vocabulary)


def compose_all(overrides: Sequence[str], multirun: bool) -> list[tuple[list[str], RunSpec]]:
    """Return (overrides, spec) of every run asked for; the faults of all runs come at once, each told once."""
    runs: list[tuple[list[str], RunSpec]] = []
    faults: dict[Fault, None] = {}
    for words in expand(overrides, multirun):
        try:
            runs.append((words, compose_run(words)))
        except ConfigError as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise ConfigError(list(faults))
    return runs


def compose_config(cfg: DictConfig, overrides: Sequence[str]) -> RunSpec:
    """Return the checked spec of what `hydra.main` composed.

    Args:
        cfg: the task's config.
        overrides: the words it was composed from (`HydraConfig.get().overrides.task`), to replace `auto` choices.

    Raises:
        ConfigError: with every fault found.
    """
    with _session() as (loader, vocabulary):
        words = check_words(overrides, vocabulary, loader)
        return _finish(list(words.good), list(words.faults), vocabulary, cfg)


def rewrite_words(overrides: Sequence[str]) -> list[str]:
    """Return the words as Hydra itself understands them: aliases written out, plain keys as `++key=value`.

    Raises:
        ConfigError: with every word that is wrong.
    """
    with _session() as (loader, vocabulary):
        words = check_words(overrides, vocabulary, loader)
    if words.faults:
        raise ConfigError(words.faults)
    return list(words.good)


def run_name(spec: RunSpec) -> str:
    """Return the run's name: the user's, or one made of its parts and recipe (`nano-nano-mlp-base`)."""
    parts = (_label(spec.llm), _label(spec.vision_tower), spec.connector.name, spec.recipe.name)
    return spec.name or "-".join(parts)


def _label(part: PretrainedPart) -> str:
    """A part's name; the checkpoint's own where the name says nothing (`llm=hf`)."""
    if part.name != "hf" or part.pretrained is None:
        return part.name
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(part.pretrained).name).strip("-.") or part.name


# ---------------------------------------------------------------------------------------------------- composing


@contextmanager
def _session() -> Iterator[tuple[ConfigLoader, Vocabulary]]:
    """Hydra's compose API over conf/, and what words may say; an outer Hydra is put back afterwards."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("tinylmm.conf", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            groups = group_choices(hydra.config_loader)
            keys = list(RunSpec.model_fields)
            yield hydra.config_loader, Vocabulary(groups, DEFAULT_GROUPS, keys, list(paths_by_leaf(RunSpec)))
    finally:
        GlobalHydra.instance().hydra = outer


def _load(words: Sequence[str], vocabulary: Vocabulary) -> DictConfig:
    """Compose train.yaml with `words`; the `hydra` node is kept."""
    screen_user_files()
    try:
        cfg = compose(config_name="train", overrides=[*words, search_path()], return_hydra_config=True)
    except _ERRORS as error:
        raise ConfigError(_translated(error, vocabulary)) from error
    faults = _check_hydra(cfg)
    if faults:
        raise ConfigError(faults)
    return cfg


def _finish(words: list[str], faults: list[Fault], vocabulary: Vocabulary, cfg: DictConfig | None = None) -> RunSpec:
    """Compose, replace `auto`, validate; raise with `faults` and everything found on the way."""
    try:
        cfg = _load(words, vocabulary) if cfg is None else cfg
        chosen = _auto_choices(cfg, faults, vocabulary)
        automatic = bool(OmegaConf.select(cfg, "eval.auto"))
        cfg = _load([*words, *chosen], vocabulary) if chosen else cfg
        if automatic:
            _take_what_is_there(cfg)
        if OmegaConf.select(cfg, "recipe.from_model", throw_on_resolution_failure=False):
            faults += take_parts(cfg, words)
    except ConfigError as error:
        raise ConfigError(list(dict.fromkeys([*faults, *error.faults]))) from error
    plain, found = _plain(cfg)
    if EXPERIMENTS in plain:
        what = "the file's keys are put below its own name, where nothing reads them."
        found.append(Fault(EXPERIMENTS, what, "Let its first line be `# @package _global_`."))
    leaves = check_leaves(_unresolved(cfg))
    leaves += _not_reported(found, leaves)
    spec, found = _validated(plain, leaves)
    faults = [*faults, *leaves, *found]
    if faults or spec is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    return spec


def _auto_choices(cfg: DictConfig, faults: list[Fault], vocabulary: Vocabulary) -> list[str]:
    """The words that replace `data=auto` and `eval=auto`."""
    words = []
    data = OmegaConf.select(cfg, "data.name", throw_on_resolution_failure=False)
    if OmegaConf.select(cfg, "data.auto"):
        inits = [
            OmegaConf.select(cfg, f"{part}.init", throw_on_resolution_failure=False) for part in ("llm", "vision_tower")
        ]
        published = OmegaConf.select(cfg, "recipe.published_data", throw_on_resolution_failure=False)
        other_model = "from_model" in (OmegaConf.select(cfg, "recipe", throw_on_resolution_failure=False) or {})
        embedded = inits == ["built", "built"] and not other_model
        named = "digits" if embedded or published is None else published
        data = _known("data", named, faults, vocabulary, "digits")
        words.append(f"data={data}")
    if OmegaConf.select(cfg, "eval.auto"):
        published = OmegaConf.select(cfg, "recipe.published_eval", throw_on_resolution_failure=False) or "none"
        trains = bool(OmegaConf.select(cfg, "recipe.stages", throw_on_resolution_failure=False))
        on_digits = data == "digits" and trains
        words.append(f"eval={'digits' if on_digits else _known('eval', published, faults, vocabulary, 'none')}")
    return words


def _known(group: str, published: object, faults: list[Fault], vocabulary: Vocabulary, instead: str) -> str:
    """What a recipe was published with as a choice of a group; where there is none, a fault and another choice."""
    choices = [choice for choice in vocabulary.groups[group] if choice != "auto"]
    if published in choices:
        return str(published)
    wrong = choice_fault(group, str(published), choices)
    faults.append(Fault(f"recipe.published_{group}", wrong.what, wrong.fix))
    return instead


def _take_what_is_there(cfg: DictConfig) -> None:
    """Let the benchmarks that `eval=auto` chose be left out where their files are not found, unless the user says otherwise."""
    with open_dict(cfg):
        for benchmark in cfg.eval.values():
            if OmegaConf.is_dict(benchmark) and "root" in benchmark and "optional" not in benchmark:
                benchmark.optional = True


def _without_sweeps(words: Words, loader: ConfigLoader) -> Words:
    swept = [word for word in words.good if is_sweep(word, loader)]
    faults = [
        Fault(
            word.lstrip("+").partition("=")[0],
            "has several values, but one run takes one.",
            "Add -m to run each, or use [a,b] for a list.",
        )
        for word in swept
    ]
    return Words(tuple(word for word in words.good if word not in swept), (*words.faults, *faults))


# ---------------------------------------------------------------------------------------------------- checking


def _validated(plain: dict[str, Any], known: list[Fault]) -> tuple[RunSpec | None, list[Fault]]:
    """Validate; faults at keys that are `known` to be wrong are not reported again."""
    strays = check_strays(plain)
    faults = [*strays, *check_all(plain)]
    try:
        text = json.dumps(plain, allow_nan=True)
    except (TypeError, ValueError) as error:
        return None, [*faults, Fault("(run)", f"holds something that JSON cannot carry: {error}.")]
    try:
        # strict: `seed=true` or `epochs="3"` is a slip, not a number; JSON: lists stand for tuples, text for paths
        return RunSpec.model_validate_json(text, strict=True, by_alias=True, by_name=False), faults
    except ValidationError as error:
        return None, [*faults, *_not_reported(faults_of(error, RunSpec, plain), [*known, *faults], strays)]


def _not_reported(faults: list[Fault], reported: list[Fault], entries: Sequence[Fault] = ()) -> list[Fault]:
    """Those of `faults` whose key is not among the `reported`, nor lies below one of the reported `entries`."""
    keys = {fault.where for fault in reported}
    above = tuple(f"{fault.where}." for fault in entries)
    return [fault for fault in faults if fault.where not in keys and not fault.where.startswith(above)]


def _plain(cfg: DictConfig) -> tuple[dict[str, Any], list[Fault]]:
    """The config as plain data with interpolations resolved, and one fault for each that cannot be."""
    faults: list[Fault] = []

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, DictConfig):
            names = {str(key): key for key in node if path or key != "hydra"}
            return {name: item(node, key, f"{path}.{name}" if path else name) for name, key in names.items()}
        if isinstance(node, ListConfig):
            return [item(node, index, f"{path}[{index}]") for index in range(len(node))]
        return str(node) if isinstance(node, Path) else node

    def item(node: Any, key: Any, path: str) -> Any:
        if OmegaConf.is_missing(node, key):
            faults.append(Fault(path, "has no value (???).", f"Set {path}=<value>."))
            return None
        try:
            return visit(node[key], path)
        except (OmegaConfBaseException, ValueError, RecursionError) as error:
            faults.append(Fault(path, f"cannot be resolved: {_first_line(error)}."))
            return None

    return visit(cfg, ""), faults


def _unresolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as written, so that a secret read from the environment is seen as its reference."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    plain.pop("hydra", None)
    return plain


def _check_hydra(cfg: DictConfig) -> list[Fault]:
    """Refuse what a YAML file put among Hydra's own settings: they can name code."""
    node: Mapping[str, Any] = cfg.hydra
    faults = [
        Fault(f"hydra.callbacks.{key}", "is refused: callbacks name code to be run.")
        for key in node.get("callbacks") or {}
    ]
    for part in ("launcher", "sweeper"):
        target = str((node.get(part) or {}).get("_target_", ""))
        if not target.startswith(_HYDRA_PACKAGES):
            faults.append(Fault(f"hydra.{part}._target_", f"is '{target}', which is not allowed."))
    for part in ("job_logging", "hydra_logging"):
        settings = repr(OmegaConf.to_container(node[part], resolve=False))
        if "'()'" in settings or "'class'" in settings:
            faults.append(Fault(f"hydra.{part}", "is refused: it names code to be run."))
    return faults


def _translated(error: Exception, vocabulary: Vocabulary) -> list[Fault]:
    """Faults for what Hydra, OmegaConf or the YAML parser raised: file and line, or key."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, yaml.MarkedYAMLError) and cause.problem_mark is not None:
            mark = cause.problem_mark
            return [Fault(f"{mark.name}, line {mark.line + 1}", f"is no valid YAML: {cause.problem}.")]
        if isinstance(cause, yaml.reader.ReaderError):
            return [Fault(str(cause.name), f"is no valid YAML: {cause.reason}.")]
        cause = cause.__cause__
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group in vocabulary.groups:
            return [choice_fault(group, name, vocabulary.groups[group])]
        return [Fault(str(error.missing_cfg_file or "config"), f"was not found: {_first_line(error)}.")]
    if isinstance(error, RecursionError):
        return [
            Fault(
                "config",
                "refers to itself without end.",
                "Look for a YAML anchor or a defaults list that names itself.",
            )
        ]
    where = getattr(error, "full_key", None)
    return [Fault(where or "config", f"cannot be composed: {_first_line(error)}.")]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(lines[0]).rstrip(".")

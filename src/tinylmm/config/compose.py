"""From the words of the command line to a `RunSpec`: Hydra composes, everything is checked, all faults come at once.

No torch and no transformers here: a wrong word is answered in a fraction of a second, on any machine.

    runs = [compose_run(words) for words in expand(["llm=phi2", "vt=clip,siglip"], multirun=True)]
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from tinylmm.config.checks import check_all, check_leaves, check_strays
from tinylmm.config.faults import faults_of
from tinylmm.config.from_model import take_parts
from tinylmm.config.groups import EXPERIMENTS
from tinylmm.config.overrides import Vocabulary, Words, check_words, choice_fault, is_sweep
from tinylmm.config.session import Session, first_line, session
from tinylmm.config.spec import PretrainedPart, RunSpec
from tinylmm.errors import ConfigError, Fault

log = logging.getLogger(__name__)


EMBEDDED = ("digits", "moving_digits")
"""Data sets that are built here, each with questions of the same name in `eval`."""


def expand(overrides: Sequence[str], multirun: bool) -> list[list[str]]:
    """Return the overrides of every run asked for, in the order in which Hydra's own sweeper runs them.

    A sweep over studies (`experiments=a,b`, also as what a study sweeps over) is all runs of the first, then of the next.

    Args:
        overrides: words of the command line, sweeps among them (`vt=clip,siglip`).
        multirun: whether `-m` was given; an experiment with `hydra.mode: MULTIRUN` counts as if it were.

    Raises:
        ConfigError: a sweep without `-m`, or, in a sweep, any fault of words and of the first run.
    """
    with session() as opened:
        return _expand(overrides, multirun, opened)


def _expand(overrides: Sequence[str], multirun: bool, opened: Session, above: tuple[str, ...] = ()) -> list[list[str]]:
    """See `expand`; `above` are the studies that this is part of."""
    if not multirun and not any("experiment" in word or "hydra." in word for word in overrides):
        return [list(overrides)]
    loader, vocabulary = opened.loader, opened.vocabulary
    words = check_words(overrides, vocabulary, loader)
    fixed = [word for word in words.good if not is_sweep(word, loader)]
    try:
        cfg = opened.load(fixed)
    except ConfigError as error:
        raise ConfigError([*words.faults, *error.faults]) from error
    params = cfg.hydra.sweeper.params
    swept = [f"{key}={value}" for key, value in params.items()]
    if not multirun and str(cfg.hydra.mode).rsplit(".", 1)[-1] != "MULTIRUN":
        if not swept:
            return [list(overrides)]
        what = f"is a sweep over {', '.join(params)}, which runs only if you ask for it."
        raise ConfigError([*words.faults, Fault("experiments", what, "Add -m (multirun).")])
    added = check_words(swept, vocabulary, loader)
    joins = any(_study(word) for word in added.good)
    given = [word for word in words.good if not word.startswith("hydra.") and not (joins and _study(word))]
    parser = OverridesParser.create(config_loader=loader)
    batches = BasicSweeper.split_arguments(parser.parse_overrides([*added.good, *given]), None)
    # without the signs, which only Hydra needs: these words are recorded and shown
    runs = [[word.lstrip("+") for word in run] for batch in batches for run in batch]
    faults = [*words.faults, *added.faults]
    if faults:
        first = check_words(runs[0], vocabulary, loader)
        _finish(list(first.good), faults, opened)
    if not joins and not any(_study(word) and is_sweep(word, loader) for word in given):
        return runs
    return [words for run in runs for words in _study_of(run, opened, above)]


def _study_of(run: list[str], opened: Session, above: tuple[str, ...]) -> list[list[str]]:
    """The runs of one of the studies that are swept over."""
    (study,) = (_study(word) for word in run if _study(word))
    if study in above:
        raise ConfigError([Fault(f"experiments={study}", f"sweeps over itself: {' -> '.join([*above, study])}.")])
    return _expand(run, True, opened, (*above, study))


def _study(word: str) -> str:
    """What a word chooses of the experiments; empty where it chooses something else."""
    key, _, choice = word.lstrip("+").partition("=")
    return choice if key == EXPERIMENTS else ""


def compose_run(overrides: Sequence[str]) -> RunSpec:
    """Return the checked spec of one run.

    Args:
        overrides: words of the command line, or one list of `expand`.

    Raises:
        ConfigError: with every fault found in words, files and values.
    """
    with session() as opened:
        return _compose_run(overrides, opened)


def _compose_run(overrides: Sequence[str], opened: Session) -> RunSpec:
    words = _without_sweeps(check_words(overrides, opened.vocabulary, opened.loader), opened.loader)
    return _finish(list(words.good), list(words.faults), opened)


def compose_all(overrides: Sequence[str], multirun: bool) -> list[tuple[list[str], RunSpec]]:
    """Return (overrides, spec) of every run asked for, each once; the faults of all runs come at once, each told once."""
    runs: dict[str, tuple[list[str], RunSpec]] = {}
    faults: dict[Fault, None] = {}
    with session() as opened:
        for words in _expand(overrides, multirun, opened):
            try:
                spec = _compose_run(words, opened)
                runs.setdefault(spec.model_dump_json(), (words, spec))
            except ConfigError as error:
                faults |= dict.fromkeys(error.faults)
    if faults:
        raise ConfigError(list(faults))
    return list(runs.values())


def rewrite_words(overrides: Sequence[str]) -> list[str]:
    """Return the words as Hydra itself understands them: aliases written out, plain keys as `++key=value`.

    Raises:
        ConfigError: with every word that is wrong.
    """
    with session() as opened:
        words = check_words(overrides, opened.vocabulary, opened.loader)
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


def _finish(words: list[str], faults: list[Fault], opened: Session) -> RunSpec:
    """Compose, replace `auto`, validate; raise with `faults` and everything found on the way."""
    try:
        cfg = opened.load(words)
        chosen = _auto_choices(cfg, faults, opened.vocabulary)
        automatic = bool(OmegaConf.select(cfg, "eval.auto"))
        cfg = opened.load([*words, *chosen]) if chosen else cfg
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
    return _with_precisions(spec)


def _with_precisions(spec: RunSpec) -> RunSpec:
    """The run with a precision in place of each evaluation's `auto`.

    Chosen here and not where a stage is planned or run: what is recorded, queued and hashed is then one and the same
    precision, whichever machine goes on with the run.
    """
    chosen = {"precision": "bf16" if spec.launch.on_gpu else "fp32"}
    settled = {k: one.model_copy(update=chosen) if one.precision == "auto" else one for k, one in spec.eval.items()}
    return spec.model_copy(update={"eval": settled})


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
        built_on = OmegaConf.select(cfg, "llm.build.data.name", throw_on_resolution_failure=False) or "digits"
        named = (built_on if built_on in EMBEDDED else "digits") if embedded else published or "digits"
        data = _known("data", named, faults, vocabulary, "digits")
        words.append(f"data={data}")
    if OmegaConf.select(cfg, "eval.auto"):
        published = OmegaConf.select(cfg, "recipe.published_eval", throw_on_resolution_failure=False) or "none"
        trains = bool(OmegaConf.select(cfg, "recipe.stages", throw_on_resolution_failure=False))
        asked = data if data in EMBEDDED and trains else _known("eval", published, faults, vocabulary, "none")
        words.append(f"eval={asked}")
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
            faults.append(Fault(path, f"cannot be resolved: {first_line(error)}."))
            return None

    return visit(cfg, ""), faults


def _unresolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as written, so that a secret read from the environment is seen as its reference."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    plain.pop("hydra", None)
    return plain

"""Hydra's compose API over conf/, and what words may say, for as long as one command composes. No torch.

Composing with Hydra takes a tenth of a second, most of it for the choices of groups; the runs of a sweep share most of them. A
session composes each set of choices once and lets plain keys be set in copies, by Hydra's own code and so with the same result.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tinylmm.config.experiments import search_path
from tinylmm.config.faults import paths_by_leaf
from tinylmm.config.groups import DEFAULT_GROUPS, group_choices, screen_user_files
from tinylmm.config.overrides import Vocabulary, choice_fault, redacted
from tinylmm.config.spec import RunSpec
from tinylmm.errors import ConfigError, Fault

_HYDRA_PACKAGES = ("hydra._internal.core_plugins.", "tinylmm.")
_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError)
"""What Hydra and OmegaConf raise over files and words; `_translated` makes faults of them."""


class Session:
    """Composes configs; see `session`."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        keys = list(RunSpec.model_fields)
        self.vocabulary = Vocabulary(group_choices(loader), DEFAULT_GROUPS, keys, list(paths_by_leaf(RunSpec)))
        self._parser = OverridesParser.create(config_loader=loader)
        self._composed: dict[tuple[str, ...], bytes] = {}
        """Words -> what they compose to, pickled: that is copied three times as fast as a config itself."""
        self._screened = False

    def load(self, words: Sequence[str]) -> DictConfig:
        """Compose train.yaml with words that `check_words` let pass; of the `hydra` node mode and sweep are kept.

        Raises:
            ConfigError: they cannot be composed, or a file is not what it may be.
        """
        if not self._screened:
            screen_user_files()
            self._screened = True
        plain = [word for word in words if word.startswith("++")]
        others = [word for word in words if not word.startswith("++")]
        if any(word.startswith("~") for word in others):  # what is removed may have been set: one after another
            plain, others = [], list(words)
        try:
            if (key := tuple(others)) not in self._composed:
                self._composed[key] = pickle.dumps(self._compose(others))
            cfg: DictConfig = pickle.loads(self._composed[key])
            ConfigLoaderImpl._apply_overrides_to_config(self._parser.parse_overrides(plain), cfg)
        except _ERRORS as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(_translated(error, self.vocabulary)) from error
        return cfg

    def _compose(self, words: Sequence[str]) -> DictConfig:
        cfg = compose(config_name="train", overrides=[*words, search_path()], return_hydra_config=True)
        if faults := _check_hydra(cfg):
            raise ConfigError(faults)
        kept = {"mode": str(cfg.hydra.mode or ""), "sweeper": {"params": dict(cfg.hydra.sweeper.get("params") or {})}}
        with open_dict(cfg):
            del cfg["hydra"]
            cfg["hydra"] = kept
        return cfg


@contextmanager
def session() -> Iterator[Session]:
    """Hydra's compose API while the block runs; an outer Hydra is put back afterwards."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("tinylmm.conf", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            yield Session(hydra.config_loader)
    finally:
        GlobalHydra.instance().hydra = outer


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
        return [Fault(str(error.missing_cfg_file or "config"), f"was not found: {first_line(error)}.")]
    if isinstance(error, RecursionError):
        return [
            Fault(
                "config",
                "refers to itself without end.",
                "Look for a YAML anchor or a defaults list that names itself.",
            )
        ]
    where = getattr(error, "full_key", None)
    return [Fault(where or "config", f"cannot be composed: {first_line(error)}.")]


def first_line(error: Exception) -> str:
    """The first line of a message, without secrets and full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(lines[0]).rstrip(".")

"""Where config groups come from: our conf/, the user's ./conf and ./experiments, Hydra's plugins. No torch."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tinylmm.errors import ConfigError, Fault

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader  # `--help` lists choices without loading Hydra

log = logging.getLogger(__name__)

DEFAULT_GROUPS = ("llm", "vision_tower", "connector", "recipe", "data", "eval", "launch")
"""Groups that the defaults list of train.yaml always gives a choice."""

EXPERIMENTS = "experiments"
MAX_YAML_BYTES = 1_000_000
MAX_ALIASES = 50
"""A config file has a few kilobytes; these limits stop one that is built to fill memory."""


def conf_folder() -> Path:
    """Return the folder of the shipped configuration, in a checkout or in site-packages."""
    spec = importlib.util.find_spec("tinylmm.conf")
    if spec is None or spec.origin is None:
        raise ConfigError([Fault("tinylmm.conf", "is not installed", "Install tinylmm again (pip install -e .).")])
    return Path(spec.origin).parent


def user_conf() -> Path | None:
    """Return ./conf if there is one and it is not the shipped one (as it is when working in a checkout)."""
    folder = Path("conf")
    return folder if folder.is_dir() and not folder.samefile(conf_folder()) else None


def experiment_folders() -> list[Path]:
    """Return ./experiments and, in a checkout, the repository's, nearest first."""
    here, shipped = Path(EXPERIMENTS), conf_folder().parent / EXPERIMENTS
    folders = [here] if here.is_dir() else []
    if shipped.is_dir() and not (folders and here.samefile(shipped)):
        folders.append(shipped)
    return folders


def group_choices(loader: ConfigLoader) -> dict[str, tuple[str, ...]]:
    """Return every group with its choices in alphabetical order.

    An experiment in a folder of its own (`experiments/name/name.yaml`) is the choice `name/name`.
    """
    names = {*DEFAULT_GROUPS}
    user = user_conf()
    if user is not None:
        names |= {path.name for path in user.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    groups = {}
    for group in [*DEFAULT_GROUPS, *sorted(names - {*DEFAULT_GROUPS, EXPERIMENTS})]:
        found = set(loader.get_group_options(group))
        for path in user.glob(f"{group}/*.yaml") if user is not None else ():
            if path.stem in found:
                _warn_of_shadow(path)
            found.add(path.stem)
        groups[group] = tuple(sorted(found))
    experiments: set[str] = set()
    for folder in experiment_folders():
        experiments |= {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    groups[EXPERIMENTS] = tuple(sorted(experiments))
    return groups


@cache
def _warn_of_shadow(path: Path) -> None:
    """Once a file: ours is found first, so that a choice means the same for everyone."""
    log.warning("%s has the name of a shipped choice and is not read; rename it to use it", path)


def screen_user_files() -> None:
    """Refuse YAML files of the user that are built to fill memory: too large, or too many aliases.

    Raises:
        ConfigError: with every such file.
    """
    user = user_conf()
    faults = []
    for folder in [*experiment_folders(), *([user] if user is not None else [])]:
        for path in sorted(folder.rglob("*.yaml")):
            size = path.stat().st_size
            if size > MAX_YAML_BYTES:
                faults.append(Fault(str(path), f"has {size} bytes; a config file may have {MAX_YAML_BYTES}."))
            elif b"&" in (text := path.read_bytes()) and b"*" in text and _aliases(text) > MAX_ALIASES:
                faults.append(Fault(str(path), f"uses more than {MAX_ALIASES} YAML aliases."))
    if faults:
        raise ConfigError(faults)


def _aliases(text: bytes) -> int:
    """Count aliases; a file that is no YAML counts none here, and is reported with its line when it is composed."""
    try:
        return sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
    except (yaml.YAMLError, UnicodeDecodeError):
        return 0

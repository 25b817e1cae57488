"""Hydra's view of a folder with experiments: `experiments/` in it is a config group, and nothing else is.

Hydra's own `file://.` makes a group of every folder that lies there. A `store` beside the user, which each run leaves, would
then turn `store=PATH` into the choice of a group that has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry

from tinylmm.config.groups import EXPERIMENTS, experiment_folders, user_conf

if TYPE_CHECKING:
    from hydra.core.object_type import ObjectType


class ExperimentsSource(FileConfigSource):
    """A folder of which only `experiments/` can be seen."""

    @staticmethod
    def scheme() -> str:
        """Of its entries in `hydra.searchpath`: `experiments://FOLDER`."""
        return EXPERIMENTS

    def available(self) -> bool:
        """Whether there are experiments."""
        return self.is_group(EXPERIMENTS)

    def is_group(self, config_path: str) -> bool:
        """Whether a path is `experiments/` or a folder in it."""
        return not config_path or (_is_experiment(config_path) and super().is_group(config_path))

    def is_config(self, config_path: str) -> bool:
        """Whether a path is a file in `experiments/`."""
        return _is_experiment(config_path) and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Names in a folder."""
        if config_path:
            return list(super().list(config_path, results_filter)) if _is_experiment(config_path) else []
        return [EXPERIMENTS]


def search_path() -> str:
    """Return the override that adds the user's folders behind the shipped one, which they can extend but not shadow."""
    SourcesRegistry.instance().register(ExperimentsSource)
    folders = [(EXPERIMENTS, folder.parent) for folder in experiment_folders()]
    user = user_conf()
    folders += [("file", user)] if user is not None else []
    quoted = (f"{scheme}://" + str(path).replace("\\", "\\\\").replace("'", "\\'") for scheme, path in folders)
    return "hydra.searchpath=[" + ",".join(f"'{path}'" for path in quoted) + "]"


def _is_experiment(config_path: str) -> bool:
    return config_path.split("/", 1)[0] == EXPERIMENTS

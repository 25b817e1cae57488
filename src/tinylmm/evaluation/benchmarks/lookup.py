"""Where a benchmark's files are found, whichever of the usual folders the user names and however they are spelt.

A missing file is one sentence: which, where it was looked for, where to get it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinylmm.errors import DataError


@dataclass(frozen=True)
class BenchmarkFiles:
    """A benchmark's files; `root` is its own folder, or the one around it (`playground/data/eval`).

    Attributes:
        root: what the user named.
        folder: name of the benchmark's own folder (`gqa`, `MME`).
        get: where the files come from, one sentence; ends every message about a missing file.
    """

    root: Path
    folder: str
    get: str

    @classmethod
    def under(cls, root: Path, get: str, *folders: str) -> BenchmarkFiles:
        """Files of a benchmark whose folder users and scripts call any of `folders`, the official name first.

        The first counts that is there, or that `root` itself is called; else the official one.
        """
        found = next((name for name in folders if root.name == name or (root / name).is_dir()), folders[0])
        return cls(root, found, get)

    def candidates(self, names: Iterable[str]) -> list[Path]:
        """All paths where any of `names` may lie, the benchmark's own folder first."""
        bases = [self.root] if self.root.name == self.folder else [self.root / self.folder, self.root]
        return [base / name for base in bases for name in names]

    def find(self, *names: str) -> Path | None:
        """The first of `names` that exists, or None."""
        return next((path for path in self.candidates(names) if path.exists()), None)

    def file(self, *names: str) -> Path:
        """The first of `names` that exists.

        Raises:
            DataError: none does; the message lists all paths and says where to get the file.
        """
        found = self.find(*names)
        if found is None:
            raise self.missing(names[0].rsplit("/", 1)[-1], self.candidates(names))
        return found

    def missing(self, what: str, looked_for: Sequence[Path]) -> DataError:
        """The error of a missing file."""
        if not self.root.is_dir():
            return DataError(
                f"{self.root}: no such folder. It should be the {self.folder} folder or the one around it. {self.get}"
            )
        paths = ", ".join(str(path) for path in looked_for)
        return DataError(f"{what} not found; looked for {paths}. {self.get}")

    def image_folder(self, *names: str) -> Path:
        """The first of `names` that exists, else where the first should lie: scoring needs no images."""
        return self.find(*names) or self.candidates(names)[0]

    def parquet(self, split: str, *configs: str) -> list[Path]:
        """The shards of a split (`test-00000-of-00003*.parquet` or `test.parquet`), in order, as `hf download` writes them.

        Args:
            split: the split's name.
            configs: names of the config, best first; `data` and no folder at all are tried after them.

        Raises:
            DataError: there is none.
        """
        shards = self._shards(split, configs)
        if not shards:
            raise self.missing(f"{split}-*.parquet", self.candidates([*configs, "data", ""]))
        return shards

    def has_parquet(self, split: str, *configs: str) -> bool:
        """Whether `parquet` would find the split."""
        return bool(self._shards(split, configs))

    def _shards(self, split: str, configs: Sequence[str]) -> list[Path]:
        for folder in self.candidates([*configs, "data", ""]):
            shards = sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
            if shards:
                return shards
        return []

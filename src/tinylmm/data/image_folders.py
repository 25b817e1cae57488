"""Where the images of prepared samples lie: of one source or of a mixture, in its image folder or embedded in its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinylmm.data.image_names import embedded_path, is_embedded
from tinylmm.data.images import safe_path


@dataclass(frozen=True)
class ImageFolder:
    """Folders of one source: of the paths in its records, and of what the prepare stage took out of them."""

    paths: Path
    embedded: Path

    def find(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DataError: the path leads out of the folder or names no file.
        """
        return embedded_path(self.embedded, name) if is_embedded(name) else safe_path(self.paths, name)


def in_mixture(position: int, name: str) -> str:
    """Name of an image in a mixture: two sources may have different files of one name."""
    return f"{position}|{name}"


@dataclass(frozen=True)
class ImageFolders:
    """Finds the images of a stage: by their own names if it has one source, else by those that `in_mixture` gives."""

    sources: Sequence[ImageFolder]

    def find(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DataError: as `ImageFolder.find`.
        """
        if len(self.sources) == 1:
            return self.sources[0].find(name)
        position, _, own = name.partition("|")
        return self.sources[int(position)].find(own)

"""Where the images of prepared samples lie: of one source or of a mixture, in its image folder or embedded in its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tinylmm.data.image_names import embedded_path, is_embedded
from tinylmm.data.images import image_size, open_image, safe_path


@dataclass(frozen=True)
class ImageFolder:
    """Folders of one source: of the paths in its records, and of what the images stage took out of them.

    Attributes:
        follow_links: links may lead out of `paths`.
        upright: images are turned as their camera says.
    """

    paths: Path
    embedded: Path
    follow_links: bool = False
    upright: bool = False

    def find(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DataError: the path leads out of the folder or names no file.
        """
        return (
            embedded_path(self.embedded, name) if is_embedded(name) else safe_path(self.paths, name, self.follow_links)
        )


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
        folder, own = self._folder(name)
        return folder.find(own)

    def open(self, name: str) -> Image.Image:
        """Return an image as RGB, as its source wants it.

        Raises:
            DataError: as `find` and `open_image`.
        """
        folder, own = self._folder(name)
        return open_image(folder.find(own), upright=folder.upright)

    def size(self, name: str) -> tuple[int, int]:
        """Return width and height of what `open` gives, in pixels.

        Raises:
            DataError: as `find` and `image_size`.
        """
        folder, own = self._folder(name)
        return image_size(folder.find(own), folder.upright)

    def upright(self, name: str) -> bool:
        """Whether an image is turned as its camera says."""
        return self._folder(name)[0].upright

    def _folder(self, name: str) -> tuple[ImageFolder, str]:
        if len(self.sources) == 1:
            return self.sources[0], name
        position, _, own = name.partition("|")
        return self.sources[int(position)], own

"""Where the images and videos of prepared samples lie: of one source or of a mixture, in its folder or in its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from tinylmm.data.image_names import embedded_path, is_embedded, video_path
from tinylmm.data.images import image_size, open_image, safe_path
from tinylmm.data.video import find_video, see_frames
from tinylmm.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFolder:
    """Folders of one source: of the paths in its records, and of what the images stage took out of them.

    Attributes:
        follow_links: links may lead out of `paths`.
        upright: images are turned as their camera says.
        clips: name of a video -> numbers of the frames of it that are shown.
    """

    paths: Path
    embedded: Path
    follow_links: bool = False
    upright: bool = False
    clips: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def find(self, name: str) -> Path:
        """Return the file of an image or a video.

        Raises:
            DataError: the path leads out of the folder or names no file.
        """
        if (video := video_path(name)) is not None:
            return find_video(self.paths, video, self.follow_links)
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
        """Return the file of an image or a video.

        Raises:
            DataError: as `ImageFolder.find`.
        """
        folder, own = self._folder(name)
        return folder.find(own)

    def open(self, name: str, data: bytes | None = None) -> Image.Image:
        """Return an image as RGB, as its source wants it; decoded from `data` where its file has been read already.

        Raises:
            DataError: as `find` and `open_image`.
        """
        folder, own = self._folder(name)
        return open_image(folder.find(own), data, folder.upright)

    def content(self, name: str) -> bytes:
        """Return an image's file.

        Raises:
            DataError: as `find`, or it cannot be read.
        """
        path = self.find(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}). Make it readable, or fetch it again."
            ) from error

    def size(self, name: str) -> tuple[int, int]:
        """Return width and height of what `open` gives, in pixels.

        Raises:
            DataError: as `find` and `image_size`.
        """
        folder, own = self._folder(name)
        return image_size(folder.find(own), folder.upright)

    @property
    def have_clips(self) -> bool:
        """Whether any source has videos."""
        return any(folder.clips for folder in self.sources)

    def frames(self, name: str) -> tuple[int, ...]:
        """Return the numbers of a video's frames that are shown; none of an image."""
        folder, own = self._folder(name)
        return folder.clips[own] if video_path(own) is not None else ()

    def see_clip(self, name: str, see: Callable[[Image.Image], T]) -> list[T]:
        """Return what `see` makes of a video's frames that are shown, in order.

        Raises:
            DataError: as `find` and `see_frames`.
        """
        folder, own = self._folder(name)
        return see_frames(folder.find(own), folder.clips[own], see)

    def upright(self, name: str) -> bool:
        """Whether an image is turned as its camera says."""
        return self._folder(name)[0].upright

    def _folder(self, name: str) -> tuple[ImageFolder, str]:
        if len(self.sources) == 1:
            return self.sources[0], name
        position, _, own = name.partition("|")
        return self.sources[int(position)], own

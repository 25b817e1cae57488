"""Tower features of the images that are asked about: each is encoded once, and let go when nobody needs it any more."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from tinylmm.models.lmm import LMM

ENCODE_IMAGES = 64
"""Images, tiles or frames that go through the tower at once, where nothing speaks against it."""
READ_AHEAD = 64
"""Images, tiles or frames that are read before they are asked for."""


class Stored(Protocol):
    """Features that somebody computed before, by image key: (T, P, Dv) each."""

    def __contains__(self, key: str, /) -> bool: ...

    def __call__(self, key: str, /) -> Tensor: ...


class ReadAhead:
    """Reads images in threads of its own while the model works on those before.

    Args:
        load: key -> pixels.
        keys: in the order in which they will be asked for; what is asked for besides is read there and then.
        readers: threads. One for a benchmark's tables: what reads them keeps the part that neighbours share, and would read
            it once a thread.
    """

    def __init__(self, load: Callable[[str], Tensor], keys: Sequence[str], readers: int = 1) -> None:
        self._readers = readers
        self._load, self._keys = load, deque(keys if len(keys) > 1 else [])
        self._reading: dict[str, Future[Tensor]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._views = READ_AHEAD  # of the largest so far; until the first is read, any may have so many

    def __enter__(self) -> Callable[[str], Tensor]:
        if self._keys:
            self._reader = ThreadPoolExecutor(self._readers, "read-ahead")
        return self._next

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def _next(self, key: str) -> Tensor:
        self._read_on()
        found = self._reading.pop(key, None)
        pixels = self._load(key) if found is None else found.result()
        views = len(pixels) if pixels.ndim == 4 else 1
        self._views = views if self._views == READ_AHEAD else max(views, self._views)
        self._read_on()  # while this one is in use
        return pixels

    def _read_on(self) -> None:
        """Have as many read as may wait, by what is known of their size."""
        while self._reader is not None and self._keys and len(self._reading) * self._views < READ_AHEAD:
            following = self._keys.popleft()
            self._reading[following] = self._reader.submit(self._load, following)


class EncodedImages:
    """Features by image key.

    Args:
        keep: so many images stay although nobody has announced a use of them, those used last.
        stored: features that need no tower.

    Attributes:
        at_once: images that go through the tower together.
        encoded: how many images went through the tower.
    """

    def __init__(self, model: LMM, keep: int = 0, stored: Stored | None = None) -> None:
        self.model, self.keep, self._stored = model, keep, stored
        self.at_once = ENCODE_IMAGES
        self.encoded = 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._uses: Counter[str] = Counter()

    def announce(self, keys: Iterable[str]) -> None:
        """Count uses to come: an image stays until `release` was called as often."""
        self._uses.update(keys)

    def release(self, keys: Iterable[str]) -> None:
        """Let go of images whose announced uses are over, but for `keep` of them."""
        self._uses.subtract(keys)
        idle = [key for key in self._features if self._uses[key] <= 0]
        for key in idle[: max(0, len(idle) - self.keep)]:
            del self._features[key]
        self._uses = +self._uses

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those, each once, that have to go through the tower."""
        stored = self._stored or ()
        return [key for key in dict.fromkeys(keys) if key not in self._features and key not in stored]

    @torch.no_grad()
    def encode(self, keys: Sequence[str], load: Callable[[str], Tensor], check: Callable[[], None]) -> None:
        """Run the tower on images that are not there yet.

        Args:
            load: key -> (3, H, W), normalised for the tower; of tiles, or frames of a clip, (T, 3, H, W).
            check: called before every batch; raises to stop.
        """
        for key in dict.fromkeys(keys):
            if key in self._features:
                self._features.move_to_end(key)
        waiting: dict[str, Tensor] = {}
        for key in [key for key in dict.fromkeys(keys) if key not in self._features]:
            if self._stored is not None and key in self._stored:
                self._features[key] = self._stored(key).to(next(self.model.vision_tower.parameters()).device)
                continue
            if not waiting:
                check()
            pixels = load(key)
            waiting[key] = pixels if pixels.ndim == 4 else pixels[None]
            if sum(map(len, waiting.values())) >= self.at_once:
                self._run_tower(waiting)
                waiting = {}
        if waiting:
            self._run_tower(waiting)

    def _run_tower(self, views: dict[str, Tensor]) -> None:
        """Encode images by key, each as its views (T, 3, H, W)."""
        pieces = torch.cat(list(views.values())).split(self.at_once)
        features = torch.cat([self.model.tower_features(some) for some in pieces])
        self._features |= dict(zip(views, features.split([len(view) for view in views.values()]), strict=True))
        self.encoded += len(views)

    def features(self, keys: Sequence[str]) -> Tensor | None:
        """(N, P, Dv) of images (or of all their tiles and frames) in this order; None without images."""
        return torch.cat([self._features[key] for key in keys]) if keys else None

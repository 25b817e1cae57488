"""Tower features of the images that are asked about: each is encoded once, and let go when nobody needs it any more."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tinylmm.models.lmm import LMM

ENCODE_IMAGES = 64
"""Images that go through the tower at once, where nothing speaks against it."""


class EncodedImages:
    """Features by image key.

    Args:
        keep: so many images stay although nobody has announced a use of them, those used last.

    Attributes:
        at_once: images that go through the tower together.
        encoded: how many images went through the tower.
    """

    def __init__(self, model: LMM, keep: int = 0) -> None:
        self.model, self.keep = model, keep
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

    @torch.no_grad()
    def encode(self, keys: Sequence[str], load: Callable[[str], Tensor], check: Callable[[], None]) -> None:
        """Run the tower on images that are not there yet.

        Args:
            load: key -> (3, H, W), normalised for the tower; where the model takes images in tiles, (T, 3, H, W).
            check: called before every batch; raises to stop.
        """
        wanted = list(dict.fromkeys(keys))
        for key in wanted:
            if key in self._features:
                self._features.move_to_end(key)
        missing = [key for key in wanted if key not in self._features]
        for first in range(0, len(missing), self.at_once):
            check()
            chunk = missing[first : first + self.at_once]
            views = [pixels if pixels.ndim == 4 else pixels[None] for pixels in map(load, chunk)]
            features = self.model.tower_features(torch.cat(views))
            self._features |= dict(zip(chunk, features.split([len(view) for view in views]), strict=True))
            self.encoded += len(chunk)

    def features(self, keys: Sequence[str]) -> Tensor | None:
        """(N, P, Dv) of images (or of all their tiles) in this order; None without images."""
        return torch.cat([self._features[key] for key in keys]) if keys else None

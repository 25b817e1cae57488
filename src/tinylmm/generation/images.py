"""Tower features of the images that are asked about: each is encoded once, and let go when nobody needs it any more."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tinylmm.models.lmm import LMM

ENCODE_IMAGES = 64
"""Images, tiles or frames that go through the tower at once."""


class EncodedImages:
    """Features by image key.

    Args:
        keep: so many images stay although nobody has announced a use of them, those used last.
        stored: key -> features (T, P, Dv) that somebody computed before, None where nobody did.

    Attributes:
        encoded: how many images went through the tower.
    """

    def __init__(self, model: LMM, keep: int = 0, stored: Callable[[str], Tensor | None] | None = None) -> None:
        self.model, self.keep, self._stored = model, keep, stored
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
            load: key -> (3, H, W), normalised for the tower; of tiles, or frames of a clip, (T, 3, H, W).
            check: called before every batch; raises to stop.
        """
        wanted = list(dict.fromkeys(keys))
        for key in wanted:
            if key in self._features:
                self._features.move_to_end(key)
        waiting: dict[str, Tensor] = {}
        for key in [key for key in wanted if key not in self._features]:
            stored = None if self._stored is None else self._stored(key)
            if stored is not None:
                self._features[key] = stored
                continue
            if not waiting:
                check()
            pixels = load(key)
            waiting[key] = pixels if pixels.ndim == 4 else pixels[None]
            if sum(map(len, waiting.values())) >= ENCODE_IMAGES:
                self._run_tower(waiting)
                waiting = {}
        if waiting:
            self._run_tower(waiting)

    def _run_tower(self, views: dict[str, Tensor]) -> None:
        """Encode images by key, each as its views (T, 3, H, W)."""
        pieces = torch.cat(list(views.values())).split(ENCODE_IMAGES)
        features = torch.cat([self.model.tower_features(some) for some in pieces])
        self._features |= dict(zip(views, features.split([len(view) for view in views.values()]), strict=True))
        self.encoded += len(views)

    def features(self, keys: Sequence[str]) -> Tensor | None:
        """(N, P, Dv) of images (or of all their tiles and frames) in this order; None without images."""
        return torch.cat([self._features[key] for key in keys]) if keys else None

"""What the pixel cache is worth: images a CPU second read from JPEG files, and from the cache, in turns.

    python -m benchmarks.reading                          # a minute: 640 x 480, four towers' transforms
    python -m benchmarks.reading --images 24 --rounds 1   # a look

Each image is read as a training reads it, in one process, up to a batch's normalised pixels: from its file without a cache,
from its file while it is written to an empty cache, and from the filled cache by an object that begins with nothing in memory.
The three take turns, so that what else the machine does meets all of them, and seconds are the process's own on a core, its
system calls included: files and cache are in memory by then, so it waits for nothing but a core. Pixels are compared bitwise.
Images are photographs' stand-ins: smooth noise with some grain, saved by Pillow at quality 90, which gives files about as large
as COCO's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.arguments import file_to_write, whole
from benchmarks.middle import circumstances
from tests.builders import redescribe, tiny_loaded
from tinylmm.config.spec import ImageSpec
from tinylmm.data.image_folders import ImageFolder, ImageFolders
from tinylmm.stages.kept import ThroughShelf
from tinylmm.stages.seen import SeenImages
from tinylmm.store.pixels import PixelShelf

OUT = Path(__file__).parent / "results/reading.json"
WIDTH, HEIGHT, QUALITY = 640, 480, 90
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "clip 336, center_crop": {"size": 336, "mode": "center_crop", **CLIP},
    "clip 336, pad": {"size": 336, "mode": "pad", **CLIP},
    "siglip 384, squash": {"size": 384, "mode": "squash", **HALF},
    "siglip 384, anyres": {"size": 384, "mode": "anyres", **HALF},
}
LIMIT = 1 << 40


def main(words: Sequence[str] | None = None) -> int:
    """Write the images, read them in turns, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=whole(1), default=96)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=file_to_write, default=OUT)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = _write(root / "images", options.images)
        size = sum((root / "images" / name).stat().st_size for name in names) / len(names)
        rows = [_measure(root, title, image, names, options.rounds) for title, image in TRANSFORMS.items()]
    record = {
        **circumstances(options),
        "seconds": "of CPU time, one process",
        "image": f"{WIDTH} x {HEIGHT} JPEG, quality {QUALITY}, {size / 1e3:.0f} kB on average",
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        sys.stdout.write(
            f"{row['transform']}: {row['jpeg_per_s']:.0f} images a CPU second from JPEG, {row['filling_per_s']:.0f} while the "
            f"cache is filled, {row['cache_per_s']:.0f} from it: {row['times']:.1f} times; {row['kb_an_image']:.0f} kB each\n"
        )
    return 0


def _write(folder: Path, count: int) -> list[str]:
    """Smooth noise with some grain, as JPEG files; their names."""
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(drawn.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        grain = drawn.normal(0, 6, smooth.shape)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=QUALITY)
    return [f"{number}.jpg" for number in range(count)]


def _measure(root: Path, title: str, image: dict[str, Any], names: list[str], rounds: int) -> dict[str, Any]:
    def seen() -> SeenImages:
        loaded = tiny_loaded()
        redescribe(loaded, image=ImageSpec.model_validate(image).model_dump(mode="json"))
        return SeenImages(ImageFolders([ImageFolder(root / "images", root)]), loaded)

    def through(key: str) -> SeenImages:
        cached = seen()
        shelf = PixelShelf(root / "pixels", key, LIMIT, {"size": image["size"], "mode": image["mode"]})
        cached.bytes_of = ThroughShelf(shelf, cached)
        return cached

    plain, filled = seen(), f"filled {title}"
    kept = through(filled)
    if not all(torch.equal(kept.pixels(name), plain.pixels(name)) for name in names):
        raise RuntimeError(f"{title}: pixels written to the cache are others than the file's")
    if not all(torch.equal(through(filled).pixels(name), plain.pixels(name)) for name in names[:8]):
        raise RuntimeError(f"{title}: pixels read from the cache are others than the file's")
    taken: dict[str, list[float]] = {"jpeg": [], "filling": [], "cache": []}
    for turn in range(rounds):
        ways: dict[str, Callable[[str], torch.Tensor]] = {
            "jpeg": plain.pixels,
            "filling": through(f"{turn} {title}").pixels,
            "cache": through(filled).pixels,
        }
        for way, read in ways.items():
            begun = time.process_time()
            for name in names:
                read(name)
            taken[way].append(len(names) / (time.process_time() - begun))
    size = sum(path.stat().st_size for path in (root / "pixels" / filled).iterdir()) / len(names)
    ratios = [cache / jpeg for cache, jpeg in zip(taken["cache"], taken["jpeg"], strict=True)]
    return {
        "transform": title,
        **{f"{way}_per_s": round(statistics.median(rates), 1) for way, rates in taken.items()},
        "times": round(statistics.median(ratios), 2),
        "times_least_and_most": [round(min(ratios), 2), round(max(ratios), 2)],
        "kb_an_image": round(size / 1e3, 1),
        "bit_equal": True,
    }


if __name__ == "__main__":
    sys.exit(main())

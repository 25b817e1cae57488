"""How fast a stage was, from the rows of its metrics.jsonl (medians, as single rows waver), and whether that was verified.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from tinylmm.reports.records import StageReport

TOKENS = {
    "text_tokens_per_s": "text",
    "image_tokens_per_s": "image",
    "supervised_tokens_per_s": "supervised",
}
GIB = 1024**3
SHARES = {"data_wait": "of the time waited for data", "padding": "padding"}


def speed_words(stage: StageReport) -> list[str]:
    """`412 samples/s`, `51,200 tokens/s (12,000 text, ...)`, `MFU 41 % (NVIDIA H200 SXM, bf16)` and so on; what rows have."""
    found = {name: _median(stage, name) for name in ("samples_per_s", "tokens_per_s", "mfu", "peak_share")}
    said = []
    if (speed := found["samples_per_s"]) is not None:
        said.append(f"{speed:,.0f} samples/s")
    if (tokens := found["tokens_per_s"]) is not None:
        parts = {word: _median(stage, name) for name, word in TOKENS.items()}
        each = ", ".join(f"{value:,.0f} {word}" for word, value in parts.items() if value is not None)
        said.append(f"{tokens:,.0f} tokens/s ({each})")
    device = next((str(row["device"]) for row in reversed(stage.metrics) if "device" in row), "")
    if (mfu := found["mfu"]) is not None:
        said.append(f"MFU {mfu:.1%} of the data sheet ({device})")
    if (share := found["peak_share"]) is not None:
        said.append(f"{share:.1%} of the measured peak" + (f" ({device})" if mfu is None else ""))
    said += [f"{share:.1%} {what}" for name, what in SHARES.items() if (share := _median(stage, name)) is not None]
    _, peaks = stage.curve("peak_memory_gib")
    said += [f"{max(peaks):.2f} GiB peak memory"] if peaks else []
    return said + kept_words(stage) + launched_words(stage.launched)


def kept_words(stage: StageReport) -> list[str]:
    """What of a training's images was in the caches when it was asked for, and what these take on disk."""
    said = []
    (_, reads), (_, rates) = stage.curve("pixel_reads"), stage.curve("pixel_hit_rate")
    if reads:  # not the summary's: a training that was interrupted has counted there what came behind it alone
        share = sum(count * rate for count, rate in zip(reads, rates, strict=True)) / sum(reads)
        said.append(
            f"{share:.1%} of the images read from the pixel cache{_on_disk(stage.kept.get('pixels'), 'pixels')}"
        )
    if (features := stage.kept.get("features")) is not None:
        share = features["hit_rate"]
        said.append(f"{share:.1%} of the images' features were in the store{_on_disk(features, 'features')}")
    return said


def _on_disk(kept: Mapping[str, Any] | None, what: str) -> str:
    return "" if kept is None else f" ({kept['disk_bytes'] / GIB:,.2f} GiB of {what} on disk)"


def launched_words(launched: Mapping[str, Any]) -> list[str]:
    """`rows of 20,480 positions`, `ZeRO-2` and so on: what a launch that leaves it open was run with."""
    rows, sharding, graphs = (launched.get(name) for name in ("row_tokens", "sharding", "graphs_compiled"))
    said = [f"rows of {rows:,} positions"] if rows else []
    said += [f"ZeRO-{sharding}"] if sharding else []
    said += ["activations computed again"] if launched.get("checkpointing") else []
    return said + ([f"{graphs} compiled graphs"] if graphs else [])


def _median(stage: StageReport, name: str) -> float | None:
    """Without the first row, which has the start-up in it, where there are others."""
    _, values = stage.curve(name)
    return median(values[1:] or values) if values else None


def verified_words(stage: StageReport) -> str:
    """Whether the training's fast paths were compared with a plain one, and how that ended."""
    found = stage.certificate
    if found is None:
        return "not verified (tinylmm verify)"
    one = found.certificate
    other = "" if found.same_versions else ", with other versions than it was trained with"
    return f"{one.verdict} ({one.created[:10]}, {one.device}, {one.precision}{other})"

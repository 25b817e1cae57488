"""What a device does while it is watched: the share of each kind of kernel, and how long it has nothing to do."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("attention", ("flash", "fmha", "attention", "attn", "sdpa")),
    ("optimiser", ("adam", "multi_tensor", "foreach", "lpnorm")),
    ("products", ("gemm", "nvjet", "cublas", "xmma", "wgmma", "splitk", "cutlass", "addmm", "aten::mm", "aten::bmm")),
    ("norms", ("layer_norm", "layernorm", "rms", "gammabeta")),
    ("loss", ("softmax", "nll_loss", "cross_entropy")),
    ("copies", ("memcpy", "memset", "copy", "cat")),
    ("elementwise", ("elementwise", "vectorized", "reduce", "dropout", "triton", "index", "scatter", "scan")),
)
"""Kind -> words of a kernel's name; the first that fits."""
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 12


class Trace:
    """Watches a device between `begin` and `end`.

    Attributes:
        found: what was seen: shares of the busy time by kind, the idle share, the kernels that took most.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.categories = ON_GPU if on_gpu else ("cpu_op",)
        self._profile = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
        self.found: dict[str, Any] = {}

    def begin(self) -> None:
        """Begin to watch."""
        self._profile.__enter__()

    def end(self) -> None:
        """Read what was seen."""
        self._profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        self.found = summary([event for event in events if event.get("cat") in self.categories])


def kind_of(name: str) -> str:
    """Kind of a kernel by its name."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), "other")


def summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up a trace's events, which have `name`, `ts` and `dur` (microseconds) and may overlap.

    Raises:
        RuntimeError: there is none: the profiler sees nothing of this device.
    """
    if not events:
        raise RuntimeError("the profiler has seen no kernel: its library for this device (CUPTI) may be missing")
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in events:
        kinds[kind_of(event["name"])] += event["dur"]
        names[event["name"]] += event["dur"]
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    total, wall = sum(kinds.values()), end - spans[0][0]
    return {
        "wall_ms": wall / 1000,
        "idle_share": 1 - busy / wall,
        "kernels": len(events),
        "shares": {kind: round(time / total, 4) for kind, time in kinds.most_common()},
        "top": [{"name": name[:120], "share": round(time / total, 4)} for name, time in names.most_common(TOP)],
    }

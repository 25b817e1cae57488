"""Measure what this machine does, in well under a minute, so that a plan need not take a data sheet's word."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinylmm.data.transform import ImageTransform
from tinylmm.sizing.cards import Calibration, save_calibration
from tinylmm.stages.doctor import memory_bytes

SECONDS = 4.0
"""For each measure."""
SIZES = {"cuda": (8192, 2**28), "cpu": (1536, 2**25)}
"""Device -> edge of the square matrices, and numbers of fp32 that are copied."""
PHOTO, INPUT = (640, 480), 384


def calibrate_and_keep() -> Path:
    """Measure, and keep what was measured in the user's cache, where plans look for it; returns the file."""
    return save_calibration(calibrate())


def calibrate() -> Calibration:
    """Measure this machine's first GPU, or its CPU where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, float(properties.total_memory)
    else:
        name, memory = "cpu", float(memory_bytes())
    exact = _matmul(device, torch.float32)
    usual = exact if device.type == "cpu" else _matmul(device, torch.bfloat16)
    return Calibration(name, memory, usual, exact, _copy(device), _images())


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    edge = SIZES[device.type][0]
    one, other = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2.0 * edge**3 * _rate(lambda: torch.mm(one, other, out=out), device)


def _copy(device: torch.device) -> float:
    """Bytes a second read and written by a large copy."""
    source = torch.zeros(SIZES[device.type][1], device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes * _rate(lambda: target.copy_(source), device)


def _images() -> float:
    """JPEGs a second that one process decodes and resizes for a tower."""
    noise = np.random.default_rng(0).integers(0, 256, (PHOTO[1] // 8, PHOTO[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(PHOTO, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    half = (0.5, 0.5, 0.5)
    transform = ImageTransform(INPUT, half, half, "squash")

    def load() -> Tensor:
        return transform(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))

    return _rate(load, torch.device("cpu"))


def _rate(work: Callable[[], Tensor], device: torch.device) -> float:
    """How often a second `work` is done: of the best of several stretches, since other programs only ever slow it down."""
    work()
    _wait(device)
    best, end, count = 0.0, time.perf_counter() + SECONDS, 1
    while (begin := time.perf_counter()) < end:
        for _ in range(count):
            work()
        _wait(device)
        taken = time.perf_counter() - begin
        best = max(best, count / taken)
        count = max(1, round(count * min(4.0, SECONDS / 10 / taken)))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

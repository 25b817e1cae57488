"""Benchmarks by name. A benchmark's module is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tinylmm.errors import ConfigError, Fault, suggestion
from tinylmm.evaluation.benchmarks.base import Benchmark

BENCHMARKS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "sqa": "SQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmmu": "MMMU",
    "mmvet": "MMVet",
    "llava_bench": "LLaVABench",
    "mmbench": "MMBench",
    "seed": "SEED",
    "vizwiz": "VizWiz",
    "qbench": "QBench",
    "mvbench": "MVBench",
    "videomme": "VideoMME",
}
"""Name -> class, in the module of the same name beside this one."""


def get_benchmark(name: str, **options: Any) -> Benchmark:
    """Return the benchmark called `name`, with options of its class (`split`, TextVQA's `ocr`).

    Raises:
        ConfigError: there is none (the message lists all and suggests the closest), or an option's value is unknown.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            [
                Fault(
                    "benchmark",
                    f"'{name}' is unknown. {suggestion(name.lower(), BENCHMARKS)}".rstrip(),
                    f"Available: {', '.join(BENCHMARKS)}.",
                )
            ]
        )
    module = import_module(f"tinylmm.evaluation.benchmarks.{name}")
    benchmark = getattr(module, BENCHMARKS[name])(**options)
    assert isinstance(benchmark, Benchmark)
    return benchmark

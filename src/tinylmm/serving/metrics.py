"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tinylmm.generation.continuous import ContinuousEngine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server.

    Args:
        waiting: how many answers wait for their turn.
    """

    def __init__(self, engine: ContinuousEngine, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tinylmm_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.gone = Counter("tinylmm_clients_gone", "Requests whose client left before the end", registry=self.registry)
        self.seconds = Histogram(
            "tinylmm_request_seconds", "Time of answered requests", buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "tinylmm_first_token_seconds", "Time to a request's first token", buckets=SECONDS, registry=self.registry
        )
        for name, text, value in (
            ("tinylmm_answers_running", "Answers that are written now", lambda: engine.answering),
            ("tinylmm_answers_waiting", "Answers that wait for their turn", waiting),
            ("tinylmm_prefix_tokens_kept", "Tokens of earlier prompts and answers", lambda: engine.prefixes.tokens),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)
        self.registry.register(_EngineCounts(engine))

    def answered(self, began: float, first: float | None) -> None:
        """Note a request that is over.

        Args:
            began, first: when it came, and when its first token was there, None if there was none (monotonic seconds).
        """
        self.seconds.observe(time.monotonic() - began)
        if first is not None:
            self.first.observe(first - began)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)


class _EngineCounts(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: ContinuousEngine) -> None:
        self.engine = engine

    def collect(self) -> list[Metric]:
        counts = self.engine.counts
        known = {
            "steps": ("Steps of the running batch", counts.ticks),
            "step_rows": ("Answers in it, summed over steps", counts.rows),
            "prompt_tokens": ("Prompt tokens, image tokens counted in", counts.prompt_tokens),
            "prompt_tokens_reused": ("Prompt tokens that were not computed anew", counts.cached_tokens),
            "new_tokens": ("Tokens generated", counts.new_tokens),
            "near_ties": ("Answers settled by decoding alone", counts.near_ties),
            "answers_put_back": ("Answers that waited in their middle for room", counts.put_back),
            "images_encoded": ("Images that went through the tower", self.engine.images.encoded),
        }
        return [CounterMetricFamily(f"tinylmm_{name}", text, value) for name, (text, value) in known.items()]

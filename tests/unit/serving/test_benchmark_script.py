"""The server's measurements run at toy size, and what they compare says the same."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import load
from benchmarks.serving import main


def test_the_benchmark_of_the_server_compares_equal_answers(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    words = [
        "--clients",
        "4",
        "--images",
        "3",
        "--questions",
        "4",
        "--baseline",
        "4",
        "--width",
        "128",
        "--layers",
        "1",
    ]
    assert main([*words, "--size", "28", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["answers_equal"] is True and record["ratio"] > 0
    assert (record["questions"], record["images_encoded"]) == (12, 3)
    assert 0 < record["prompt_tokens_reused"] < record["prompt_tokens"]
    assert out.with_suffix(".png").stat().st_size > 1000


def test_the_load_counts_right_and_wrong_answers_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    words = ["--clients", "6", "--seconds", "2", "--images", "3", "--questions", "2", "--size", "28", "--layers", "1"]
    assert load.main([*words, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["requests"] == record["right"] > 6 and record["distinct_answers"] > 3
    assert record["wrong"] == record["mixed"] == record["lost"] == 0
    assert record["latency_s"]["p50"] <= record["latency_s"]["p99"] and record["answers_per_s"] > 0
    assert out.with_suffix(".png").stat().st_size > 1000
    ending = load._ending
    assert [ending(reply, 0, ["a", "b"]) for reply in (None, (500, ""), (429, ""), (200, "b"), (200, "c"))] == [
        "lost",
        "lost",
        "refused",
        "mixed",
        "wrong",
    ]

"""The benchmark of the server runs at toy size, and what it compares says the same."""

from __future__ import annotations

import json
from pathlib import Path

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

"""The protocol beside a score says all that changes it, and how two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinylmm.evaluation.benchmarks.mmbench import MMBench
from tinylmm.evaluation.benchmarks.records import ImageRef, Item
from tinylmm.evaluation.benchmarks.textvqa import TextVQA
from tinylmm.evaluation.benchmarks.vizwiz import VizWiz
from tinylmm.evaluation.protocol import Protocol, protocol_of

ITEMS = [Item(str(n), n, f"question {n}?", (ImageRef(Path(f"/a/{n}.jpg")),), reference="red") for n in range(30)]
HOW: dict[str, Any] = {"template": "phi", "max_new_tokens": 128, "precision": "fp32", "code": 3, "layout": "llava"}


def made(
    items: list[Item] = ITEMS, variant: str = "llava", options: dict[str, Any] | None = None, **how: Any
) -> Protocol:
    return protocol_of(TextVQA(), variant, items, 30, options or {}, **HOW | how)


def test_it_reads_back_from_json() -> None:
    protocol = made(ITEMS[:10], limit=10, seed=4, judge="gpt-4", judge_runs=5)
    record = json.loads(json.dumps(protocol.as_json()))
    assert Protocol.of_json(record, "textvqa") == protocol
    assert (record["name"], record["limited"]) == ("textvqa-llava", True)


def test_what_an_earlier_version_wrote_is_its_name() -> None:
    assert Protocol.of_json("gqa-llava", "gqa").name == "gqa-llava"
    assert Protocol.of_json(None, "gqa").name == "gqa"


def test_departures_from_the_papers_protocol_are_named() -> None:
    assert made().departs == ()
    departs = made(ITEMS[:10], "lmms", {"ocr": False}, max_new_tokens=8).departs
    assert departs == ("a sample of 10 of 30 questions", "variant lmms", "ocr=false", "max_new_tokens=8")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (made(ITEMS[:10], limit=10), "questions 30 and 10 of 30 (limit 10, seed 0)"),
        (made(variant="lmms"), "protocol textvqa-llava and textvqa-lmms"),
        (made(options={"ocr": False}), "ocr true and false"),
        (made(template="llama"), "template phi and llama"),
        (made(max_new_tokens=8), "new tokens 128 and 8"),
        (made(precision="bf16"), "precision fp32 and bf16"),
        (made(judge="gpt-4"), "judge not known and gpt-4 × 1"),
        (made(code=4), "code 3 and 4"),
        (made(layout="hf"), "layout llava and hf"),
        (made(split="val"), "split not known and val"),
        (made([*ITEMS[:29], Item("29", 29, "another?", ITEMS[29].images, reference="red")]), "other questions"),
    ],
)
def test_two_protocols_differ_in_each_of_their_fields(other: Protocol, words: str) -> None:
    assert made() != other and made().differences(other) == [words]


def test_equal_ones_differ_in_nothing() -> None:
    assert made() == made(options={"ocr": True}) and made().differences(made()) == []


def test_a_split_that_is_taken_because_it_is_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "vizwiz").mkdir()
    (tmp_path / "vizwiz/val.json").write_text("[]")
    assert VizWiz().chosen_split(tmp_path) == "val"
    (tmp_path / "vizwiz/llava_test.jsonl").write_text("")
    assert VizWiz().chosen_split(tmp_path) == "test" and VizWiz("val").chosen_split(tmp_path) == "val"
    (tmp_path / "mmbench").mkdir()
    (tmp_path / "mmbench/mmbench_dev_cn_20231003.tsv").write_text("")
    assert MMBench().chosen_split(tmp_path) == "dev_cn"
    assert TextVQA().chosen_split(tmp_path) is None  # it has but one

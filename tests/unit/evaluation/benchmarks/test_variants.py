"""Every variant of every benchmark by answers whose score was taken from its published script, and docs that name them all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.judge_server import completion, judge_server
from tinylmm.evaluation.benchmarks.choice import lettered
from tinylmm.evaluation.benchmarks.free_text import FreeTextReference
from tinylmm.evaluation.benchmarks.gqa import GQAReference
from tinylmm.evaluation.benchmarks.records import Answer, Item
from tinylmm.evaluation.benchmarks.registry import benchmark_names, get_benchmark
from tinylmm.evaluation.judge import Judge

OPTIONS = lettered(["red", "banana"])
CHOICE = {"options": OPTIONS, "answer": "B"}
TEN_YES = FreeTextReference(("yes",) * 10)
MIXED = FreeTextReference(("women's",) * 8 + ("a Dog", "two"))

ITEMS: dict[str, dict[str, Any]] = {
    "vqav2": {"reference": TEN_YES},
    "gqa": {"reference": GQAReference("t-shirt", True, "query", "attr", 2, 5, None)},
    "textvqa": {"reference": MIXED},
    "pope": {"reference": "no", "category": "random"},
    "mme": {"reference": "yes", "category": "existence"},
    "vizwiz": {"reference": MIXED},
    "sqa": {"reference": CHOICE | {"has_image": True, "in_split": True}, "options": 2},
    "mmmu": {"reference": {"options": OPTIONS, "gold": ("B",)}, "options": 2, "category": "Accounting"},
    "mmbench": {"reference": CHOICE | {"index": 5, "base": 5, "l2": "", "question": "Which?"}, "options": 2},
    "seed": {"reference": {"answer": "B", "data_type": "image", "id": 1}, "options": 4},
    "qbench": {"reference": CHOICE | {"type": "What", "concern": "Other"}, "options": 2},
    "mvbench": {"reference": CHOICE, "category": "action_count", "options": 2},
    "videomme": {"reference": CHOICE | {"domain": "x", "task": "y"}, "category": "short", "options": 2},
    "longvideobench": {"reference": CHOICE | {"duration": "15"}, "category": "S2E", "options": 2},
    "mlvu": {"reference": CHOICE, "category": "ego", "options": 2},
    "mmvu": {"reference": {"options": {}, "answer": "Oil", "kind": "open-ended"}, "category": "Art"},
    "mmvet": {"reference": {"question": "Why?", "answer": "rain", "capabilities": ["rec"]}},
    "llava_bench": {"reference": {"caption": "c", "question": "q", "gpt4": "g"}, "category": "conv"},
    "digits": {"reference": "7"},
}

# answer -> score of the item above; of a judged benchmark, the judge's reply -> score
CASES: dict[tuple[str, str], dict[str, float | None]] = {
    ("vqav2", "official"): {"yes": 1.0, "Yes": 0.0, "yes.": 0.0},  # ten equal references: nothing is normalised
    ("vqav2", "llava"): {"yes": 1.0, "Yes.": 1.0, "yes sir": 0.0},
    ("vqav2", "lmms"): {"Yes": 1.0, "yes,": 1.0, "a yes": 1.0},
    ("gqa", "llava"): {"T-Shirt.": 1.0, "tshirt": 0.0, " t-shirt": 0.0},
    ("gqa", "official"): {"t-shirt": 1.0, "T-shirt": 0.0},
    ("gqa", "lmms"): {"TShirt": 1.0, "t shirt": 0.0},
    ("textvqa", "llava"): {"women's": 1.0, "2": 0.3, "the dog!": 0.3},
    ("textvqa", "official"): {"women's": 1.0, "2": 0.3},
    ("textvqa", "lmms"): {"women's": 1.0, "2": 0.3},
    ("pope", "llava"): {"No, it is": 1.0, "NO": 0.0, "not. yes": 1.0},
    ("pope", "official"): {"no": 1.0, "There is no dog": 1.0, "Nope": 0.0},
    ("pope", "lmms"): {"NO ": 1.0, "No.": 0.0, "There is no dog": 0.0},
    ("mme", "llava"): {"eyes": 1.0, "  yes": 0.0, "y": 0.0},
    ("mme", "official"): {"Yes, so": 1.0, "It is, yes": 0.0},
    ("mme", "lmms"): {"y": 1.0, "  yes": 1.0, "..yes": 1.0},
    ("vizwiz", "llava"): {
        "women's": 0.0,
        "2": 0.3,
    },  # put through m4c, which tears "women 's" off, before the official rule
    ("vizwiz", "official"): {"Women's": 1.0, "dog": 0.3},
    ("vizwiz", "lmms"): {"women's": 1.0, "two": 0.3},
    ("sqa", "llava"): {"B": 1.0, "B. x": 1.0, "b": 0.0, "(B)": 0.0, "The answer is B.": 1.0},
    ("sqa", "lmms"): {"b": 1.0, "B.x": 1.0, "The answer is B.": 0.0},
    ("sqa", "vlmeval"): {"(B)": 1.0, "The answer is B because of all that I see here": 1.0, "banana": 1.0, "b": 0.0},
    ("mmmu", "tinyllava"): {"(B)": 1.0, "B.": 1.0, "A": 0.0},
    ("mmmu", "official"): {"(A) or B": 0.0, "so it is B": 1.0},
    ("mmmu", "lmms"): {"B. banana": 1.0, "a DNA": 0.0},
    ("mmmu", "lmms_before_1471"): {"B. banana": 1.0, "(A)": 0.0},
    ("mmbench", "official"): {"B": 1.0, "answer is **b**, as can be seen by all": 1.0, "a banana": 1.0, "Z": 0.0},
    ("mmbench", "lmms"): {"A banana is here": 0.0, "B.": 1.0, "my choice is B- look": 1.0},
    ("mmbench", "vanilla"): {"(B)": 1.0, "red": 0.0},
    ("seed", "llava"): {"B": 1.0, "B.": 0.0, "b": 0.0},
    ("seed", "lmms"): {" b": 1.0, "B. banana": 1.0, "(B)": 0.0},
    ("qbench", "mmmu"): {"(B)": 1.0, "so B then": 1.0, "A": 0.0},
    ("qbench", "lmms"): {"B. banana": 1.0, "it is an A. B": 1.0, "AA. x": 0.0},
    ("mvbench", "tinyllava_video"): {"Best option: (A)": 1.0, "(A)": 0.0},
    ("mvbench", "official"): {"B) banana": 1.0, "": 1.0, "it is B": 0.0},
    ("mvbench", "lmms"): {"I say b": 1.0, "": None, "This is a banana": 0.0},
    ("videomme", "tinyllava_video"): {"B": 1.0, "Answer: B": 0.0},
    ("videomme", "official"): {"Answer: B": 1.0, "ABC": 0.0, "none": None},
    ("videomme", "lmms"): {"A film, so B": 0.0, "Answer: B": 1.0, "none": 0.0},
    ("videomme", "lmms_regex"): {"Answer: B": 0.0, "The answer is B": 1.0, "none": 0.0},
    ("longvideobench", "tinyllava_video"): {"B.": 1.0, "Answer: B": 0.0},
    ("longvideobench", "lmms"): {"The best option is B": 1.0, "Based on it, A": 1.0, "ANSWER: B": 0.0},
    ("mlvu", "tinyllava_video"): {"(B)": 1.0, "Answer: B": 0.0},
    ("mmvu", "tinyllava_video"): {"it is oil": 1.0, "": 1.0, "ink": 0.0},
    ("mmvu", "strict"): {"it is oil": 1.0, "": 0.0},
    ("mmvet", "official"): {"0.5 as": 0.5, "1.0": 1.0, "2": 0.0},
    ("mmvet", "lmms"): {"0.5 as": 0.5, " 0.7": 0.7},
    ("llava_bench", "llava"): {"8 6": 6.0, "9, 7": -1.0, "\n8 6": -1.0},
    ("llava_bench", "lmms"): {"9, 7": 7.0, "\n8 6": 6.0, "9;-7": -7.0},
    ("digits", "exact-match-v1"): {"7": 1.0, "17": 0.0},
}


@pytest.mark.parametrize(("name", "variant"), list(CASES))
def test_a_variant_scores_as_its_script_does(name: str, variant: str) -> None:
    benchmark, item = get_benchmark(name), Item("1", 1, "?", **ITEMS[name])
    for text, score in CASES[name, variant].items():
        if benchmark.judged:
            with judge_server(lambda body, text=text: completion(text)) as server:
                scores = benchmark.score([item], {"1": Answer("x")}, variant, Judge(server.url, "m"))
        else:
            scores = benchmark.score([item], {"1": Answer(text)}, variant)
        assert scores.variant == variant
        assert scores.per_item[0].score == pytest.approx(score), (name, variant, text)


def test_every_variant_has_cases() -> None:
    known = {(name, variant) for name in benchmark_names() for variant in get_benchmark(name).variants}
    assert known == set(CASES)


def test_docs_name_every_variant_of_every_published_benchmark() -> None:
    page = (Path(__file__).parents[4] / "docs/scoring.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    documented = {name: re.findall(r"`(\w+)`", cell) for name, cell in rows}
    published = {name: list(get_benchmark(name).variants) for name in benchmark_names() if name != "digits"}
    assert documented == published

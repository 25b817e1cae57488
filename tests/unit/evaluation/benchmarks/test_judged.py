"""MM-Vet and LLaVA-Bench in the Wild, judged by a real local server and, without one, kept for later."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.disk import (
    by_id,
    cell,
    given,
    png,
    scored,
    write_image,
    write_json,
    write_jsonl,
    write_parquet,
)
from tests.unit.evaluation.judge_server import completion, judge_server
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.llava_bench import LLaVABench, parse_llava, parse_lmms
from tinylmm.evaluation.benchmarks.mmvet import MMVet, parse_grade
from tinylmm.evaluation.images import open_image_ref
from tinylmm.evaluation.judge import Judge


def says(text_of: Callable[[str], str]) -> Any:
    """A judge whose reply depends on the user message."""
    return lambda body: completion(text_of(body["messages"][-1]["content"]))


@pytest.fixture
def vet_root(tmp_path: Path) -> Path:
    folder = tmp_path / "mm-vet"
    metadata = {
        "v1_0": {
            "imagename": "v1_0.png",
            "question": "What is x?",
            "answer": "-1<AND>-5",
            "capability": ["ocr", "math"],
        },
        "v1_1": {"imagename": "v1_1.png", "question": "Who?", "answer": "Ann<OR>Anna", "capability": ["rec"]},
        "v1_2": {"imagename": "v1_2.png", "question": "Why?", "answer": "rain", "capability": ["rec", "know"]},
    }
    write_json(folder / "mm-vet.json", {key: {**value, "imagesource": "web"} for key, value in metadata.items()})
    asked = [
        {"question_id": n, "image": f"v1_{n}.png", "text": metadata[f"v1_{n}"]["question"], "category": "default"}
        for n in range(3)
    ]
    write_jsonl(folder / "llava-mm-vet.jsonl", asked)
    write_image(folder / "images/v1_0.png")
    return tmp_path


def test_mmvet_asks_the_question_alone(vet_root: Path) -> None:
    items = MMVet().load(vet_root)
    assert [(item.question_id, item.prompt) for item in items] == [(0, "What is x?"), (1, "Who?"), (2, "Why?")]
    assert open_image_ref(items[0].images[0]).size == (4, 3)
    assert MMVet().load(vet_root / "mm-vet") == items
    (vet_root / "mm-vet/llava-mm-vet.jsonl").unlink()
    assert MMVet().load(vet_root) == items
    (vet_root / "mm-vet").rename(vet_root / "mmvet")  # as LLaVA's page calls the folder
    assert [item.item_id for item in MMVet().load(vet_root)] == ["0", "1", "2"]


def test_mmvet_total_capabilities_and_sets(vet_root: Path) -> None:
    items = MMVet().load(vet_root)
    grades = {"What is x?": "0.5", "Who?": "1.0", "Why?": "0.2"}
    with judge_server(
        says(lambda text: next(g for q, g in grades.items() if text.splitlines()[-1].startswith(q)))
    ) as s:
        scores = scored(MMVet(), items, {0: "x = -1", "v1_1": "Ann", 2: "sun"}, judge=Judge(s.url, "gpt-4-0613"))
    assert scores.aggregate == {
        "total": 56.7,
        "rec": 60.0,
        "ocr": 50.0,
        "know": 20.0,
        "math": 50.0,
        "set/ocr_math": 50.0,
        "set/rec": 100.0,
        "set/rec_know": 20.0,
    }
    assert by_id(scores) == {"0": (0.5, [0.5]), "1": (1.0, [1.0]), "2": (0.2, [0.2])}
    body = next(body for body in s.bodies if "x = -1 | " in body["messages"][0]["content"][-9:])
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("gpt-4-0613", 3, 0.0)
    content = body["messages"][0]["content"]
    assert content.startswith("Compare the ground truth and prediction from AI models")
    assert "\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n" in content
    assert content.count("Can you explain this meme?") == 2
    assert content.endswith(" | 1.0\n\nWhat is x? | -1 <AND> -5 | x = -1 | ")


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.7", 0.7),
        ("1", 1.0),
        ("0.5 because", 0.5),
        ("0.5\n", 0.5),
        ("1.5", None),
        ("-0.1", None),
        ("nan", None),
        ("Score: 0.5", None),
        (" 0.5", None),  # the first word of a reply that begins with a space is empty
        ("", None),
    ],
)
def test_mmvet_grade_is_the_first_word(reply: str, grade: float | None) -> None:
    assert parse_grade(reply) == grade


def test_mmvet_asks_again_five_times_and_does_not_read_the_last_reply(vet_root: Path) -> None:
    items = MMVet().load(vet_root)[:1]
    replies = iter(["good", "fine", "ok", "well", "so", "0.9"])
    with judge_server(lambda body: completion(next(replies))) as server:
        scores = scored(MMVet(), items, {0: "x = -1"}, judge=Judge(server.url, "m"))
    assert by_id(scores)["0"] == (0.0, None)
    assert scores.counts["ungraded"] == 1
    assert [body["temperature"] for body in server.bodies] == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    contents = [body["messages"][0]["content"] for body in server.bodies]
    assert contents[1] == contents[0] + "\nPredict the correctness of the answer (digit): "
    replies = iter(["good", "0.4"])
    with judge_server(lambda body: completion(next(replies))) as server:
        scores = scored(MMVet(), items, {0: "x = -1"}, judge=Judge(server.url, "m"))
    assert by_id(scores)["0"] == (0.4, [0.4])


def test_mmvet_averages_the_runs_of_the_judge(vet_root: Path, tmp_path: Path) -> None:
    items = MMVet().load(vet_root)[:1]
    replies = iter(["0.2", "0.4"])
    with judge_server(lambda body: completion(next(replies))) as server:
        judge = Judge(server.url, "m", runs=2, cache=tmp_path / "cache")
        scores = scored(MMVet(), items, {0: "x = -1"}, judge=judge)
        assert scores.aggregate["total"] == 30.0 and scores.aggregate["std"] == 10.0
        assert by_id(scores)["0"] == (pytest.approx(0.3), [0.2, 0.4])
        assert scores.counts["judge_requests"] == 2
        again = scored(MMVet(), items, {0: "x = -1"}, judge=judge)
        assert again.aggregate == scores.aggregate
        assert (again.counts["judge_requests"], again.counts["judge_cached"]) == (0, 2)  # counted per scoring
        assert len(server.requests) == 2


def test_mmvet_lmms_has_its_own_header_and_room(vet_root: Path) -> None:
    items = MMVet().load(vet_root)[:1]
    replies = iter(["hmm", "0.6 of 1"])
    with judge_server(lambda body: completion(next(replies))) as server:
        scores = scored(MMVet(), items, {0: "x"}, "lmms", Judge(server.url, "gpt-4o-2024-11-20"))
    assert scores.aggregate["total"] == 60.0
    assert [(body["max_tokens"], body["temperature"]) for body in server.bodies] == [(128, 0.0), (128, 0.5)]
    content = server.bodies[0]["messages"][0]["content"]
    assert "score.\ngpt_query_prompt | Ground truth" in content and content.endswith("What is x? | -1 <AND> -5 | x |")


def test_mmvet_missing_answers_are_zero_without_asking(vet_root: Path) -> None:
    items = MMVet().load(vet_root)
    with judge_server(lambda body: completion("1.0")) as server:
        scores = scored(MMVet(), items, {0: ""}, judge=Judge(server.url, "m"))
    assert scores.aggregate["total"] == 33.3
    assert len(server.requests) == 1 and scores.counts["missing"] == 2


def test_without_a_judge_nothing_is_scored_and_the_upload_is_written(vet_root: Path, tmp_path: Path) -> None:
    items = MMVet().load(vet_root)
    scores = scored(MMVet(), items, {0: "a", 1: "b"})
    assert scores.aggregate == {}
    assert by_id(scores)["0"] == (None, None)
    assert (scores.counts["unjudged"], scores.counts["missing"], scores.counts["scored"]) == (2, 1, 0)
    MMVet().write_submission(items, given({0: "a", 1: "b"}), tmp_path / "up.json")
    assert json.loads((tmp_path / "up.json").read_text()) == {"v1_0": "a", "v1_1": "b", "v1_2": ""}


def test_mmvet_parquet_has_capabilities_in_one_text(tmp_path: Path) -> None:
    row = {"question_id": "v1_0", "question": "Who?", "answer": "Ann", "capability": "ocr,spat", "image": cell(png())}
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", [row])
    (item,) = MMVet().load(tmp_path, "hf")
    assert item.reference["capabilities"] == ["ocr", "spat"]
    with judge_server(lambda body: completion("1.0")) as server:
        scores = scored(MMVet(), [item], {0: "Ann"}, judge=Judge(server.url, "m"))
    assert scores.aggregate == {"total": 100.0, "ocr": 100.0, "spat": 100.0, "set/ocr_spat": 100.0}


def test_mmvet_question_without_metadata_is_named(vet_root: Path) -> None:
    write_json(vet_root / "mm-vet/mm-vet.json", {})
    with pytest.raises(DataError, match=r"mm-vet.json, v1_0: field question, answer, capability missing"):
        MMVet().load(vet_root)


@pytest.fixture
def wild_root(tmp_path: Path) -> Path:
    """Three questions about two images; GPT-4's answers and the captions stand in another order."""
    folder = tmp_path / "llava-bench-in-the-wild"
    questions = [
        {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "Name?"},
        {"question_id": 1, "image": "001.jpg", "category": "detail", "text": "Describe."},
        {"question_id": 2, "image": "002.jpg", "category": "conv", "text": "Where?"},
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    context = [
        {"id": "b", "image": "002.jpg", "caption": ["A street.", "In Rome."]},
        {"id": "a", "image": "001.jpg", "caption": "A cat called Tom."},
    ]
    write_jsonl(folder / "context.jsonl", context)
    gpt4 = [{"question_id": n, "text": f"GPT-4 on {n}"} for n in (2, 0, 1)]
    write_jsonl(folder / "answers_gpt4.jsonl", gpt4)
    write_image(folder / "images/001.jpg")
    return tmp_path


def review(text: str) -> str:
    """8 for GPT-4; the model gets 6 for Tom, 4 for a description, and 8 else."""
    asked = text.split("[Question]\n")[1].split("\n")[0]
    return {"Name?": "8 6", "Describe.": "8 4", "Where?": "8 8"}[asked] + "\nBoth did well."


def test_llava_bench_joins_captions_and_references_by_content(wild_root: Path) -> None:
    items = LLaVABench().load(wild_root)
    assert [item.prompt for item in items] == ["Name?", "Describe.", "Where?"]
    with judge_server(says(review)) as server:
        scores = scored(LLaVABench(), items, {2: "Rome", 0: "Tom"}, judge=Judge(server.url, "gpt-4-0314"))
    body = next(body for body in server.bodies if "Where?" in body["messages"][1]["content"])
    assert (body["max_tokens"], body["temperature"]) == (1024, 0.2)
    system, user = body["messages"]
    assert system["content"] == "You are a helpful and precise assistant for checking the quality of the answer."
    assert user["content"].startswith(
        "[Context]\nA street.\nIn Rome.\n\n[Question]\nWhere?\n\n[Assistant 1]\nGPT-4 on 2\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nRome\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
    )
    assert user["content"].endswith("does not affect your judgment.\n\n")
    assert scores.aggregate == {
        "all": 75.0,
        "conv": 87.5,
        "detail": 50.0,
        "reference/all": 8.0,
        "model/all": 6.0,
        "reference/conv": 8.0,
        "model/conv": 7.0,
        "reference/detail": 8.0,
        "model/detail": 4.0,
    }
    assert by_id(scores)["0"] == (6.0, [8.0, 6.0])
    assert scores.counts["missing"] == 1  # judged as an empty answer all the same
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("8 6\nwhy", (8.0, 6.0), (8.0, 6.0)),
        ("8.5 6", (8.5, 6.0), (8.5, 6.0)),
        ("8,6", (8.0, 6.0), (8.0, 6.0)),
        ("9, 7", (-1.0, -1.0), (9.0, 7.0)),  # a comma and a space become two spaces
        ("8  6", (-1.0, -1.0), (8.0, 6.0)),
        ("8 6 ", (-1.0, -1.0), (8.0, 6.0)),
        ("Assistant 1: 8", (-1.0, -1.0), (1.0, 8.0)),
        ("\n8 6", (-1.0, -1.0), (8.0, 6.0)),  # only the first line is read: of the stripped review, in lmms-eval
        ("9\n7", (-1.0, -1.0), (-1.0, -1.0)),
        ("9;7", (-1.0, -1.0), (9.0, 7.0)),
        ("-1 -1", (-1.0, -1.0), (-1.0, -1.0)),
        ("9-7", (-1.0, -1.0), (9.0, -7.0)),  # a minus sign belongs to its number
        ("8 nan", (-1.0, -1.0), (-1.0, -1.0)),
        ("", (-1.0, -1.0), (-1.0, -1.0)),
    ],
)
def test_reading_a_review(text: str, strict: tuple[float, float], lenient: tuple[float, float]) -> None:
    assert parse_llava(text) == strict
    assert parse_lmms(text) == lenient


def test_an_unread_review_stays_in_the_mean_and_is_counted(wild_root: Path) -> None:
    items = LLaVABench().load(wild_root)
    texts = {0: "Tom", 1: "A cat", 2: "Rome"}
    with judge_server(
        says(lambda text: "9, 7" if "Rome" in text.split("[Assistant 2]")[1] else review(text))
    ) as server:
        scores = scored(LLaVABench(), items, texts, judge=Judge(server.url, "m"))
        lenient = scored(LLaVABench(), items, texts, "lmms", Judge(server.url, "m"))
    # means (8 + 8 - 1) / 3 = 5 and (6 + 4 - 1) / 3 = 3
    assert scores.aggregate["all"] == 60.0
    assert by_id(scores)["2"] == (-1.0, None)
    assert (scores.counts["unread_reviews"], scores.counts["unparsed"]) == (1, 1)
    # means 25 / 3 = 8.333 and 17 / 3 = 5.667, rounded before the division
    assert lenient.aggregate["all"] == round(5.667 / 8.333 * 100, 1)
    assert lenient.counts["unread_reviews"] == 0


def test_llava_bench_without_a_judge_says_what_is_left(wild_root: Path) -> None:
    scores = scored(LLaVABench(), LLaVABench().load(wild_root), {0: "Tom", 1: ""})
    assert scores.aggregate == {} and [row.score for row in scores.per_item] == [None, None, None]
    assert scores.counts == {"scored": 0, "missing": 1, "unparsed": 0, "unjudged": 2}


def test_llava_bench_parquet(tmp_path: Path) -> None:
    row = {"question_id": 0, "question": "Name?", "category": "conv", "caption": "A cat.", "gpt_answer": "Tom"}
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [row | {"image": cell(png())}])
    (item,) = LLaVABench().load(tmp_path, "hf")
    assert item.reference == {"caption": "A cat.", "question": "Name?", "gpt4": "Tom"}
    assert open_image_ref(item.images[0]).size == (4, 3)


def test_a_question_without_caption_or_reference_is_named(wild_root: Path) -> None:
    folder = wild_root / "llava-bench-in-the-wild"
    write_jsonl(folder / "answers_gpt4.jsonl", [{"question_id": 0, "text": "x"}])
    with pytest.raises(DataError, match=r"question 2: .*answers_gpt4.jsonl has no answer to question 1"):
        LLaVABench().load(wild_root)
    (folder / "context.jsonl").unlink()
    with pytest.raises(DataError, match=r"context.jsonl not found.*liuhaotian/llava-bench-in-the-wild"):
        LLaVABench().load(wild_root)

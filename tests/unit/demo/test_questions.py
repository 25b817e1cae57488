"""Held-out questions are those of the model's own evaluations, with the truth and what each model said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.reports.conftest import StoreBuilder
from tinylmm.demo.questions import question_sets
from tinylmm.store.layout import model_folder


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    built = StoreBuilder(tmp_path / "store")
    built.whole()
    return built


def trained(store: StoreBuilder, name: str) -> Path:
    return model_folder(store.root / "stages" / store.key("train", name))


def test_two_stages_bring_the_questions_that_both_were_asked(store: StoreBuilder) -> None:
    [found] = question_sets([trained(store, "finetune"), trained(store, "pretrain")], 12)
    assert (found.name, found.count, len(found.questions)) == ("digits", 40, 12)
    assert {question.category for question in found.questions} == {"digit", "colour", "count", "multiple_choice"}
    rows = {}
    for stage in ("finetune", "pretrain"):
        file = store.root / "stages" / store.key("eval", f"digits@{stage}") / "output/generations.jsonl"
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["image"], []).append(row)
    for question in found.questions:
        [image] = question.images
        first, second = rows[image.path.name]
        assert (question.text, question.truth) == (first["question"], first["truth"])
        assert question.said == (first["text"], second["text"])
        assert image.path.is_file()
    assert any(question.said[0] != question.said[1] for question in found.questions)


def test_a_model_that_was_not_evaluated_brings_none(store: StoreBuilder, tmp_path: Path) -> None:
    store.stage("train", "other")
    assert question_sets([trained(store, "other"), trained(store, "finetune")], 12) == []
    assert question_sets([tmp_path / "elsewhere/output/model"], 12) == []


def test_a_second_model_from_elsewhere_said_nothing_there(store: StoreBuilder, tmp_path: Path) -> None:
    [found] = question_sets([trained(store, "finetune"), tmp_path / "a/b/c"], 4)
    assert all(question.said[0] is not None and question.said[1] is None for question in found.questions)


def test_questions_whose_image_is_gone_or_lies_outside_are_left_out(store: StoreBuilder) -> None:
    images = store.root / "stages" / store.key("data", "digits") / "output/images/test"
    (images / "0.png").unlink()
    (images / "1.png").unlink()
    (images / "1.png").symlink_to("/etc/hostname")
    [found] = question_sets([trained(store, "finetune")], 100)
    shown = {question.images[0].path.name for question in found.questions}
    assert shown == {f"{number}.png" for number in range(2, 40)}

"""card.py: what a model card says of a run, and the run's own questions with their pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.reports.card import base_models, card_sections, datasets, hub_results, own_questions
from tinylmm.reports.collect import collect_report
from tinylmm.reports.records import RunReport
from tinylmm.reports.wording import recipe_rows

from .conftest import SPEC, StoreBuilder


@pytest.fixture
def run(store: StoreBuilder) -> RunReport:
    store.whole()
    return collect_report(store.root, ["nano-base"]).runs[0]


def test_results_are_those_of_the_stage_with_interval_blind_and_chance(run: RunReport) -> None:
    sections = dict(card_sections(run, "finetune"))
    assert list(sections) == ["Results", "Recipe", "Data"]
    assert "| metric | after finetune | 95 % | blind | chance | n |" in sections["Results"]
    assert "| accuracy | 80.0 |" in sections["Results"] and "pretrain |" not in sections["Results"]
    assert "google/siglip-base" in sections["Recipe"] and "| finetune | finetune |" in sections["Recipe"]
    assert "This is the model after pretrain." in dict(card_sections(run, "pretrain"))["Recipe"]
    (row,) = hub_results(run, "finetune")
    assert (row["metric_type"], row["metric_value"], row["dataset_type"]) == ("accuracy", 80.0, "digits")


def test_the_hubs_names_of_parts_and_data_are_told_and_no_folder_of_the_users(tmp_path: Path) -> None:
    assert base_models(SPEC) == ["google/siglip-base"]
    own = {"name": "phi2", "init": "pretrained", "pretrained": str(tmp_path)}
    assert base_models(SPEC | {"llm": own}) == ["google/siglip-base"]
    fetched = {"how_to_get": "Annotations: huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K, file a.json."}
    assert datasets({"data": {"sources": {"finetune": fetched, "again": fetched, "mine": {}}}}) == [
        "liuhaotian/LLaVA-Instruct-150K"
    ]


def test_the_runs_own_questions_are_balanced_and_come_with_their_pictures(
    run: RunReport, store: StoreBuilder, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    source, found = own_questions(store.root, run, "finetune", tmp_path / "pictures", 8)
    assert source == "questions of the run's own evaluation: digits" and len(found) == 8
    assert len({text for text, _ in found}) == 4, "of every category"
    assert all(len(images) == 1 and images[0].is_file() for _, images in found)
    for path in (store.root / "stages").rglob("images/test/*.png"):
        path.unlink()
    assert own_questions(store.root, run, "finetune", tmp_path / "pictures", 8)[1] == []


def test_what_an_adapter_trained_is_said(store: StoreBuilder) -> None:
    spec = json.loads(json.dumps(SPEC))
    stages = spec["recipe"]["stages"]
    stages["pretrain"]["tune"] = {"llm": {"qlora": {"r": 8}, "from_layer": None}, "connector": "full"}
    stages["finetune"]["tune"] = {"llm": {"lora": {"r": 128}}, "vision_tower": {"from_layer": 0.5}}
    assert [row.trains for row in recipe_rows(spec)] == [
        "LLM (qlora, rank 8), connector",
        "LLM (lora, rank 128), vision tower from layer 0.5",
    ]

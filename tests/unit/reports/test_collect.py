"""collect.py: what is read from a store, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinylmm.errors import IntegrityError, UserError
from tinylmm.evaluation.images import open_image_ref
from tinylmm.reports.collect import collect_report
from tinylmm.reports.stored import Generation, StoredSpec, choose_generations, read_generations, read_stored_spec
from tinylmm.reports.wording import verdict
from tinylmm.store.provenance import this_process
from tinylmm.store.runs import read_runs

from .conftest import StoreBuilder, digest_of, write


def test_collecting_imports_no_torch() -> None:
    code = "import sys, tinylmm.reports.collect, tinylmm.reports.tables; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_newest_finished_run_is_the_default(store: StoreBuilder) -> None:
    store.whole("old")
    store.run("new", finished="2026-01-03T00:00:00+00:00")
    store.run("newest-but-running", status="running", finished=None)
    assert [run.name for run in collect_report(store.root).runs] == ["new"]


def test_a_broken_run_does_not_hide_the_others(store: StoreBuilder, caplog: pytest.LogCaptureFixture) -> None:
    store.whole("good")
    (store.run("broken") / "run.json").write_text("{")
    assert collect_report(store.root).name == "good"
    assert "broken is left out" in caplog.text
    with pytest.raises(IntegrityError, match=r"broken/run\.json cannot be read \(JSONDecodeError"):
        collect_report(store.root, ["broken"])


def test_unknown_run_is_refused_with_a_suggestion(store: StoreBuilder) -> None:
    store.whole("nano-base")
    with pytest.raises(UserError, match=r"no run named 'nano-bsae'(.|\n)*Did you mean 'nano-base'\?"):
        collect_report(store.root, ["nano-bsae"])


@pytest.mark.parametrize("name", ["../runs/nano-base", ".", ""], ids=["parent", "here", "empty"])
def test_a_path_is_no_run_name(store: StoreBuilder, name: str) -> None:
    store.whole("nano-base")
    with pytest.raises(UserError, match="no run named"):
        collect_report(store.root, [name])


def test_store_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no runs in the store .*Start one with `tinylmm-train`"):
        collect_report(tmp_path)


def test_store_without_a_finished_run_lists_those_there_are(store: StoreBuilder) -> None:
    store.run("slow", status="running", finished=None)
    with pytest.raises(UserError, match=r"no run has finished yet: slow \(running\)"):
        collect_report(store.root)


def test_run_of_another_format_is_refused(store: StoreBuilder) -> None:
    write(store.run("future") / "run.json", {"format": 2})
    with pytest.raises(IntegrityError, match="format is 2, this version reads 1"):
        collect_report(store.root, ["future"])


def test_scores_belong_to_the_training_stage_whose_model_was_evaluated(store: StoreBuilder) -> None:
    store.whole()
    run = collect_report(store.root).runs[0]
    rows = {row.metric: {stage: score.value for stage, score in row.by_stage.items()} for row in run.score_rows()}
    assert rows["accuracy"] == {"pretrain": 30.0, "finetune": 80.0}
    assert list(rows)[:2] == ["accuracy", "accuracy/digit"]
    assert run.headline is not None and run.headline[0] == "finetune"


def test_evaluation_of_a_model_of_no_stage_is_refused(store: StoreBuilder) -> None:
    store.whole()
    folder = store.root / "stages" / store.key("eval", "digits@finetune")
    write(folder / "spec.json", {"spec": {}, "parents": {"model": "f" * 64}, "settings": {}})
    with pytest.raises(IntegrityError, match="evaluates model ffffffffffffffff, which no training stage"):
        collect_report(store.root)


def test_a_score_that_is_no_number_is_refused(store: StoreBuilder) -> None:
    store.whole()
    folder = store.root / "stages" / store.key("eval", "digits@finetune")
    store.scores(folder, [{"metric": "accuracy", "value": float("nan"), "blind": None, "chance": None, "count": 3}])
    with pytest.raises(IntegrityError, match=r"scores\.json: accuracy is nan"):
        collect_report(store.root)


def test_failed_stage_brings_its_traceback(store: StoreBuilder) -> None:
    store.stage("train", "pretrain")
    key = store.key("train", "finetune")
    store.stages["finetune"] = {"kind": "train", "name": "finetune", "digest": digest_of("finetune"), "key": key}
    (store.root / "work" / key).mkdir(parents=True)
    (store.root / "work" / key / "error.txt").write_text("Traceback\nNonFiniteError: loss is nan at step 31\n")
    store.run("broken", status="failed", finetune="failed")
    run = collect_report(store.root, ["broken"]).runs[0]
    assert run.stages[1].error == "Traceback\nNonFiniteError: loss is nan at step 31"
    assert run.models == {"pretrain": store.root / "stages" / store.key("train", "pretrain") / "output" / "model"}


def test_running_stage_is_read_up_to_its_last_whole_line(store: StoreBuilder) -> None:
    folder = store.root / "work" / store.key("train", "pretrain")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    store.stages["pretrain"] = {
        "kind": "train",
        "name": "pretrain",
        "digest": digest_of("pretrain"),
        "key": folder.name,
    }
    store.run("slow", status="running", finished=None, pretrain="running")
    run = collect_report(store.root, ["slow"]).runs[0]
    assert run.stages[0].curve() == ([1], [2.0])
    assert run.notes == ("No evaluation has finished, so there are no scores.",)


def test_curve_keeps_the_later_of_a_repeated_step_and_drops_what_is_not_finite(store: StoreBuilder) -> None:
    folder = store.stage("train", "pretrain")
    rows = [
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": float("nan")},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.run("resumed")
    assert collect_report(store.root).runs[0].stages[0].curve() == ([1, 2], [3.0, 1.0])


def test_deleted_stage_becomes_a_note(store: StoreBuilder) -> None:
    store.whole()
    key = store.key("prepare", "prepare[pretrain]")
    (store.root / "stages" / key).rename(store.root / "gone")
    assert f"({key}) has been deleted" in collect_report(store.root).runs[0].notes[0]


def test_examples_tell_what_earlier_models_and_the_blind_one_said(store: StoreBuilder) -> None:
    store.whole()
    examples = collect_report(store.root).runs[0].examples["digits"]
    assert len(examples) == 24
    assert all([answer.stage for answer in example.earlier] == ["pretrain", "blind"] for example in examples)
    assert all(example.image is not None and example.image.path.is_file() for example in examples)


def test_image_may_not_lead_out_of_its_folder(store: StoreBuilder) -> None:
    store.whole(image="../../../../../secret.png")
    (store.root / "secret.png").write_bytes(b"")
    assert {example.image for example in collect_report(store.root).runs[0].examples["digits"]} == {None}


def test_images_of_outside_data_lie_under_its_root(store: StoreBuilder, tmp_path: Path) -> None:
    store.whole()
    spec = store.root / "stages" / store.key("eval", "digits@finetune") / "spec.json"
    record = json.loads(spec.read_text())
    location = {"root": str(tmp_path / "gqa"), "source": {"images": "images"}}
    write(spec, {**record, "settings": {"location": location}})
    paths = {
        example.image.path.parent for example in collect_report(store.root).runs[0].examples["digits"] if example.image
    }
    assert paths == {tmp_path / "gqa" / "images"}


def generation(item_id: str, category: str, correct: bool) -> Generation:
    return Generation(item_id, item_id, category, "", "", "", float(correct), correct, None, False, (), "")


def test_chosen_rows_are_balanced_over_categories_and_right_and_wrong() -> None:
    generations = [generation(str(i), "ab"[i % 10 == 0], i % 4 != 0) for i in range(400)]
    chosen = choose_generations(iter(generations), 8)
    assert chosen == choose_generations(iter(generations), 8)
    counts = {(category, right): 0 for category in "ab" for right in (True, False)}
    for one in chosen:
        counts[one.category, one.correct] += 1
    assert set(counts.values()) == {2}


def test_choice_takes_what_there_is_when_one_side_is_missing() -> None:
    assert len(choose_generations((generation(str(i), "a", True) for i in range(3)), 8)) == 3


def test_a_killed_run_is_stopped_in_its_report_as_in_the_list_of_runs(store: StoreBuilder) -> None:
    store.stage("train", "pretrain")
    folder = store.run("killed", status="running", finished=None)
    record = json.loads((folder / "run.json").read_text())
    write(folder / "run.json", {**record, **vars(this_process()), "process_start": 1.0})
    (run,) = collect_report(store.root, ["killed"]).runs
    assert run.record.status == read_runs(store.root)[0].status == "stopped"
    assert verdict(run) == "The run was stopped: 1 of 1 stages are done."


def test_an_image_is_shown_as_it_was_asked_about_and_from_behind_a_link_where_links_are_followed(
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (18, 16)).save(tmp_path / "phone.png", exif=exif)
    line = {"question_id": 1, "text": "a", "correct": True, "images": [{"path": str(tmp_path / "phone.png")}]}
    (tmp_path / "generations.jsonl").write_text(json.dumps(line) + "\n")
    (one,) = read_generations(tmp_path / "generations.jsonl")
    spec = {
        "spec": {},
        "parents": {},
        "settings": {"location": {"root": str(tmp_path), "source": {"images": "images"}}},
    }
    assert one.first_image(tmp_path / "images", stored(tmp_path, spec)) is None
    spec["settings"]["location"]["source"] |= {"follow_links": True, "orientation": "apply"}
    ref = one.first_image(tmp_path / "images", stored(tmp_path, spec))
    assert ref is not None and open_image_ref(ref).size == (16, 18)


def stored(folder: Path, spec: dict[str, Any]) -> StoredSpec:
    write(folder / "spec.json", spec)
    return read_stored_spec(folder)

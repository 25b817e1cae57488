"""Images and videos that cannot be read, in an evaluation: named, counted and wrong where that is allowed, else refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.builders import tiny_loaded
from tests.unit.data.test_video import cut
from tests.unit.stages.test_evaluate import job_of, lines
from tests.videos import moved_to_front, write_video
from tinylmm.errors import DataError
from tinylmm.models.checkpoint import save_model
from tinylmm.stages import evaluate
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stages.scoring import read_rows

CLIPS = ("whole.mp4", "cut.mp4", "frame.mp4")
"""All of one; one whose header shows that it is damaged; one that only decoding shows."""
SKIP = {"on_bad": "skip", "max_bad": 3}
WRONG = {"cut.mp4-0", "cut.mp4-1", "frame.mp4-0", "frame.mp4-1", "torn.png-0", "torn.png-1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("train") / "output"
    save_model(tiny_loaded(), output / "model", None, {})
    return output


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two questions about each of three clips and two images, of which two clips and an image are damaged."""
    images = tmp_path / "data/images"
    images.mkdir(parents=True)
    cut(images / "cut.mp4", write_video(images / "whole.mp4", 20), 0.5)
    front = moved_to_front(images / "frame.mp4", images / "whole.mp4")
    content = bytearray(front.read_bytes())
    content[1900:2200] = b"\x55" * 300  # behind the index, in the frames
    front.write_bytes(content)
    (images / "whole.png").write_bytes(_png())
    (images / "torn.png").write_bytes(_png()[:60])
    asked = [
        {"question_id": f"{name}-{n}", "image" if name.endswith(".png") else "video": name, "text": f"what? {n}"}
        for n in range(2)
        for name in (*CLIPS, "whole.png", "torn.png")
    ]
    common = {"category": "c", "answer": "a red 3", "options": 4}
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(row | common) + "\n" for row in asked))
    return tmp_path


def _png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(file, "png")
    return file.getvalue()


def with_policy(root: Path, model: Path, policy: dict[str, Any], **launch: Any) -> StageJob[Any]:
    job = job_of(root, model, launch, sampling={"uniform": 20})
    settings = job.settings.as_json()
    settings["location"]["source"] |= policy
    spec = job.spec.as_json()
    return make_job("eval", "digits@finetune", "0" * 64, spec, {"model": model}, settings, job.folder, root / "store")


@pytest.mark.parametrize("kept", [True, False], ids=["features kept", "features not kept"])
def test_what_cannot_be_read_is_named_counted_and_scored_as_missing(root: Path, model: Path, kept: bool) -> None:
    job = with_policy(root, model, SKIP, cache_features=kept)
    summary = evaluate.run(job)
    scores = json.loads((job.output / "scores.json").read_text())
    assert (summary["unreadable"], summary["questions"]) == (3, 10)
    assert (scores["counts"]["missing"], scores["counts"]["unreadable"]) == (6, 6)
    assert len(scores["per_item"]) == 10 and {row["id"] for row in scores["per_item"] if row["score"] == 0} >= WRONG
    rows = {row["item_id"]: row for row in lines(job.output / "generations.jsonl")}
    assert {name for name, row in rows.items() if "unreadable" in row} == WRONG
    assert all(rows[name]["text"] == "" and name[:-2] in rows[name]["unreadable"] for name in WRONG)
    assert all(row["new_tokens"] > 0 for name, row in rows.items() if name not in WRONG)
    assert all(row["blind_text"] is not None for row in rows.values()), "without its image each can be asked"
    faults = lines(job.output / "faults.jsonl")
    assert sorted(Path(row["image"]).name for row in faults) == ["cut.mp4", "frame.mp4", "torn.png"]
    assert summary["clips_encoded"] == (1 if kept else 0)
    (remark,) = summary["remarks"]  # the report has it
    assert remark.startswith("images or videos of 6 of 10 questions could not be read")
    again = read_rows(job.output / "generations.jsonl")
    assert {name for mode, name in again if "unreadable" in again[mode, name]} == WRONG, "a judge has no answer either"


def test_without_leave_they_stop_the_evaluation_which_says_what_to_do(root: Path, model: Path) -> None:
    with pytest.raises(DataError) as caught:
        evaluate.run(with_policy(root, model, {}))
    message = str(caught.value)
    assert "digits@finetune: 1 images or videos cannot be read, 0 allowed (on_bad=fail)" in message
    assert "cut.mp4" in message and "set eval.digits.on_bad=skip and eval.digits.max_bad=1 or more" in message
    with pytest.raises(DataError, match="3 images or videos cannot be read, 2 allowed"):
        evaluate.run(with_policy(root, model, {"on_bad": "skip", "max_bad": 2}))


def test_an_image_that_was_put_right_is_asked_about_by_the_next_try(root: Path, model: Path) -> None:
    with pytest.raises(DataError):
        evaluate.run(with_policy(root, model, {"on_bad": "skip", "max_bad": 2}))
    (root / "data/images/torn.png").write_bytes(_png())
    job = with_policy(root, model, {"on_bad": "skip", "max_bad": 2})
    assert evaluate.run(job)["unreadable"] == 2
    rows = {row["item_id"]: row for row in lines(job.output / "generations.jsonl")}
    assert rows["torn.png-0"]["new_tokens"] > 0 and rows["torn.png-1"]["new_tokens"] > 0

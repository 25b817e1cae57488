"""`make quickstart-video` at toy size: clips that are written, trained on and asked about, baselines in time, benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.integration.project import Project
from tests.unit.evaluation.benchmarks.disk import write_json, write_parquet
from tests.videos import write_video
from tinylmm.data import video as videos

SMALL = {"frames": 24, "clips": 10, "text": 30, "test": 3}
OWNERS = ("data", "llm.build.data", "vision_tower.build.data")
EVALS = ("moving_digits", "moving_digits_one_frame", "moving_digits_shuffled")
WORDS = (
    *("llm=nano_video", "vt=nano_video", "recipe=video", "video.sampling={uniform: 4}"),
    *(f"{owner}.build.options.{name}={count}" for owner in OWNERS for name, count in SMALL.items()),
    *(f"eval.{name}.data.build.options.{part}={count}" for name in EVALS for part, count in SMALL.items()),
    *("llm.build.steps=3", "vision_tower.build.steps=3", "vision_tower.build.batch=8", "tracking.tensorboard=false"),
    *("recipe.stages.pretrain.epochs=1", "recipe.stages.finetune.epochs=1", "launch.slots=1"),
)


def benchmarks(root: Path) -> list[str]:
    """Files of MVBench (a video file, an AVI file, a folder of frames) and Video-MME, and the words that ask them."""
    for name in ("clevrer/video_validation/a.mp4", "nturgbd/b.avi"):
        path = root / "MVBench/video" / name
        path.parent.mkdir(parents=True)
        write_video(path, 40, **({"codec": "mpeg4"} if path.suffix == ".avi" else {}))
    frames = root / "MVBench/video/tvqa/frames_fps3_hq/friends"
    frames.mkdir(parents=True)
    for number in range(1, 31):
        Image.new("RGB", (40, 30), (8 * number, 0, 0)).save(frames / f"{number:05d}.jpg")
    asked = {"question": "What?", "candidates": ["up", "down"], "answer": "up"}
    write_json(root / "MVBench/json/moving_count.json", [asked | {"video": "a.mp4"}] * 3)
    write_json(root / "MVBench/json/fine_grained_pose.json", [asked | {"video": "b.avi"}])
    part = {"video": "friends", "start": 2, "end": 6}
    write_json(root / "MVBench/json/episodic_reasoning.json", [asked | part])
    row = {"videoID": "v", "question": "What?", "options": ["A. Up.", "B. Down."], "answer": "A", "duration": "short"}
    rows = [row | {"question_id": f"v-{number}"} for number in range(3)]
    write_parquet(root / "Video-MME/videomme/test-00000-of-00001.parquet", rows)
    (root / "Video-MME/data").mkdir()
    write_video(root / "Video-MME/data/v.mp4", 9)
    named = [("mvbench", "MVBench"), ("videomme", "Video-MME")]
    return [
        f"eval=[moving_digits,{','.join(name for name, _ in named)}]",
        *(f"eval.{name}.root={root / folder}" for name, folder in named),
        *(f"eval.{name}.max_new_tokens=4" for name, _ in named),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("moving")
    project = Project(root, (*WORDS, *benchmarks(root / "eval")))
    done = project.train_here("name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    return project


def scores(project: Project, name: str, run: str = "first") -> dict[str, Any]:
    """scores.json of an evaluation after the last stage."""
    record = json.loads((project.store / f"runs/{run}/run.json").read_text())
    (key,) = [row["key"] for row in record["stages"] if row["name"] == f"{name}@finetune"]
    found: dict[str, Any] = json.loads((project.store / "stages" / key / "output/scores.json").read_text())
    return found


def test_baselines_in_time_stand_beside_the_score(finished: Project) -> None:
    (path,) = finished.store.glob("reports/*/results.json")
    rows = [row for row in json.loads(path.read_text())["rows"] if row["stage"] == "finetune"]
    by_name = {row["evaluation"]: row for row in rows if row["metric"] == "accuracy"}
    assert set(by_name) >= set(EVALS)
    assert by_name["moving_digits"]["blind"] is not None and by_name["moving_digits"]["chance"] > 0
    assert {row["metric"] for row in rows} >= {f"accuracy/{c}" for c in ("direction", "leaves_first", "count")}
    said = {name: scores(finished, name)["protocol"]["frames"] for name in EVALS}
    assert said == {
        "moving_digits": "uniform 4",
        "moving_digits_one_frame": "middle of uniform 4",
        "moving_digits_shuffled": "shuffled of uniform 4",
    }
    tokens = {name: _prompt_tokens(finished, name) for name in EVALS}
    assert tokens["moving_digits"] == tokens["moving_digits_shuffled"]
    # four patches a frame, and three frames fewer
    assert {a - b for a, b in zip(tokens["moving_digits"], tokens["moving_digits_one_frame"], strict=True)} == {12}


def _prompt_tokens(project: Project, name: str) -> list[int]:
    record = json.loads((project.store / "runs/first/run.json").read_text())
    (key,) = [row["key"] for row in record["stages"] if row["name"] == f"{name}@finetune"]
    lines = (project.store / "stages" / key / "output/generations.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt_tokens"] for line in lines]


def test_benchmarks_ask_for_their_protocols_frames_and_encode_a_clip_once_for_all_its_questions(
    finished: Project,
) -> None:
    mvbench, videomme = scores(finished, "mvbench"), scores(finished, "videomme")
    assert (mvbench["counts"]["scored"], mvbench["generation"]["clips_encoded"]) == (5, 3)
    assert (videomme["counts"]["scored"], videomme["generation"]["clips_encoded"]) == (3, 1)
    assert videomme["protocol"]["frames"] == "uniform 16, distinct"
    # of nine frames each once, four patches a frame; sixteen of forty
    assert _prompt_tokens(finished, "videomme")[0] < _prompt_tokens(finished, "mvbench")[0]


def test_a_second_run_decodes_nothing_but_the_reports_pictures(
    finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = videos._frames

    def counted(path: Path, container: Any, stream: Any, video: Any, indices: Any, *args: Any) -> Any:
        decoded.append(len(indices))
        return real(path, container, stream, video, indices, *args)

    monkeypatch.setattr(videos, "_frames", counted)
    done = finished.train_here("name=second", "eval.moving_digits.max_new_tokens=7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert scores(finished, "moving_digits", "second")["generation"]["clips_encoded"] == 0
    assert set(decoded) <= {1}


def test_a_folder_of_frames_that_is_not_there_is_named_before_anything_starts(finished: Project) -> None:
    frames = finished.root / "eval/MVBench/video/tvqa/frames_fps3_hq/friends"
    moved = frames.rename(frames.parent / "elsewhere")
    done = finished.train_here("name=third", "seed=3")
    moved.rename(frames)
    assert done.returncode == 2
    assert "tvqa/frames_fps3_hq/friends" in done.stderr

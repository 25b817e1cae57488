"""A finished model under lmms-eval, with a task and data of our own; skipped where the `lmms` extra is not installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import tinylmm
from tests.builders import IMAGE_SIZE, redescribe, tiny_loaded
from tinylmm.errors import DataError, UserError
from tinylmm.models.anyres import with_tiles
from tinylmm.models.checkpoint import save_model
from tinylmm.store.layout import stage_key
from tinylmm.store.runs import StageRow, create_run

lmms_model = pytest.importorskip("lmms_eval.api.model", reason="the extra `lmms` is not installed")
pytestmark = pytest.mark.slow

TASK = """
task: tinylmm_colours
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
process_results: !function utils.results
metric_list:
  - metric: words
    aggregation: !function utils.mean
    higher_is_better: true
metadata:
  version: 0
"""
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, answers):
    return {"words": {"text": answers[0], "id": doc["id"]}}


def mean(found):
    return sum(bool(row["text"]) for row in found) / len(found)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lmms") / "model"
    save_model(tiny_loaded(), root, None, {})
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from tinylmm.evaluation.lmms import TinyLMM

    return TinyLMM(pretrained=str(folder), device="cpu")


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour) for colour in ((255, 0, 0), (0, 0, 255))]


def request(model: Any, number: int, *arguments: Any, visuals: Any = ()) -> Any:
    model.task_dict = {"t": {"test": dict.fromkeys(range(9))}}
    return SimpleNamespace(args=(*arguments, lambda doc: list(visuals), number, "t", "test"), task_name="t")


def test_a_tiny_local_task_runs_from_the_registry_to_its_score(folder: Path, tmp_path: Path) -> None:
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from tinylmm.evaluation.lmms import manifest

    rows = [
        {"id": n, "image": pictures()[n % 2], "question": f"Which colour is it? {n}", "answer": "red"} for n in range(6)
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "test.parquet"))
    (tmp_path / "task").mkdir()
    (tmp_path / "task/colours.yaml").write_text(TASK.format(data=tmp_path / "test.parquet"))
    (tmp_path / "task/utils.py").write_text(UTILS)
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    found = simple_evaluate(
        model="tinylmm",
        model_args=f"pretrained={folder},device=cpu",
        tasks=["tinylmm_colours"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        bootstrap_iters=0,
        batch_size=8,
    )
    scores = found["results"]["tinylmm_colours"]
    assert next(value for key, value in scores.items() if key.startswith("words")) == 1.0
    assert len(found["samples"]["tinylmm_colours"]) == 6


def test_answers_come_in_the_order_asked_and_end_at_a_stop_text(model: Any) -> None:
    red, blue = pictures()
    asked = [
        request(model, 0, "<image>\nlong question about it", {"max_new_tokens": 6}, visuals=[red]),
        request(model, 1, "short", {"max_new_tokens": 3}, visuals=[blue]),
        request(model, 2, "no image", {"max_new_tokens": 6}),
        request(model, 3, "short", {"max_new_tokens": 6}, visuals=[red, blue]),
    ]
    together = model.generate_until(asked)
    assert together == [model.generate_until([one])[0] for one in asked] and all(together)
    stop = together[0][2]
    cut = request(model, 0, "<image>\nlong question about it", {"max_new_tokens": 6, "until": [stop]}, visuals=[red])
    assert model.generate_until([cut]) == [together[0].split(stop)[0].strip()]


def test_the_greedy_continuation_is_the_likeliest(model: Any) -> None:
    (red, _) = pictures()
    scores = model.loglikelihood([request(model, 0, "which?", word, visuals=[red]) for word in ("red", "a red 3", "3")])
    assert all(total < 0 for total, _ in scores)
    assert scores[1][0] < max(scores[0][0], scores[2][0])  # more tokens, less likely under a random model


def test_what_it_cannot_do_is_refused(model: Any, folder: Path) -> None:
    from tinylmm.evaluation.lmms import TinyLMM

    with pytest.raises(DataError, match="take images only"):
        model.generate_until([request(model, 0, "what?", {}, visuals=["clip.mp4"])])
    with pytest.raises(UserError, match="conv_template"):
        TinyLMM(pretrained=str(folder), conv_template="v1")
    with pytest.raises(UserError, match="int8"):
        TinyLMM(pretrained=str(folder), precision="int8")


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, 64),
        ({"batch_size": "auto"}, 64),
        ({"batch_size": "auto:4"}, 64),
        ({"batch_size": "3"}, 3),
        ({"batch_size": "auto", "max_batch_size": 8}, 8),
    ],
)
def test_batch_sizes_are_taken_as_lmms_eval_writes_them(given: dict[str, Any], rows: int, folder: Path) -> None:
    from tinylmm.evaluation.lmms import TinyLMM

    assert TinyLMM.create_from_arg_string(f"pretrained={folder},device=cpu", given).batch_size == rows


@pytest.mark.parametrize("wrong", [{"batch_size": "many"}, {"batch_size": 0}, {"tokens": "x"}])
def test_a_wrong_number_is_refused_by_name(wrong: dict[str, Any], folder: Path) -> None:
    from tinylmm.evaluation.lmms import TinyLMM

    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.* is not a number of 1 or more"):
        TinyLMM(pretrained=str(folder), device="cpu", **wrong)


def test_a_run_is_taken_by_its_name_and_a_stage_by_its_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinylmm.evaluation.lmms import TinyLMM

    digest = "ab" * 32
    stage = tmp_path / "store/stages" / stage_key("train", digest)
    (stage / "output").mkdir(parents=True)
    save_model(tiny_loaded(), stage / "output/model", None, {})
    create_run(tmp_path / "store", "mine", "mine", stages=[StageRow("train", "finetune", digest, stage.name, "run")])
    monkeypatch.setenv("TINYLMM_STORE", str(tmp_path / "store"))
    with pytest.raises(Exception, match="cannot be used"):  # no manifest: the same rule as for chat and export
        TinyLMM(pretrained="mine", device="cpu")
    monkeypatch.setattr("tinylmm.store.find_model.check_folder", lambda *_, **__: [])
    asked = ("<image>\nWhat is it?", {"max_new_tokens": 5})
    answers = [
        bridge.generate_until([request(bridge, 0, *asked, visuals=pictures()[:1])])
        for bridge in (TinyLMM(pretrained=where, device="cpu") for where in ("mine", str(stage), str(folder)))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_model_of_tiles_answers_as_in_chat(tmp_path: Path) -> None:
    from tinylmm.evaluation.lmms import TinyLMM

    loaded = tiny_loaded()
    redescribe(loaded, image=loaded.description.as_json()["image"] | {"mode": "anyres", "tiles": [[1, 2], [2, 1]]})
    parts = (loaded.model.connector, loaded.description.image, loaded.model.vision_tower.num_tokens)
    loaded.model.connector = with_tiles(*parts)
    save_model(loaded, tmp_path / "model", None, {})
    bridge, chat = (
        TinyLMM(pretrained=str(tmp_path / "model"), device="cpu"),
        tinylmm.load(tmp_path / "model", device="cpu"),
    )
    shapes = [Image.new("RGB", size, (0, 255, 0)) for size in ((40, 12), (12, 40), (16, 16))]
    asked = [
        request(bridge, n, "What is it?", {"max_new_tokens": 5}, visuals=[shape]) for n, shape in enumerate(shapes)
    ]
    asked.append(request(bridge, 3, "And these?", {"max_new_tokens": 5}, visuals=shapes))
    expected = [chat.chat("What is it?", shape, max_new_tokens=5) for shape in shapes]
    assert bridge.generate_until(asked) == [*expected, chat.chat("And these?", shapes, max_new_tokens=5)]
    for visuals in ([shapes[0]], shapes, []):
        scores = bridge.loglikelihood([request(bridge, 0, "which?", word, visuals=visuals) for word in ("red", "3")])
        assert all(total < 0 for total, _ in scores)

"""`tinylmm data check` and `show` on a real project: what they find, say, write, and how they end."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests.builders import NoFiles, tiny_tokenizer
from tests.integration.project import Project, tiny_project
from tinylmm.cli.main import app
from tinylmm.config.compose import compose_run
from tinylmm.errors import ConfigError, DataError, UserError
from tinylmm.planning.graph import build_graph
from tinylmm.store.store import Store

BROKEN = b"\x89PNG\r\n\x1a\n but no image"


def png(colour: str, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png")
    return buffer.getvalue()


def data_url(content: bytes) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(content).decode()}}


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clean project with one more source, `faulty`, in OpenAI's format."""
    root = tmp_path_factory.mktemp("project")
    made = tiny_project(root)
    (root / "data/images/copy.png").write_bytes((root / "data/images/0-red.png").read_bytes())
    gone, copy = ({"type": "image", "image": f"{name}.png"} for name in ("gone", "copy"))
    text = {"type": "text", "text": "or?"}
    good = [
        message("user", [data_url(png("red")), text, {"type": "image", "image": "0-red.png"}]),
        message("assistant", "x"),
    ]
    records = [
        {"id": "good", "messages": [message("system", "be brief"), *good]},
        {"id": "same", "messages": [message("system", "be brief"), *good]},
        {"id": "web", "messages": [message("user", [data_url(b"")]), message("assistant", "x")]},
        {
            "id": "<b>gone</b>",
            "messages": [message("user", [gone]), message("assistant", "x")],
        },
        {"id": "odd", "messages": [message("user", "q")]},
        {
            "id": "odd",
            "messages": [message("user", [copy]), message("assistant", "x")],
        },
        {"id": "broken", "messages": [message("user", [data_url(BROKEN)]), message("assistant", "x")]},
    ]
    (root / "data/faulty.jsonl").write_text("\n".join(map(json.dumps, records)))
    more = "+data.sources.faulty={annotations: faulty.jsonl, images: images, format: openai}"
    return Project(root, (*made.words, more, f"store={root / 'store'}"))


def data(project: Project, command: str, *more: str) -> Result:
    return CliRunner().invoke(app, ["data", command, *project.words, *more], env={"COLUMNS": "300"})


def test_a_clean_data_set_is_told_as_such_with_its_counts_and_a_page(project: Project) -> None:
    result = data(project, "check", "--tokens")
    assert result.exit_code == 0, result.output
    for line in ("pretrain: all 24 records can be used", "finetune: all 29 records can be used", "words a sample"):
        assert line in result.output
    page = (project.store / "reports/data-llava_v1_5.html").read_text()
    assert "all 29 records can be used" in page and "tokens a sample" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ((), 116),  # with an image as one token, nothing would be left out in any of them
        (("vt.image.mode=anyres",), 124),
        (("recipe.stages.finetune.image_mode=anyres",), 124),
    ],
    ids=["square", "anyres", "anyres-of-the-stage"],
)
def test_what_max_length_leaves_out_is_counted_as_training_counts_it(
    project: Project, words: tuple[str, ...], length: int, tmp_path: Path
) -> None:
    words = (*words, f"recipe.stages.finetune.max_length={length}")
    result = data(project, "check", "--tokens", "--json", "--source", "finetune", *words)
    (found,) = json.loads(result.stdout)["sources"]
    assert 0 < found["too_long"] < found["samples"] and not found["clean"] and result.exit_code == 2
    said = data(project, "check", "--tokens", "--source", "finetune", *words).output
    assert f"finetune: {found['too_long']} of 29 samples would be left out" in said and "as one" not in said
    enough = ("recipe.stages.finetune.max_dropped=1", "recipe.stages.finetune.max_steps=1", f"store={tmp_path}")
    assert project.train_here(*words, *enough, "recipe.stages.pretrain.max_steps=1").returncode == 0
    trained = Project(tmp_path, ()).root / "stages"
    manifests = [json.loads(path.read_text()) for path in trained.glob("train-*/manifest.json")]
    (dropped,) = (one["summary"]["data"]["dropped"] for one in manifests if one["name"] == "finetune")
    assert dropped == found["too_long"]


def test_every_fault_is_listed_with_record_and_id_and_what_is_there_twice(project: Project, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    result = data(project, "check", "--source", "faulty", "--json", "--html", str(page))
    assert result.exit_code == 2
    (found,) = json.loads(result.stdout)["sources"]
    assert (found["records"], found["samples"], found["clean"]) == (7, 3, False)
    faults = {(fault["index"], fault["id"]): fault["reason"] for fault in found["faults"]}
    assert [index for index, _ in faults] == [2, 3, 4, 6]
    assert "gone.png': not found" in faults[3, "<b>gone</b>"]
    assert "last question has no answer" in faults[4, "odd"]
    assert faults[6, "broken"].startswith("the embedded image embedded:") and "not a readable" in faults[6, "broken"]
    assert found["same_conversations"] == [[[0, "good"], [1, "same"]]]
    assert found["same_images"] == [["0-red.png", "copy.png"]]
    assert found["same_ids"] == [["odd", 2]]
    assert found["histograms"]["images a sample"] == {"1": 1, "2": 2}
    assert found["histograms"]["shorter side of the images in pixels"] == {"16-31": 3}
    text = page.read_text()
    assert "&lt;b&gt;gone&lt;/b&gt;" in text and "<b>gone" not in text


def test_a_quick_check_finds_what_headers_and_names_tell(project: Project) -> None:
    result = data(project, "check", "--source", "faulty", "--quick", "--json")
    (found,) = json.loads(result.stdout)["sources"]
    assert result.exit_code == 2 and [fault["index"] for fault in found["faults"]] == [2, 3, 4, 6]
    assert found["same_images"] == []


def test_a_file_that_is_not_there_or_broken_is_a_fault_of_its_source(project: Project) -> None:
    result = data(project, "check", "data.sources.pretrain.annotations=gone.json", "--source", "pretrain")
    assert result.exit_code == 2
    assert "pretrain: cannot be trained on" in result.output and "gone.json" in result.output


def test_a_sample_is_shown_with_what_is_trained_on_and_its_images_as_the_tower_gets_them(
    project: Project, tmp_path: Path
) -> None:
    page = tmp_path / "sample.html"
    result = data(project, "show", "--source", "faulty", "--id", "same", "--html", str(page))
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    assert "record 1 (id 'same')" in flat and "template llama, stage finetune" in flat
    assert "be brief USER: [image 1]or?[image 2] ASSISTANT:« x</s>»" in flat
    assert "40 × 30 → 16 × 16" in flat and "image 2: 0-red.png, 16 × 16 → 16 × 16" in flat
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert '<span class="token trained">&lt;/s&gt;</span>' in text
    tile = Image.open(io.BytesIO(base64.b64decode(text.split("data:image/png;base64,")[1].split('"')[0])))
    assert tile.size == (16, 16) and tile.getpixel((3, 3)) == (255, 0, 0)


def test_the_first_record_in_the_stages_own_template_is_shown_by_default(project: Project) -> None:
    shown = data(project, "show", "--stage", "pretrain")
    assert "record 0 (id 'c0')" in shown.output and "[image 1]«a red square↵" in shown.output
    assert "Which colour? ASSISTANT:« red</s>»USER: Is it red?" in " ".join(data(project, "show").output.split())


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("show", "--id", "nope"), DataError, "no record has the id 'nope' among 29"),
        (("show", "--index", "99"), DataError, "there is no record 99 among 29"),
        (("show", "--index", "3", "--id", "x"), UserError, "give one of them"),
        (("show", "--source", "faulty", "--id", "odd"), DataError, r"record 4 \(id 'odd'\): .*no answer"),
        (("show", "--stage", "finetun"), ConfigError, "Did you mean 'finetune'"),
        (("check", "--source", "fault"), ConfigError, "Did you mean 'faulty'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_is_refused_with_what_there_is(
    project: Project, words: tuple[str, ...], kind: type[UserError], message: str
) -> None:
    result = data(project, words[0], *words[1:])
    with pytest.raises(kind, match=message):
        raise result.exception or AssertionError(result.output)


def test_data_that_a_run_makes_itself_is_not_there_before_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", f"store={tmp_path}"])
    with pytest.raises(
        UserError, match=r"data digits is made by the run itself.*Give the same words to tinylmm-train first"
    ):
        raise result.exception or AssertionError(result.output)


def test_data_and_tokenizer_that_runs_have_made_are_taken_from_the_store(tmp_path: Path) -> None:
    words = [f"store={tmp_path}"]
    graph = build_graph(compose_run(words), NoFiles())
    made = {stage.name: stage for stage in graph}
    store = Store(tmp_path)
    digits = graph[made["prepare[finetune]"].parents["data"]]
    output = store.begin(digits) / "output"
    (output / "images").mkdir()
    (output / "images/a.png").write_bytes(png("blue"))
    turns = [{"from": "human", "value": "<image>\nwhat digit?"}, {"from": "gpt", "value": "3"}]
    (output / "finetune.json").write_text(json.dumps([{"id": "f", "image": "a.png", "conversations": turns}]))
    store.publish(digits, {}, time.time())
    result = CliRunner().invoke(app, ["data", "check", *words, "--source", "finetune"])
    assert result.exit_code == 0 and "finetune: all 1 records can be used" in result.output
    shown = CliRunner().invoke(app, ["data", "show", *words])
    assert "parts tokenizer/nano is made by the run itself" in str(shown.exception)
    tiny_tokenizer().save_pretrained(store.begin(made["tokenizer/nano"]) / "output")
    store.publish(made["tokenizer/nano"], {}, time.time())
    shown = CliRunner().invoke(app, ["data", "show", *words])
    assert shown.exit_code == 0 and "image 1: a.png, 40 × 30 → 32 × 32" in shown.output and "« 3</s>»" in shown.output

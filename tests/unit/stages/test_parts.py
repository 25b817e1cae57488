"""Parts are built from nothing, alone, and are what the next stages load."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, SiglipVisionModel

from tinylmm.data.embedded import build_digits
from tinylmm.data.sample import Sample
from tinylmm.errors import ConfigError, DataError
from tinylmm.stages import parts
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stages.parts import run

BUILD = {"steps": 4, "batch": 4, "lr": 1e-3, "warmup_ratio": 0.1, "weight_decay": 0.0, "max_length": 320, "seed": 0}
TEXT = {"file": "text.json", "images": ""}
CAPTIONS = {"file": "pretrain.json", "images": "images"}
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
IMAGE = {"size": 32, "mean": [0.2] * 3, "std": [0.2] * 3, "mode": "squash", "resample": "bicubic"}
TOKENIZER: dict[str, Any] = {"role": "tokenizer", "vocab_size": 512, "pad_token": None, "source": TEXT}
LLM: dict[str, Any] = {
    "role": "llm",
    "_target_": "transformers.LlamaForCausalLM",
    "init": "built",
    "architecture": LLAMA,
    "build": BUILD,
    "source": TEXT,
}
TOWER: dict[str, Any] = {
    "role": "vision_tower",
    "_target_": "tinylmm.models.vision.HFVisionTower",
    "encoder": "transformers.SiglipVisionModel",
    "init": "built",
    "architecture": SIGLIP,
    "image": IMAGE,
    "build": BUILD | {"max_length": 32, "text_tower": {"width": 16, "layers": 1, "heads": 2}},
    "source": CAPTIONS,
}


def job(folder: Path, spec: dict[str, Any], location: dict[str, Any] | None = None, **parents: Path) -> StageJob[Any]:
    (folder / "output").mkdir(parents=True, exist_ok=True)
    settings = {"tracking": {"log_steps": 2}, "location": location or {"root": None, "source": {}}}
    return make_job("parts", spec["role"], "0" * 64, spec, parents, settings, folder, folder / "store")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build_digits(folder, seed=0, pretrain=12, share=1, finetune=1, text=20, test=1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert run(job(folder, TOKENIZER, data=data))["conversations"] == 20
    return folder / "output"


def test_a_tokenizer_knows_the_words_of_its_texts(tokenizer: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert loaded.tokenize("what digit is") == ["what", "Ġdigit", "Ġis"]
    assert json.loads((tokenizer / "part.json").read_text())["role"] == "tokenizer"


def test_an_llm_is_loaded_as_any_other(tmp_path: Path, data: Path, tokenizer: Path) -> None:
    summary = run(job(tmp_path, LLM, data=data, tokenizer=tokenizer))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "output")
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    identity = json.loads((tmp_path / "output" / "part.json").read_text())
    assert identity == {key: LLM[key] for key in ("role", "_target_", "init", "architecture")}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["steps"]) for row in rows] == [(2, 4), (4, 4)]


def test_a_tower_is_loaded_as_any_other_without_its_text_encoder(tmp_path: Path, data: Path) -> None:
    run(job(tmp_path, TOWER, data=data))
    model = SiglipVisionModel.from_pretrained(tmp_path / "output")
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 4, 16)
    saved = load_file(tmp_path / "output" / "model.safetensors")
    assert not [name for name in saved if "words" in name or "log_scale" in name]
    assert "image" in json.loads((tmp_path / "output" / "part.json").read_text())


@pytest.mark.parametrize("spec", [TOKENIZER, LLM, TOWER], ids=["tokenizer", "llm", "vision_tower"])
def test_a_part_built_twice_is_the_same_to_the_byte(
    tmp_path: Path, data: Path, tokenizer: Path, spec: dict[str, Any]
) -> None:
    contents = []
    for name in ("first", "second"):
        run(job(tmp_path / name, spec, data=data, tokenizer=tokenizer))
        output = tmp_path / name / "output"
        contents.append({path.name: path.read_bytes() for path in sorted(output.iterdir())})
    assert contents[0] == contents[1]


def test_training_moves_the_weights_away_from_their_first_values(tmp_path: Path, data: Path) -> None:
    states = []
    for steps in (1, 4):
        spec = TOWER | {"build": TOWER["build"] | {"steps": steps}}
        run(job(tmp_path / str(steps), spec, data=data))
        states.append(load_file(tmp_path / str(steps) / "output" / "model.safetensors"))
    unmoved = [name for name in states[0] if torch.equal(states[0][name], states[1][name])]
    assert unmoved == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architecture": LLAMA | {"vocab_size": 300}}, ConfigError, "vocab_size: is 300, but the tokenizer has"),
        ({"build": BUILD | {"max_length": 40}}, DataError, r"more than llm\.build\.max_length=40"),
        ({"source": CAPTIONS}, DataError, "has an image, but an LLM is pretrained on text alone"),
        ({"_target_": "os.system"}, ConfigError, "os.system"),
    ],
    ids=["vocabulary", "length", "images", "target"],
)
def test_an_llm_that_cannot_be_built_is_refused(
    tmp_path: Path, data: Path, tokenizer: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(job(tmp_path, LLM | change, data=data, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("records", "message"),
    [("[]", "no records"), ('[{"id": "x", "conversations": []}]', r"record 0 \(x\): `conversations` is empty")],
    ids=["none", "broken"],
)
def test_a_source_with_nothing_or_something_broken_in_it_is_refused(tmp_path: Path, records: str, message: str) -> None:
    (tmp_path / "text.json").write_text(records)
    with pytest.raises(DataError, match=message):
        run(job(tmp_path / "work", TOKENIZER, data=tmp_path))


def test_a_towers_images_are_opened_as_their_source_says(tmp_path: Path) -> None:
    """A picture behind a link, whose camera says to mirror it: black and white change sides."""
    (tmp_path / "data").mkdir()
    (tmp_path / "disk").mkdir()
    stored = Image.new("RGB", (32, 32))
    stored.paste((255, 255, 255), (16, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 2
    stored.save(tmp_path / "disk/a.png", exif=exif)
    (tmp_path / "data/images").symlink_to(tmp_path)
    sample = Sample("a", (), ("disk/a.png",))
    found = {}
    for orientation in ("apply", "ignore"):
        source = CAPTIONS | {"follow_links": True, "orientation": orientation}
        found[orientation] = parts._load_images(
            job(tmp_path, TOWER | {"source": source}, data=tmp_path / "data"), [sample]
        )
    assert torch.equal(found["apply"], found["ignore"].flip(3)) and not torch.equal(found["apply"], found["ignore"])


def outside(folder: Path, annotations: str, layout: str) -> dict[str, Any]:
    """The location of a source of the user's own files."""
    return {"root": str(folder), "source": {"annotations": annotations, "images": "pictures", "format": layout}}


def test_parts_are_built_from_files_of_ones_own_in_their_format(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number} is a number"}]
        for number in range(6)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in [*messages, []]))
    source = {"content": {}, "format": "openai", "limit": 6}  # the seventh record is broken
    location = outside(tmp_path, "talk.jsonl", "openai")
    words = job(tmp_path / "words", TOKENIZER | {"vocab_size": 300, "source": source}, location)
    assert run(words)["conversations"] == 6
    llm = job(tmp_path / "llm", LLM | {"source": source}, location, tokenizer=words.output)
    assert run(llm)["conversations"] == 6


def test_a_tower_is_built_from_images_in_a_folder_and_in_records_one_each(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for shade in (0, 200):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / f"pictures/{shade}.png")
    inside = "data:image/png;base64," + base64.b64encode((tmp_path / "pictures/200.png").read_bytes()).decode()

    def captions(*names: Any) -> str:
        turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "red"}]
        return json.dumps([{"id": str(n), "image": name, "conversations": turns} for n, name in enumerate(names)])

    names = ["0.png", str(tmp_path / "pictures/200.png"), inside]
    (tmp_path / "a.json").write_text(captions(*names))
    location = outside(tmp_path, "a.json", "llava")
    tower = job(tmp_path / "tower", TOWER | {"source": {"content": {}}}, location)
    first, second, third = parts._load_images(tower, parts._read_source(tower))
    assert torch.equal(second, third) and not torch.equal(first, second)
    assert run(tower)["images"] == 3
    text = [{"id": "t", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}]
    (tmp_path / "a.json").write_text(json.dumps(json.loads(captions("0.png")) + text))
    with pytest.raises(DataError, match="record t has 0 images, but a tower is pretrained on records with one image"):
        run(job(tmp_path / "again", TOWER | {"source": {"content": {}}}, location))

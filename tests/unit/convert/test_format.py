"""A checkpoint format is one module: where it lies, commands and functions find it, both ways."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.builders import tiny_loaded
from tests.foreign import write_json
from tinylmm.convert import formats
from tinylmm.convert.conversion import export_model, import_model, write_model
from tinylmm.convert.format import all_formats, detect_layout, find_names
from tinylmm.convert.source import open_source
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import load_model, save_model

PAGE = (Path(__file__).parents[3] / "docs/extending.md").read_text(encoding="utf-8")
MINE = re.findall(r"^```python title=my_lab/my_format\.py\n(.*?)^```", PAGE, re.M | re.S)[0]
"""The format that the documentation shows."""
ENTRY = re.findall(r"^```toml\n(.*?tinylmm\.formats.*?)^```", PAGE, re.M | re.S)[0]
"""The lines by which a package names it."""


@pytest.fixture
def forget() -> Iterator[None]:
    """What a test imports from a folder of its own is gone afterwards."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("my_lab", "my_lab.my_format", f"{formats.__name__}.mine", f"{formats.__name__}.other"):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> Path:
    """A folder that counts as part of `convert/formats`."""
    (tmp_path / "formats").mkdir()
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path / "formats")])
    return tmp_path / "formats"


def there_and_back(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    save_model(loaded, tmp_path / "ours", None, {})
    report = export_model(tmp_path / "ours", tmp_path / "theirs", "mine")
    assert report.format == "mine" and report.difference is None
    imported = import_model(tmp_path / "theirs", tmp_path / "again")
    assert imported.layout == "mine"
    before, after = loaded.model.state_dict(), load_model(tmp_path / "again", []).model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_format_that_lies_in_the_folder_is_found_detected_written_and_read(tmp_path: Path, folder: Path) -> None:
    assert "mine" not in find_names("readers")
    (folder / "mine.py").write_text(MINE)
    assert "mine" in find_names("readers") and "mine" in find_names("writers")
    there_and_back(tmp_path)


def test_what_a_format_cannot_hold_is_refused_in_its_words(tmp_path: Path, folder: Path) -> None:
    (folder / "mine.py").write_text(MINE.replace("lambda export: []", "lambda export: ['it is too good']"))
    with pytest.raises(UserError, match="cannot be a checkpoint of my tool:\n  - it is too good\nNothing was written"):
        write_model(tiny_loaded(), tmp_path / "theirs", "mine", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["formats"]


def test_an_installed_package_brings_a_format_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None
) -> None:
    site = tmp_path / "site"
    info = site / "my_lab-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_lab\nVersion: 1.0\n")
    points = tomllib.loads(ENTRY)["project"]["entry-points"]
    lines = [f"[{group}]\n{name} = {module}\n" for group, named in points.items() for name, module in named.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    (site / "my_lab").mkdir()
    (site / "my_lab/__init__.py").touch()
    (site / "my_lab/my_format.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(site))
    assert find_names("writers")[-1] == "mine"
    there_and_back(tmp_path)


def test_the_names_read_from_source_text_are_those_of_the_imported_formats() -> None:
    known = all_formats()
    assert find_names("readers") == [name for one in known for name in one.readers]
    assert find_names("writers") == [name for one in known for name in one.writers]


def test_the_table_and_its_names_load_no_torch() -> None:
    code = (
        "import sys; from tinylmm.convert.format import find_names; assert 'hf' in find_names('writers'); "
        "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_formats_of_one_name_are_refused(folder: Path) -> None:
    (folder / "mine.py").write_text(MINE)
    (folder / "other.py").write_text(MINE)
    with pytest.raises(UserError, match="two checkpoint formats are called mine"):
        all_formats()


def test_a_folder_of_two_layouts_is_not_guessed_at(tmp_path: Path, folder: Path) -> None:
    (folder / "other.py").write_text(MINE.replace('source.model_type == "mine"', '"mm_vision_tower" in source.config'))
    write_json(tmp_path / "m/config.json", {"model_type": "llava_llama", "mm_vision_tower": "openai/tiny-clip"})
    with pytest.raises(UserError, match=r"could be of the layouts llava, mine\. Name the right one with --layout"):
        detect_layout(open_source(tmp_path / "m", None, None, None))


ADAPTER = "adapter_config.json"


@pytest.mark.parametrize(
    ("config", "files", "layout"),
    [
        ({"model_type": "tinyllava"}, (), "factory"),
        ({"architectures": ["TinyLlavaForConditionalGeneration"]}, (), "factory"),
        ({"model_type": "tinyllava"}, ("language_model/x", "connector/x"), "factory-folders"),
        ({"model_type": "tinyllava"}, ("language_model/x", "connector/x", ADAPTER), "factory-lora"),
        ({"model_type": "llava_llama"}, (ADAPTER, "non_lora_trainables.bin"), "llava-lora"),
        ({"model_type": "tinyllava"}, (ADAPTER,), "llava-lora"),
        ({"model_type": "llava_llama"}, ("mm_projector.bin",), "llava-projector"),
        ({"model_type": "llama"}, ("mm_projector.bin",), "llava-projector"),
        ({"model_type": "llava_llama"}, ("mm_projector.bin", "model.safetensors"), "llava"),
        ({"model_type": "tiny_llava_phi"}, ("model.safetensors",), "bench"),
        ({"model_type": "llava", "vision_config": {}}, ("model.safetensors",), "transformers"),
        ({"model_type": "llava"}, ("model.safetensors",), "llava"),
    ],
)
def test_each_layout_is_told_by_its_files_and_config_alone(
    tmp_path: Path, config: dict[str, object], files: tuple[str, ...], layout: str
) -> None:
    write_json(tmp_path / "config.json", config)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert detect_layout(open_source(tmp_path, None, None, None)) == layout


def test_our_own_model_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "ours/config.json", {"model_type": "tinylmm"})
    write_json(tmp_path / "bert/config.json", {"model_type": "bert"})
    with pytest.raises(UserError, match="is a tinylmm model already"):
        detect_layout(open_source(tmp_path / "ours", None, None, None))
    with pytest.raises(UserError, match=r"no layout that can be imported \(model_type 'bert', architectures \[\]\)"):
        detect_layout(open_source(tmp_path / "bert", None, None, None))

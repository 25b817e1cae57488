"""Content identity of data sources and checkpoint folders: what changes it, what does not, what is cached."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tinylmm.config.spec import SourceSpec
from tinylmm.errors import DataError
from tinylmm.planning import fingerprints as fingerprint
from tinylmm.planning.fingerprints import checkpoint_fingerprint, source_fingerprint

SOURCE = SourceSpec(annotations="a.json", images="images", how_to_get="Download a.json from the project page.")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for name in ("1.png", "2.png", "3.png"):
        (images / name).write_bytes(name.encode())
    records = [{"id": 1, "image": "2.png"}, {"id": 2}, {"id": 3, "image": ["1.png", "2.png"]}, {"image": "3.png"}]
    (images.parent / "a.json").write_text(json.dumps(records), encoding="utf-8")
    return images.parent


def identity(root: Path, source: SourceSpec = SOURCE) -> dict[str, Any]:
    return source_fingerprint(root, source, root.parent / "cache")


def test_source_is_the_hash_of_its_file_and_the_listing_of_its_images(root: Path) -> None:
    listing = "".join(f'["{name}", 5]\n' for name in ("1.png", "2.png", "3.png"))
    assert identity(root) == {
        "annotations": hashlib.sha256((root / "a.json").read_bytes()).hexdigest(),
        "images": hashlib.sha256(listing.encode()).hexdigest(),
        "num_images": 3,
        "missing": [],
        "num_missing": 0,
    }


def test_identity_is_the_same_in_another_place_and_from_the_cache(root: Path, tmp_path: Path) -> None:
    first = identity(root)
    assert identity(root) == first
    moved = root.rename(tmp_path / "moved")
    assert identity(moved) == first


def test_changed_annotations_or_image_size_change_the_identity(root: Path) -> None:
    identities = [identity(root)]
    (root / "images" / "1.png").write_bytes(b"longer than before")
    identities.append(identity(root))
    (root / "a.json").write_text('[{"image": "1.png"}, {"id": 9}]', encoding="utf-8")
    identities.append(identity(root))
    assert len({json.dumps(value) for value in identities}) == 3


def test_missing_images_are_counted_and_listed_not_raised(root: Path) -> None:
    complete = identity(root)
    (root / "images" / "2.png").unlink()
    found = identity(root)
    assert (found["missing"], found["num_missing"]) == (["2.png"], 1)
    assert found["images"] != complete["images"]


def test_only_the_first_missing_images_are_listed(root: Path) -> None:
    records = [{"image": f"{number:03}.png"} for number in range(50)]
    (root / "a.json").write_text(json.dumps(records), encoding="utf-8")
    found = identity(root)
    assert found["missing"] == [f"{number:03}.png" for number in range(20)]
    assert found["num_missing"] == 50


def test_limit_leaves_out_the_images_of_later_records(root: Path) -> None:
    assert identity(root, SOURCE.model_copy(update={"limit": 2}))["num_images"] == 1


def test_file_is_read_again_only_when_its_stat_has_changed(root: Path) -> None:
    first = identity(root)
    stat = (root / "a.json").stat()
    content = (root / "a.json").read_text(encoding="utf-8")
    (root / "a.json").write_text(content.replace("3.png", "9.png"), encoding="utf-8")
    os.utime(root / "a.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(root) == first
    os.utime(root / "a.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identity(root)["missing"] == ["9.png"]


def test_sizes_of_very_many_images_are_cached_with_the_list(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "STAT_LIMIT", 2)
    first = identity(root)
    (root / "images" / "1.png").unlink()
    assert identity(root) == first


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 1}', b"[]", b"\xff"])
def test_damaged_cache_counts_as_none(root: Path, content: bytes) -> None:
    first = identity(root)
    (cached,) = (root.parent / "cache").iterdir()
    cached.write_bytes(content)
    assert identity(root) == first


def test_missing_annotation_file_is_refused_with_how_to_get_it(root: Path) -> None:
    (root / "a.json").unlink()
    with pytest.raises(DataError, match=r"a\.json: not found.*Download a\.json from the project page"):
        identity(root)


def test_hub_id_has_no_local_content() -> None:
    assert checkpoint_fingerprint("microsoft/phi-2") == {}


def test_two_checkpoints_joined_by_a_plus_count_each_on_its_own(tmp_path: Path) -> None:
    assert checkpoint_fingerprint("openai/clip-vit-large-patch14+facebook/dinov2-large") == {}
    for name in ("clip", "dinov2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    both = f"{tmp_path}/clip+{tmp_path}/dinov2"
    before = checkpoint_fingerprint(both)
    assert [list(part["files"]) for part in before["parts"]] == [["config.json"]] * 2
    (tmp_path / "dinov2" / "config.json").write_text("other")
    assert checkpoint_fingerprint(both) != before
    mixed = checkpoint_fingerprint(f"org/clip+{tmp_path}/dinov2")["parts"]
    assert mixed[0] == {"id": "org/clip"} and "files" in mixed[1]


def test_checkpoint_folder_is_its_small_files_hashed_and_its_large_ones_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "HASHED_BYTES", 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "vocab").write_bytes(b"a")
    (tmp_path / ".cache").write_bytes(b"ignored")
    files = checkpoint_fingerprint(str(tmp_path))["files"]
    assert list(files) == ["config.json", "sub/model.safetensors", "vocab"]
    assert files["sub/model.safetensors"] == {"size": 100}
    assert files["vocab"] == {"size": 1, "sha256": hashlib.sha256(b"a").hexdigest()}
    assert files["config.json"]["sha256"] == hashlib.sha256(b'{"hidden_size": 64}').hexdigest()


def test_fingerprint_loads_neither_torch_nor_pillow() -> None:
    code = (
        "import sys, tinylmm.planning.fingerprints;"
        "print([m for m in ('torch', 'PIL', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def said(image: str) -> list[dict[str, Any]]:
    question = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}
    return [question, {"role": "assistant", "content": "x"}]


def test_images_of_messages_are_listed_but_embedded_ones_are_part_of_the_file(root: Path) -> None:
    records = [
        {"messages": said(name)} for name in ("1.png", "gone.png", "data:image/png;base64,AAAA", "http://x/y.png")
    ]
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = identity(root, SOURCE.model_copy(update={"annotations": "m.jsonl", "format": "openai"}))
    assert (found["num_images"], found["missing"]) == (2, ["gone.png"])


def test_a_folder_of_parquet_files_is_identified_by_all_of_them(root: Path) -> None:
    source = SOURCE.model_copy(update={"annotations": "shards", "format": "parquet"})
    (root / "shards").mkdir()
    for number, name in enumerate(("1.png", "2.png")):
        row = {"image": {"bytes": None, "path": name}, "conversations": [{"from": "human", "value": "<image>"}]}
        row["conversations"].append({"from": "gpt", "value": "x"})
        pq.write_table(pa.Table.from_pylist([row]), root / "shards" / f"train-{number}.parquet")
    first = identity(root, source)
    assert first["num_images"] == 2 and identity(root, source) == first
    (root / "shards" / "train-1.parquet").write_bytes((root / "shards" / "train-0.parquet").read_bytes())
    assert identity(root, source)["annotations"] != first["annotations"]

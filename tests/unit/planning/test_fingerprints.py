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
from tinylmm.planning import listing
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
    content = {name: (root / "images" / name).read_bytes() for name in ("1.png", "2.png", "3.png")}
    lines = "".join(f'["{n}", 5, "{hashlib.sha256(data).hexdigest()[:32]}"]\n' for n, data in content.items())
    assert identity(root) == {
        "annotations": hashlib.sha256((root / "a.json").read_bytes()).hexdigest(),
        "images": hashlib.sha256(lines.encode()).hexdigest(),
        "num_images": 3,
        "missing": [],
        "num_missing": 0,
        "videos": False,
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


def test_an_edited_image_of_the_same_size_is_another_one(root: Path) -> None:
    before = identity(root)
    path = root / "images" / "1.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    after = identity(root)
    assert after["images"] != before["images"]
    content[-1] ^= 1
    path.write_bytes(content)
    assert identity(root) == before, "written again as it was: content decides, not when it was written"


@pytest.mark.parametrize("where", [0, -1])
def test_of_a_large_image_both_ends_count(root: Path, where: int) -> None:
    path = root / "images" / "1.png"
    content = bytearray(b"x" * 100_000)
    path.write_bytes(content)
    before = identity(root)
    content[where] ^= 1
    path.write_bytes(content)
    assert identity(root)["images"] != before["images"]


def test_an_image_is_read_once_for_each_state_of_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(root)
    read = listing.edges_of
    seen: list[str] = []
    monkeypatch.setattr(listing, "edges_of", lambda path, size: (seen.append(path), read(path, size))[1])
    assert identity(root) == first and seen == []
    (root / "images" / "1.png").write_bytes(b"another one")
    identity(root)
    assert [Path(path).name for path in seen] == ["1.png"]


def test_images_that_are_downloaded_later_are_found_however_many_there_are(root: Path) -> None:
    (root / "images" / "1.png").rename(root / "away.png")
    assert identity(root)["num_missing"] == 1
    (root / "away.png").rename(root / "images" / "1.png")
    assert identity(root)["num_missing"] == 0


def test_a_path_that_names_a_folder_or_a_pipe_is_not_opened(root: Path) -> None:
    (root / "a.json").write_text('[{"image": "folder"}, {"image": "pipe"}]', encoding="utf-8")
    (root / "images" / "folder").mkdir()
    os.mkfifo(root / "images" / "pipe")
    assert identity(root)["num_missing"] == 0


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 1}', b"[]", b"\xff"])
def test_damaged_cache_counts_as_none(root: Path, content: bytes) -> None:
    first = identity(root)
    for cached in (root.parent / "cache").iterdir():
        cached.write_bytes(content)
    assert identity(root) == first


def test_a_flipped_bit_in_the_cache_is_seen(root: Path) -> None:
    first = identity(root)
    for cached in (root.parent / "cache").iterdir():
        text = cached.read_bytes()
        cached.write_bytes(text.replace(first["annotations"].encode(), first["annotations"][::-1].encode()))
    assert identity(root) == first


def test_missing_annotation_file_is_refused_with_how_to_get_it(root: Path) -> None:
    (root / "a.json").unlink()
    with pytest.raises(DataError, match=r"a\.json: not found.*Download a\.json from the project page"):
        identity(root)


def test_hub_id_has_no_local_content() -> None:
    assert checkpoint_fingerprint("microsoft/phi-2", Path("unused")) == {}


def test_two_checkpoints_joined_by_a_plus_count_each_on_its_own(tmp_path: Path) -> None:
    assert checkpoint_fingerprint("openai/clip-vit-large-patch14+facebook/dinov2-large", tmp_path) == {}
    for name in ("clip", "dinov2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    both = f"{tmp_path}/clip+{tmp_path}/dinov2"
    before = checkpoint_fingerprint(both, tmp_path / "cache")
    assert [list(part["files"]) for part in before["parts"]] == [["config.json"]] * 2
    (tmp_path / "dinov2" / "config.json").write_text("other")
    assert checkpoint_fingerprint(both, tmp_path / "cache") != before
    mixed = checkpoint_fingerprint(f"org/clip+{tmp_path}/dinov2", tmp_path / "cache")["parts"]
    assert mixed[0] == {"id": "org/clip"} and "files" in mixed[1]


def test_a_checkpoint_folder_is_all_its_files_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    (folder / "sub" / "model.safetensors").write_bytes(b"x" * 200_000)
    (folder / ".cache").write_bytes(b"ignored")
    files = checkpoint_fingerprint(str(folder), tmp_path / "cache")["files"]
    assert list(files) == ["config.json", "sub/model.safetensors"]
    assert files["config.json"]["sha256"] == hashlib.sha256(b'{"hidden_size": 64}').hexdigest()
    assert files["sub/model.safetensors"] == {"size": 200_000, "sha256": hashlib.sha256(b"x" * 200_000).hexdigest()}


def test_weights_overwritten_in_place_are_other_weights_and_are_read_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"x" * 200_000)
    hashed: list[Path] = []
    read = fingerprint.hash_file
    monkeypatch.setattr(fingerprint, "hash_file", lambda path: (hashed.append(path), read(path))[1])
    first = [checkpoint_fingerprint(str(weights.parent), tmp_path / "cache") for _ in range(3)]
    assert first[0] == first[2] and len(hashed) == 1
    with weights.open("r+b") as file:
        file.write(b"y")
    assert checkpoint_fingerprint(str(weights.parent), tmp_path / "cache") != first[0]
    assert len(hashed) == 2


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


def test_names_are_in_order_and_each_there_once_however_many_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_JOINED", 7)
    monkeypatch.setattr(listing, "BLOCK", 5)
    given = [f"b/{number % 40}.jpg" for number in range(200)] + ["é.png", "\U0001f600.png", "a\0b", "", "half \ud800"]
    names = listing.Names.of(iter(given))
    assert [name for block in names.blocks() for name in block] == sorted(set(given[:-1]))
    assert len(names) == 44
    assert list(listing.Names.of([]).blocks()) == []


def test_blocks_and_threads_find_what_one_look_finds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (root / "images" / f"{number}.jpg").write_bytes(b"x" * number * 1000)
    (root / "images" / "folder").mkdir()
    records = [{"image": f"{number}.jpg"} for number in range(50)] + [{"image": "folder"}, {"image": "a\0b"}]
    (root / "a.json").write_text(json.dumps(records), encoding="utf-8")
    at_once = identity(root)
    assert (at_once["num_images"], at_once["num_missing"]) == (52, 11)
    monkeypatch.setattr(listing, "BLOCK", 7)
    monkeypatch.setattr(listing, "_SLOW_SECONDS", 0)
    assert identity(root) == at_once
    assert source_fingerprint(root, SOURCE, root / "another cache") == at_once


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_cache_is_read_anew(root: Path, damage: str) -> None:
    first = identity(root)
    for path in (root.parent / "cache").iterdir():
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes({"cut": content[:-9], "bit": content, "empty": b""}[damage])
    assert identity(root) == first


def test_an_image_that_cannot_be_read_is_missing_until_it_can(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not known for ever by a hash of nothing: a network's disk falters, permissions are set right."""
    readable = source_fingerprint(root, SOURCE, root / "another cache")
    read = listing.edges_of
    monkeypatch.setattr(listing, "edges_of", lambda path, size: None if path.endswith("2.png") else read(path, size))
    assert identity(root)["missing"] == ["2.png"]
    monkeypatch.setattr(listing, "edges_of", read)
    assert identity(root) == readable


def test_a_file_that_is_gone_when_it_is_read_has_no_content(tmp_path: Path) -> None:
    assert listing.edges_of(str(tmp_path / "gone.png"), 5) is None

"""A manifest proves a folder: every altered, missing or added file is named, and a crash never leaves half a file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinylmm.errors import IntegrityError, TinyLMMError
from tinylmm.store import integrity
from tinylmm.store.integrity import (
    check_files,
    check_folder,
    hash_folder,
    mark_complete,
    read_manifest,
    sync_folder,
    write_atomic,
    write_manifest,
)

CONTENT = {
    "spec.json": b'{"kind": "train"}',
    "metrics.jsonl": b'{"step": 1}\n{"step": 2}\n',
    "output/config.json": b"{}",
    "output/model.safetensors": bytes(range(256)) * 40,
    "output/samples/data-00000.arrow": b"ARROW1" + bytes(500),
    "output/empty.txt": b"",
}
FILES = [*CONTENT, "manifest.json", "COMPLETE"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished folder with one file of each kind."""
    folder = tmp_path / "train-0123456789abcdef"
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, {"kind": "train", "step": 7})
    mark_complete(folder)
    return folder


def test_hash_folder_lists_every_file_sorted_with_its_sha256_and_size(folder: Path) -> None:
    records = hash_folder(folder, skip=("manifest.json", "COMPLETE"))
    assert list(records) == sorted(CONTENT)
    assert records == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} for name, content in CONTENT.items()
    }


def test_a_known_record_is_taken_over_only_if_the_size_agrees(folder: Path) -> None:
    known = {"spec.json": {"sha256": "known", "size": 17}, "metrics.jsonl": {"sha256": "known", "size": 1}}
    records = hash_folder(folder, known)
    assert records["spec.json"]["sha256"] == "known"
    assert records["metrics.jsonl"]["sha256"] == hashlib.sha256(CONTENT["metrics.jsonl"]).hexdigest()


def test_a_finished_folder_has_no_problems_and_keeps_its_record(folder: Path) -> None:
    assert check_folder(folder) == []
    assert check_folder(folder, deep=False) == []
    assert read_manifest(folder)["step"] == 7
    assert sorted(read_manifest(folder)["files"]) == sorted(CONTENT)


def test_the_marker_is_the_sha256_of_the_manifest(folder: Path) -> None:
    expected = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert (folder / "COMPLETE").read_text().strip() == expected


@pytest.mark.parametrize("name", [name for name in FILES if CONTENT.get(name) != b""])
@pytest.mark.parametrize("where", [0.0, 0.5, 0.999], ids=["first", "middle", "last"])
def test_a_flipped_bit_is_found_and_its_file_named(folder: Path, name: str, where: float) -> None:
    content = bytearray(
        (folder / name).read_bytes().rstrip(b"\n") if name == "COMPLETE" else (folder / name).read_bytes()
    )
    content[int(where * len(content))] ^= 4
    (folder / name).write_bytes(content)
    problems = check_folder(folder)
    assert len(problems) == 1
    assert name in problems[0]


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_and_named(folder: Path, name: str, deep: bool) -> None:
    (folder / name).unlink()
    problems = check_folder(folder, deep)
    assert len(problems) == 1
    assert f"{folder / name} is missing" in problems[0]


@pytest.mark.parametrize("name", list(CONTENT))
def test_another_size_is_found_without_reading_the_file(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"x")
    assert check_folder(folder, deep=False) == [
        f"{folder / name} has {len(CONTENT[name]) + 1} bytes, manifest.json says {len(CONTENT[name])}."
    ]


def test_all_problems_are_reported_at_once(folder: Path) -> None:
    (folder / "spec.json").unlink()
    (folder / "output/config.json").write_bytes(b"[]")
    (folder / "output/added.bin").write_bytes(b"new")
    assert [Path(problem.split(" ")[0]).name for problem in check_folder(folder)] == [
        "config.json",
        "spec.json",
        "added.bin",
    ]


def test_a_file_added_outside_output_is_no_problem(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert check_folder(folder) == []


def test_a_file_replaced_by_a_link_is_found(folder: Path) -> None:
    (folder / "output/config.json").rename(folder.parent / "config.json")
    (folder / "output/config.json").symlink_to(folder.parent / "config.json")
    assert check_folder(folder) == [f"{folder / 'output/config.json'} is not a regular file any more."]


def test_a_missing_folder_is_a_problem(tmp_path: Path) -> None:
    assert check_folder(tmp_path / "no") == [f"{tmp_path / 'no'} is missing."]


@pytest.mark.parametrize("kind", ["file link", "folder link", "pipe"])
def test_only_regular_files_can_be_kept(tmp_path: Path, kind: str) -> None:
    (tmp_path / "inner").mkdir()
    odd = tmp_path / "inner" / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/etc/hostname" if kind == "file link" else "/etc")
    with pytest.raises(IntegrityError, match=re.escape(f"{odd} is not a regular file")):
        write_manifest(tmp_path, {})
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"a": {"sha256": 1, "size": 1}}}']
)
def test_what_is_no_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json is not a manifest"):
        read_manifest(tmp_path)
    assert len(check_files(tmp_path)) == 1


def test_writing_a_manifest_again_replaces_it_and_withdraws_the_marker(folder: Path) -> None:
    (folder / ".manifest.json.0000.tmp").write_text("of a killed write")
    (folder / "output/config.json").write_bytes(b'{"new": 1}')
    write_manifest(folder, {"step": 8}, skip=("metrics.jsonl",))
    assert check_folder(folder) == [f"{folder / 'COMPLETE'} is missing: the folder was not finished."]
    mark_complete(folder)
    assert check_folder(folder) == []
    assert sorted(read_manifest(folder)["files"]) == sorted(set(CONTENT) - {"metrics.jsonl"})


def test_sync_folder_accepts_nested_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/file").write_text("x")
    sync_folder(tmp_path, skip=("missing",))
    assert (tmp_path / "a/file").read_text() == "x" and (tmp_path / "a/b/c").is_dir()


def test_write_atomic_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "old" * 1000)
    write_atomic(tmp_path / "a.json", json.dumps({"é": 1}, ensure_ascii=False))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk_is_named_with_path_and_bytes_and_harms_nothing(small_disk: Path) -> None:
    target = small_disk / "run.json"
    write_atomic(target, "good")
    with pytest.raises(
        TinyLMMError, match=rf"disk is full: writing {target} needs 4,000,000 bytes, its disk has [\d,]+ free"
    ):
        write_atomic(target, "x" * 4_000_000)
    assert [(path.name, path.read_text()) for path in small_disk.iterdir()] == [("run.json", "good")]


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "fast"])
@pytest.mark.parametrize("content", ["é", b"\x00\xff"], ids=["text", "bytes"])
def test_a_written_file_has_the_permissions_that_the_umask_gives(
    tmp_path: Path, content: str | bytes, durable: bool
) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", content, durable)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_weights_of_a_published_folder_can_be_read_by_whom_the_umask_lets_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / "deep").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "deep/model.safetensors")
        write_manifest(tmp_path, {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"model.safetensors": 0o640, "manifest.json": 0o640}


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", 3)  # type: ignore[arg-type]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_longest_file_name_can_be_written(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("x" * 255), "content")
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_no_module_has_its_own_way_to_write_a_file_atomically() -> None:
    source = Path(integrity.__file__).parents[1]
    own = re.compile(
        r"tempfile\.(mkstemp|NamedTemporaryFile)|os\.(replace|rename)\(|(part|temporary|Path\(.*\))\.replace\("
    )
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if own.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"store/integrity.py"}

"""Images both trained on and asked about are found by content, under whatever name."""

from __future__ import annotations

import json
from pathlib import Path

from tinylmm.evaluation import overlap
from tinylmm.evaluation.overlap import annotated_images, overlapping_images


def test_only_equal_bytes_count_whatever_the_name(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    contents = {
        "train/a": b"one",
        "train/b": b"two",
        "train/c": b"longer",
        "ask/x": b"two",
        "ask/y": b"six",
        "ask/z": b"?",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read: list[str] = []
    real = overlap.hash_file
    monkeypatch.setattr(overlap, "hash_file", lambda path: read.append(path.name) or real(path))
    trained = [tmp_path / "train" / name for name in ("a", "b", "c", "missing")]
    asked = [tmp_path / "ask" / name for name in ("x", "y", "z", "missing")]
    assert overlapping_images(trained, asked) == [(tmp_path / "ask/x", tmp_path / "train/b")]
    assert set(read) == {"a", "b", "x", "y"}  # sizes rule the others out unread


def test_a_sources_images_are_those_its_records_name(tmp_path: Path) -> None:
    records = [{"id": "1", "image": "b.png"}, {"id": "2"}, {"id": "3", "image": ["a.png", "b.png"]}]
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert annotated_images(tmp_path, "train.json", "images") == [tmp_path / "images/a.png", tmp_path / "images/b.png"]

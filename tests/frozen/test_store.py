"""A store is laid out as before: names of files and folders, and the form of every record in it."""

from __future__ import annotations

from pathlib import Path

from tests.frozen.record import failed_stage, frozen, store_layout


def test_a_finished_run_leaves_what_it_left_before(tmp_path: Path) -> None:
    before, now = frozen("store_layout"), store_layout(tmp_path)
    assert list(now) == list(before)
    moved = [part for part in before if now[part] != before[part]]
    assert {part: now[part] for part in moved} == {part: before[part] for part in moved}, f"{moved} are not as before"


def test_a_failed_stage_leaves_what_it_left_before(tmp_path: Path) -> None:
    assert failed_stage(tmp_path) == frozen("failed_stage")

"""What other programs read stays as it is: `tinylmm plan --json`, a report's results.json; and how files are identified."""

from __future__ import annotations

from pathlib import Path

from tests.frozen.record import contents, frozen, plans, results


def test_plan_prints_the_same_json(tmp_path: Path) -> None:
    found = plans(tmp_path)
    assert list(found) == list(frozen("plans"))
    for name, plan in found.items():
        assert plan == frozen("plans")[name], name


def test_a_report_has_the_same_results(tmp_path: Path) -> None:
    assert results(tmp_path) == frozen("results")


def test_files_outside_the_store_are_identified_as_before(tmp_path: Path) -> None:
    assert contents(tmp_path) == frozen("contents")

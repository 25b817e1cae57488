"""A measurement refuses what it cannot measure in a sentence, before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cpu, reading, scale, serving, significance
from benchmarks import eval as engine

Main = Callable[[list[str]], int]
COUNTS: list[tuple[Main, str, str]] = [
    (significance.main, "--repetitions", "0"),
    (significance.main, "--runs", "0"),
    (significance.main, "--images", "-3"),
    (significance.main, "--seed", "-1"),
    (scale.main, "--sizes", "0"),
    (scale.main, "--pictures", "0"),
    (scale.main, "--sizes", "many"),
    (engine.main, "--images", "0"),
    (engine.main, "--questions", "0"),
    (engine.main, "--baseline", "0"),
    (engine.main, "--new-tokens", "0"),
    (engine.main, "--layers", "0"),
    (engine.main, "--size", "13"),
    (engine.main, "--width", "96"),
    (cpu.main, "--rounds", "0"),
    (reading.main, "--images", "0"),
    (reading.main, "--rounds", "0"),
    (cpu.main, "--steps", "none"),
    (serving.main, "--clients", "0"),
    (serving.main, "--baseline", "1"),
]


@pytest.mark.parametrize(("main", "name", "word"), COUNTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_number_that_measures_nothing_is_refused(
    main: Main, name: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, word])
    assert ended.value.code == 2
    assert f"argument {name}: is '{word}'; use a " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "name"),
    [
        (significance.main, "--out"),
        (scale.main, "--output"),
        (engine.main, "--out"),
        (serving.main, "--out"),
        (cpu.main, "--output"),
        (reading.main, "--out"),
    ],
)
def test_a_result_that_could_not_be_written_is_refused_before_hours_of_measuring(
    main: Main, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path, tmp_path / "nowhere/x.json"):
        with pytest.raises(SystemExit) as ended:
            main([name, str(place)])
        assert ended.value.code == 2 and "no file in a folder that is there" in capsys.readouterr().err


def test_data_is_made_up_in_a_folder_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scale.main(["--folder", str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "which is no folder" in capsys.readouterr().err

"""Cards are told by their driver's names, and what was measured of a machine takes their place."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from tinylmm.config.launch import LaunchSpec
from tinylmm.sizing.cards import Calibration, card_named, cards, gpu_names, save_calibration, this_machine


def test_every_card_that_a_run_may_name_is_in_the_table_with_its_source() -> None:
    assert {"auto", *cards()} == set(get_args(LaunchSpec.model_fields["gpu"].annotation))
    assert all(card.source and card.memory_bytes >= 24e9 for card in cards().values())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100_80"),
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
    ],
)
def test_a_card_is_told_by_its_drivers_name(name: str, key: str) -> None:
    card = card_named(name)
    assert card is not None and card.key == key


def test_a_card_in_no_table_is_not_guessed_at() -> None:
    assert card_named("NVIDIA T4") is None


def test_the_drivers_own_list_is_read(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   1\n")
    assert gpu_names(tmp_path) == ["NVIDIA H200"] * 2
    assert gpu_names(tmp_path / "none") == []


def test_what_was_measured_counts_for_that_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert this_machine([]) is None
    path = save_calibration(Calibration("cpu", 16e9, 1e11, 1e11, 1e10, 90.0))
    measured = this_machine([])
    assert measured is not None and (measured.matmul_flops, measured.images_per_s) == (1e11, 90.0)
    other = this_machine(["NVIDIA H200"])
    assert other is not None and other.key == "h200"
    path.write_text("half a li")
    assert this_machine([]) is None

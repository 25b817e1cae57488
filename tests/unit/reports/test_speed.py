"""What a report says of how a training ran: speeds from its rows, and what its launch chose."""

from __future__ import annotations

from tinylmm.reports.records import StageReport
from tinylmm.reports.speed import speed_words


def stage(**launched: object) -> StageReport:
    rows = ({"step": 1, "samples_per_s": 1.0, "peak_memory_gib": 2.0}, {"step": 2, "samples_per_s": 56.7})
    return StageReport("train", "finetune", "0" * 64, "train-0", "run", 9.0, metrics=rows, launched=launched)


def test_what_was_left_open_and_chosen_is_told() -> None:
    chosen = {"row_tokens": 20480, "sharding": 2, "checkpointing": True, "graphs_compiled": 4}
    assert speed_words(stage(**chosen)) == [
        "57 samples/s",
        "2.00 GiB peak memory",
        "rows of 20,480 positions",
        "ZeRO-2",
        "activations computed again",
        "4 compiled graphs",
    ]


def test_stages_from_before_say_nothing_of_it() -> None:
    assert speed_words(stage()) == ["57 samples/s", "2.00 GiB peak memory"]
    assert speed_words(stage(row_tokens=None, sharding=None, checkpointing=False)) == speed_words(stage())

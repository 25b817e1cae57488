"""What ranks do together, in two real processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import distributed, multiprocessing

from tinylmm.training.ranks import in_turn, over_ranks


def go_through(rank: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    with in_turn():
        inside = folder / "inside"
        inside.mkdir()  # fails if another rank is in
        time.sleep(0.05)
        inside.rmdir()
        with (folder / "order").open("a") as order:
            order.write(f"{rank}\n")
    with in_turn(needed=False):
        (folder / f"behind-{rank}").touch()
        distributed.barrier()
    distributed.destroy_process_group()


def test_ranks_of_a_machine_go_through_a_block_one_after_the_other(tmp_path: Path) -> None:
    multiprocessing.spawn(go_through, (tmp_path,), nprocs=3)
    assert (tmp_path / "order").read_text().split() == ["0", "1", "2"]
    assert len(list(tmp_path.glob("behind-*"))) == 3


def test_one_process_has_nobody_to_wait_for() -> None:
    with in_turn():
        assert not distributed.is_initialized()


def add_up(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    (folder / f"rank-{rank}").write_text(str(over_ranks([1.0 + rank, 10.5], 5.0 - rank)))
    distributed.destroy_process_group()


def test_numbers_of_all_ranks_are_added_and_the_largest_found(tmp_path: Path) -> None:
    multiprocessing.spawn(add_up, (tmp_path,), nprocs=2)
    assert {path.read_text() for path in tmp_path.glob("rank-*")} == {"([3.0, 21.0], 5.0)"}
    assert over_ranks([1.0], 2.0) == ([1.0], 2.0)

"""Which runs of a store are those of a sweep: by their specs, as its words compose them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylmm.errors import UserError
from tinylmm.store.runs import RunRecord, read_runs

HOW_NOT_WHAT = ("name", "store", "launch", "tracking", "trust")
"""Fields of a spec that say how a run is made or called."""
ENDED = ("done", "waiting")


def runs_of_sweep(store_root: Path, specs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the runs with these specs, in their order; of several the newest that has ended.

    Args:
        specs: plain JSON, as `RunRecord.spec`.

    Raises:
        UserError: none of them has ended.
    """
    ended = [run for run in read_runs(store_root) if run.status in ENDED]
    found = [next((run.name for run in ended if _asks_for(run, spec)), None) for spec in specs]
    names = [name for name in found if name is not None]
    if not names:
        raise UserError(
            f"no run in {store_root} that has ended is one of the {len(specs)} that these words ask for. Give them to "
            "`tinylmm-train` first (with -m for a sweep), or name runs as `tinylmm runs` lists them."
        )
    return list(dict.fromkeys(names))


def _asks_for(run: RunRecord, spec: Mapping[str, Any]) -> bool:
    """Whether a run was asked for by a spec; fields that a later version added say nothing about an older record."""
    return all(
        _agree(run.spec[key], value) for key, value in spec.items() if key in run.spec and key not in HOW_NOT_WHAT
    )


def _agree(stored: Any, asked: Any) -> bool:
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        return stored.keys() <= asked.keys() and all(_agree(value, asked[key]) for key, value in stored.items())
    return bool(stored == asked)

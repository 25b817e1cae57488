"""A picture of what was measured: our step beside the plain way's, the techniques, where the device's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_results(record: dict[str, Any], path: Path) -> None:
    """Draw the sections that there are."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = record["rows"]
    parts = [
        (draw, found)
        for draw, sections in (
            (_steps, ("steps",)),
            (_techniques, ("techniques",)),
            (_shares, ("kernels", "generation")),
            (_planner, ("planner",)),
        )
        if (found := [row for row in rows if row["section"] in sections])
    ]
    columns = min(2, max(1, len(parts)))
    lines = -(-max(1, len(parts)) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(7 * columns, 4.5 * lines), layout="constrained", squeeze=False
    )
    versions = record["versions"]
    figure.suptitle(f"{record['device']}, torch {versions['torch']}, transformers {versions['transformers']}")
    for panel in panels.flat[len(parts) :]:
        panel.set_axis_off()
    for panel, (draw, found) in zip(panels.flat, parts, strict=False):
        draw(panel, found)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _steps(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    axis.set(title="Training, samples/s (log)", yscale="log")
    cases = list(dict.fromkeys((row["llm"], row["stage"]) for row in rows))
    for place, side in enumerate(("ours", "plain")):
        found = {(row["llm"], row["stage"]): row["samples_per_s"] for row in rows if row["side"] == side}
        known = [number for number, case in enumerate(cases) if case in found]
        bars = axis.bar([number + 0.4 * place for number in known], [found[cases[n]] for n in known], 0.4, label=side)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    axis.set_xticks(
        [number + 0.2 for number in range(len(cases))], [f"{llm}\n{stage}" for llm, stage in cases], fontsize=7
    )
    axis.legend()


def _techniques(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    axis.set(title="Each technique: on against off (1 = equal)")
    names = [f"{row['technique']}, {row['stage']}" for row in rows]
    places = list(range(len(rows)))
    axis.barh([place + 0.2 for place in places], [row["times_as_fast"] for row in rows], 0.4, label="speed")
    axis.barh([place - 0.2 for place in places], [row["memory_ratio"] for row in rows], 0.4, label="peak memory")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(places, names, fontsize=7)
    axis.legend()


def _shares(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    axis.set(title="Share of the device's busy time; idle share of the whole", ylim=(0, 1))
    rows = [row for row in rows if "shares" in row]
    names = [row.get("stage") or f"answers,\n{row['precision']},\n{row['way']}" for row in rows]
    bottom = [0.0] * len(rows)
    for kind in dict.fromkeys(kind for row in rows for kind in row["shares"]):
        heights = [row["shares"].get(kind, 0.0) for row in rows]
        axis.bar(names, heights, 0.5, bottom=bottom, label=kind)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axis.plot(names, [row["idle_share"] for row in rows], "kx", label="idle")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _planner(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    axis.set(title="tinylmm plan: predicted over measured (1 = right)")
    names = [f"{row['llm']}\n{row['stage']}" for row in rows]
    for key, mark in (("memory_ratio", "o"), ("time_ratio", "s")):
        known = [(name, row[key]) for name, row in zip(names, rows, strict=True) if row[key] is not None]
        if known:
            axis.plot(*zip(*known, strict=True), mark, label=key.replace("_", " "))
    axis.axhline(1, color="black", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend()

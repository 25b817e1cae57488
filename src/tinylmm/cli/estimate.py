"""The estimate of a plan in the terminal: a table of trainings, one of their memory by launch, and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylmm.planning.advice import amount

IN_DETAIL = 4
"""Trainings up to which each is spoken of part by part; of a larger sweep, only what does not fit."""
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_estimate(console: Console, estimate: dict[str, Any]) -> None:
    """Print `estimate_record`'s JSON."""
    rows = estimate["stages"]
    if rows:
        console.print(_trainings(rows))
        console.print(_memory(rows))
        for row in rows:
            _say_of(console, row, _name(row, rows), len(rows) <= IN_DETAIL)
        console.print(_total(estimate), highlight=False)
    for kind, sentences in (("assumed", estimate["assumptions"]), ("unknown", estimate["unknown"])):
        for sentence in sentences:
            console.print(f"{kind}: {sentence}", highlight=False)


def _trainings(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="What each training takes; ~ is assumed", title_justify="left")
    for heading in ("training", "trained", "tokens", "FLOP", "steps", "s/step", "hours", "money"):
        table.add_column(heading, no_wrap=heading != "training")
    for row in rows:
        total, trained = (sum(part[key] for part in row["parameters"].values()) for key in ("total", "trained"))
        flops = sum(part["forward"] + part["backward"] for part in row["flops_a_sample"].values())
        assumed = "~" if row["lengths"].startswith("assumed") else ""
        table.add_row(
            _name(row, rows),
            f"{_short(trained)} of {_short(total)}",
            f"{assumed}{row['tokens_a_sample']:.0f}",
            _short(flops),
            "?" if row["steps"] is None else f"{assumed}{row['steps']}",
            *(_number(row[key]) for key in ("seconds_a_step", "hours", "money")),
        )
    return table


def _memory(rows: list[dict[str, Any]]) -> Table:
    """Launches that rows have in common stand in one column."""
    names = list(dict.fromkeys(name for row in rows for name in row["memory"]))
    table = Table(
        "training",
        *names,
        title="Memory of one device; * as this run is launched, ! more than there is",
        title_justify="left",
    )
    for row in rows:
        cells = []
        for name in names:
            memory = row["memory"].get(name)
            colour = "" if memory is None else {True: "green", False: "red", None: ""}[memory["fits"]]
            said = "" if memory is None else amount(memory["total"]) + (" *" if name == row["launch"] else "")
            said += " !" if memory is not None and memory["fits"] is False else ""
            cells.append(Text(said, colour))
        table.add_row(_name(row, rows), *cells)
    return table


def _name(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The training's name, with its digest where another of the sweep is called so too."""
    alone = sum(other["stage"] == row["stage"] for other in rows) == 1
    return str(row["stage"]) if alone else f"{row['stage']} {row['digest'][:8]}"


def _say_of(console: Console, row: dict[str, Any], name: str, in_detail: bool) -> None:
    if not in_detail and not row["advice"]:
        return
    console.print(f"{name}:", style="bold", highlight=False)
    if in_detail:
        for sentence in _details(row):
            console.print(f"  {sentence}", highlight=False)
    if row["advice"]:
        console.print(f"  does not fit; {row['advice']}", style="yellow", highlight=False)
    if row["device"] is None and row["fitting_cards"]:
        console.print(f"  fits on: {', '.join(row['fitting_cards'])}", highlight=False)


def _details(row: dict[str, Any]) -> Iterator[str]:
    for name, size in row["parameters"].items():
        flops = row["flops_a_sample"][name]
        once = ", run once: its features are kept" if name == "vision_tower" and row["features_cached"] else ""
        yield (
            f"{name}: {_short(size['trained'])} of {_short(size['total'])} parameters trained, "
            f"{_short(flops['forward'])} FLOP forward and {_short(flops['backward'])} backward{once}"
        )
    own = row["memory"][row["launch"]]
    terms = ", ".join(f"{k} {amount(v)}" for k, v in own.items() if k not in ("total", "fits") and v)
    disk = ", ".join(f"{name.replace('_', ' ')} {amount(size)}" for name, size in row["disk"].items() if size)
    chosen = ", ".join(f"{name} {value}" for name, value in row["chosen"].items())
    yield f"launched with {row['launched']}" + (f" (chosen: {chosen})" if chosen else "")
    yield f"memory of {row['launch']}: {terms}"
    yield f"disk: {disk}"


def _total(estimate: dict[str, Any]) -> str:
    totals, device = estimate["totals"], estimate["stages"][0]["device"]
    shapes = ", ".join(dict.fromkeys(source for row in estimate["stages"] for source in row["shapes"].values()))
    disk = f"{amount(totals['disk'])} of disk; shapes: {shapes}"
    if device is None:
        named = "launch.gpu (h100, h200, a100_80, ...), or measure this machine with tinylmm doctor --calibrate"
        return f"still to do: {disk}. For hours and money name a card with {named}."
    money = "" if totals["money"] is None else f", {totals['money']:,.2f} in money"
    hours = "unknown" if totals["hours"] is None else _number(totals["hours"])
    return (
        f"still to do: {hours} hours, {_number(totals['gpu_hours'])} device-hours{money} on {device['title']} "
        f"({device['source']}), {disk}"
    )


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "?"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01"


def _short(number: float) -> str:
    """Three digits and a unit of thousands: 2.78G, 9.51M."""
    size, unit = next((row for row in UNITS if number >= row[0]), (1.0, ""))
    return f"{number / size:.3g}{unit}" if number / size < 999.5 else f"{number / size:.0f}{unit}"

"""How a report says things: numbers, durations, and the one sentence that sums a run up. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tinylmm.reports.records import RunReport, Score

ABSENT = "–"
GROUP_TITLES = {
    "llm": "LLM",
    "vision_tower": "Vision tower",
    "connector": "Connector",
    "recipe": "Recipe",
    "data": "Data",
}


def number(value: float | None, digits: int = 1) -> str:
    """A number with fixed digits, or a dash for what was not measured."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def points(value: float) -> str:
    """A difference with its sign; the minus is the typographic one, as wide as the plus."""
    return f"{value:+.1f}".replace("-", "−")


def span(interval: tuple[float, float] | None) -> str:
    """An interval's two ends, or a dash where there is none."""
    return ABSENT if interval is None else f"{interval[0]:.1f}–{interval[1]:.1f}"


def duration(seconds: float | None) -> str:
    """Seconds in the largest two units that say something: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(iso: str | None) -> str:
    """An ISO time to the minute."""
    return iso[:16].replace("T", " ") if iso else ABSENT


def words(label: str) -> str:
    """A category's or metric's key as words."""
    return label.replace("_", " ")


def verdict(run: RunReport) -> str:
    """One sentence: what the last evaluated model scores against blind and chance, or how far the run came."""
    progress = _progress(run)
    if run.headline is None:
        return progress or "The run is done; it had no evaluation."
    stage, score = run.headline
    unit = " %" if score.is_share else ""
    named = ", ".join([words(score.title), *(score.protocol.departs if score.protocol else ())])
    subject = f"{score.value:.1f} % of {score.count:,} held-out questions ({named}) are answered right after {stage}"
    if not score.is_share:
        subject = f"{words(score.metric)} on {named} is {score.value:.1f} after {stage}"
    against = []
    if score.blind is not None:
        against.append(_against(score, score.blind, "the same model without the image", unit, score.beyond_blind))
    if score.chance is not None:
        against.append(_against(score, score.chance, "chance", unit, score.beyond(score.chance)))
    sentence = f"{subject}, {' and '.join(against)}" if against else subject
    return f"{sentence}. {progress}" if progress else f"{sentence}."


def _against(score: Score, other: float, what: str, unit: str, clear: bool) -> str:
    gap = score.value - other
    if not clear:
        return f"not clearly different from {what} ({other:.1f}{unit})"
    return f"{abs(gap):.1f} points {'above' if gap >= 0 else 'below'} {what} ({other:.1f}{unit})"


def _progress(run: RunReport) -> str:
    done = sum(stage.finished for stage in run.stages)
    if run.record.status == "failed":
        failed = next((stage for stage in run.stages if stage.status == "failed"), None)
        where = f" in stage {failed.name}" if failed else ""
        reason = f": {failed.error.splitlines()[-1]}" if failed and failed.error else "."
        return f"The run failed{where} after {done} of {len(run.stages)} stages{reason}"
    if run.record.status != "done":
        state = {"running": "is still running", "waiting": "waits for a judge"}.get(run.record.status, "was stopped")
        return f"The run {state}: {done} of {len(run.stages)} stages are done."
    return ""


def facts(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The choices that name a run, from the dump of its spec: parts, recipe, data, seed."""
    rows = []
    for key, title in GROUP_TITLES.items():
        part = spec.get(key) or {}
        name = str(part.get("name", ABSENT))
        if part.get("pretrained") and part.get("init", "pretrained") == "pretrained":
            name += f" ({part['pretrained']})"
        elif part.get("init"):
            name += {"built": " (trained here from nothing)", "random": " (random)"}.get(part["init"], "")
        rows.append((title, name))
    return [*rows, ("Seed", str(spec.get("seed", ABSENT)))]


def _data(data: Any) -> str:
    """A stage's source, or its mixture with weights."""
    return ", ".join(f"{name} × {weight:g}" for name, weight in data.items()) if isinstance(data, dict) else str(data)


@dataclass(frozen=True)
class RecipeRow:
    """One training stage of a recipe in words: what it trains, on what, how."""

    name: str
    data: str
    trains: str
    lr: str
    batch: str
    length: str


def recipe_rows(spec: Mapping[str, Any]) -> list[RecipeRow]:
    """One row a training stage of the recipe, from the dump of a run's spec."""
    stages = (spec.get("recipe") or {}).get("stages") or {}
    return [
        RecipeRow(
            name=name,
            data=_data(stage.get("data", ABSENT)),
            trains=", ".join(_tuned(stage.get("tune") or {})) or "nothing",
            lr=_rates(stage.get("lr")),
            batch=str(stage.get("global_batch", ABSENT)),
            length=f"{stage['max_steps']} steps" if stage.get("max_steps") else _epochs(stage.get("epochs", 1)),
        )
        for name, stage in stages.items()
    ]


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'' if count == 1 else 's'}"


def _part(key: str) -> str:
    return "LLM" if key == "llm" else words(key)


def _tuned(tune: dict[str, Any]) -> Iterable[str]:
    for part, how in tune.items():
        if isinstance(how, dict):
            yield f"{_part(part)} {_how(how)}"
        elif how != "frozen":
            yield _part(part) if how == "full" else f"{_part(part)} ({how})"


def _how(how: dict[str, Any]) -> str:
    """A part that is trained neither whole nor not at all: from a layer on, or through an adapter."""
    if how.get("from_layer") is not None:
        return f"from layer {how['from_layer']}"
    kind = next((kind for kind in ("lora", "qlora") if how.get(kind)), None)
    return f"({kind}, rank {how[kind].get('r')})" if kind else "in part"


def _rates(rate: Any) -> str:
    if isinstance(rate, dict):
        return ", ".join(f"{_part(part)} {value:g}" for part, value in rate.items())
    return f"{rate:g}" if rate is not None else ABSENT

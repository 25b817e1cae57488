"""What papers, model cards and READMEs report, with source and unit, to be read beside one's own figures. No torch.

The numbers lie in published.yaml, as their sources print them; papers mix units (POPE as F1 or as accuracy), so a figure
says which of ours it may be compared with, or that its source does not say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from tinylmm.evaluation.protocol import Protocol
from tinylmm.reports.records import RunReport
from tinylmm.reports.wording import number, words


@dataclass(frozen=True)
class Published:
    """One figure of a publication.

    Attributes:
        benchmark: name in our registry.
        value: as printed, in `unit`.
        unit: of what, over which split, by which judge.
        metric: our figure that it corresponds to; None where the source leaves that open.
        source: publication and table.
        model: what the source calls the model.
        llm, vision_tower, connector: our parts that make it; None where we have none.
        recipes: our recipes that train it, the closest first; empty where we have none.
    """

    benchmark: str
    value: float
    unit: str
    metric: str | None
    source: str
    model: str
    llm: str | None
    vision_tower: str | None
    connector: str | None
    recipes: tuple[str, ...]


@cache
def published_results() -> tuple[Published, ...]:
    """Every figure of published.yaml, in its order."""
    text = resources.files("tinylmm.reports").joinpath("published.yaml").read_text(encoding="utf-8")
    return tuple(_figures(yaml.safe_load(text)))


def published_for(
    llm: str, vision_tower: str, recipe: str, benchmark: str | None = None, connector: str = "mlp"
) -> list[Published]:
    """Figures published of a model of these parts and this recipe, on one benchmark or on all."""
    return [
        figure
        for figure in published_results()
        if (figure.llm, figure.vision_tower, figure.connector) == (llm, vision_tower, connector)
        and recipe in figure.recipes
        and benchmark in (None, figure.benchmark)
    ]


def published_grid(run: RunReport) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what is published of a run's parts, for the benchmarks that the run was evaluated on.

    Ours is the figure that the published one corresponds to, after the last stage; where the source leaves open which
    one that is, the benchmark's first. What sets it apart from the published protocol stands beside it: a sample of the
    questions, another split or rule, prompts without OCR tokens. No rows where nothing is published.
    """
    llm, tower, recipe, connector = (
        str((run.record.spec.get(part) or {}).get("name")) for part in ("llm", "vision_tower", "recipe", "connector")
    )
    rows = []
    for name, evaluation in run.last_evaluations.items():
        ours = {row.metric: row.last.value for row in run.score_rows() if row.name == name}
        first = next(iter(ours.values()), None)
        for figure in published_for(llm, tower, recipe, evaluation.benchmark, connector):
            mine = first if figure.metric is None else ours.get(figure.metric)
            cells = [figure.unit, f"{number(mine)}{_apart(evaluation.protocol)}", number(figure.value)]
            rows.append([words(name), figure.source, *cells])
    return ["benchmark", "published by", "unit", "ours", "published"], rows


def _apart(protocol: Protocol) -> str:
    split = [f"split {protocol.split}"] if protocol.split else []
    judge = [f"judged by {protocol.judge}"] if protocol.judge else []
    apart = [*protocol.departs, *split, *judge]
    return f" ({', '.join(apart)})" if apart else ""


def _figures(content: dict[str, Any]) -> Iterator[Published]:
    for row in content["results"]:
        source = content["sources"][row["source"]]
        for benchmark, value in row["values"].items():
            meaning = source.get("benchmarks", {}).get(benchmark) or content["benchmarks"][benchmark]
            yield Published(
                benchmark=benchmark,
                value=float(value),
                unit=meaning["unit"],
                metric=meaning["metric"],
                source=source["title"],
                model=row["model"],
                llm=row["llm"],
                vision_tower=row["vision_tower"],
                connector=row["connector"],
                recipes=tuple(row["recipes"]),
            )

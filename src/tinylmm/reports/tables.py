"""The score tables as Markdown, for the terminal, and as tidy rows. No torch.

All three are made of what scores.json files say and nothing else. One run: a row a metric, a column a training stage.
Several runs: a row a run, as in a paper's ablation table.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from tinylmm.errors import printable
from tinylmm.reports.published import published_grid
from tinylmm.reports.records import Report, RunReport, ScoreRow
from tinylmm.reports.wording import ABSENT, duration, facts, number, span, verdict, words

MAX_COMPARED_CATEGORIES = 8
"""With more, a comparison shows scores over all questions only: the table would not fit a terminal."""


def result_rows(report: Report) -> list[dict[str, Any]]:
    """Every score of every run as one tidy row, with the evaluated training stage and the 95 % interval."""
    return [
        {
            "run": run.name,
            "stage": evaluation.stage,
            "benchmark": score.benchmark,
            "metric": score.metric,
            "value": score.value,
            "blind": score.blind,
            "chance": score.chance,
            "count": score.count,
            "interval": score.interval(),
        }
        for run in report.runs
        for evaluation in run.evaluations
        for score in evaluation.scores
    ]


def score_grid(run: RunReport) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one run's scores: metric, after each stage, the last one's 95 % interval, blind and chance, n."""
    stages = run.scored_stages
    header = ["metric", *(f"after {stage}" for stage in stages), "95 %", "blind", "chance", "n"]
    rows = []
    for row in run.score_rows():
        values = [number(row.by_stage[stage].value) if stage in row.by_stage else ABSENT for stage in stages]
        last = row.last
        sure = [span(last.interval()), number(last.blind), number(last.chance), f"{last.count:,}"]
        rows.append([row_label(run, row), *values, *sure])
    return header, rows


def compare_grid(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of several runs' last scores: a row a run, after which stage, a column a metric."""
    last = {run.name: {(r.benchmark, r.metric): r.last for r in run.score_rows()} for run in report.runs}
    keys = list(dict.fromkeys(key for scores in last.values() for key in scores))
    if len(keys) > MAX_COMPARED_CATEGORIES:
        keys = [key for key in keys if "/" not in key[1]]
    one = len({benchmark for benchmark, _ in keys}) == 1
    header = ["run", "after"]
    for benchmark, metric in keys:
        label = words(metric.partition("/")[2] or metric)
        header.append(label if one else f"{words(benchmark)} {label}")
    rows = []
    for run in report.runs:
        scores = [last[run.name].get(key) for key in keys]
        after = run.scored_stages[-1] if run.scored_stages else ABSENT
        rows.append([run.name, after, *(number(score.value if score else None) for score in scores)])
    return header, rows


MAX_LABEL_WIDTH = 24
"""Characters of a column that a narrow terminal leaves whole."""


def row_label(run: RunReport, row: ScoreRow) -> str:
    """What a score row is called; the benchmark is named where the run has several."""
    label = words(row.last.label)
    several = len({evaluation.benchmark for evaluation in run.evaluations}) > 1
    return f"{words(row.benchmark)}: {label}" if several else label


def render_scores(report: Report) -> Table:
    """The table that ends a run in the terminal."""
    single = len(report.runs) == 1
    header, rows = score_grid(report.runs[0]) if single else compare_grid(report)
    percent = all(score.value <= 100 for run in report.runs for e in run.evaluations for score in e.scores)
    unit = " in %" if percent else ""  # MME counts points
    title = f"{report.runs[0].name}: scores{unit}" if single else f"{len(report.runs)} runs: last scores{unit}"
    # Text objects, not strings: a category named "[red]" is a name, not rich markup
    table = Table(title=Text(title), caption=Text(verdict(report.runs[0])) if single else None, title_justify="left")
    table.caption_justify = "left"
    text_columns = 1 if single else 2
    for index, name in enumerate(header):  # a narrow terminal folds the words of headers, never a figure
        width = max([len(cells[index]) for cells in rows], default=0)
        justify: Literal["left", "right"] = "left" if index < text_columns else "right"
        table.add_column(Text(name), justify=justify, min_width=min(width, MAX_LABEL_WIDTH))
    metrics = [row.metric for row in report.runs[0].score_rows()] if single else []
    for index, cells in enumerate(rows):
        overall = single and "/" not in metrics[index]
        ends_group = overall and index + 1 < len(metrics) and "/" in metrics[index + 1]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if overall else "", end_section=ends_group)
    return table


def render_markdown(report: Report) -> str:
    """The report in short, for a pull request or a notebook."""
    blocks = []
    if len(report.runs) > 1:
        blocks += [f"# {len(report.runs)} runs", markdown_table(*compare_grid(report), text_columns=2)]
    for run in report.runs:
        blocks.append(f"{'#' if len(report.runs) == 1 else '##'} {escape_markdown(run.name)}")
        blocks.append(escape_markdown(verdict(run)))
        if run.evaluations:
            blocks.append(markdown_table(*score_grid(run)))
            blocks.append(
                "In % (MME: points). 95 %: the last model's interval; blind: the last model asked without the image; "
                "chance: a uniform guess among the options."
            )
        header, rows = published_grid(run)
        if rows:
            blocks.append("Published of the same parts and recipe, each in its source's own unit:")
            blocks.append(markdown_table(header, rows, text_columns=3))
        blocks.append("\n".join(f"- {escape_markdown(note)}" for note in run.notes))
        blocks.append(
            markdown_table(["part", "choice"], [list(fact) for fact in facts(run.record.spec)], text_columns=2)
        )
        stages = [[s.name, s.kind, s.digest[:12], s.status, duration(s.seconds)] for s in run.stages]
        blocks.append(markdown_table(["stage", "kind", "digest", "status", "time"], stages, text_columns=4))
        blocks.append(_fenced(run.command))
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A GitHub-flavoured table: the first `text_columns` left, the others right."""
    lines = [header, [":--" if index < text_columns else "--:" for index in range(len(header))], *rows]
    cells = [[cell if index == 1 else escape_markdown(cell) for cell in line] for index, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def escape_markdown(text: str) -> str:
    """`text` such that Markdown shows it as it is: no markup, HTML, link, mention or formula, no table cell or line begun."""
    plain = " ".join(printable(" ".join(text.split())).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)
    # GitHub makes links of bare addresses, mentions of @names and formulas of $...$, which no backslash prevents
    plain = plain.replace("@", "&#64;").replace("$", "&#36;").replace("://", "&#58;//")
    plain = re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:-1]}&#46;", plain)
    return re.sub(r"^(\d{1,9})?([-+=.)])(?=\s|$|[-=])", r"\1\\\2", plain)


def _fenced(text: str) -> str:
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{text}\n{fence}"

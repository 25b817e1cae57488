"""A study's tables: for the terminal and Markdown, as LaTeX, and as CSV. No torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from tinylmm.errors import printable
from tinylmm.reports.compare import p_text
from tinylmm.reports.doubt import Estimate
from tinylmm.reports.effects import Contrast, Findings
from tinylmm.reports.published import Published
from tinylmm.reports.study import Column, Study
from tinylmm.reports.wording import ABSENT, duration, number, points, span, words

NOTE = (
    "Mean over seeds with its 95 % interval over seeds and questions (whole images). Cells that share a letter cannot be told "
    "apart (all pairs, corrected by Holm)."
)
ONE_SEED = (
    "one seed: its seed noise is not in the interval; letters tell this model from others, not its choices from theirs."
)


def study_grid(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a sweep: a row a cell, named by its factors; per column the mean, its interval and its letters."""
    study = findings.study
    letters = {id(column): findings.letters(column) for column in study.columns}
    header = [*(factor.title for factor in study.factors.varying), "seeds"]
    for column in study.columns:
        header += [column.title, "95 %", "alike"]
    rows = []
    for place, cell in enumerate(study.cells):
        row = [*cell.levels, str(len(cell.runs))]
        for column in study.columns:
            found = column.means.get(place)
            alike = letters[id(column)].get(place, ABSENT) if len(column.cells) > 1 else ABSENT
            row += [_mean(found) + _fewer(study, column, place), span(found.interval if found else None), alike]
        rows.append(row)
    return header, rows


def _mean(found: Estimate | None) -> str:
    return ABSENT if found is None else f"{number(found.value)}{'' if found.seeds_known else ' *'}"


def _fewer(study: Study, column: Column, place: int) -> str:
    """Where not every run of a cell has the figure, how many have."""
    have, runs = len(column.runs.of_cell(place)), len(study.cells[place].runs)
    return f" ({have} of {runs} seeds)" if 0 < have < runs else ""


def seed_lines(study: Study) -> list[str]:
    """What is known of the noise of seeds: its size where a cell has several, and of each other cell the nearest that has."""
    lines = []
    for column in study.columns:
        several = [cell for cell in column.cells if len(column.runs.of_cell(cell)) > 1]
        if several:
            spreads = [column.runs.spread(cell) or 0.0 for cell in several]
            middle = sorted(spreads)[len(spreads) // 2]
            lines.append(
                f"{column.title}: seeds alone move a run by {number(middle, 2)} (standard deviation; median of "
                f"{len(several)} cells, {number(min(spreads), 2)} to {number(max(spreads), 2)})."
            )
            lines += [_unknown(study, column, cell) for cell in column.cells if cell not in several]
    if nowhere := [
        column.title for column in study.columns if all(len(column.runs.of_cell(c)) < 2 for c in column.cells)
    ]:
        whose = "" if len(nowhere) == len(study.columns) else f"{', '.join(nowhere)}: "
        lines.append(f"{whose}every cell has one seed, so the noise of seeds is unknown; run more (seed=0,1,2).")
    return lines


def _unknown(study: Study, column: Column, cell: int) -> str:
    what = f"{column.title}, {study.label(cell)}: one seed, so its seed noise is unknown"
    noise = column.seed_noise(study, cell)
    assert noise is not None, "other cells have several"
    return f"{what}; the nearest cell that has several, {study.label(noise[1])}, has {number(noise[0], 2)}."


def effect_grid(contrasts: Sequence[Contrast], several: bool) -> tuple[list[str], list[list[str]]]:
    """Header and cells of main effects or interactions."""
    header = ["factor", "change", *(["figure"] if several else []), "difference", "95 %", "p", "matched"]
    rows = []
    for one in contrasts:
        low, high = one.found.interval
        mark = "" if one.found.seeds_known else " *"
        figure = [one.column.title] if several else []
        sure = [f"{points(low)} to {points(high)}", p_text(one.corrected), str(one.matched)]
        rows.append([" × ".join(one.what), one.change, *figure, f"{points(one.found.value)}{mark}", *sure])
    return header, rows


def published_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what is published of the cells: ours, theirs, and the difference where both are the same figure."""
    titles = [factor.title for factor in study.factors.varying]
    header = [*titles, "figure", "published by", "unit", "ours", "95 %", "published", "ours less published"]
    rows = []
    for place, cell in enumerate(study.cells):
        for column in study.columns:
            found = column.means.get(place)
            for figure in study.published(place, column) if found else ():
                assert found is not None
                apart = ABSENT if figure.metric is None else points(found.value - figure.value)
                own = [number(found.value), span(found.interval), number(figure.value), apart]
                rows.append([*cell.levels, column.title, figure.source, figure.unit, *own])
    return header, rows


def cost_grid(study: Study) -> tuple[list[str], list[list[str]]]:
    """Header and cells of what a model of each cell takes to train, beside the first column's mean."""
    header = ["no.", *(factor.title for factor in study.factors.varying), "training of one model"]
    header += [column.title for column in study.columns[:1]] + ["front"]
    front = set(pareto_front(study))
    rows = []
    for place, cell in enumerate(study.cells):
        means = [_mean(column.means.get(place)) for column in study.columns[:1]]
        time = duration(study.training_seconds(place))
        rows.append([str(place + 1), *cell.levels, time, *means, "yes" if place in front else ""])
    return header, rows


def pareto_front(study: Study) -> list[int]:
    """Cells of which no other trains faster and scores as well (first column), the fastest first."""
    if not study.columns:
        return []
    means = study.columns[0].means
    timed = [
        (seconds, -means[cell].value, cell) for cell in means if (seconds := study.training_seconds(cell)) is not None
    ]
    front: list[int] = []
    for _, lost, cell in sorted(timed):
        if not front or -lost > means[front[-1]].value:
            front.append(cell)
    return front


@dataclass(frozen=True)
class Section:
    """A part of a study's report: sentences, a table, sentences."""

    title: str
    before: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int
    after: tuple[str, ...]


def study_sections(findings: Findings) -> list[Section]:
    """The study's tables in their order; those with nothing in them are left out."""
    study, factors = findings.study, len(findings.study.factors.varying)
    several = len(study.columns) > 1
    power = [line for column in study.columns for line in findings.power_lines(column)]
    matched = "Differences over matched cells: combinations of the other factors that have both levels, averaged."
    number_of = len(findings.effects) + len(findings.interactions)
    correction = [f"p is corrected for {number_of} comparisons (Holm)."] if number_of > 1 else []
    both = "By how much one factor's difference changes with the other's level."
    published = "Ours less published stands only where both are the same figure; units are the sources' own."
    below = [NOTE, *([f"* {ONE_SEED}"] if _any_alone(study) else []), *_protocols(study), *study.notes]
    sections = [
        _section("Cells", study.factors.lines(), study_grid(findings), factors, below),
        _section("Seeds", seed_lines(study), ([], []), 0, []),
        _section("What would tell neighbours apart", power, ([], []), 0, []),
        _section("Main effects", [], effect_grid(findings.effects, several), 2 + several, [matched, *correction]),
        _section("Interactions", [], effect_grid(findings.interactions, several), 2 + several, [both, *correction]),
        _section("Published", [], published_rows(study), factors + 3, [published]),
        _section("Cost", [], cost_grid(study), factors + 1, [study.reuse_line]),
    ]
    return [section for section in sections if section.rows or section.before]


def _any_alone(study: Study) -> bool:
    return any(not found.seeds_known for column in study.columns for found in column.means.values())


def _section(
    title: str, before: Sequence[str], table: tuple[list[str], list[list[str]]], text_columns: int, after: Sequence[str]
) -> Section:
    header, rows = table
    return Section(title, tuple(before), tuple(header), tuple(map(tuple, rows)), text_columns, tuple(after))


def _protocols(study: Study) -> list[str]:
    """What the numbers of columns stand for, where one evaluation was made by several protocols."""
    lettered = {(c.name, c.letter): c for c in study.columns if c.letter and c.protocol is not None}
    lines = [
        f"{words(name)} {letter}: {', '.join(f'{fact} {value}' for fact, value in column.protocol.facts())}."
        for (name, letter), column in lettered.items()
        if column.protocol is not None
    ]
    return [*lines, "Figures of different protocols are not comparable."] if lines else []


# ---------------------------------------------------------------------------------------------------- LaTeX, CSV

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "–": "--", "−": r"\ensuremath{-}", "×": r"\ensuremath{\times}", "→": r"\ensuremath{\to}",
    "·": r"\ensuremath{\cdot}", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """`text` as LaTeX shows it, letter for letter; what pdfTeX's fonts lack becomes its code point."""
    plain = printable(" ".join(text.split()))
    return "".join(_LATEX.get(c) or (c if " " <= c <= "\u017f" else rf"\texttt{{U+{ord(c):04X}}}") for c in plain)


def study_latex(findings: Findings) -> str:
    """The study's table with booktabs, to be put into a paper by \\input; needs `\\usepackage{booktabs}`."""
    study = findings.study
    letters = {id(column): findings.letters(column) for column in study.columns}
    factors = [escape_latex(factor.title) for factor in study.factors.varying]
    pattern = "l" * len(factors) + "r" + "rr" * len(study.columns)
    columns = [f"{escape_latex(column.title)} & published" for column in study.columns]
    rows = [_latex_row(study, letters, place) for place in range(len(study.cells))]
    alone = [f"Asterisk: {ONE_SEED}"] if _any_alone(study) else []
    note = " ".join([*study.factors.lines(), NOTE, *alone])
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            "\\small",
            f"\\begin{{tabular}}{{{pattern}}}",
            "\\toprule",
            f"{' & '.join([*factors, 'seeds', *columns])} \\\\",
            "\\midrule",
            *rows,
            "\\bottomrule",
            "\\end{tabular}",
            f"\\caption{{{escape_latex(note)}}}",
            "\\end{table}",
            "",
        ]
    )


def _latex_row(study: Study, letters: dict[int, dict[int, str]], place: int) -> str:
    cell = study.cells[place]
    parts = [*map(escape_latex, cell.levels), str(len(cell.runs))]
    for column in study.columns:
        found = column.means.get(place)
        if found is None:
            parts += ["--", "--"]
            continue
        low, high = found.interval
        star = "" if found.seeds_known else "$^{*}$"
        value = f"{number(found.value)}{star} {{\\scriptsize [{low:.1f}, {high:.1f}]}}"
        value += _fewer(study, column, place)
        alike = letters[id(column)].get(place, "") if len(column.cells) > 1 else ""
        figures = study.published(place, column)
        theirs = "--" if not figures else number(figures[0].value)
        parts += [value + (f"$^{{\\mathrm{{{alike}}}}}$" if alike else ""), theirs]
    return f"{' & '.join(parts)} \\\\"


def study_csv(findings: Findings) -> str:
    """Every cell and figure as a tidy row: our value with its interval, the published one, and their difference."""
    study, text = findings.study, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    factors = [factor.title for factor in study.factors.varying]
    measured = ["evaluation", "metric", "value", "low", "high", "seeds", "seed_sd", "seeds_known", "alike"]
    theirs = ["published", "published_by", "published_unit", "difference"]
    writer.writerow([*factors, *measured, "training_hours", "runs", *theirs])
    for column in study.columns:
        letters = findings.letters(column)
        for place in column.cells:
            found, cell = column.means[place], study.cells[place]
            spread, seconds = column.runs.spread(place), study.training_seconds(place)
            values = [f"{value:.4f}" for value in (found.value, *found.interval)]
            alike = [len(column.runs.of_cell(place)), _four(spread), str(found.seeds_known).lower(), letters[place]]
            hours = "" if seconds is None else f"{seconds / 3600:.5f}"
            names = " ".join(run.name for run in study.runs_of(place))
            theirs_here: list[Published | None] = [*study.published(place, column)]
            for figure in theirs_here or [None]:
                other = ["", "", "", ""]
                if figure is not None:
                    apart = "" if figure.metric is None else f"{found.value - figure.value:.4f}"
                    other = [f"{figure.value:g}", figure.source, figure.unit, apart]
                name = [column.name, column.metric + (f" {column.letter}" if column.letter else "")]
                row = [*cell.levels, *name, *values, *alike, hours, names, *other]
                writer.writerow([_plain(value) for value in row])
    return text.getvalue()


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _plain(value: object) -> str:
    """A field that no spreadsheet program takes for a formula."""
    text = printable(str(value))
    return f"'{text}" if text[:1] in ("=", "+", "@") or (text[:1] == "-" and not _is_number(text)) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

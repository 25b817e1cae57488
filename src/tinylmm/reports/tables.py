"""The score tables as Markdown, for the terminal, and as tidy rows. No torch.

All three are made of what scores.json files say and nothing else. One run: a row a metric, a column a training stage.
Several runs: a row a run, as in a paper's ablation table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tinylmm.errors import printable
from tinylmm.evaluation.protocol import Protocol, shared
from tinylmm.reports.effects import Findings
from tinylmm.reports.published import published_grid
from tinylmm.reports.records import Report, RunReport, Score, ScoreRow
from tinylmm.reports.speed import speed_words, verified_words
from tinylmm.reports.study import Study
from tinylmm.reports.study_tables import study_sections
from tinylmm.reports.wording import ABSENT, duration, facts, number, span, verdict, words
from tinylmm.store.runs import TRAIN

MAX_COMPARED_CATEGORIES = 8
"""With more, a comparison shows scores over all questions only: the table would not fit a terminal."""


def result_rows(report: Report) -> list[dict[str, Any]]:
    """Every score of every run as one tidy row, with the evaluated training stage and the 95 % interval."""
    return [
        {
            "run": run.name,
            "stage": evaluation.stage,
            "evaluation": evaluation.name,
            "benchmark": score.benchmark,
            "metric": score.metric,
            "value": score.value,
            "blind": score.blind,
            "chance": score.chance,
            "count": score.count,
            "interval": score.interval(),
            "limited": evaluation.protocol.limited,
            "protocol": evaluation.protocol.as_json(),
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
    """Header and cells of several runs' last scores: a row a run, after which stage, a column a metric.

    Figures of one column that were made by different protocols carry letters, which `protocol_marks` explains.
    """
    last = {run.name: {(r.name, r.metric): r.last for r in run.score_rows()} for run in report.runs}
    found = {key: score for scores in last.values() for key, score in scores.items()}
    keys = list(found)
    if len(keys) > MAX_COMPARED_CATEGORIES:
        keys = [key for key in keys if "/" not in key[1]]
    one = len({name for name, _ in keys}) == 1
    labels = {key: words(found[key].label) for key in keys}
    header = ["run", "after", *(labels[key] if one else f"{words(key[0])} {labels[key]}" for key in keys)]
    marks = protocol_marks(report)
    rows = []
    for run in report.runs:
        after = run.scored_stages[-1] if run.scored_stages else ABSENT
        rows.append([run.name, after, *(_marked(last[run.name].get(key), marks) for key in keys)])
    return header, rows


def _marked(score: Score | None, marks: Mapping[tuple[str, Protocol], Mark]) -> str:
    if score is None:
        return ABSENT
    mark = marks.get((score.title, score.protocol)) if score.protocol else None
    sample = " (sample)" if score.protocol and score.protocol.limited else ""
    return f"{number(score.value)}{f' {mark.letter}' if mark else ''}{sample}"


@dataclass(frozen=True)
class Mark:
    """A letter beside figures, and the protocol that it stands for."""

    letter: str
    protocol: Protocol


def protocol_marks(report: Report) -> dict[tuple[str, Protocol], Mark]:
    """(evaluation, protocol) -> its mark, for evaluations that the runs of a report made by several protocols."""
    protocols: dict[str, list[Protocol]] = {}
    for run in report.runs:
        for name, evaluation in run.last_evaluations.items():
            protocols.setdefault(name, []).append(evaluation.protocol)
    marks: dict[tuple[str, Protocol], Mark] = {}
    letters: dict[tuple[str, Protocol], str] = {}
    for name, found in protocols.items():
        standing = shared(found)
        if len(set(standing.values())) > 1:
            for one, stands in standing.items():
                number = len(letters)
                letter = letters.setdefault((name, stands), ascii_lowercase[number % 26] * (number // 26 + 1))
                marks[name, one] = Mark(letter, stands)
    return marks


def compare_notes(report: Report) -> list[str]:
    """One line a letter of `compare_grid`: what it stands for, and that such figures are not comparable."""
    first: dict[str, Mark] = {}
    lines = []
    for name, mark in dict.fromkeys((name, mark) for (name, _), mark in protocol_marks(report).items()):
        other = first.setdefault(name, mark)
        against = f" (against {other.letter}: {'; '.join(other.protocol.differences(mark.protocol))})"
        lines.append(f"{mark.letter}  {words(name)}: {protocol_line(mark.protocol)}{'' if other is mark else against}")
    return [*lines, "Figures with different letters are not comparable."] if lines else []


def protocol_line(protocol: Protocol) -> str:
    """A protocol in one line: `gqa-llava, questions 300 of 12,578 (limit 300, seed 0), template phi, ...`."""
    return _in_words(protocol.facts())


def _in_words(facts: Iterable[tuple[str, str]]) -> str:
    return ", ".join(value if label == "protocol" else f"{label} {value}" for label, value in facts)


def protocol_grid(run: RunReport) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the protocols that a run was evaluated by: a row an evaluation, a column a field that any has."""
    facts = {name: dict(evaluation.protocol.facts()) for name, evaluation in run.last_evaluations.items()}
    columns = list(dict.fromkeys(label for found in facts.values() for label in found))
    return ["", *columns], [[words(name), *(found.get(c, ABSENT) for c in columns)] for name, found in facts.items()]


STUDY_IN_TERMINAL = ("Cells", "Seeds", "Main effects")
MAX_LABEL_WIDTH = 24
"""Characters of a column that a narrow terminal leaves whole."""


def row_label(run: RunReport, row: ScoreRow) -> str:
    """What a score row is called, with what sets it apart from the benchmark's own protocol.

    The evaluation is named where the run has several.
    """
    label = words(row.last.label) + (f" ({row.last.mark})" if row.last.mark else "")
    several = len({evaluation.name for evaluation in run.evaluations}) > 1
    return f"{words(row.name)}: {label}" if several else label


def render_scores(report: Report, findings: Findings | None = None) -> Group:
    """The table that ends a run or a sweep in the terminal."""
    if findings is not None:
        return _render_study(findings)
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
    return Group(table, *map(Text, _protocol_lines(report.runs[0]) if single else compare_notes(report)))


def _render_study(findings: Findings) -> Group:
    """The cells of a sweep, what a factor adds, and what may be chance."""
    parts: list[Any] = []
    for section in study_sections(findings):
        if section.title not in STUDY_IN_TERMINAL:
            continue
        title = f"{len(findings.study.report.runs)} runs" if section.title == "Cells" else section.title
        table = Table(title=Text(title), title_justify="left")
        for index, name in enumerate(section.header):
            width = max([len(cells[index]) for cells in section.rows], default=0)
            justify: Literal["left", "right"] = "left" if index < section.text_columns else "right"
            table.add_column(Text(name), justify=justify, min_width=min(width, MAX_LABEL_WIDTH))
        for cells in section.rows:
            table.add_row(*map(Text, cells))
        parts += [*map(Text, section.before), *([table] if section.rows else []), *map(Text, section.after)]
    return Group(*parts)


def _protocol_lines(run: RunReport) -> list[str]:
    """For the terminal: how each evaluation was made, and which have no figure."""
    facts = {name: evaluation.protocol.facts() for name, evaluation in run.last_evaluations.items()}
    shared = [fact for fact in next(iter(facts.values()), []) if all(fact in found for found in facts.values())]
    lines = [
        f"{words(name)}: {_in_words(fact for fact in found if fact not in shared)}" for name, found in facts.items()
    ]
    if len(facts) > 1 and shared:
        lines.append(f"All: {_in_words(shared)}")
    elif facts:
        lines = [f"{words(name)}: {_in_words(found)}" for name, found in facts.items()]
    return [*lines, *(note for note in run.notes if " has no figure: " in note)]


def _study_markdown(findings: Findings) -> list[str]:
    blocks = [f"# {len(findings.study.report.runs)} runs, {len(findings.study.cells)} cells"]
    for section in study_sections(findings):
        if section.title != "Cells":
            blocks.append(f"## {section.title}")
        blocks.append("\n".join(f"- {escape_markdown(line)}" for line in section.before))
        if section.rows:
            table = markdown_table(list(section.header), [*map(list, section.rows)], section.text_columns)
            blocks.append(_linked(table, findings.study) if section.title == "Cells" else table)
        blocks.append("\n".join(f"- {escape_markdown(line)}" for line in section.after))
    if served := served_cells(findings.study):
        blocks.append("## Serve a cell\n\nOf several seeds the first; chat, export and eval take the same names.")
        for place, command in served:
            blocks += [escape_markdown(findings.study.label(place)), _fenced(command)]
    return blocks


def served_cells(study: Study) -> list[tuple[int, str]]:
    """Place of each cell that has a finished model, and what serves it: of several seeds the first one's."""
    found = []
    for place, cell in enumerate(study.cells):
        commands = [study.report.runs[run].served_by for run in cell.runs]
        found += [(place, command) for command in commands if command is not None][:1]
    return found


def use_commands(run: RunReport) -> list[str]:
    """What to type to serve a run's model, to talk to it, and to write it for other programs; nothing if it has none."""
    wanted = (("serve",), ("demo",), ("chat",), ("export", f"{run.name}-hf", "--to", "hf", "--verify"))
    return [command for words_ in wanted if (command := run.command_for(*words_)) is not None]


def _linked(table: str, study: Study) -> str:
    """The table of cells with a column more: each run, by its seed, as a link to its place on the page beside this file."""
    places = [zip(cell.seeds, cell.runs, strict=True) for cell in study.cells]
    links = [" ".join(f"[{escape_markdown(seed)}](report.html#run{run})" for seed, run in cell) for cell in places]
    ends = ["runs, by seed", ":--", *links]
    return "\n".join(f"{line} {end} |" for line, end in zip(table.splitlines(), ends, strict=True))


def render_markdown(report: Report, findings: Findings | None = None) -> str:
    """The report in short, for a pull request or a notebook."""
    blocks = [] if findings is None else _study_markdown(findings)
    if len(report.runs) > 1 and findings is None:
        blocks += [f"# {len(report.runs)} runs", markdown_table(*compare_grid(report), text_columns=2)]
        blocks.append("\n".join(f"- {escape_markdown(line)}" for line in compare_notes(report)))
    for run in report.runs:
        blocks.append(f"{'#' if len(report.runs) == 1 else '##'} {escape_markdown(run.name)}")
        blocks.append(escape_markdown(verdict(run)))
        if run.evaluations:
            blocks.append(markdown_table(*score_grid(run)))
            blocks.append(
                "In % (MME: points). 95 %: the last model's interval; blind: the last model asked without the image; "
                "chance: a uniform guess among the options; n: questions, or groups that are scored as one."
            )
            header, rows = protocol_grid(run)
            blocks.append(markdown_table(header, rows, text_columns=len(header)))
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
        trained = [[s.name, *speed_words(s), verified_words(s)] for s in run.stages if s.kind == TRAIN]
        blocks.append("\n".join(f"- {escape_markdown('; '.join(said))}" for said in trained))
        blocks.append(_fenced("\n".join([run.command, *use_commands(run)])))
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

"""study.py, effects.py and study_tables.py: a sweep's runs by what varies, over seeds and questions."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tinylmm.reports.collect import collect_report
from tinylmm.reports.effects import Findings, findings_of
from tinylmm.reports.study_tables import (
    cost_grid,
    effect_grid,
    escape_latex,
    pareto_front,
    published_rows,
    seed_lines,
    study_csv,
    study_grid,
    study_latex,
)
from tinylmm.reports.tables import render_markdown, render_scores
from tinylmm.reports.write import write_report

from .conftest import StoreBuilder
from .sweeps import add_run, sweep


def found(store: StoreBuilder, names: list[str]) -> Findings:
    findings = findings_of(collect_report(store.root, names))
    assert findings is not None
    return findings


@pytest.fixture
def swept(store: StoreBuilder) -> Findings:
    store.questions = 200
    return found(store, sweep(store))


def test_rows_are_factors_and_runs_of_other_seeds_are_one_cell(swept: Findings) -> None:
    header, rows = study_grid(swept)
    assert header == ["LLM", "Recipe", "seeds", "digits accuracy", "95 %", "alike"]
    assert [row[:4] for row in rows] == [
        ["small", "base", "3", "40.0"],
        ["small", "lora", "3", "40.0"],
        ["large", "base", "3", "70.0"],
        ["large", "lora", "3", "70.0"],
    ]
    assert [row[5] for row in rows] == ["b", "b", "a", "a"]


def test_an_interval_over_seeds_is_wider_than_any_runs_own(swept: Findings) -> None:
    column = swept.study.columns[0]
    low, high = column.means[0].interval
    assert low < 40 < high and column.runs.scores is not None
    assert column.runs.spread(0) == pytest.approx(2.5)


def test_what_is_the_same_everywhere_is_said_once(swept: Findings) -> None:
    text = render_markdown(swept.study.report, swept)
    start = text[: text.index("## Seeds")]
    assert "Vision tower siglip (google/siglip-base), Connector mlp, Data digits" in start
    assert not re.search(r"small-base-\d", start), "no run's name in the table"
    rows = [line for line in start.splitlines() if line.startswith("| small | base")]
    assert len(rows) == 1 and rows[0].endswith("| [0](report.html#run0) [1](report.html#run1) [2](report.html#run2) |")


def test_main_effects_are_differences_over_matched_cells(swept: Findings) -> None:
    header, rows = effect_grid(swept.effects, False)
    assert header == ["factor", "change", "difference", "95 %", "p", "matched"]
    assert [(row[0], row[1], row[2], row[5]) for row in rows] == [
        ("LLM", "small → large", "+30.0", "2"),
        ("Recipe", "base → lora", "+0.0", "2"),
    ]
    llm, recipe = swept.effects
    assert llm.clear and not recipe.clear
    (both,) = swept.interactions
    assert both.what == ("LLM", "Recipe") and both.found.value == pytest.approx(0) and not both.clear
    assert {contrast.comparisons for contrast in (llm, recipe, both)} == {3}


def test_runs_that_share_a_training_of_their_seed_are_one_unit(swept: Findings) -> None:
    assert swept.study.columns[0].runs.units.tolist() == [0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8]


def test_one_seed_says_that_its_noise_is_unknown_and_shows_the_nearest(store: StoreBuilder) -> None:
    names = sweep(store)
    add_run(store, "alone", {"llm.name": "large", "recipe.name": "share", "seed": 0}, 0.7, luck=50)
    findings = found(store, [*names, "alone"])
    _, rows = study_grid(findings)
    assert rows[-1][:4] == ["large", "share", "1", "70.0 *"]
    said = [line for line in seed_lines(findings.study) if "unknown" in line]
    assert said == [
        "digits accuracy, large · share: one seed, so its seed noise is unknown; the nearest cell that has several, "
        "large · base, has 2.50."
    ]


def test_that_no_cell_has_a_second_seed_is_said_once(store: StoreBuilder) -> None:
    findings = found(store, sweep(store, seeds=1))
    assert len(findings.study.cells) == 4
    assert seed_lines(findings.study) == [
        "every cell has one seed, so the noise of seeds is unknown; run more (seed=0,1,2)."
    ]


def test_neighbours_that_are_alike_come_with_what_would_tell_them_apart(store: StoreBuilder) -> None:
    store.questions = 80
    store.images()
    for seed in range(3):
        for llm, right in (("small", 0.50), ("large", 0.56)):
            change = {"llm.name": llm, "seed": seed}
            add_run(store, f"{llm}-{seed}", change, right + 0.025 * (seed - 1), luck=seed)
    findings = found(store, [f"{llm}-{seed}" for llm in ("small", "large") for seed in range(3)])
    (line,) = findings.power_lines(findings.study.columns[0])
    assert line.startswith("large over small: +") and "times the questions" in line


def test_the_same_choices_and_seed_twice_are_no_second_seed(store: StoreBuilder) -> None:
    names = sweep(store)
    add_run(store, "again", {"llm.name": "small", "recipe.name": "base", "seed": 0}, 0.9, luck=9)
    findings = found(store, [*names, "again"])
    assert len(findings.study.cells[0].runs) == 3
    assert len(findings.study.notes) == 1 and "the same choices and seed" in findings.study.notes[0]


def test_a_run_without_scores_is_said_and_leaves_no_hole(store: StoreBuilder) -> None:
    names = sweep(store, seeds=2)
    add_run(store, "bare", {"llm.name": "third", "recipe.name": "base", "seed": 0}, 0.5, benchmarks=())
    findings = found(store, [*names, "bare"])
    assert "bare has no scores." in findings.study.notes
    assert study_grid(findings)[1][-1] == ["third", "base", "1", "–", "–", "–"]


def test_a_cell_of_which_one_run_has_no_scores_says_how_many_have(store: StoreBuilder) -> None:
    names = sweep(store)
    add_run(store, "bare", {"llm.name": "small", "recipe.name": "base", "seed": 3}, 0.5, benchmarks=())
    findings = found(store, [*names, "bare"])
    assert study_grid(findings)[1][0][2:4] == ["4", "40.0 (3 of 4 seeds)"]
    assert "(3 of 4 seeds)" in study_latex(findings)


def test_runs_that_nothing_tells_apart_keep_their_names(store: StoreBuilder) -> None:
    store.whole("a")
    store.run("b")
    assert findings_of(collect_report(store.root, ["a", "b"])) is None
    assert findings_of(collect_report(store.root, ["a"])) is None


def test_figures_of_two_protocols_are_two_columns(store: StoreBuilder) -> None:
    names = sweep(store, seeds=2)
    path = store.root / "stages" / store.key("eval", "digits@finetune-large-lora-1") / "output" / "scores.json"
    content = Path(path).read_text().replace("exact match", "other rule")
    path.write_text(content)
    findings = found(store, names)
    assert [column.title for column in findings.study.columns] == ["digits accuracy [1]", "digits accuracy [2]"]
    assert "Figures of different protocols are not comparable" in render_markdown(findings.study.report, findings)


def test_a_metric_that_is_no_mean_rests_on_the_runs_own_intervals(store: StoreBuilder) -> None:
    names = sweep(store)
    for name in names:
        folder = store.root / "stages" / store.key("eval", f"digits@finetune-{name}")
        metric = {"metric": "f1", "value": 60.0, "blind": None, "chance": None, "count": 40, "interval": [52.0, 68.0]}
        store.scores(folder, [metric])
    column = found(store, names).study.columns[0]
    assert column.runs.scores is None
    assert column.means[0].interval == pytest.approx((52, 68), abs=0.01)


def test_terminal_shows_cells_seeds_and_effects_in_80_columns(swept: Findings) -> None:
    console = Console(file=StringIO(), width=80, record=True)
    console.print(render_scores(swept.study.report, swept))
    text = console.export_text()
    assert "12 runs" in text and "small → large" in text and "+30.0" in text and "Main effects" in text
    assert "alike" in text and "seeds alone move a run by 2.50" in text


def test_cost_front_and_reuse_come_from_manifests(store: StoreBuilder) -> None:
    store.images()
    for llm, right, seconds in (("a", 0.5, 10.0), ("b", 0.4, 20.0), ("c", 0.7, 60.0)):
        add_run(store, llm, {"llm.name": llm}, right, seconds=seconds, shared="one")
    study = found(store, ["a", "b", "c"]).study
    assert pareto_front(study) == [0, 2]
    assert [row[-1] for row in cost_grid(study)[1]] == ["yes", "", "yes"]
    assert "These runs ask for 12 stages, 8 of them distinct" in study.reuse_line


# ---------------------------------------------------------------------------------------------------- published, files


def published_study(store: StoreBuilder) -> Findings:
    store.images()
    for tower, right in (("clip", 0.50), ("siglip", 0.60)):
        add_run(store, tower, {"llm.name": "phi2", "vision_tower.name": tower, "connector.name": "mlp"}, right)
        path = store.root / "stages" / store.key("eval", f"digits@finetune-{tower}") / "output" / "scores.json"
        path.write_text(path.read_text().replace('"benchmark": "digits"', '"benchmark": "gqa"'))
    return found(store, ["clip", "siglip"])


def test_published_values_stand_beside_ours_with_the_difference(store: StoreBuilder) -> None:
    header, rows = published_rows(published_study(store).study)
    assert header[-4:] == ["ours", "95 %", "published", "ours less published"]
    first = rows[0]
    assert first[0] == "clip" and first[2] == "TinyLLaVA (arXiv 2402.14289), Table A1"
    assert (first[-4], first[-2], first[-1]) == ("50.0", "60.3", "−10.3")


def test_csv_has_value_interval_published_and_difference(store: StoreBuilder) -> None:
    rows = list(csv.DictReader(io.StringIO(study_csv(published_study(store)))))
    row = rows[0]
    assert (row["Vision tower"], row["value"], row["published"], row["difference"]) == (
        "clip",
        "50.0000",
        "60.3",
        "-10.3000",
    )
    assert float(row["low"]) < 50 < float(row["high"])
    assert row["seeds_known"] == "false" and row["runs"] == "clip"


def test_csv_begins_no_formula(store: StoreBuilder) -> None:
    store.images()
    for name, level in (("one", "=1+1"), ("two", "-x")):
        add_run(store, name, {"llm.name": level}, 0.5)
    cells = [row["LLM"] for row in csv.DictReader(io.StringIO(study_csv(found(store, ["one", "two"]))))]
    assert cells == ["'=1+1", "'-x"]


HOSTILE = r"a_b & 50% \input{x} $x$ {y} #~^<|>" + '" 手 –'


def test_latex_is_a_booktabs_table_of_equal_rows(store: StoreBuilder) -> None:
    text = study_latex(published_study(store))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3 and len({line.count("&") for line in rows}) == 1
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{table}"):
        assert text.count(word) == 1
    assert text.count("{") == text.count("}")
    assert "60.3" in rows[1] and "Vision tower" in rows[0]


def test_latex_shows_words_as_they_are() -> None:
    assert escape_latex(r"a_b\c") == r"a\_b\textbackslash{}c"
    assert escape_latex("手") == r"\texttt{U+624B}"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX engine here")
def test_latex_compiles(store: StoreBuilder, tmp_path: Path) -> None:
    store.images()
    for name, level in (("one", HOSTILE), ("two", "plain")):
        add_run(store, name, {"llm.name": level, "recipe.name": name}, 0.5)
    (tmp_path / "table.tex").write_text(study_latex(found(store, ["one", "two"])))
    paper = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    (tmp_path / "paper.tex").write_text(paper)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


def test_a_sweep_writes_its_tables_beside_the_report_and_again_the_same_bytes(store: StoreBuilder) -> None:
    names = sweep(store)
    paths = dict(write_report(store.root, names).items())
    assert list(paths) == ["html", "markdown", "results", "latex", "csv", "figures"]
    files = sorted(path for path in paths["html"].parent.rglob("*") if path.is_file())
    assert [path.name for path in files if path.suffix == ".pdf"] == [
        "bars-llm.pdf",
        "bars-recipe.pdf",
        "cost.pdf",
        "radar.pdf",
    ]
    first = [path.read_bytes() for path in files]
    write_report(store.root, names)
    assert [path.read_bytes() for path in files] == first


def test_an_ungraded_question_leaves_the_runs_own_intervals(store: StoreBuilder) -> None:
    names = sweep(store, seeds=2)
    path = store.root / "stages" / store.key("eval", f"digits@finetune-{names[0]}") / "output" / "generations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    column = found(store, names).study.columns[0]
    assert column.runs.scores is None and column.means[0].item_variance > 0


def test_names_of_users_are_no_markup(store: StoreBuilder) -> None:
    store.images()
    for name, level in (("one", "<b>|x|"), ("two", "[red]")):
        add_run(store, name, {"llm.name": level}, 0.5)
    findings = found(store, ["one", "two"])
    text = render_markdown(findings.study.report, findings)
    assert r"&lt;b&gt;\|x\|" in text
    console = Console(file=StringIO(), width=80, record=True)
    console.print(render_scores(findings.study.report, findings))
    assert "[red]" in console.export_text()


def test_each_cell_says_how_to_serve_its_first_seed(store: StoreBuilder) -> None:
    names = sweep(store)
    paths = write_report(store.root, names)
    page, text = paths.html.read_text(), paths.markdown.read_text()
    findings = found(store, names)
    for cell in findings.study.cells:
        command = f"tinylmm serve {findings.study.report.runs[cell.runs[0]].name} --store {store.root.absolute()}"
        assert f'<pre class="command">{command}</pre>' in page and f"```bash\n{command}\n```" in text

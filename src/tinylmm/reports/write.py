"""Writes a report's files, each whole or not at all: report.html, report.md, results.json, and of a sweep its tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinylmm.errors import UserError
from tinylmm.reports.collect import collect_report
from tinylmm.reports.compare import Pair, comparison_json
from tinylmm.reports.effects import Findings, findings_of
from tinylmm.reports.figures import picture_pdf, study_pictures
from tinylmm.reports.html import render_comparison_html, render_html
from tinylmm.reports.records import Report
from tinylmm.reports.study_tables import study_csv, study_latex
from tinylmm.reports.tables import render_markdown, result_rows
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import StoreLayout

RESULTS_FORMAT = 1
MAX_FOLDER_CHARS = 100


@dataclass(frozen=True)
class ReportPaths:
    """Where a report's files lie; the last three are a sweep's, `figures` a folder of PDFs."""

    html: Path
    markdown: Path
    results: Path
    latex: Path | None = None
    csv: Path | None = None
    figures: Path | None = None

    def items(self) -> list[tuple[str, Path]]:
        """Name and path of each that there is."""
        return [(name, path) for name, path in vars(self).items() if path is not None]


def write_report(store_root: Path, runs: Sequence[str] | None = None, out: Path | None = None) -> ReportPaths:
    """Collect and write the report of the named runs, or of the newest finished one.

    Args:
        store_root: the store that has the runs.
        runs: names of runs of the store.
        out: folder to write to; by default one named after the runs under the store's reports.

    Raises:
        UserError: unknown run, empty store, nothing finished yet, or `out` is a file.
        IntegrityError: a file of the store is unreadable or contradicts another.
    """
    report = collect_report(store_root, runs)
    return write_files(report, out, findings_of(report))


def write_files(report: Report, out: Path | None = None, findings: Findings | None = None) -> ReportPaths:
    """Write a collected report, and what its runs say together where they differ; else as in `write_report`."""
    folder = StoreLayout(report.store).reports / _folder_name(report) if out is None else out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; a report is a folder with three files. Name another place.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(folder / "report.html", folder / "report.md", folder / "results.json")
    results = {"format": RESULTS_FORMAT, "rows": result_rows(report)}
    write_atomic(paths.html, render_html(report, findings))
    write_atomic(paths.markdown, render_markdown(report, findings))
    write_atomic(paths.results, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if findings is not None:
        paths = replace(paths, latex=folder / "table.tex", csv=folder / "table.csv")
        write_atomic(folder / "table.tex", study_latex(findings))
        write_atomic(folder / "table.csv", study_csv(findings))
        for picture in study_pictures(findings):
            figures = folder / "figures"
            figures.mkdir(exist_ok=True)
            write_atomic(figures / f"{picture.name}.pdf", picture_pdf(picture))
            paths = replace(paths, figures=figures)
    return paths


def write_comparison(report: Report, pairs: Sequence[Pair], out: Path | None = None) -> tuple[Path, Path]:
    """Write compare.html and compare.json, by default to `store/reports/compare-<names>`; returns both paths.

    Raises:
        UserError: `out` is a file.
    """
    folder = StoreLayout(report.store).reports / f"compare-{_folder_name(report)}" if out is None else out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; a comparison is a folder with two files. Name another place.")
    folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / "compare.html", folder / "compare.json"
    write_atomic(page, render_comparison_html(report, pairs))
    text = json.dumps(comparison_json(report, pairs), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(record, f"{text}\n")
    return page, record


def _folder_name(report: Report) -> str:
    """The runs' names joined; of many runs the first one and a digest of them all, as file names have a limit."""
    if len(report.name) <= MAX_FOLDER_CHARS:
        return report.name
    tail = hashlib.sha256(report.name.encode()).hexdigest()[:12]
    return f"{report.runs[0].name[:MAX_FOLDER_CHARS]}+{len(report.runs) - 1}-{tail}"

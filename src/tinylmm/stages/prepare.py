"""The `prepare` stage: annotation file -> token ids, labels and image references, in the order of the file.

What leaves here can be trained on without surprises: each conversation is rendered, and each image that it names was decoded
completely by the `images` stage. A record that fails is listed with its reason, and either stops the run now or is left out
and counted (`on_bad`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from tinylmm.data.chat import get_template
from tinylmm.data.records import Place
from tinylmm.data.sample import BadRecord
from tinylmm.errors import DataError
from tinylmm.models.build import load_tokenizer
from tinylmm.planning.specs import PrepareStage
from tinylmm.stages import rendering
from tinylmm.stages.chunks import Chunk, ChunkFolder
from tinylmm.stages.images import read_faults
from tinylmm.stages.job import StageJob
from tinylmm.stages.pool import in_order
from tinylmm.stages.rendering import SCHEMA, Renderer, pieces_of
from tinylmm.stages.sources import Progress, Source, processes
from tinylmm.stop import require_claim

log = logging.getLogger(__name__)

DOING = "preparing samples"
FAULTS_SHOWN = 20
SERIAL_PIECES = 4
"""So few pieces are done sooner in this process than in others that must start first."""


@dataclass
class _Tally:
    """What was seen so far."""

    ids: list[np.ndarray] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    records: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    chunks: int = 0

    def add(self, chunk: Chunk) -> None:
        """Count one more chunk."""
        self.ids.append(chunk.ids)
        self.bad += chunk.bad
        self.records += chunk.records
        self.samples += chunk.samples
        self.tokens += chunk.tokens
        self.supervised_tokens += chunk.supervised_tokens
        self.chunks += 1

    @property
    def duplicates(self) -> int:
        """Records whose id another one has already."""
        return self.records - len(np.unique(np.concatenate(self.ids))) if self.ids else 0


def run(job: StageJob[PrepareStage]) -> dict[str, Any]:
    """Write `output/samples` (a `datasets` folder) and `output/report.json`; return counts for the manifest.

    Chunks of records that an earlier try has finished are not done again.

    Columns: sample_id; input_ids with one IMAGE_TOKEN_ID an image; labels, not shifted; images, relative to the
    source's image folder, or names of embedded ones, which the `images` stage made files of. Nothing is cut here,
    because how many tokens an image takes is not known yet.

    Raises:
        DataError: the annotation file cannot be read, or more records are bad than `on_bad` and `max_bad` allow; the
            message lists up to FAULTS_SHOWN of them.
        UserError: the tokenizer cannot be loaded or does not fit the template.
        StoppedError: a stop was asked for.
    """
    source, place, scratch = Source.of(job), Place(), job.folder / "scratch"
    tokenizer = load_tokenizer(job.spec.tokenizer, job.parents.get("tokenizer"), job.settings.folders.get("tokenizer"))
    template = get_template(job.spec.template).fitted(tokenizer)
    kept = ChunkFolder(scratch / f"chunks-of-{rendering.CHUNK}", SCHEMA)
    renderer = Renderer(template, tokenizer, source, read_faults(job.parents["images"]), kept)
    progress = Progress(job, "records", DOING, place, source.limit)
    tally = _Tally()
    pieces = pieces_of(progress.read(source.records(place)))
    first = list(islice(pieces, SERIAL_PIECES))
    several = processes(job) if len(first) == SERIAL_PIECES else 1
    for chunk in in_order(renderer, chain(first, pieces), several, DOING):
        require_claim()
        tally.add(chunk)
        progress(chunk.records)
    _enforce_policy(source, tally)
    _write_rows(scratch / "rows.arrow", kept.tables(tally.chunks))
    _publish(scratch / "rows.arrow", job)
    shutil.rmtree(scratch)
    return _report(job, tally)


def _enforce_policy(source: Source, tally: _Tally) -> None:
    """Stop if more records are bad than the source allows, or none is left."""
    if len(tally.bad) > source.allowed:
        lines = [
            f"{source.annotations}: {len(tally.bad)} bad records, {source.allowed} allowed (on_bad={source.on_bad})"
        ]
        lines += [f"  record {bad.index} (id '{bad.sample_id}'): {bad.reason}" for bad in tally.bad[:FAULTS_SHOWN]]
        if len(tally.bad) > FAULTS_SHOWN:
            lines.append(f"  ... and {len(tally.bad) - FAULTS_SHOWN} more")
        advice = (
            f"Correct or remove them, or set on_bad=skip and max_bad={len(tally.bad)} on the source to leave them out."
        )
        raise DataError("\n".join([*lines, " ".join(filter(None, [advice, source.how_to_get]))]))
    if not tally.samples:
        raise DataError(f"{source.annotations}: no usable record among {tally.records}. Check the file.")


def _write_rows(path: Path, tables: Iterator[pa.Table]) -> None:
    """Stream rows to an Arrow file, so that memory does not grow with the data set."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)


def _publish(rows: Path, job: StageJob[PrepareStage]) -> None:
    """Save as a `datasets` folder. Its fingerprint is the stage's digest: by default it would be a random one."""
    samples = job.output / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    table = datasets.Dataset.from_file(str(rows)).data
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(SCHEMA))
    dataset = datasets.Dataset(table, info=info, fingerprint=job.digest[:16])
    datasets.disable_progress_bars()  # the command shows its own
    dataset.save_to_disk(samples)


def _report(job: StageJob[PrepareStage], tally: _Tally) -> dict[str, Any]:
    """Write report.json with every skipped record; the summary for the manifest has the first FAULTS_SHOWN of them."""
    skipped = [asdict(bad) for bad in tally.bad]
    summary = {
        "samples": tally.samples,
        "skipped": len(skipped),
        "tokens": tally.tokens,
        "supervised_tokens": tally.supervised_tokens,
        "duplicates": tally.duplicates,
    }
    report = json.dumps(summary | {"skipped_records": skipped}, indent=1, ensure_ascii=False)
    (job.output / "report.json").write_text(report + "\n", encoding="utf-8")
    log.info("prepared %(samples)d samples of %(tokens)d tokens; skipped %(skipped)d", summary)
    if summary["duplicates"]:
        log.warning("%d records repeat an id; all of them are used", summary["duplicates"])
    remark = f"{len(skipped):,} records are left out as bad; {job.output / 'report.json'} lists them"
    remarks = {"remarks": [remark]} if skipped else {}
    return summary | {"skipped_records": skipped[:FAULTS_SHOWN]} | remarks

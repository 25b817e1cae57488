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
from tinylmm.data.clip_list import takes_videos
from tinylmm.data.records import Place
from tinylmm.data.sample import BadRecord
from tinylmm.errors import DataError
from tinylmm.models.build import load_tokenizer
from tinylmm.planning.specs import PrepareStage
from tinylmm.stages import rendering
from tinylmm.stages.chunks import Chunk, ChunkFolder
from tinylmm.stages.images import read_faults
from tinylmm.stages.job import StageJob
from tinylmm.stages.pool import heed, in_order
from tinylmm.stages.rendering import SCHEMA, Renderer, pieces_of
from tinylmm.stages.sources import Progress, Source, processes
from tinylmm.stop import require_claim
from tinylmm.store.layout import OUTPUT_FOLDER, StoreLayout

log = logging.getLogger(__name__)

DOING = "preparing samples"
FAULTS_SHOWN = 20
SHARD_BYTES = 500_000_000
"""Of a file of samples; the last chunk in it goes beyond."""
STATE_FILE = "state.json"
"""Of a `datasets` folder: which files its rows are in."""
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
    checked = job.parents["images"]
    renderer = Renderer(template, tokenizer, source, read_faults(checked), kept, takes_videos(checked))
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
    _publish(kept.tables(tally.chunks), job)
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


def _publish(tables: Iterator[pa.Table], job: StageJob[PrepareStage]) -> None:
    """Write a `datasets` folder, chunk after chunk: the library's own writer would map all of it into memory.

    It writes what describes a folder, of an empty one. The fingerprint is the stage's digest: by default it would be a random
    one.
    """
    folder = job.output / "samples"
    shutil.rmtree(folder, ignore_errors=True)
    datasets.disable_progress_bars()  # the command shows its own
    info = datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(SCHEMA))
    empty = datasets.table.InMemoryTable(SCHEMA.empty_table())
    datasets.Dataset(empty, info=info, fingerprint=job.digest[:16]).save_to_disk(folder)
    for path in folder.glob("*.arrow"):
        path.unlink()
    files: list[Path] = []
    while (first := next(tables, None)) is not None:
        heed(DOING)
        files.append(folder / f"{len(files)}.part")
        with pa.OSFile(str(files[-1]), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_table(first)
            while sink.tell() < SHARD_BYTES and (table := next(tables, None)) is not None:
                writer.write_table(table)
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    state["_data_files"] = [{"filename": name} for name in names]
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")


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
    published = StoreLayout(job.store).stage(job.folder.name) / OUTPUT_FOLDER  # where it lies when this is read
    remark = f"{len(skipped):,} records are left out as bad; {published / 'report.json'} lists them"
    remarks = {"remarks": [remark]} if skipped else {}
    return summary | {"skipped_records": skipped[:FAULTS_SHOWN]} | remarks

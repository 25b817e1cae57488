"""The `prepare` stage: annotation file -> token ids, labels and image references, every record and image checked once.

What leaves here can be trained on without surprises: each conversation is rendered, each image was decoded completely.
A record that fails is listed with its reason, and either stops the run now or is left out and counted (`on_bad`).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tinylmm.constants import IGNORE_INDEX
from tinylmm.data.chat import ChatTemplate, Rendered, get_template
from tinylmm.data.image_names import embedded_path, is_embedded
from tinylmm.data.images import check_image, relative_name, safe_path
from tinylmm.data.sample import BadRecord, Sample, read_samples
from tinylmm.errors import DataError, StoppedError
from tinylmm.models.build import load_tokenizer
from tinylmm.planning.specs import PrepareStage
from tinylmm.stages.chunks import Chunk, ChunkFolder
from tinylmm.stages.job import StageJob
from tinylmm.stop import belong_to, stop_requested

log = logging.getLogger(__name__)
T = TypeVar("T")

FAULTS_SHOWN = 20
CHUNK = 4096
"""Records in memory at a time."""
AT_ONCE = 32
"""Records or images that a process takes at a time."""
SERIAL_BELOW = 2000
"""So few records are done sooner in this process than in others that must start first."""

EMBEDDED_FOLDER = "embedded"
"""Below the stage's output: images that records carried, each content once (`data/image_names.py`)."""

FEATURES = datasets.Features(
    {
        "sample_id": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "images": datasets.List(datasets.Value("string")),
    }
)


@dataclass(frozen=True)
class _Source:
    """Where the stage reads, what records look like, and what it does with bad ones."""

    annotations: Path
    images: Path
    format: str
    limit: int | None
    on_bad: str
    max_bad: int
    how_to_get: str
    follow_links: bool = False


@dataclass
class _Tally:
    """What was seen so far."""

    ids: Counter[str] = field(default_factory=Counter)
    bad: list[BadRecord] = field(default_factory=list)
    checked: dict[str, str | None] = field(default_factory=dict)
    """Image path -> what is wrong with it, or None."""
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    chunks: int = 0

    def add(self, chunk: Chunk, ids: Iterable[str]) -> None:
        """Count one more chunk, of records with these ids."""
        self.ids.update(ids)
        self.bad += chunk.bad
        self.checked |= chunk.checked
        self.samples += len(chunk.rows)
        self.tokens += chunk.tokens
        self.supervised_tokens += chunk.supervised_tokens
        self.chunks += 1


def run(job: StageJob[PrepareStage]) -> dict[str, Any]:
    """Write `output/samples` (a `datasets` folder) and `output/report.json`; return counts for the manifest.

    Chunks of records that an earlier try has finished are not done again.

    Columns: sample_id; input_ids with one IMAGE_TOKEN_ID an image; labels, not shifted; images, relative to the
    source's image folder, or names of embedded ones, which become files below `output/embedded`. Nothing is cut here,
    because how many tokens an image takes is not known yet.

    Raises:
        DataError: the annotation file cannot be read, or more records are bad than `on_bad` and `max_bad` allow; the
            message lists up to FAULTS_SHOWN of them.
        UserError: the tokenizer cannot be loaded or does not fit the template.
        StoppedError: a stop was asked for.
    """
    source = _source(job)
    renderer = _Renderer(
        get_template(job.spec.template),
        load_tokenizer(job.spec.tokenizer, job.parents.get("tokenizer"), job.settings.folders.get("tokenizer")),
        source.images,
        source.follow_links,
        job.output / EMBEDDED_FOLDER,
    )
    scratch = job.folder / "scratch"
    kept = ChunkFolder(scratch / f"chunks-of-{CHUNK}", FEATURES.arrow_schema)
    tally = _Tally()
    _prepare(source, renderer, tally, kept, job.settings.launch.num_workers)
    renderer.drop(name for name, fault in tally.checked.items() if fault is not None)
    _enforce_policy(source, tally)
    _write_rows(scratch / "rows.arrow", kept.tables(tally.chunks))
    _publish(scratch / "rows.arrow", job)
    shutil.rmtree(scratch)
    return _report(job, tally)


def _source(job: StageJob[PrepareStage]) -> _Source:
    spec = job.spec.source
    (location,) = job.locations
    source = location.source
    policy = (spec.format, spec.limit, source.on_bad, source.max_bad)
    if "data" in job.parents:
        assert spec.file is not None  # of a data stage's output, sources are identified by their file
        folder = job.parents["data"]
        return _Source(folder / spec.file, folder / spec.images, *policy, "", spec.follow_links)
    root = job.root_of(location)
    assert source.annotations is not None
    return _Source(root / source.annotations, root / source.images, *policy, source.how_to_get, spec.follow_links)


class _Renderer:
    """Does the work on one sample; travels to worker processes once."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        images: Path,
        follow_links: bool,
        embedded: Path,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.images = images
        self.follow_links = follow_links
        self.embedded = embedded

    def store(self, record: Sample | BadRecord) -> Sample | BadRecord:
        """Write a record's embedded images to files, so that no more than a few are in memory.

        An absolute path inside the image folder is named from there: the folder may lie elsewhere when it is trained on.
        """
        if isinstance(record, BadRecord):
            return record
        if any(map(os.path.isabs, record.images)):
            record = replace(record, images=tuple(relative_name(self.images, name) for name in record.images))
        if not record.embedded:
            return record
        for name, data in record.embedded.items():
            path = embedded_path(self.embedded, name)
            if not path.exists() or path.read_bytes() != data:  # a kill or a power cut leaves half a file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        return replace(record, embedded={})

    def render(self, sample: Sample) -> Rendered:
        return self.template.render(sample.turns, self.tokenizer, sample.system)

    def drop(self, names: Iterable[str]) -> None:
        """Forget embedded images that have a fault."""
        for name in filter(is_embedded, names):
            embedded_path(self.embedded, name).unlink(missing_ok=True)

    def image_fault(self, name: str) -> str | None:
        """What is wrong with an image, or None."""
        path = embedded_path(self.embedded, name) if is_embedded(name) else None
        try:
            check_image(safe_path(self.images, name, self.follow_links) if path is None else path)
        except DataError as error:
            if path is None:
                return str(error)
            return f"the embedded image {name[:20]}: {str(error).removeprefix(f'{path}: ')}"
        return None


_worker: _Renderer
"""In a worker process: its own copy of the renderer."""


def _start_worker(renderer: _Renderer, parent: int) -> None:
    global _worker
    belong_to(parent)
    _worker = renderer


def _render_in_worker(sample: Sample) -> Rendered:
    return _worker.render(sample)


def _image_fault_in_worker(path: str) -> str | None:
    return _worker.image_fault(path)


class _Workers(Protocol):
    """Does a chunk's work, in order."""

    def render(self, samples: list[Sample]) -> list[Rendered]: ...

    def image_faults(self, paths: list[str]) -> list[str | None]: ...


class _InProcess:
    def __init__(self, renderer: _Renderer) -> None:
        self.renderer = renderer

    def render(self, samples: list[Sample]) -> list[Rendered]:
        return [self.renderer.render(sample) for sample in _until_stop(samples)]

    def image_faults(self, paths: list[str]) -> list[str | None]:
        return [self.renderer.image_fault(path) for path in _until_stop(paths)]


class _InPool:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def render(self, samples: list[Sample]) -> list[Rendered]:
        return list(_until_stop(self.pool.map(_render_in_worker, samples, chunksize=AT_ONCE)))

    def image_faults(self, paths: list[str]) -> list[str | None]:
        return list(_until_stop(self.pool.map(_image_fault_in_worker, paths, chunksize=AT_ONCE)))


@contextmanager
def _workers(renderer: _Renderer, processes: int) -> Iterator[_Workers]:
    if processes < 2:
        yield _InProcess(renderer)
        return
    # spawn: a fork would copy the locks of torch's and the tokenizer's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (renderer, os.getpid()))
    try:
        yield _InPool(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _until_stop(things: Iterable[T]) -> Iterator[T]:
    """Yield things until a stop is asked for.

    Raises:
        StoppedError: it is.
    """
    for thing in things:
        if stop_requested():
            raise StoppedError("stopped while preparing samples; the same command continues from there")
        yield thing


def _prepare(source: _Source, renderer: _Renderer, tally: _Tally, kept: ChunkFolder, num_workers: int) -> None:
    """Make the chunks of the file, in its order, and count them in `tally`; those that are kept already are read."""
    read = islice(read_samples(source.annotations, source.format), source.limit)
    records = enumerate(renderer.store(record) for record in _until_stop(read))
    chunk = list(islice(records, CHUNK))
    with _workers(renderer, num_workers if len(chunk) >= SERIAL_BELOW else 1) as workers:
        while chunk:
            done = kept.read(tally.chunks)
            if done is None or done.records != len(chunk):
                done = _make_chunk(chunk, workers, tally.checked)
                kept.write(tally.chunks, done)
            tally.add(done, (record.sample_id for _, record in chunk))
            chunk = list(islice(records, CHUNK))
    tally.bad.sort(key=lambda bad: bad.index)


def _make_chunk(
    records: list[tuple[int, Sample | BadRecord]], workers: _Workers, checked: dict[str, str | None]
) -> Chunk:
    """Check and render some records, each with its place in the file; images that were `checked` are not looked at again."""
    samples = [(index, record) for index, record in records if isinstance(record, Sample)]
    named = dict.fromkeys(path for _, sample in samples for path in sample.images)
    new = [path for path in named if path not in checked]
    faults = dict(zip(new, workers.image_faults(new), strict=True))
    known = ChainMap(faults, checked)
    rendered = workers.render([sample for _, sample in samples])
    bad = [record for _, record in records if isinstance(record, BadRecord)]
    good: list[tuple[Sample, Rendered]] = []
    for (index, sample), ids_and_labels in zip(samples, rendered, strict=True):
        fault = _fault(sample, ids_and_labels, known)
        if fault is None:
            good.append((sample, ids_and_labels))
        else:
            bad.append(BadRecord(index, sample.sample_id, fault))
    rows = pa.Table.from_pylist([_row(*one) for one in good], schema=FEATURES.arrow_schema)
    tokens = sum(len(ids_and_labels.input_ids) for _, ids_and_labels in good)
    return Chunk(rows, len(records), bad, faults, tokens, sum(_supervised(one) for _, one in good))


def _fault(sample: Sample, rendered: Rendered, checked: Mapping[str, str | None]) -> str | None:
    """Why a rendered sample cannot be used, or None."""
    faults = [fault for path in sample.images if (fault := checked[path]) is not None]
    if not _supervised(rendered):
        faults.append("no token of it would be trained on")
    return " ".join(dict.fromkeys(faults)) or None


def _supervised(rendered: Rendered) -> int:
    return len(rendered.labels) - rendered.labels.count(IGNORE_INDEX)


def _row(sample: Sample, rendered: Rendered) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
        "images": list(sample.images),
    }


def _enforce_policy(source: _Source, tally: _Tally) -> None:
    """Stop if more records are bad than the source allows, or none is left."""
    allowed = source.max_bad if source.on_bad == "skip" else 0
    if len(tally.bad) > allowed:
        lines = [f"{source.annotations}: {len(tally.bad)} bad records, {allowed} allowed (on_bad={source.on_bad})"]
        lines += [f"  record {bad.index} (id '{bad.sample_id}'): {bad.reason}" for bad in tally.bad[:FAULTS_SHOWN]]
        if len(tally.bad) > FAULTS_SHOWN:
            lines.append(f"  ... and {len(tally.bad) - FAULTS_SHOWN} more")
        advice = (
            f"Correct or remove them, or set on_bad=skip and max_bad={len(tally.bad)} on the source to leave them out."
        )
        raise DataError("\n".join([*lines, " ".join(filter(None, [advice, source.how_to_get]))]))
    if not tally.samples:
        raise DataError(f"{source.annotations}: no usable record among {sum(tally.ids.values())}. Check the file.")


def _write_rows(path: Path, tables: Iterator[pa.Table]) -> None:
    """Stream rows to an Arrow file, so that memory does not grow with the data set."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, FEATURES.arrow_schema) as writer:
        for table in tables:
            writer.write_table(table)


def _publish(rows: Path, job: StageJob[PrepareStage]) -> None:
    """Save as a `datasets` folder. Its fingerprint is the stage's digest: by default it would be a random one."""
    samples = job.output / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    table = datasets.Dataset.from_file(str(rows)).data
    info = datasets.DatasetInfo(features=FEATURES)
    dataset = datasets.Dataset(table, info=info, fingerprint=job.digest[:16])
    datasets.disable_progress_bars()  # the command shows its own
    dataset.save_to_disk(samples)


def _report(job: StageJob[PrepareStage], tally: _Tally) -> dict[str, Any]:
    """Write report.json with every skipped record; the summary for the manifest has the first FAULTS_SHOWN of them."""
    skipped = [asdict(bad) for bad in tally.bad]
    summary = {
        "samples": tally.samples,
        "skipped": len(skipped),
        "images": sum(fault is None for fault in tally.checked.values()),
        "tokens": tally.tokens,
        "supervised_tokens": tally.supervised_tokens,
        "duplicates": sum(tally.ids.values()) - len(tally.ids),
    }
    report = json.dumps(summary | {"skipped_records": skipped}, indent=1, ensure_ascii=False)
    (job.output / "report.json").write_text(report + "\n", encoding="utf-8")
    log.info("prepared %(samples)d samples with %(images)d images, %(tokens)d tokens; skipped %(skipped)d", summary)
    if summary["duplicates"]:
        log.warning("%d records repeat an id; all of them are used", summary["duplicates"])
    remark = f"{len(skipped):,} records are left out as bad; {job.output / 'report.json'} lists them"
    remarks = {"remarks": [remark]} if skipped else {}
    return summary | {"skipped_records": skipped[:FAULTS_SHOWN]} | remarks

"""The prepare stage on real files: columns, counts, both policies for each kind of bad record, stable bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.stages.preparing import prepared
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.errors import ConfigError, DataError, StoppedError, UserError
from tinylmm.planning.specs import PrepareStage, StageSettings
from tinylmm.stages import prepare, rendering
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stop import watch_for_stop

Record = dict[str, Any]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(["USER: what is it? ASSISTANT: a cat"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with two good images, and files that no record may use."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 30), colour).save(images / name)
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:1500])
    (images / "corrupt.png").write_bytes(b"this is no image")
    (images / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 14_000, 14_000, 8, 2, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(b"\0"))
    )
    Image.new("RGB", (4, 4)).save(tmp_path / "data" / "outside.png")
    (images / "link.png").symlink_to(tmp_path / "data" / "outside.png")
    return tmp_path / "data"


def record(name: str = "good", image: Any = "a.png", question: str = "<image>\nwhat is it?", **fields: Any) -> Record:
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    found = {"id": name, "image": image, "conversations": messages, **fields}
    return {key: value for key, value in found.items() if value is not None}


BAD = {
    "corrupt-image": (record("bad", "corrupt.png"), r"corrupt\.png: not a readable"),
    "truncated-jpeg": (record("bad", "cut.jpg"), r"cut\.jpg: image is damaged or cut short"),
    "missing-image": (record("bad", "gone.png"), r"'gone\.png': not found"),
    "second-image-missing": (record("bad", ["a.png", "gone.png"], "<image><image>"), r"'gone\.png': not found"),
    "no-conversations": (record("bad", conversations=None), "`conversations` must be a list"),
    "unknown-role": (record("bad", conversations=[{"from": "x", "value": "<image>"}] * 2), "unknown role 'x'"),
    "two-slots-one-image": (record("bad", question="<image> <image>"), "2 <image> but the record names 1"),
    "path-escape": (record("bad", "../outside.png"), "leads out of the image folder"),
    "absolute-path": (record("bad", "/etc/hostname"), "leads out of the image folder"),
    "link-outside": (record("bad", "link.png"), "leads out of the image folder"),
    "bomb": (record("bad", "bomb.png"), "too large"),
    "video": (record("bad", None, video="a.mp4"), "nothing says which frames of it to show: set video.sampling"),
}


def job_of(root: Path, tokenizer: Path, records: list[Any], template: str = "phi", **source: Any) -> StageJob[Any]:
    (root / "a.json").write_text(json.dumps(records), encoding="utf-8")
    folder = root.parent / "work" / "prepare"
    fields = {"format": "llava", "limit": None, "on_bad": "fail", "max_bad": 0, **source}
    location = {"annotations": "a.json", "images": "images", "how_to_get": "Ask the author.", **fields}
    settings = {"launch": {"num_workers": 0}, "location": {"root": str(root), "source": location}, "folders": {}}
    spec = {"template": template, "source": {**fields, "content": {}}}
    parents = {"tokenizer": tokenizer, "images": folder.parent / "images" / "output"}
    job = make_job("prepare", "prepare[x]", "ab" * 32, spec, parents, settings, folder, folder / "store")
    job.output.mkdir(parents=True, exist_ok=True)
    return job


def output_hashes(job: StageJob[Any]) -> dict[str, str]:
    files = (path for path in sorted(job.output.rglob("*")) if path.is_file())
    return {str(path.relative_to(job.output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_samples_have_ids_labels_and_images_in_file_order(root: Path, tokenizer: Path) -> None:
    records = [
        record("1"),
        record("2", "b.jpg"),
        record("3", None, "what?"),
        record("4", ["a.png", "b.jpg"], "<image><image>"),
    ]
    summary = prepared(job_of(root, tokenizer, records))
    samples = load_from_disk(root.parent / "work" / "prepare" / "output" / "samples")
    assert samples["sample_id"][:] == ["1", "2", "3", "4"]
    assert samples["images"][:] == [["a.png"], ["b.jpg"], [], ["a.png", "b.jpg"]]
    assert [ids.count(IMAGE_TOKEN_ID) for ids in samples["input_ids"]] == [1, 1, 0, 2]
    reader = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    assert [reader.decode([i for i in labels if i >= 0]) for labels in samples["labels"]] == [" a cat<|endoftext|>"] * 4
    assert summary == {
        "samples": 4,
        "skipped": 0,
        "skipped_records": [],
        "images": 2,
        "faulty": 0,
        "tokens": sum(len(ids) for ids in samples["input_ids"]),
        "supervised_tokens": sum(label >= 0 for labels in samples["labels"] for label in labels),
        "duplicates": 0,
    }


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_record_stops_the_run_with_file_record_and_reason(
    root: Path, tokenizer: Path, bad: Record, reason: str
) -> None:
    job = job_of(root, tokenizer, [record(), bad, record()])
    with pytest.raises(DataError, match=reason) as caught:
        prepared(job)
    assert f"{root / 'a.json'}: 1 bad records, 0 allowed (on_bad=fail)" in str(caught.value)
    assert "record 1 (id 'bad'): " in str(caught.value)
    assert "set on_bad=skip and max_bad=1" in str(caught.value)
    assert not (job.output / "samples").exists()


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_record_is_left_out_and_counted_where_that_is_allowed(
    root: Path, tokenizer: Path, bad: Record, reason: str
) -> None:
    job = job_of(root, tokenizer, [record("1"), bad, record("2")], on_bad="skip", max_bad=1)
    summary = prepared(job)
    assert load_from_disk(job.output / "samples")["sample_id"][:] == ["1", "2"]
    assert (summary["samples"], summary["skipped"]) == (2, 1)
    (skipped,) = summary["skipped_records"]
    assert (skipped["index"], skipped["sample_id"]) == (1, "bad")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(skipped["reason"])
    assert json.loads((job.output / "report.json").read_text(encoding="utf-8"))["skipped_records"] == [skipped]


def test_more_bad_records_than_allowed_stop_the_run_with_their_total(root: Path, tokenizer: Path) -> None:
    records = [record(), *(record(f"bad{number}", f"gone{number}.png") for number in range(25))]
    job = job_of(root, tokenizer, records, on_bad="skip", max_bad=24)
    with pytest.raises(DataError, match=r"(?s)25 bad records, 24 allowed.*\(id 'bad19'\).*\.\.\. and 5 more") as caught:
        prepared(job_of(root, tokenizer, records, on_bad="skip", max_bad=24))
    assert "bad20" not in str(caught.value)
    assert "Ask the author." in str(caught.value)
    assert not (job.output / "samples").exists()


def test_rerun_gives_the_same_bytes_also_over_leftovers(root: Path, tokenizer: Path) -> None:
    records = [record("1"), record("bad", "gone.png"), record("2", "b.jpg")]
    job = job_of(root, tokenizer, records, on_bad="skip", max_bad=1)
    prepared(job)
    first = output_hashes(job)
    (job.output / "samples" / "data-00007-of-00009.arrow").write_bytes(b"left by a killed try")
    (job.folder / "scratch").mkdir()
    (job.folder / "scratch" / "chunks-of-2048").mkdir()
    (job.folder / "scratch" / "chunks-of-2048" / "0.arrow").write_bytes(b"half")
    prepared(job)
    assert output_hashes(job) == first
    assert set(first) >= {"report.json", "samples/state.json", "samples/dataset_info.json"}


def test_worker_processes_give_the_same_bytes(root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 7)
    job = job_of(root, tokenizer, [record(str(number), ["a.png", "b.jpg"][number % 2]) for number in range(20)])
    prepared(job)
    first = output_hashes(job)
    monkeypatch.setattr(prepare, "SERIAL_PIECES", 1)
    job = replace(job, settings=StageSettings.model_validate(job.settings.as_json() | {"launch": {"num_workers": 2}}))
    prepared(job)
    assert output_hashes(job) == first


def test_chunks_of_a_long_file_are_joined_in_order(
    root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 3)
    job = job_of(root, tokenizer, [record(str(number)) for number in range(8)])
    assert prepared(job)["images"] == 1
    assert load_from_disk(job.output / "samples")["sample_id"][:] == [str(number) for number in range(8)]


def test_rows_of_many_chunks_lie_in_files_of_a_size(
    root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 3)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 3_000)
    job = job_of(root, tokenizer, [record(str(number)) for number in range(20)])
    prepared(job)
    assert len(list((job.output / "samples").glob("*.arrow"))) > 2
    assert load_from_disk(job.output / "samples")["sample_id"][:] == [str(number) for number in range(20)]


def test_limit_takes_the_first_records_only(root: Path, tokenizer: Path) -> None:
    records = [record("1"), record("2"), record("bad", "gone.png")]
    assert prepared(job_of(root, tokenizer, records, limit=2))["samples"] == 2


def test_repeated_ids_are_used_and_counted(root: Path, tokenizer: Path) -> None:
    summary = prepared(job_of(root, tokenizer, [record("1"), record("1"), record("1"), record("2")]))
    assert (summary["samples"], summary["duplicates"]) == (4, 2)


def test_file_without_a_usable_record_is_refused(root: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json: no usable record among 0"):
        prepared(job_of(root, tokenizer, []))


def test_built_data_is_read_from_the_data_stage(root: Path, tokenizer: Path) -> None:
    job = job_of(root, tokenizer, [record("1")])
    source = {"file": "a.json", "images": "images", "format": "llava", "limit": None, "on_bad": "fail", "max_bad": 0}
    spec = PrepareStage.model_validate({"template": "phi", "source": source})
    located = StageSettings.model_validate(
        {"location": {"root": None, "source": {"annotations": "a.json", "images": "images"}}}
    )
    built = replace(job, spec=spec, settings=located, parents=job.parents | {"data": root})
    assert prepared(built)["samples"] == 1


def test_unknown_template_is_refused(root: Path, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match="unknown chat template 'pi'"):
        prepared(job_of(root, tokenizer, [record()], template="pi"))


def test_tokenizer_that_cannot_be_loaded_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer '.*nowhere'.*cannot be loaded.*Check llm\.tokenizer"):
        prepared(job_of(root, tmp_path / "nowhere", [record()]))


def broken_off(job: StageJob[Any], monkeypatch: pytest.MonkeyPatch, after: int, stop: BaseException) -> None:
    """Run the stage until so many records are rendered; then it is stopped, or dies."""
    render, calls = rendering.Renderer.render, []

    def counted(self: rendering.Renderer, sample: Any) -> Any:
        calls.append(sample)
        if len(calls) > after:
            if isinstance(stop, StoppedError):
                signal.raise_signal(signal.SIGTERM)
            else:
                raise stop
        return render(self, sample)

    monkeypatch.setattr(rendering.Renderer, "render", counted)
    with watch_for_stop(), pytest.raises(type(stop)):
        prepared(job)
    monkeypatch.setattr(rendering.Renderer, "render", render)


@pytest.mark.parametrize("stop", [StoppedError(), MemoryError()], ids=["asked to stop", "died"])
def test_what_was_stopped_goes_on_behind_the_last_whole_chunk_to_the_same_bytes(
    stop: BaseException, root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 3)
    images = ["a.png", "gone.png", "b.jpg"]
    records = [record(str(number), images[number % 3]) for number in range(9)] + [record("1"), {"id": "no"}]
    job = job_of(root, tokenizer, records, on_bad="skip", max_bad=4)
    summary = prepared(job)
    undisturbed = output_hashes(job)
    shutil.rmtree(job.folder.parent)
    job.output.mkdir(parents=True)
    broken_off(job, monkeypatch, 7, stop)
    rendered: list[str] = []
    render = rendering.Renderer.render
    monkeypatch.setattr(
        rendering.Renderer, "render", lambda self, sample: rendered.append(sample.sample_id) or render(self, sample)
    )
    assert prepared(job) == summary
    assert rendered == (["6", "7", "8", "1"] if isinstance(stop, MemoryError) else ["1"]), "whole chunks are kept"
    assert output_hashes(job) == undisturbed


@pytest.mark.parametrize("name", ["1.arrow", "1.json"])
def test_a_kept_chunk_that_is_not_whole_is_made_again(
    name: str, root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "CHUNK", 3)
    job = job_of(root, tokenizer, [record(str(number)) for number in range(11)])
    prepared(job)
    undisturbed = output_hashes(job)
    broken_off(job, monkeypatch, 6, StoppedError())
    path = job.folder / "scratch/chunks-of-3" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    prepared(job)
    assert output_hashes(job) == undisturbed


def test_preparing_in_several_processes_can_be_stopped(
    root: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "SERIAL_PIECES", 1)
    monkeypatch.setattr(rendering, "CHUNK", 500)
    job = job_of(root, tokenizer, [record(str(number)) for number in range(5_000)])
    job = replace(job, settings=StageSettings.model_validate(job.settings.as_json() | {"launch": {"num_workers": 2}}))
    done = threading.Event()

    def stop_once_it_works() -> None:
        while not list(job.folder.glob("scratch/*/0.json")) and not done.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    with watch_for_stop():
        asker = threading.Thread(target=stop_once_it_works)
        asker.start()
        try:
            with pytest.raises(StoppedError, match="the same command continues"):
                prepared(job)
        finally:
            done.set()
            asker.join()
    assert list(job.folder.glob("scratch/*/0.json")) and not list(job.folder.glob("scratch/*/9.json"))

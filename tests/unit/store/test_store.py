"""A stage in the store is whole and proven or not there, whatever was killed, altered or deleted."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinylmm.errors import IntegrityError
from tinylmm.store.claims import claim
from tinylmm.store.gc import CACHE_DAYS
from tinylmm.store.integrity import mark_complete, write_manifest
from tinylmm.store.provenance import software_versions
from tinylmm.store.runs import StageRow, create_run
from tinylmm.store.stage import Stage, digest
from tinylmm.store.store import Store

PUBLISHED = ["COMPLETE", "log.txt", "manifest.json", "metrics.jsonl", "output/deep/b.bin", "output/a.txt", "spec.json"]
PROVEN = [name for name in PUBLISHED if name != "log.txt"]
DISK_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir", "shutil.rmtree"}


def make_stage(number: int = 0, kind: str = "train", parents: dict[str, Stage] | None = None, **spec: Any) -> Stage:
    digests = {role: parent.digest for role, parent in (parents or {}).items()}
    fields = {"number": number, "lr": 1e-3, **spec}
    return Stage.of(kind, f"{kind}[{number}]", 1, fields, digests, {"launch": {"backend": "local"}})


def work_on(store: Store, stage: Stage) -> None:
    """Leave a work folder as a stage that has just ended leaves it."""
    work = store.begin(stage)
    (work / "output/deep").mkdir(exist_ok=True)
    (work / "output/a.txt").write_text(f"result {stage.digest}")
    (work / "output/deep/b.bin").write_bytes(bytes(1000))
    (work / "metrics.jsonl").write_text('{"step": 1}\n')
    (work / "log.txt").write_text("log\n")
    (work / "job.json").write_text("{}")
    (work / "checkpoints/step-1").mkdir(parents=True, exist_ok=True)
    (work / "checkpoints/step-1/weights").write_bytes(bytes(100))
    store.fail(stage, "Traceback of an earlier try")


def finish(store: Store, stage: Stage) -> Path:
    work_on(store, stage)
    return store.publish(stage, {"samples": 3}, time.time() - 2)


def files(folder: Path) -> list[str]:
    """All files but those of a killed `write_atomic`, which nobody reads."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"
    )


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def killed_at(event: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that is killed at its so-manieth access to the disk; False if it got through."""
    child = os.fork()
    if child == 0:
        events = itertools.count(1)

        def hook(name: str, _: object) -> None:
            if name in DISK_EVENTS and next(events) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# -------------------------------------------------------------------------------------------------- the way through


def test_reading_an_absent_store_makes_nothing(store: Store) -> None:
    stage = make_stage()
    assert store.status(stage) == "todo"
    assert store.ls() == []
    assert store.gc(set()) == []
    with pytest.raises(IntegrityError, match="is missing or not whole"):
        store.output(stage)
    assert not store.root.exists()


def test_a_published_stage_is_complete_and_holds_what_shall_be_kept(store: Store) -> None:
    stage = make_stage()
    folder = finish(store, stage)
    assert folder == store.root / "stages" / stage.key
    assert files(folder) == sorted(PUBLISHED)
    assert store.status(stage) == "complete"
    assert store.verify(stage) == []
    assert (store.open_output(stage) / "a.txt").read_text() == f"result {stage.digest}"
    assert not store.work_folder(stage).exists()


def test_the_manifest_says_what_made_the_stage(store: Store) -> None:
    stage = make_stage(parents={"data": make_stage(1, "data")})
    manifest = json.loads((finish(store, stage) / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("format", "kind", "name", "digest", "parents", "summary")} == {
        "format": 1,
        "kind": "train",
        "name": "train[0]",
        "digest": stage.digest,
        "parents": stage.parents,
        "summary": {"samples": 3},
    }
    assert 2 <= manifest["seconds"] < 60
    assert manifest["started"] < manifest["finished"]
    assert set(manifest["versions"]) == {"tinylmm", "git", "python", "torch", "transformers"}
    assert manifest["peak_rss_mib"] > 1
    assert sorted(manifest["files"]) == sorted(set(PROVEN) - {"COMPLETE", "manifest.json"})


def test_the_spec_beside_the_result_is_what_the_digest_is_made_of(store: Store) -> None:
    stage = make_stage()
    spec = json.loads((finish(store, stage) / "spec.json").read_text())
    assert digest({key: spec[key] for key in ("kind", "version", "spec", "parents")}) == spec["digest"] == stage.digest
    assert spec["settings"] == stage.settings


def test_begin_keeps_what_a_killed_try_left(store: Store) -> None:
    stage = make_stage()
    work_on(store, stage)
    work = store.begin(stage)
    assert (work / "checkpoints/step-1/weights").exists()
    assert (work / "output/a.txt").exists()
    assert (work / "error.txt").read_text() == "Traceback of an earlier try"
    assert store.status(stage) == "todo"


def test_log_lines_written_while_publishing_do_no_harm(store: Store) -> None:
    stage = make_stage()
    with (store.begin(stage) / "log.txt").open("a") as handler:
        store.publish(stage, {}, time.time())
        handler.write("published\n")
    assert store.verify(stage) == []


# ------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", PROVEN)
def test_a_flipped_bit_is_named_never_used_and_the_stage_is_made_anew(store: Store, name: str) -> None:
    stage = make_stage()
    flip_bit(finish(store, stage) / name)
    assert name in store.verify(stage)[0]
    reader = Store(store.root)
    if reader.is_complete(stage):  # sizes agree: only reading the files tells
        with pytest.raises(IntegrityError, match=re.escape(name)):
            reader.open_output(stage)
        assert not Store(store.root).is_complete(stage)
    assert not reader.recover(stage)
    finish(store, stage)
    assert store.verify(stage) == []
    assert (store.root / "damaged" / f"{stage.key}-1").is_dir()


@pytest.mark.parametrize("name", [name for name in PROVEN if name != "COMPLETE"])
def test_a_missing_file_makes_the_stage_incomplete_and_is_named_in_the_log(
    store: Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = make_stage()
    (finish(store, stage) / name).unlink()
    assert store.status(stage) == "todo"
    assert f"{store.folder(stage) / name} is missing" in caplog.text
    store.begin(stage)
    assert "is set aside in" in caplog.text
    assert (store.root / "damaged" / f"{stage.key}-1").is_dir()


def test_each_damaged_folder_is_kept_under_its_own_number(store: Store) -> None:
    stage = make_stage()
    for _ in range(3):
        (finish(store, stage) / "output/a.txt").unlink()
        assert not store.recover(stage)
    assert sorted(path.name for path in (store.root / "damaged").iterdir()) == [f"{stage.key}-{n}" for n in (1, 2, 3)]


def test_an_added_file_is_refused_but_the_stage_is_not_given_up(store: Store) -> None:
    stage = make_stage()
    added = finish(store, stage) / "output/adapter_config.json"
    added.write_text("{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json is not in manifest\.json"):
        store.open_output(stage)
    added.unlink()
    assert store.open_output(stage)


def test_files_are_read_once_for_each_store_object(store: Store) -> None:
    stage = make_stage()
    folder = finish(store, stage)
    store.open_output(stage)
    flip_bit(folder / "output/deep/b.bin")
    assert store.open_output(stage)
    with pytest.raises(IntegrityError, match=r"b\.bin has SHA-256"):
        Store(store.root).open_output(stage)


def test_another_stages_folder_under_this_key_is_not_used(store: Store) -> None:
    stage, other = make_stage(0), make_stage(1)
    finish(store, other).rename(store.root / "stages" / stage.key)
    assert store.status(stage) == "todo"
    assert not store.recover(stage)


def test_a_different_spec_under_the_same_digest_stops_with_the_differences(store: Store) -> None:
    stage = make_stage(lr=1e-3)
    finish(store, stage)
    store.check_spec(stage)
    same_digest = replace(stage, spec={**stage.spec, "lr": 2e-3})
    with pytest.raises(IntegrityError, match=r"spec\.lr: 0\.001 -> 0\.002"):
        store.open_output(same_digest)


def test_a_spec_with_tuples_is_equal_to_its_json(store: Store) -> None:
    stage = make_stage(mean=(0.5, 0.5, 0.5))
    finish(store, stage)
    store.check_spec(stage)


# ------------------------------------------------------------------------------------------------------ crashes


def test_a_crash_between_rename_and_marker_is_recovered(store: Store) -> None:
    stage = make_stage()
    marker = finish(store, stage) / "COMPLETE"
    content = marker.read_text()
    marker.unlink()
    assert store.is_complete(stage)
    assert marker.read_text() == content


def test_an_unmarked_folder_that_does_not_match_is_set_aside(store: Store) -> None:
    stage = make_stage()
    folder = finish(store, stage)
    (folder / "COMPLETE").unlink()
    flip_bit(folder / "output/deep/b.bin")
    assert not store.recover(stage)
    assert not folder.exists()
    assert (store.root / "damaged" / f"{stage.key}-1/output/a.txt").exists()


def test_a_kill_at_any_disk_access_of_publish_loses_no_finished_work(tmp_path: Path) -> None:
    software_versions()
    stage, recovered = make_stage(), 0
    for event in itertools.count(1):
        store = Store(tmp_path / str(event))
        work_on(store, stage)
        if not killed_at(event, lambda store=store: store.publish(stage, {}, time.time())):  # type: ignore[misc]
            break
        if store.recover(stage):
            recovered += 1
        else:
            assert (store.work_folder(stage) / "checkpoints/step-1/weights").exists()
            store.begin(stage)
            store.publish(stage, {}, time.time())
        assert store.verify(stage) == []
        assert files(store.folder(stage)) == sorted(PUBLISHED)
    assert event > 20
    assert recovered > 10


def test_a_kill_at_any_disk_access_of_recover_converges(tmp_path: Path) -> None:
    stage = make_stage()
    for event in itertools.count(1):
        store = Store(tmp_path / str(event))
        (finish(store, stage) / "output/a.txt").write_text("damaged")
        if not killed_at(event, lambda store=store: store.recover(stage)):  # type: ignore[misc]
            break
        assert not store.recover(stage)
        assert files(store.root / "damaged" / f"{stage.key}-1") == sorted(PUBLISHED)
    assert event > 3


def test_the_second_of_two_publishers_drops_its_result(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    stage = make_stage()
    first = finish(store, stage)
    work_on(store, stage)
    assert store.publish(stage, {"samples": 4}, time.time()) == first
    assert json.loads((first / "manifest.json").read_text())["summary"] == {"samples": 3}
    assert "finished by another process" in caplog.text


def test_a_link_in_the_output_is_refused_and_the_work_kept(store: Store) -> None:
    stage = make_stage()
    work_on(store, stage)
    link = store.work_folder(stage) / "output/link"
    link.symlink_to("a.txt")
    with pytest.raises(IntegrityError, match="link is not a regular file"):
        store.publish(stage, {}, time.time())
    assert (store.work_folder(stage) / "checkpoints").exists()


# ------------------------------------------------------------------------------------------- listing, deleting


def test_ls_says_what_is_there_and_who_uses_it(store: Store) -> None:
    whole, unmarked, damaged = (make_stage(number) for number in range(3))
    size = sum(path.stat().st_size for path in finish(store, whole).rglob("*") if path.is_file())
    (finish(store, unmarked) / "COMPLETE").unlink()
    (finish(store, damaged) / "output/a.txt").unlink()
    row = StageRow(whole.kind, whole.name, whole.digest, whole.key)
    create_run(store.root, "base", "mine", stages=[row, row])
    rows = {row.key: row for row in store.ls()}
    found = rows[whole.key]
    assert (found.kind, found.name, found.size, found.status) == ("train", "train[0]", size, "complete")
    assert (found.digest, found.runs) == (whole.digest, ("mine",))
    assert (rows[unmarked.key].status, rows[damaged.key].status) == ("unfinished", "damaged")
    assert rows[damaged.key].runs == ()


def test_gc_deletes_what_no_run_uses_and_keeps_all_ancestors(store: Store) -> None:
    data = make_stage(0, "data")
    prepared = make_stage(1, "prepare", {"data": data})
    model = make_stage(2, "train", {"prepared": prepared})
    unused = make_stage(3, "eval", {"model": model})
    abandoned = make_stage(4)
    for stage in (data, prepared, model, unused):
        finish(store, stage)
    work_on(store, abandoned)
    expected = [f"stages/{unused.key}", f"work/{abandoned.key}"]
    assert [row.folder for row in store.gc({model.digest})] == expected
    assert store.is_complete(unused)
    assert [row.folder for row in store.gc({model.digest}, dry_run=False)] == expected
    assert [store.status(stage) for stage in (data, prepared, model, unused)] == ["complete"] * 3 + ["todo"]
    assert not store.work_folder(abandoned).exists()
    assert not (store.root / "trash").exists()


def test_gc_keeps_the_failed_work_of_a_run_and_its_parents(store: Store) -> None:
    parent = make_stage(0, "data")
    failed = make_stage(1, "train", {"data": parent})
    finish(store, parent)
    work_on(store, failed)
    assert store.gc({failed.digest}, dry_run=False) == []


def test_gc_keeps_what_a_live_process_works_on_and_its_parents(store: Store) -> None:
    parent = make_stage(0, "data")
    active = make_stage(1, "train", {"data": parent})
    finish(store, parent)
    work_on(store, active)
    with claim(store.root, active.key):
        assert store.gc(set(), dry_run=False) == []
    assert len(store.gc(set(), dry_run=False)) == 2


def test_gc_deletes_what_was_set_aside_and_what_a_killed_gc_left(store: Store) -> None:
    stage = make_stage()
    (finish(store, stage) / "output/a.txt").unlink()
    finish(store, stage)
    (store.root / "trash/half").mkdir(parents=True)
    assert [row.folder for row in store.gc({stage.digest}, dry_run=False)] == [f"damaged/{stage.key}-1"]
    assert not (store.root / "trash").exists()
    assert store.is_complete(stage)


def test_gc_deletes_nothing_if_a_kept_stages_parents_are_unknown(store: Store) -> None:
    kept, unused = make_stage(0), make_stage(1)
    (finish(store, kept) / "spec.json").unlink()
    finish(store, unused)
    with pytest.raises(IntegrityError, match=r"spec\.json cannot be read"):
        store.gc({kept.digest}, dry_run=False)
    assert store.is_complete(unused)


def features(store: Store, key: str, *readers: Stage) -> Path:
    """A folder of features, and the note of it in the readers' folders."""
    folder = store.root / "features" / key
    folder.mkdir(parents=True)
    (folder / "features.bin").write_bytes(bytes(100))
    write_manifest(folder, {"format": 1, "images": 7})
    mark_complete(folder)
    for reader in readers:
        (store.work_folder(reader) / "features.json").write_text(json.dumps([key]))
    return folder


def test_ls_lists_features_with_the_runs_that_read_them_and_the_cache(store: Store) -> None:
    reader, size = make_stage(), 0
    work_on(store, reader)
    folder = features(store, "abc", reader)
    size = sum(path.stat().st_size for path in folder.iterdir())
    (store.root / "cache").mkdir()
    (store.root / "cache/one.json").write_text("{}")
    create_run(store.root, "base", "mine", stages=[StageRow(reader.kind, reader.name, reader.digest, reader.key)])
    rows = [(row.key, row.kind, row.name, row.size, row.status, row.runs) for row in store.ls()]
    assert rows == [
        ("abc", "features", "7 images", size, "complete", ("mine",)),
        ("cache", "cache", "fingerprints", 2, "complete", ()),
    ]
    (folder / "features.bin").unlink()
    assert store.ls()[0].status == "damaged"


def test_gc_keeps_the_features_that_a_kept_stage_reads_and_deletes_the_others(store: Store) -> None:
    kept, given_up = make_stage(0), make_stage(1)
    for stage in (kept, given_up):
        work_on(store, stage)
    both = features(store, "both", kept, given_up)
    alone = features(store, "alone", given_up)
    store.publish(kept, {}, time.time())
    expected = [f"work/{given_up.key}", "features/alone"]
    assert [row.folder for row in store.gc({kept.digest})] == expected
    assert alone.exists()
    assert [row.folder for row in store.gc({kept.digest}, dry_run=False)] == expected
    assert both.exists()
    assert not alone.exists()
    assert store.verify(kept) == []


def test_gc_deletes_no_features_if_it_is_unknown_who_reads_them(store: Store) -> None:
    kept = make_stage()
    work_on(store, kept)
    folder = features(store, "abc", kept)
    (store.work_folder(kept) / "features.json").write_text("[")
    with pytest.raises(IntegrityError, match=r"features\.json cannot be read"):
        store.gc({kept.digest}, dry_run=False)
    assert folder.exists()


def test_gc_deletes_fingerprints_that_nobody_read_for_long(store: Store) -> None:
    old, new = store.root / "cache/fingerprints/old.json", store.root / "cache/fingerprints/new.json"
    old.parent.mkdir(parents=True)
    for path, age in ((old, CACHE_DAYS + 1), (new, CACHE_DAYS - 1)):
        path.write_text("{}")
        os.utime(path, (time.time() - 86400 * age,) * 2)
    assert [row.folder for row in store.gc(set(), dry_run=False)] == ["cache/fingerprints/old.json"]
    assert (old.exists(), new.exists()) == (False, True)


def test_a_kill_at_any_disk_access_of_gc_leaves_no_half_stage(tmp_path: Path) -> None:
    stage = make_stage()
    for event in itertools.count(1, 2):  # every other one: all steps are several accesses long
        store = Store(tmp_path / str(event))
        finish(store, stage)
        if not killed_at(event, lambda store=store: store.gc(set(), dry_run=False)):  # type: ignore[misc]
            break
        assert not store.folder(stage).exists() or store.verify(stage) == []
    assert event > 20
    store.gc(set(), dry_run=False)
    assert not (store.root / "trash").exists()

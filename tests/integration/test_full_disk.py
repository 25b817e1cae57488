"""On a disk that is full or read-only, each command does without it or says so in one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.project import Project, tiny_project
from tinylmm.cli.errors import guarded
from tinylmm.cli.main import app
from tinylmm.store.claims import Claim
from tinylmm.store.layout import StoreLayout

QUICK = ("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1")
SENTENCE = {"full": "disk is full", "no inodes": "one more file name (inode)", "read-only": "disk is read-only"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = tiny_project(tmp_path_factory.mktemp("finished"))
    assert project.train_here(*QUICK).returncode == 0
    return project


@pytest.fixture(params=SENTENCE)
def disk(request: pytest.FixtureRequest, tmp_path: Path, finished: Project) -> Iterator[tuple[str, Path]]:
    """A store that cannot be written, with one finished run and an unused stage in it, and why it cannot."""
    with tmpfs(tmp_path / "disk", "size=64m") as mounted:
        store = mounted / "store"
        shutil.copytree(finished.store, store)
        shutil.rmtree(store / "cache")
        unused = shutil.copytree(next((store / "stages").glob("train-*")), store / "stages/train-0123456789abcdef")
        assert sum(path.stat().st_size for path in unused.rglob("*")) > 100_000
        if request.param == "full":
            fill(mounted / "big")
        elif request.param == "no inodes":
            use_up_inodes(mounted)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        yield SENTENCE[request.param], store


@contextlib.contextmanager
def tmpfs(mounted: Path, options: str) -> Iterator[Path]:
    """A small disk at `mounted` while the block runs."""
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mounted)]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass


def use_up_inodes(mounted: Path) -> None:
    """Leave no room for one more file, however much there is for bytes."""
    status = os.statvfs(mounted)
    used = status.f_files - status.f_ffree
    subprocess.run(["mount", "-o", f"remount,nr_inodes={used}", str(mounted)], check=True)


def said(command: Callable[[], object]) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = guarded(lambda: int(command() or 0))
    return code, output.getvalue()


def tinylmm(*words: str) -> tuple[int, str]:
    return said(lambda: app(list(words), standalone_mode=False))


def test_planning_and_looking_at_data_need_no_store(disk: tuple[str, Path], finished: Project) -> None:
    why, store = disk
    words = [*finished.words, *QUICK, f"store={store}"]
    assert tinylmm("plan", *words)[0] == 0
    code, text = tinylmm("data", "check", *words)
    assert code == 0 and "no page: " in text and why in text
    code, text = tinylmm("data", "check", *words, "--html", str(store / "page.html"))
    assert code == 1 and why in text


def test_what_only_reads_works(disk: tuple[str, Path]) -> None:
    for words in (["runs"], ["store", "ls"], ["store", "verify", "--quick"], ["store", "gc"]):
        assert tinylmm(*words, "--store", str(disk[1]))[0] == 0, words


def test_what_has_to_write_says_so_in_one_sentence(disk: tuple[str, Path], finished: Project) -> None:
    why, store = disk
    code, text = tinylmm("report", "--store", str(store))
    assert (code, text.count("\n")) == (1, 1) and why in text
    done = finished.train_here(*QUICK, "seed=3", f"store={store}")
    assert done.returncode in (1, 2) and any(words in done.stderr for words in (why, "nothing can be written to"))
    assert done.stderr.count("\n") <= 2


def test_a_full_disk_can_be_freed(disk: tuple[str, Path]) -> None:
    why, store = disk
    code, text = tinylmm("store", "gc", "--yes", "--store", str(store))
    if "read-only" in why:
        assert code == 1 and why in text
    else:
        assert code == 0 and not (store / "stages/train-0123456789abcdef").exists(), text


def test_a_full_disk_frees_nothing_that_somebody_works_on(disk: tuple[str, Path]) -> None:
    why, store = disk
    if "full" not in why:
        return
    (store.parent / "big").unlink()
    with Claim(store, "train-0123456789abcdef"):
        tinylmm("store", "gc", "--yes", "--store", str(store))
        assert StoreLayout(store).stage("train-0123456789abcdef").exists()


@pytest.mark.parametrize("kilobytes", [40, 500])
def test_a_disk_that_fills_up_during_a_run_is_named_and_the_run_continues_when_there_is_room(
    kilobytes: int, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "disk", "size=32m") as mounted:
        project = tiny_project(tmp_path)
        fill(mounted / "big")
        os.truncate(mounted / "big", (mounted / "big").stat().st_size - 1024 * kilobytes)
        words = (*QUICK, f"store={mounted / 'store'}", "launch.save_steps=1")
        done = project.train_here(*words)
        assert done.returncode == 1 and "disk is full" in done.stderr, done.stderr
        assert "Traceback" not in done.stdout + done.stderr and done.stderr.count("\n") == 1
        (mounted / "big").unlink()
        assert project.train_here(*words).returncode == 0


@pytest.mark.parametrize("inodes", [2, 12, 40, 60])
def test_a_disk_without_room_for_more_files_is_named_and_the_run_continues_when_there_is(
    inodes: int, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "disk", f"nr_inodes={inodes}") as mounted:
        project = tiny_project(tmp_path)
        words = (*QUICK, f"store={mounted / 'store'}", "launch.save_steps=1")
        done = project.train_here(*words)
        assert done.returncode == 1 and "one more file name (inode)" in done.stderr, done.stderr
        assert "Traceback" not in done.stdout + done.stderr and done.stderr.count("\n") == 1
        for command in (["runs"], ["store", "ls"], ["report"]):
            code, text = tinylmm(*command, "--store", str(mounted / "store"))
            assert code == 0 or (code in (1, 2) and text.count("\n") == 1), (command, text)
        subprocess.run(["mount", "-o", "remount,nr_inodes=2000", str(mounted)], check=True)
        assert project.train_here(*words).returncode == 0

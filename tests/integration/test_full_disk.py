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
SENTENCE = {"full": "disk is full", "read-only": "disk is read-only"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = tiny_project(tmp_path_factory.mktemp("finished"))
    assert project.train_here(*QUICK).returncode == 0
    return project


@pytest.fixture(params=SENTENCE)
def disk(request: pytest.FixtureRequest, tmp_path: Path, finished: Project) -> Iterator[tuple[str, Path]]:
    """A store that cannot be written, with one finished run and an unused stage in it, and why it cannot."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mounted)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        store = mounted / "store"
        shutil.copytree(finished.store, store)
        shutil.rmtree(store / "cache")
        unused = shutil.copytree(next((store / "stages").glob("train-*")), store / "stages/train-0123456789abcdef")
        assert sum(path.stat().st_size for path in unused.rglob("*")) > 100_000
        if request.param == "full":
            with contextlib.suppress(OSError), (mounted / "big").open("wb", buffering=0) as file:
                while file.write(b"0" * 4096):
                    pass
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        yield SENTENCE[request.param], store
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


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
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(mounted)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        project = tiny_project(tmp_path)
        with contextlib.suppress(OSError), (mounted / "big").open("wb", buffering=0) as file:
            while file.write(b"0" * 4096):
                pass
        os.truncate(mounted / "big", (mounted / "big").stat().st_size - 1024 * kilobytes)
        words = (*QUICK, f"store={mounted / 'store'}", "launch.save_steps=1")
        done = project.train_here(*words)
        assert done.returncode == 1 and "disk is full" in done.stderr, done.stderr
        assert "Traceback" not in done.stdout + done.stderr and done.stderr.count("\n") == 1
        (mounted / "big").unlink()
        assert project.train_here(*words).returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)

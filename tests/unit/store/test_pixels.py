"""A shelf gives back what was put there, to whoever asks, whatever happens to whoever puts."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinylmm.cli.store import app
from tinylmm.store import pixels
from tinylmm.store.gc import collect_garbage, list_stored
from tinylmm.store.layout import PIXELS_USED_FILE, SPEC_FILE
from tinylmm.store.pixels import BYTES, INDEX, RECORD_BYTES, PixelShelf, Views, check_shelf, count_images, folder_bytes

ABOUT = {"size": 4, "mode": "squash"}
SIZE = 48
LARGE = 1 << 30
FORK = multiprocessing.get_context("fork")


def shelf(root: Path, limit: int = LARGE, key: str = "shelf") -> PixelShelf:
    return PixelShelf(root / "pixels", key, limit, ABOUT)


def image(number: int) -> bytes:
    return bytes([number]) * SIZE


def key(number: int, of: str = "s") -> bytes:
    return f"{of}{number}".encode().ljust(16)


def never() -> Any:
    pytest.fail("it is kept")


def read(own: PixelShelf, number: int, stamp: str = "s", views: int = 0) -> bytes:
    """Image `number`, whose content is known by its number, looked for under a stamp."""
    found = own.read(key(number, stamp), lambda: key(number, "c"), lambda: Views(image(number), views))
    return bytes(found.data)


def test_what_one_process_keeps_another_reads_without_making_it(tmp_path: Path) -> None:
    first = shelf(tmp_path)
    assert [read(first, n) for n in range(3)] == [image(n) for n in range(3)]
    assert first.take() == (3, 0)
    second = shelf(tmp_path)
    assert [bytes(second.read(key(n), never, never).data) for n in range(3)] == [image(n) for n in range(3)]
    assert second.take() == (3, 3) and second.take() == (0, 0)
    assert count_images(first.folder) == 3 and check_shelf(first.folder) == []


def test_a_file_of_another_name_or_time_shares_the_entry_of_its_content(tmp_path: Path) -> None:
    own = shelf(tmp_path)
    read(own, 1)
    before = folder_bytes(tmp_path / "pixels")
    found = own.read(key(1, "copy"), lambda: key(1, "c"), never)
    assert bytes(found.data) == image(1)
    assert folder_bytes(tmp_path / "pixels") == before + RECORD_BYTES
    assert bytes(shelf(tmp_path).read(key(1, "copy"), never, never).data) == image(1), "noted for everybody"


def test_the_number_of_views_comes_back(tmp_path: Path) -> None:
    read(shelf(tmp_path), 1, views=3)
    assert shelf(tmp_path).read(key(1), never, never) == Views(image(1), 3)


def test_what_another_adds_later_is_found(tmp_path: Path) -> None:
    early, late = shelf(tmp_path), shelf(tmp_path)
    read(early, 1)
    assert bytes(late.read(key(1), never, never).data) == image(1)
    read(early, 2)
    assert bytes(late.read(key(2), never, never).data) == image(2)


def test_forks_and_copies_add_to_files_of_their_own(tmp_path: Path) -> None:
    own = shelf(tmp_path)
    read(own, 0)
    workers = [FORK.Process(target=lambda n=n: read(own, n)) for n in range(1, 4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    copy = pickle.loads(pickle.dumps(own))
    assert all(bytes(copy.read(key(n), never, never).data) == image(n) for n in range(4))
    assert len(list(own.folder.glob(f"*{INDEX}"))) == 4


def test_many_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    def work(first: int) -> None:
        own = shelf(tmp_path)
        for step in range(60):
            number = (first * 17 + step) % 60
            assert read(own, number) == image(number)

    workers = [FORK.Process(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    own = shelf(tmp_path)
    assert all(bytes(own.read(key(n), never, never).data) == image(n) for n in range(60))
    assert count_images(own.folder) == 60 and check_shelf(own.folder) == []


@pytest.mark.parametrize("writes", range(6))
def test_a_writer_killed_at_any_write_loses_only_what_it_was_at(tmp_path: Path, writes: int) -> None:
    def work() -> None:
        left, real = [writes], pixels._write

        def write(descriptor: int, data: bytes) -> None:
            if not left[0]:
                real(descriptor, bytes(data)[: len(data) // 2])
                os._exit(9)
            left[0] -= 1
            real(descriptor, data)

        pixels._write = write
        own = shelf(tmp_path)
        for number in range(3):  # each has two writes: its bytes, and its record
            read(own, number)

    worker = FORK.Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == 9
    own, whole = shelf(tmp_path), writes // 2
    assert [read(own, number) for number in range(3)] == [image(number) for number in range(3)]
    assert own.take() == (3, whole)
    assert check_shelf(own.folder) == [] and count_images(own.folder) == 3


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_damaged_image_is_seen_said_struck_out_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = shelf(tmp_path)
    for number in range(3):
        read(first, number)
    (data,) = first.folder.glob(f"*{BYTES}")
    damage(data, SIZE + 5)
    assert len(check_shelf(first.folder)) == 1 and str(data) in check_shelf(first.folder)[0]
    assert check_shelf(first.folder, deep=False) == []
    second = shelf(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [read(second, number) for number in range(3)] == [image(number) for number in range(3)]
    assert "damaged: it is decoded again" in caplog.text and second.take() == (3, 2)
    assert check_shelf(first.folder) == [], "struck out for everybody"
    third = shelf(tmp_path)
    assert all(bytes(third.read(key(n), never, never).data) == image(n) for n in range(3))
    assert bytes(first.read(key(1), never, never).data) == image(1), "also for whoever knew the old place"


def test_a_damaged_or_cut_index_costs_its_records_alone(tmp_path: Path) -> None:
    first = shelf(tmp_path)
    for number in range(3):
        read(first, number)
    (index,) = first.folder.glob(f"*{INDEX}")
    damage(index, RECORD_BYTES + 3)
    assert check_shelf(first.folder) == [f"{index}: record 1 is damaged."]
    index.write_bytes(index.read_bytes()[:-1])
    own = shelf(tmp_path)
    assert [read(own, number) for number in range(3)] == [image(number) for number in range(3)]
    assert own.take() == (3, 1)


def test_bytes_that_a_power_cut_took_are_made_again(tmp_path: Path) -> None:
    first = shelf(tmp_path)
    read(first, 0), read(first, 1)
    (data,) = first.folder.glob(f"*{BYTES}")
    data.write_bytes(data.read_bytes()[:-1])
    assert check_shelf(first.folder, deep=False) == [f"{data}: the image of record 1 is cut short."]
    own = shelf(tmp_path)
    assert (read(own, 0), read(own, 1)) == (image(0), image(1)) and own.take() == (2, 1)


def test_all_shelves_together_stay_within_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = shelf(tmp_path, key="other")
    read(other, 9)
    room = folder_bytes(tmp_path / "pixels")
    limit = room + len(json.dumps(ABOUT, sort_keys=True)) + 2 * (SIZE + RECORD_BYTES)
    writers = [shelf(tmp_path, limit) for _ in range(3)]
    with caplog.at_level(logging.INFO):
        for number in range(6):
            assert read(writers[number % 3], number) == image(number)
        assert folder_bytes(tmp_path / "pixels") <= limit
    assert count_images(writers[0].folder) == 2 and "launch.cache_pixels_gib" in caplog.text
    assert bytes(shelf(tmp_path, limit).read(key(0), never, never).data) == image(0), "what is kept is read"
    assert check_shelf(writers[0].folder) == []


def test_a_nearly_full_disk_is_left_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_free", lambda folder: pixels.LEFT_FREE - 1)
    own = shelf(tmp_path)
    assert read(own, 1) == read(own, 1) == image(1)
    assert own.take() == (2, 0) and count_images(own.folder) == 0


def test_what_the_disk_refuses_ends_keeping_and_not_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = shelf(tmp_path)
    read(own, 0)

    def refuse(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(pixels, "_write", refuse)
        assert [read(own, number) for number in (0, 1, 2)] == [image(0), image(1), image(2)]
    assert "training goes on" in caplog.text and "The disk is full" in caplog.text
    assert len([one for one in caplog.records if "training goes on" in one.message]) == 1
    assert own.take() == (4, 1)


def test_a_shelf_that_is_deleted_under_a_reader_is_made_again(tmp_path: Path) -> None:

    own = shelf(tmp_path)
    read(own, 0)
    shutil.rmtree(own.folder)
    assert read(own, 0) == image(0)
    assert read(shelf(tmp_path), 1) == image(1)
    assert bytes(shelf(tmp_path).read(key(1), never, never).data) == image(1)


def stage(root: Path, digest: str, shelves: list[str]) -> None:
    folder = root / "stages" / f"train-{digest[:16]}"
    folder.mkdir(parents=True)
    (folder / SPEC_FILE).write_text('{"parents": {}}')
    (folder / PIXELS_USED_FILE).write_text(json.dumps(shelves))


def test_the_stores_commands_know_shelves(tmp_path: Path) -> None:
    read(shelf(tmp_path, key="read"), 0), read(shelf(tmp_path, key="unread"), 0)
    stage(tmp_path, "a" * 64, ["read"])
    rows = {row.key: row for row in list_stored(tmp_path) if row.kind == "pixels"}
    assert rows.keys() == {"read", "unread"}
    assert (rows["read"].name, rows["read"].status) == ("1 images of 4 x 4 pixels (squash)", "complete")
    assert rows["read"].size == sum(path.stat().st_size for path in (tmp_path / "pixels/read").iterdir())
    assert [row.folder for row in collect_garbage(tmp_path, {"a" * 64})] == ["pixels/unread"]
    collect_garbage(tmp_path, {"a" * 64}, dry_run=False)
    assert [path.name for path in (tmp_path / "pixels").iterdir()] == ["read"]
    (data,) = (tmp_path / "pixels/read").glob(f"*{BYTES}")
    done = CliRunner().invoke(app, ["verify", "read", "--store", str(tmp_path)])
    assert done.exit_code == 0, done.output
    damage(data, 3)
    done = CliRunner().invoke(app, ["verify", "read", "--store", str(tmp_path)])
    assert done.exit_code != 0 and "is damaged" in done.output
    assert CliRunner().invoke(app, ["verify", "read", "--quick", "--store", str(tmp_path)]).exit_code == 0

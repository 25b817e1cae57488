"""Claims: at most one live process works on a stage, and a dead one's work is taken over. No torch here.

A claim is the file `store/claims/<key>.json`, which names its owner and is touched every few seconds. Whoever looks
at it and takes it does so under a file lock, `<key>.lock`, so two takers cannot both win.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from tinylmm.errors import ClaimLostError, StoppedError
from tinylmm.stop import stop_requested
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import StoreLayout
from tinylmm.store.provenance import Process, ended_with_boot, is_running, now, this_process

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""An owner that cannot be looked up from here (another host) counts as dead when it was silent for so long."""
FIRST_POLL_SECONDS = 0.2
LAST_POLL_SECONDS = 2.0
POLL_GROWTH = 1.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner(Process):
    """A process that holds a claim: `since` when (ISO 8601), `token` unique to one claim. The JSON of its file."""

    since: str
    token: str


UNKNOWN = Owner(0, "?", None, None, 0.0, "?", "")
"""Stands for whoever wrote a file that cannot be read; it is judged by its heartbeat alone."""


class Claim:
    """The right to work on one stage. As a context manager it waits until it has the claim, and gives it back.

    Attributes:
        key: folder name of the stage in the store.
        token: what tells this claim from every other one; empty while it is not held.

    Two claims in one process exclude each other too, so threads can use them; a claim is not re-entrant.
    """

    def __init__(
        self,
        store_root: Path,
        key: str,
        on_wait: Callable[[Owner], None] | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self.key = key
        self._path = _owner_file(store_root, key)
        self._on_wait = on_wait
        self._heartbeat_seconds = heartbeat_seconds
        self._owner = UNKNOWN
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claim:
        seen: set[str] = set()
        pause = FIRST_POLL_SECONDS
        while (owner := self.try_acquire()) is not None:
            if owner.token not in seen:
                seen.add(owner.token)
                log.info("%s is being worked on by %s; waiting", self.key, describe(owner))
                if self._on_wait is not None:
                    self._on_wait(owner)
            if stop_requested():
                raise StoppedError(f"stopped while waiting for {describe(owner)}; the same command continues")
            time.sleep(pause)
            pause = min(pause * POLL_GROWTH, LAST_POLL_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def try_acquire(self) -> Owner | None:
        """Take the claim if no live process holds it. Returns None when taken, otherwise the present owner."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(self._path):
            present = _read_owner(self._path)
            if present is not None and _is_live(self._path, present):
                return present
            if present is not None:
                log.warning("%s: taking over the claim of %s, which is gone", self.key, describe(present))
            self._owner = Owner(**vars(this_process()), since=now(), token=secrets.token_hex(8))
            self._stop.clear()
            try:
                write_atomic(
                    self._path, json.dumps(vars(self._owner), indent=1), durable=False
                )  # nobody holds it after a power cut
                self._thread = threading.Thread(target=self._beat, name=f"claim-{self.key}", daemon=True)
                self._thread.start()
            except BaseException:  # also a signal: a claim that nobody will give back must not stay
                self._path.unlink(missing_ok=True)
                raise
        return None

    def release(self) -> None:
        """Give the claim back; does nothing if it is not held, was lost, or came here through a fork."""
        self._stop.set()
        if self._thread is None or self._owner.pid != os.getpid():
            return
        self._thread.join()
        self._thread = None
        with _lock(self._path):
            if self._is_ours():
                self._path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            try:
                if not self._is_ours():
                    log.error("%s: this process lost its claim: it was silent for too long", self.key)
                    return
                os.utime(self._path)
            except FileNotFoundError:
                continue  # taken between the two lines: the next beat sees by whom
            except OSError as error:  # a network file system may falter; silence costs the claim only later
                log.warning("%s: heartbeat failed (%s)", self.key, error)

    def _is_ours(self) -> bool:
        return _holds(self._path, self.token)

    @property
    def token(self) -> str:
        return self._owner.token


def claim(store_root: Path, key: str, on_wait: Callable[[Owner], None] | None = None) -> Claim:
    """Return the claim on a stage, to be used as `with claim(...) as c:`; it blocks while a live process holds it.

    Args:
        store_root: the store.
        key: folder name of the stage.
        on_wait: called once for each owner that is waited for.
    """
    return Claim(store_root, key, on_wait)


def require_claim(store_root: Path, key: str, token: str) -> None:
    """Look whether a claim still holds: to be called before each write, as a process that was silent cannot know.

    Args:
        store_root: the store.
        key: folder name of the stage.
        token: of the claim under which the stage is worked on, here or by the process that started this one.

    Raises:
        ClaimLostError: somebody else has it.
    """
    try:
        if _holds(_owner_file(store_root, key), token):
            return
    except OSError as error:  # a network file system may falter; the heartbeat sees to that
        log.warning("%s: the claim cannot be read (%s)", key, error)
        return
    raise ClaimLostError(
        f"{key}: another process took this stage over while this one was silent for a minute; its result is left to "
        "that process"
    )


def held(store_root: Path, key: str) -> Owner | None:
    """Return the live owner of the claim on a stage, or None. Takes nothing and waits for nobody."""
    path = _owner_file(store_root, key)
    owner = _read_owner(path)
    return owner if owner is not None and _is_live(path, owner) else None


def describe(owner: Owner) -> str:
    """Return `process 17 on host since 2026-01-31T12:00:00.000+00:00`."""
    return f"process {owner.pid or '?'} on {owner.host} since {owner.since}"


def _owner_file(store_root: Path, key: str) -> Path:
    return StoreLayout(Path(store_root)).claim(key)


def _holds(path: Path, token: str) -> bool:
    owner = _read_owner(path)
    return owner is not None and owner.token == token


def _lock(owner_file: Path) -> FileLock:
    # Readable and writable for all: colleagues who share a store share its locks. It is held for milliseconds.
    return FileLock(owner_file.with_suffix(".lock"), mode=0o666)


def _read_owner(path: Path) -> Owner | None:
    """Return the owner, None if there is no file, UNKNOWN if the file is garbage."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return UNKNOWN


def _is_live(path: Path, owner: Owner) -> bool:
    running = is_running(owner)
    if running is not None:
        return running
    try:
        heartbeat = path.stat().st_mtime
    except FileNotFoundError:
        return False
    if ended_with_boot(owner, heartbeat):
        return False
    return _file_time(path) - heartbeat < STALE_SECONDS


def _file_time(path: Path) -> float:
    """Return the time by the clock that stamps heartbeats: on a network file system that is the server's, not ours."""
    clock = path.with_suffix(".lock")
    try:
        os.utime(clock)
        return clock.stat().st_mtime
    except (FileNotFoundError, PermissionError):
        return time.time()

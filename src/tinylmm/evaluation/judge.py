"""A judge model behind any OpenAI-compatible endpoint: retries, limits, a cache by content, counts of what it cost.

No client library. The key comes from one environment variable, goes into one header and nowhere else: not into the
cache, not into a message (a server that echoes it is redacted), and never to another host (redirects are refused).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tinylmm.errors import ConfigError, Fault, StoppedError, TinyLMMError
from tinylmm.evaluation.redaction import holds_key, without_key
from tinylmm.evaluation.transport import RefusedError, Transport
from tinylmm.stop import stop_requested
from tinylmm.store.integrity import write_atomic

KEY_VARIABLE = "TINYLMM_JUDGE_API_KEY"
POLL_SECONDS = 0.2

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
T = TypeVar("T")
R = TypeVar("R")
_log = logging.getLogger(__name__)


class JudgeError(TinyLMMError):
    """The judge gave no usable reply in all its attempts. What it said before is in the cache: ask again to continue."""


@dataclass
class Usage:
    """What judging cost: requests sent (retries included), replies taken from the cache, and tokens as the server counts."""

    requests: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def counts(self, before: Usage | None = None) -> dict[str, int]:
        """For `Scores.counts`: every count under `judge_<name>`, without what had been used `before`."""
        earlier = asdict(before or Usage())
        return {f"judge_{name}": value - earlier[name] for name, value in asdict(self).items()}

    def copy(self) -> Usage:
        """The counts as they are now."""
        return Usage(**asdict(self))


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/tinylmm/judge`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tinylmm" / "judge"


class Judge:
    """Asks one model; safe to use from several threads.

    Args:
        base_url: up to and including the version (`https://api.openai.com/v1`); `/chat/completions` is added.
        model: as the endpoint names it.
        cache: folder of replies by content, so that nothing is paid for twice; None keeps none.
        runs: how often every answer is judged, where a benchmark averages runs (MM-Vet's paper 5, LLaVA 3).
        parallel: how many questions `map` keeps under way at once.
        timeout: seconds a request may take in all.
        attempts: how often a request is sent before `JudgeError`.
        backoff: seconds before the first retry, doubled for each further one up to `max_backoff`; a server's
            `Retry-After` counts instead where it is longer, up to `max_backoff` too.
        max_bytes: longest reply read.

    Raises:
        ConfigError: `base_url` is no plain http(s) address, `model` is empty, or the key cannot be one.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: Path | None = None,
        runs: int = 1,
        parallel: int = 4,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 1.0,
        max_backoff: float = 60.0,
        max_bytes: int = 4_000_000,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = checked_address(base_url, model, runs)
        self.model = model
        self.cache = cache
        self.runs = runs
        self.parallel = max(1, parallel)
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.max_bytes = max_bytes
        self.usage = Usage()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._transport = Transport(f"{self.base_url}/chat/completions")

    def ask(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, temperature: float = 0.0, sample: int = 0
    ) -> str:
        """Return the text of the model's reply, from the cache if the very same was asked before.

        Args:
            messages: `{"role", "content"}` each.
            max_tokens, temperature: as the benchmark's script sets them.
            sample: tells repeated askings of the same apart (a second run must not get the first one's reply).

        Raises:
            ConfigError: the endpoint refuses the request itself (wrong key, model or address); retrying would not help.
            JudgeError: no usable reply in all attempts.
        """
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        place = self._place(body, sample)
        kept = _read_reply(place)
        if kept is not None:
            self._count(cached=1)
            return self._open(kept)
        reply = self._send(body)
        if place is not None:
            asked = {"base_url": self.base_url, "request": body, "sample": sample}
            secret = any(holds_key(text, _key()) for one in messages for text in one.values())
            _write_reply(place, {**({} if secret else asked), "reply": reply})
        return reply

    def map(self, function: Callable[[T], R], values: Sequence[T]) -> list[R]:
        """`function` of every value, several at once, in the order of the values. The first error ends it.

        Raises:
            StoppedError: a stop was asked for. A request under way is not waited for: it may hang for minutes.
        """
        todo, done, over = (
            iter(range(len(values))),
            queue.SimpleQueue[tuple[int, R | BaseException]](),
            threading.Event(),
        )

        def work() -> None:
            while not over.is_set():
                with self._lock:
                    index = next(todo, None)
                if index is None:
                    return
                try:
                    done.put((index, function(values[index])))
                except BaseException as error:
                    done.put((index, error))
                    return

        for _ in range(min(self.parallel, len(values))):
            threading.Thread(target=work, daemon=True).start()  # a pool's threads would keep the process from ending
        try:
            found: dict[int, R] = {}
            while len(found) < len(values):
                index, result = _take_done(done)
                if isinstance(result, BaseException):
                    raise result
                found[index] = result
            return [found[index] for index in range(len(values))]
        except KeyboardInterrupt:
            raise _stopped() from None
        finally:
            over.set()

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)

    def _place(self, body: Mapping[str, Any], sample: int) -> Path | None:
        if self.cache is None:
            return None
        asked = json.dumps([self.base_url, body, sample], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        return self.cache / digest[:2] / f"{digest}.json"

    def _send(self, body: Mapping[str, Any]) -> str:
        """Send until a usable reply comes."""
        problem = ""
        for attempt in range(self.attempts):
            self._count(requests=1, retries=int(attempt > 0))
            try:
                # what is kept and what is parsed holds no key either, should the model say it
                return self._open(self._take(self._post(body)))
            except RefusedError as error:
                problem, wait = self._refused(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem, wait = f"{type(error).__name__}: {error}", 0.0
            if attempt + 1 < self.attempts:
                pause = min(self.max_backoff, max(wait, self.backoff * 2**attempt))
                _log.warning("judge %s: %s; trying again in %.1f s", self.model, self._redacted(problem), pause)
                self._sleep(pause)
        raise JudgeError(
            f"judge {self.model} at {self.base_url} gave no usable reply in {self.attempts} attempts; the last: "
            f"{self._redacted(problem)}. The answers and the replies so far are kept: score again to continue."
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "tinylmm"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        return self._transport.post(json.dumps(body).encode(), headers, self.timeout, self.max_bytes)

    def _take(self, received: bytes) -> str:
        """The text of a chat completion; ValueError says what is wrong with anything else."""
        try:
            reply = json.loads(received)
            content = reply["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            start = self._redacted(received.decode("utf-8", "replace"))[:80]
            raise ValueError(f"the reply is no chat completion, it begins {start!r}") from error
        if content is not None and not isinstance(content, str):
            raise ValueError("the reply's content is no text")
        usage = reply.get("usage")
        if isinstance(usage, dict):
            counted = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            self._count(**{name: value for name, value in counted.items() if isinstance(value, int)})
        return content or ""  # a refusal has no content

    def _refused(self, error: RefusedError) -> tuple[str, float]:
        """What a retried status means, and how long the server asks to wait."""
        problem = f"{error}: {self._redacted(' '.join(error.detail.split()))[:300]}"
        if error.status not in _RETRIED:
            hint = {
                401: f"Set {KEY_VARIABLE} to a valid key.",
                403: f"Set {KEY_VARIABLE} to a key that may use this model.",
                404: "Check the judge's base_url (it ends in the version, as .../v1) and model.",
            }.get(error.status, "Check the judge's base_url and model.")
            raise ConfigError([Fault("judge", f"{self.base_url} answers {self._redacted(problem)}", hint)]) from None
        try:
            return problem, float(error.headers.get("Retry-After") or 0)
        except ValueError:  # a date; the own backoff will do
            return problem, 0.0

    def _open(self, reply: str) -> str:
        """A reply as it may be kept and read: one that gives the key away says nothing else that a scorer needs."""
        return self._redacted(reply) if holds_key(reply, _key()) else reply

    def _redacted(self, text: str) -> str:
        return without_key(text, _key())


def _key() -> str:
    """The key as it is sent: a file that it was read from ends in a newline, which no header may hold.

    Raises:
        ConfigError: it holds what no key and no header can hold; the message does not show it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or any(c.isspace() or not c.isprintable() for c in key):
        what = "holds spaces, line ends or letters that no key has."
        raise ConfigError([Fault(KEY_VARIABLE, what, "Set it to the key alone.")])
    return key


def _take_done(done: queue.SimpleQueue[T]) -> T:
    """Wait for what a thread has done.

    Raises:
        StoppedError: a stop was asked for meanwhile.
    """
    while True:
        if stop_requested():
            raise _stopped()
        with contextlib.suppress(queue.Empty):
            return done.get(timeout=POLL_SECONDS)


def _stopped() -> StoppedError:
    return StoppedError(
        "stopped while judging; the replies so far are kept, and the same command continues with the others"
    )


def checked_address(base_url: str, model: str, runs: int = 1) -> str:
    """Return where to ask, without what is added to it.

    Raises:
        ConfigError: as `Judge`.
    """
    faults = []
    try:
        parts = urlsplit(base_url)
        port_is_sane = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_sane = urlsplit(""), False
    if parts.username or parts.password:
        faults.append(Fault("judge.base_url", "must hold no user or password.", f"The key comes from {KEY_VARIABLE}."))
    elif parts.scheme not in ("http", "https") or not parts.hostname or not port_is_sane or parts.query:
        faults.append(
            Fault(
                "judge.base_url", f"'{base_url}' is no address of an endpoint.", "Example: https://api.openai.com/v1."
            )
        )
    if not model:
        faults.append(Fault("judge.model", "is empty.", "Name the model as the endpoint does."))
    if runs < 1:
        faults.append(Fault("judge.runs", f"is {runs}.", "Use 1 or more."))
    if faults:
        raise ConfigError(faults)
    return base_url.rstrip("/").removesuffix("/chat/completions")


def _read_reply(place: Path | None) -> str | None:
    """A kept reply; a file that a killed process or a full disk left broken counts as none, and is written again."""
    if place is None:
        return None
    try:
        reply = json.loads(place.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def _write_reply(place: Path, record: Mapping[str, Any]) -> None:
    """Keep a reply so that a reader in another process never sees half of it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place, json.dumps(record, ensure_ascii=False), durable=False)

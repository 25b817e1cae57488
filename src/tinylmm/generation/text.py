"""Text of an answer while its tokens come: what has been told is never taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Pieces:
    """Turns tokens into pieces of text; joined, they are the answer, without white space around it.

    Args:
        text: ids -> text, as `PromptMaker.text`.
        stops: the answer ends before the first of these that it comes to; told pieces hold nothing of one.

    Attributes:
        stopped: whether the answer has come to one of `stops`; later tokens say nothing.
    """

    def __init__(self, text: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._text, self._stops = text, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._told = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The next piece, which may be empty: behind a half-written character and white space more may come that changes
        them, and behind the beginning of a stop its end."""
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self._text(self._ids)
        ends = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._tell(whole[: min(ends)].strip())
        held = max((_begun(whole, stop) for stop in self._stops), default=0)
        return self._tell(whole[: len(whole) - held].lstrip().rstrip("\ufffd").rstrip())

    def finish(self) -> str:
        """The last piece."""
        return "" if self.stopped else self._tell(self._text(self._ids).strip())

    def _tell(self, ready: str) -> str:
        if not ready.startswith(self._told) or len(ready) == len(self._told):
            return ""
        piece, self._told = ready[len(self._told) :], ready
        return piece


def _begun(text: str, stop: str) -> int:
    """How many of the last characters of a text may be the beginning of a stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

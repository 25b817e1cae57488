"""Work of fixed shapes that a GPU records once (a CUDA graph) and replays: the host asks for all its kernels at once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")
TRIED = 2
"""Runs of some work before it is recorded: libraries choose kernels and make workspaces in the first ones."""
KEPT = 4
"""Recordings of one function that are kept, each for one shape."""


class Recording(Generic[T]):
    """Work that reads and writes the same tensors each time, launched kernel by kernel until it is recorded.

    Once it is, every call returns the same tensors, written anew.
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T | None = None

    @torch.no_grad()
    def __call__(self) -> T:
        if self._graph is None:
            return self._work()
        self._graph.replay()
        return self._result  # type: ignore[return-value]

    @torch.no_grad()
    def record(self) -> str | None:
        """Record, once; returns why it could not."""
        if self._device.type != "cuda":
            return f"a {self._device.type.upper()} records nothing"
        stream, before = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                for _ in range(TRIED):
                    self._work()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a thread that reads images may allocate meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._result = self._work()
        except RuntimeError as error:  # of CUDA, and of whatever a model does that cannot be recorded
            torch.cuda.set_stream(before)  # a recording that fails at its end leaves its own stream behind
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self._graph = graph
        return None


class Replayed(Generic[T]):
    """A function of one tensor, recorded for each shape that comes a second time.

    What it returns holds until the next call with the same shape.

    Args:
        function: of a tensor on `device`, in `dtype`.
        tensors: those in a result, to be compared: a recording gives the bits that its function gives, or is told on.
        record: whether anything is recorded.

    Attributes:
        alike: whether all recordings so far gave the same bits as the function itself.
        failed: why something could not be recorded; nothing more is then.
    """

    def __init__(
        self,
        function: Callable[[Tensor], T],
        tensors: Callable[[T], Sequence[Tensor]],
        device: torch.device,
        dtype: torch.dtype,
        record: bool,
    ) -> None:
        self._function, self._tensors, self._record = function, tensors, record
        self._device, self._dtype = device, dtype
        self._kept: OrderedDict[torch.Size, tuple[Tensor, Recording[T]] | None] = OrderedDict()
        self.alike = True
        self.failed: str | None = None

    @torch.no_grad()
    def __call__(self, given: Tensor) -> T:
        given = given.to(self._device, self._dtype)
        if not self._record or self.failed is not None:
            return self._function(given)
        if given.shape not in self._kept:
            self._kept[given.shape] = None
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._function(given)
        self._kept.move_to_end(given.shape)
        kept = self._kept[given.shape]
        if kept is None:
            return self._first(given)
        kept[0].copy_(given)
        return kept[1]()

    def _first(self, given: Tensor) -> T:
        place, function = given.clone(), self._function
        recording = Recording(lambda: function(place), self._device)
        self.failed = recording.record()
        expected = function(given)
        if self.failed is not None:
            log.warning("what stands in front of questions is not recorded as a CUDA graph: %s", self.failed)
            return expected
        self._kept[given.shape] = place, recording
        found = recording()
        pairs = zip(self._tensors(found), self._tensors(expected), strict=True)
        self.alike &= all(torch.equal(one, other) for one, other in pairs)
        return found

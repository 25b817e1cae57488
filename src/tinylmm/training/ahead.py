"""Batches that are on the device before their step begins.

A thread takes them from the loader, prepares them and has them copied on a stream of its own while the device computes. The
step itself then copies nothing, and never waits for a copy, which would let the device run dry between two micro-batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch import Tensor

from tinylmm.models.layout import layout_of
from tinylmm.training.pipes import unpack

LOOK_S = 0.2
"""Seconds after which a thread that waits looks whether it is still wanted."""


def as_step_takes_it(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of the loader with its layout, and without what says nothing to the model but for `sample_ids` and counts."""
    batch = unpack(batch)
    for extra in ("segment_ids", "num_samples", "image_paths"):
        batch.pop(extra, None)
    batch["layout"] = layout_of(batch["input_ids"], batch["position_ids"], batch["targets"])
    return batch


class StepReader:
    """The loader's batches as steps take them: read ahead on a GPU, whose work they must not hold up.

    On a CPU each is made when it is asked for: the step has all cores.

    Args:
        device: that computes the steps.
        depth: batches that wait at most: those of a step.
    """

    def __init__(self, device: torch.device, depth: int) -> None:
        self._device, self._depth = device, depth
        self._source: Any = None
        self._ahead: ReadAhead | None = None

    def read(self, batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
        """The batches of an iterator; asked again for the same one, it goes on where it was."""
        if self._device.type == "cpu":
            return map(as_step_takes_it, batches)
        if self._ahead is None or self._source is not batches:
            self.close()
            self._source, self._ahead = batches, ReadAhead(batches, as_step_takes_it, self._depth, self._device)
        return self._ahead

    def close(self) -> None:
        """End the thread that reads ahead, if there is one."""
        if self._ahead is not None:
            self._ahead.close()
        self._source = self._ahead = None


class ReadAhead:
    """An iterator over prepared batches.

    Args:
        batches: of the loader.
        prepare: run on each in the thread, on the CPU side.
        depth: batches that wait at most.
        device: where their tensors go.

    An error of the loader or of `prepare` is raised where the batch is asked for. `close` ends the thread.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        prepare: Callable[[Any], dict[str, Any]],
        depth: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._waiting: Queue[tuple[Any, Any, BaseException | None]] = Queue(max(1, depth))
        self._unwanted = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(batches, prepare), name="tinylmm-read-ahead", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> dict[str, Any]:
        while True:
            try:
                batch, copied, error = self._waiting.get(timeout=LOOK_S)
                break
            except Empty:
                if not self._thread.is_alive() and self._waiting.empty():
                    raise StopIteration from None  # asked again behind the end
        if error is not None:
            raise error
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            _each(batch, lambda tensor: tensor.record_stream(stream))
        return dict(batch)

    def close(self) -> None:
        """End the thread; batches that wait are dropped."""
        self._unwanted.set()
        self._thread.join()

    def _read(self, batches: Iterator[Any], prepare: Callable[[Any], dict[str, Any]]) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        try:
            for batch in batches:
                made, copied = prepare(batch), None
                if stream is not None:
                    with torch.cuda.stream(stream):
                        made = _each(made, self._copy)
                        copied = stream.record_event()
                if not self._put((made, copied, None)):
                    return
            self._put((None, None, StopIteration()))
        except BaseException as error:  # it belongs to whoever asks for the batch
            self._put((None, None, error))

    def _copy(self, tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() or not tensor.numel() else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)

    def _put(self, found: tuple[Any, Any, BaseException | None]) -> bool:
        while not self._unwanted.is_set():
            try:
                self._waiting.put(found, timeout=LOOK_S)
                return True
            except Full:
                continue
        return False


def _each(value: Any, use: Callable[[Tensor], Any]) -> Any:
    """Use a function on each tensor of a batch, also of mappings in it."""
    if isinstance(value, Tensor):
        return use(value)
    if isinstance(value, dict):
        return {key: _each(one, use) for key, one in value.items()}
    return value

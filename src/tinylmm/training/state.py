"""What a training has learnt and how its optimiser stands, parameter by parameter, in files that any launch can read.

Trained weights and the optimiser's tensors stand under the parameter's name, whole and in full precision, whether one
process holds them all (local, DDP: `Replicated`) or each rank a share (ZeRO: `Partitioned`). Ranks write about as much each.
Frozen weights are not in it: they are the stage's parents'.

An optimiser whose state has no form of the parameter's shape (8-bit, Adafactor under ZeRO) is kept as its own `state_dict`,
which only a launch of the same kind can read.

Everything that touches DeepSpeed's private attributes is in this file; an upgrade of it is checked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tinylmm.errors import IntegrityError
from tinylmm.training.ranks import gather, rank, world_size

WEIGHT = "weight"
"""Among a parameter's tensors, beside those of the optimiser."""
NUMBERS_FILE = "optimizer.json"

Form = Literal["by name", "replicated", "partitioned"]
"""How the optimiser's state is written: by parameter, or as the `state_dict` that all ranks share, or of each rank."""


@dataclass(frozen=True)
class ParameterState:
    """One trained parameter.

    Attributes:
        tensors: WEIGHT, and the optimiser's tensors of that shape.
        numbers: the optimiser's scalars for it, as its count of steps.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, float]


class Source(Protocol):
    """Where parameters and their optimiser's state are. Every rank must call every method, for the same parameters."""

    @property
    def form(self) -> Form:
        """How the optimiser's state can be written."""

    def read(self, parameter: nn.Parameter) -> ParameterState:
        """The whole parameter, on every rank; without the optimiser's tensors where the form is another than by name."""

    def write(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """Put everything back."""

    def state_dict(self) -> Any:
        """This rank's optimiser as it is."""

    def load_state_dict(self, state: Any) -> None:
        """Put it back."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_state(folder: Path, model: nn.Module, source: Source) -> Form:
    """Write this rank's share, and return the form of it. Every rank must call it; `folder` exists."""
    form = source.form
    mine: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    parameters = trained(model)
    for (name, parameter), owner in zip(parameters.items(), owner_ranks(parameters), strict=True):
        state = source.read(parameter)
        if owner == rank():
            mine |= {f"{name}/{key}": tensor.detach().cpu().contiguous() for key, tensor in state.tensors.items()}
        numbers[name] = state.numbers
    save_file(mine, folder / f"state-{rank() + 1:05d}-of-{world_size():05d}.safetensors")
    if form == "partitioned" or (form == "replicated" and rank() == 0):
        torch.save(source.state_dict(), folder / _own_file(form))
    if rank() == 0:
        (folder / NUMBERS_FILE).write_text(json.dumps({"form": form, "numbers": numbers}), encoding="utf-8")
    return form


def own_shares(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the parameters that this rank answers for: of all ranks together, one of each."""
    owners = owner_ranks(parameters)
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for (name, parameter), owner in zip(parameters.items(), owners, strict=True)
        if owner == rank()
    }


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the trained weights into a model that is whole on every rank.

    Raises:
        IntegrityError: the folder holds other tensors than this stage trains.
    """
    parameters = trained(model)
    found = set()
    with torch.no_grad():
        for name, key, tensor in _tensors(folder):
            if key == WEIGHT and name in parameters:
                parameters[name].copy_(tensor)
            found.add(name)
    if found != set(parameters):
        raise IntegrityError(
            f"{folder} holds other tensors than this stage trains: {sorted(found ^ set(parameters))[:5]}"
        )


def load_state(folder: Path, model: nn.Module, source: Source) -> None:
    """Put weights and the optimiser's state back, whatever launch wrote them. Every rank must call it."""
    record = json.loads((folder / NUMBERS_FILE).read_text(encoding="utf-8"))
    form: Form = record["form"]
    if form != "by name":
        source.load_state_dict(torch.load(folder / _own_file(form), map_location="cpu", weights_only=True))
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    for name, parameter in trained(model).items():
        keys = [key for key in where if key.rpartition("/")[0] == name]
        tensors = {key.rpartition("/")[2]: _tensor(where[key], key) for key in keys}
        source.write(parameter, ParameterState(tensors, record["numbers"][name]))


def _own_file(form: Form) -> str:
    return "optimizer.pt" if form == "replicated" else f"optimizer-{rank() + 1:05d}-of-{world_size():05d}.pt"


def _tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def _tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Parameter, key and tensor of all that is in the folder's files, one at a time."""
    for path in sorted(folder.glob("state-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                name, _, what = key.rpartition("/")
                yield name, what, file.get_tensor(key)


def owner_ranks(parameters: dict[str, nn.Parameter]) -> list[int]:
    """Which rank writes each parameter: the largest first, each to the rank that has least."""
    loads = [0] * world_size()
    sizes = [_numel(parameter) for parameter in parameters.values()]
    owners = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also where this rank holds a share of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _split(state: dict[str, Any], like: Tensor) -> tuple[dict[str, Tensor], dict[str, float], bool]:
    """Tensors of the shape of `like`, scalars, and whether that is all there is."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == like.shape}
    rest = {key: value for key, value in state.items() if key not in tensors}
    scalar = {key: value for key, value in rest.items() if _is_number(value)}
    return tensors, {key: float(value) for key, value in scalar.items()}, len(scalar) == len(rest)


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


class Replicated:
    """One process, or DDP: every rank holds everything.

    Args:
        optimizer: of torch or bitsandbytes, over parameters of the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def form(self) -> Form:
        """See `Source`."""
        whole = all(_split(state, parameter)[2] for parameter, state in self.optimizer.state.items())
        return "by name" if whole else "replicated"

    def read(self, parameter: nn.Parameter) -> ParameterState:
        """See `Source`."""
        weight = {WEIGHT: parameter.data}
        if self.form != "by name":
            return ParameterState(weight, {})
        tensors, numbers, _ = _split(self.optimizer.state.get(parameter, {}), parameter)
        return ParameterState(weight | tensors, numbers)

    def write(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """See `Source`."""
        others = {key: tensor for key, tensor in state.tensors.items() if key != WEIGHT}
        parameter.data.copy_(state.tensors[WEIGHT])
        if not others and not state.numbers:
            return
        self.optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in others.items()}
        self.optimizer.state[parameter] |= _numbers(state.numbers, self.optimizer, parameter.device)

    def state_dict(self) -> Any:
        """See `Source`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """See `Source`."""
        self.optimizer.load_state_dict(state)


def _numbers(numbers: dict[str, float], optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Scalars as the optimiser keeps them: torch's as tensors, on the parameter's device where the kernel is fused."""
    if type(optimizer).__module__.startswith("bitsandbytes"):
        return {key: int(value) if key == "step" else value for key, value in numbers.items()}
    fused = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    return {key: torch.tensor(value, device=device if fused else "cpu") for key, value in numbers.items()}


class Partitioned:
    """ZeRO-2 and ZeRO-3: each rank holds a share of the fp32 weights and of the optimiser's tensors, all in flat pieces.

    Args:
        engine: DeepSpeed's, with its ZeRO optimiser over a torch or bitsandbytes one.
    """

    def __init__(self, engine: Any) -> None:
        self.stage = engine.zero_optimization_stage()
        self.zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer

    @property
    def form(self) -> Form:
        """See `Source`."""
        whole = all(_split(state, flat)[2] for flat, state in self.optimizer.state.items())
        return "by name" if all(gather(whole)) else "partitioned"

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """A whole parameter in fp32, on every rank."""
        return self._whole(parameter, WEIGHT)

    def read(self, parameter: nn.Parameter) -> ParameterState:
        """See `Source`."""
        return ParameterState(
            {key: self._whole(parameter, key) for key in (WEIGHT, *self._keys())}, self._all_numbers()
        )

    def write(self, parameter: nn.Parameter, state: ParameterState) -> None:
        """See `Source`."""
        for key, tensor in state.tensors.items():
            if key != WEIGHT:
                self._make_state(key)
            self._put(parameter, key, tensor)
        for flat in self._flats():
            if state.numbers:
                self.optimizer.state[flat] |= _numbers(state.numbers, self.optimizer, flat.device)

    def state_dict(self) -> Any:
        """See `Source`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """See `Source`."""
        self.optimizer.load_state_dict(state)

    def put_weights(self, parameters: dict[str, nn.Parameter], shares: dict[str, Tensor]) -> None:
        """Give the fp32 weights the values of `own_shares`: DeepSpeed itself makes them of weights rounded to bf16 or fp16."""
        device = self._flats()[0].device
        for (name, parameter), owner in zip(parameters.items(), owner_ranks(parameters), strict=True):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            whole = shares[name].to(device) if owner == rank() else torch.empty(shape, device=device)
            if world_size() > 1:
                torch.distributed.broadcast(whole, owner)
            self._put(parameter, WEIGHT, whole)

    def _flats(self) -> list[Tensor]:
        """This rank's pieces of the fp32 weights, which the inner optimiser works on."""
        found = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        return list(found)

    def _keys(self) -> list[str]:
        """The optimiser's tensors of a flat piece's shape; the same on every rank, also on one that holds nothing yet."""
        own = [_split(self.optimizer.state[flat], flat)[0] for flat in self._flats() if flat in self.optimizer.state]
        return sorted({key for keys in gather([key for tensors in own for key in tensors]) for key in keys})

    def _all_numbers(self) -> dict[str, float]:
        for flat in self._flats():
            if flat in self.optimizer.state:
                return _split(self.optimizer.state[flat], flat)[1]
        return {}

    def _make_state(self, key: str) -> None:
        """Room for the optimiser's tensors, which it only makes in its first step."""
        for flat in self._flats():
            state = self.optimizer.state[flat]
            if key not in state:
                state[key] = torch.zeros_like(flat)

    def _piece(self, parameter: nn.Parameter, key: str) -> tuple[Tensor, int, int] | None:
        """This rank's piece of a parameter's fp32 weight or optimiser tensor, its start in the whole, and its length."""
        if self.stage == 3:
            group, start, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            flat = self.zero.fp32_partitioned_groups_flat[group]
            within = self.zero._get_param_partition_rank(parameter) * length
        else:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            start, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            within = mapping.lp_fragment_address.start
        whole = flat if key == WEIGHT else self.optimizer.state[flat][key]
        return whole.data.narrow(0, start, length), within, length

    def _whole(self, parameter: nn.Parameter, key: str) -> Tensor:
        """All ranks' pieces put together: each adds its own to zeros."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        numel = _numel(parameter)
        piece = self._piece(parameter, key)
        room = numel if piece is None else max(numel, piece[1] + piece[2])
        room = max(gather(room)) if self.stage == 3 else room  # the last share may be padded
        buffer = torch.zeros(room, dtype=torch.float32, device=self._flats()[0].device)
        if piece is not None:
            values, start, length = piece
            buffer[start : start + length] = values.to(torch.float32)
        torch.distributed.all_reduce(buffer)
        return buffer[:numel].view(shape)

    def _put(self, parameter: nn.Parameter, key: str, tensor: Tensor) -> None:
        piece = self._piece(parameter, key)
        if piece is None:
            return
        values, start, length = piece
        flat = tensor.flatten()
        flat = F.pad(flat, (0, max(0, start + length - flat.numel())))
        values.copy_(flat[start : start + length])

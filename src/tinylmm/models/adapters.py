"""Low-rank adapters through peft: put on a part's linear layers, saved as peft folders, merged where a model is loaded.

An adapter's names are relative to its part's transformers model, so a saved folder is also read by
`peft.PeftModel.from_pretrained(model, folder)`. In memory adapters exist only while they are trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinylmm.config.description import QuantizationEntry
from tinylmm.config.recipe import LoraSpec, QLoraSpec
from tinylmm.errors import IntegrityError, UserError
from tinylmm.models.lmm import LMM
from tinylmm.models.quantize import import_bitsandbytes, quantize_linears, round_trip

NAME = "default"
PREFIX = "base_model.model."
"""What peft puts before every name in a saved adapter."""
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A part's adapter.

    Attributes:
        config: peft's LoraConfig as plain data.
        quantization: of the base weights it was trained on; None if they were whole.
    """

    config: dict[str, Any]
    quantization: QuantizationEntry | None


def adapter_root(model: LMM, part: str) -> tuple[str, nn.Module]:
    """Return the module that a part's adapter names are relative to, and that module's own name in the LMM."""
    module: nn.Module = getattr(model, part)
    encoder = getattr(module, "encoder", None)
    if part == "vision_tower" and isinstance(encoder, PreTrainedModel):
        return f"{part}.encoder", encoder
    return part, module


def adaptable_linears(model: LMM, part: str) -> dict[str, nn.Linear]:
    """Return the linear layers of a part that an adapter may sit on, by their names below `adapter_root`.

    The LLM's are those of its decoder (never the output head), the tower's those of the blocks that are run. Layers inside
    `nn.MultiheadAttention` are left out: it uses their weights without calling them.
    """
    _, root = adapter_root(model, part)
    if part == "llm":
        inside = list(model.llm.get_decoder().modules())  # type: ignore[operator]
    elif part == "vision_tower":
        inside = [module for block in model.vision_tower.blocks for module in block.modules()]
    else:
        inside = list(root.modules())
    bypassed = {id(m) for outer in root.modules() if isinstance(outer, nn.MultiheadAttention) for m in outer.modules()}
    wanted = {id(module) for module in inside} - bypassed
    return {n: m for n, m in root.named_modules() if isinstance(m, nn.Linear) and id(m) in wanted}


def add_adapter(
    model: LMM, part: str, settings: LoraSpec, seed: int, compute: torch.dtype, device: torch.device
) -> Adapter:
    """Put an adapter on a part and leave nothing but it trainable there (and biases, if `bias` asks for them).

    Args:
        settings: of the adapter; a `QLoraSpec` also says how the base weights are held.
        seed: draws the adapter's A matrices, whatever was drawn before; B starts at zero.
        compute: dtype that 4-bit layers compute in.
        device: where the base weights are quantised, and stay.

    Raises:
        UserError: the part has no linear layers, none of a name in `targets`, or bitsandbytes is missing.
    """
    linears = adaptable_linears(model, part)
    targets = _targets(part, linears, settings.targets)
    quantization = None
    if isinstance(settings, QLoraSpec):
        held = {name: getattr(settings, name) for name in QuantizationEntry.model_fields}
        quantization = QuantizationEntry(**held)
    _, root = adapter_root(model, part)
    if quantization is not None:
        quantize_linears(root, linears, quantization, compute, device)
    config = {
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "bias": settings.bias,
        "use_rslora": settings.rslora,
        "target_modules": targets,
        "task_type": "CAUSAL_LM" if part == "llm" else None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(root, _peft().LoraConfig(**config), targets)
    return Adapter(config, quantization)


def adapter_state(model: LMM, part: str, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return a part's adapter tensors by peft's names.

    Args:
        state: full state dict gathered over ranks, keys as in `LMM.state_dict()`; None reads the model itself.
    """
    prefix, root = adapter_root(model, part)
    names = [name for name, p in root.named_parameters() if p.requires_grad]
    held = dict(root.named_parameters()) if state is None else {n: state[f"{prefix}.{n}"] for n in names}
    return {_saved_name(name): held[name].detach().cpu().contiguous() for name in names}


def save_adapter(adapter: Adapter, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a peft folder: adapter_config.json and adapter_model.safetensors."""
    folder.mkdir(parents=True)
    config = _peft().LoraConfig(**adapter.config, inference_mode=True).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=1, sort_keys=True, default=str)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def merge_adapter(model: LMM, part: str, folder: Path, quantization: QuantizationEntry | None) -> None:
    """Add a saved adapter to a part's weights, in fp32, so that nothing of it is left but its effect.

    With `quantization` the base weights first become what their quantised forms stood for, which the adapter was trained on.

    Raises:
        IntegrityError: the folder's tensors are not those that its config asks for on this part.
        UserError: the base was quantised and bitsandbytes is missing.
    """
    _, root = adapter_root(model, part)
    if quantization is not None:
        restore_base(model, part, quantization)
    linears = adaptable_linears(model, part)
    config = _peft().LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False  # or peft freezes what it makes, and there is no telling what belongs to the adapter
    _inject(root, config, _targets(part, linears, config.target_modules))
    tensors = load_file(folder / WEIGHTS_FILE)
    own = {_saved_name(name): p for name, p in root.named_parameters() if p.requires_grad}
    needed = {name for name in own if ".lora_" in name}  # of the biases only those that the loss reaches are saved
    if odd := sorted((needed - tensors.keys()) | (tensors.keys() - own.keys())):
        raise IntegrityError(
            f"{folder / WEIGHTS_FILE} does not fit the {part} it lies beside: {len(odd)} tensors are missing or "
            f"not asked for, such as {', '.join(odd[:3])}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    for name, layer in _wrapped(root).items():
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, layer.get_base_layer())
    del root.peft_config
    root.requires_grad_(True)


def restore_base(model: LMM, part: str, quantization: QuantizationEntry) -> None:
    """Give a part's weights the values that an adapter was trained on: what their quantised forms stood for.

    Raises:
        UserError: bitsandbytes is missing.
    """
    round_trip(adapter_root(model, part)[1], adaptable_linears(model, part), quantization)


def _peft() -> Any:
    """The package, imported when an adapter is used: it takes seconds, and imports bitsandbytes in its own way."""
    import_bitsandbytes()
    import peft

    return peft


def _inject(root: nn.Module, config: Any, targets: list[str]) -> None:
    """Wrap exactly the layers `targets` as a LoraConfig says."""
    config.target_modules = set(targets)
    _peft().inject_adapter_in_model(config, root, NAME)
    if odd := sorted(_wrapped(root).keys() ^ set(targets)):
        raise RuntimeError(f"peft put adapters on other layers than asked: {odd[:5]}")


def _wrapped(root: nn.Module) -> dict[str, Any]:
    """Layers that carry an adapter, by name."""
    layer_class = _peft().tuners.lora.LoraLayer
    return {name: module for name, module in root.named_modules() if isinstance(module, layer_class)}


def _targets(part: str, linears: dict[str, nn.Linear], wanted: Any) -> list[str]:
    """Full names of the layers that get an adapter."""
    if not linears:
        raise UserError(f"tune.{part}: the part has no linear layers for an adapter to sit on; use frozen or full.")
    if wanted == "all-linear":
        return list(linears)
    ends = tuple(f".{end}" for end in wanted)
    found = [name for name in linears if name in wanted or name.endswith(ends)]
    lost = [end for end in wanted if not any(name == end or name.endswith(f".{end}") for name in found)]
    if lost:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise UserError(
            f"tune.{part}: targets names {', '.join(lost)}, but no linear layer is called so. "
            f"There are: {', '.join(kinds)}; or use all-linear."
        )
    return found


def _saved_name(name: str) -> str:
    return PREFIX + name.replace(f".{NAME}.", ".")

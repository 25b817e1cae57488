"""Which parameters a stage trains: a part is frozen, full, trained from one of its blocks on, or given adapters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from tinylmm.config.fields import PARTS
from tinylmm.config.recipe import Tune, TuneSpec
from tinylmm.errors import UserError
from tinylmm.models.adapters import Adapter, add_adapter
from tinylmm.models.attention import without_flash
from tinylmm.models.llm import decoder_of
from tinylmm.models.lmm import LMM

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class PartTuning:
    """What was decided for one part: its mode in words, and trained of all parameters.

    Attributes:
        total: parameters of the part as it is saved; those of an adapter come on top and are in `trained` alone.
        adapter: set where the part is trained through one.
    """

    mode: str
    trained: int
    total: int
    adapter: Adapter | None = None


def apply_tuning(
    model: LMM, tune: TuneSpec, seed: int = 0, precision: str = "fp32", device: torch.device | None = None
) -> dict[str, PartTuning]:
    """Set `requires_grad` on every parameter of the model as the stage's `tune` says, and add adapters where it says so.

    A parameter that the loss cannot reach (a tower's final norm behind the selected layer) is never trained, whatever the
    mode: with several ranks it would be waited for without end.

    Args:
        tune: how each part is trained.
        seed: draws new adapters.
        precision: what 4-bit layers compute in.
        device: where layers are quantised.

    Raises:
        UserError: a block index lies outside the part's depth, an adapter cannot be put on a part, or nothing of the model
            is left to train.
    """
    unreached = _unreached(model, with_tower=tune.vision_tower != "frozen")
    decided = {}
    for part in PARTS:
        decided[part] = _tune(model, part, getattr(tune, part), seed, COMPUTE[precision], device or torch.device("cpu"))
    for parameter in unreached:
        parameter.requires_grad = False
    trained = {part: sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad) for part in PARTS}
    if not any(trained.values()):
        modes = ", ".join(f"{part}: {decided[part].mode}" for part in PARTS)
        raise UserError(f"nothing of this model is left to train ({modes}); set one of tune's parts to full or lora")
    return {part: PartTuning(d.mode, trained[part], d.total, d.adapter) for part, d in decided.items()}


def enable_checkpointing(model: LMM) -> None:
    """Recompute activations in the backward pass: of the LLM's blocks, and of the tower's where they are trained.

    Not the reentrant kind, which gives no gradients to a tower or connector below a frozen embedding.
    """
    trained = [
        model.llm,
        *([model.vision_tower] if any(p.requires_grad for p in model.vision_tower.parameters()) else []),
    ]
    for part in trained:
        for module in part.modules():
            if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
                module.gradient_checkpointing_enable({"use_reentrant": False})


def decoder_blocks(llm: nn.Module) -> nn.ModuleList:
    """Return the transformer blocks of a causal LM: the list that is as long as its config says it is deep."""
    depth = llm.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    for child in decoder_of(llm).children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return child
    raise ValueError(f"{type(llm).__name__} keeps its {depth} blocks in no list, so from_layer cannot be applied")


def connector_blocks(connector: nn.Module) -> list[nn.Module]:
    """Return a connector's blocks, first to last: its own `blocks`, or else its longest outer list of layers with parameters.

    Lists of equal length side by side (an MLP each for two streams) are taken in step: block i is the i-th of each.
    """
    own = getattr(connector, "blocks", None)
    if own is not None:
        return list(own)
    lists = {n: m for n, m in connector.named_modules() if n and isinstance(m, (nn.ModuleList, nn.Sequential))}
    outer = [m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)]
    holders: list[nn.Module] = [*outer] or [connector]
    layers = [[layer for layer in m.children() if any(True for _ in layer.parameters())] for m in holders]
    longest = max(map(len, layers))
    return [nn.ModuleList(step) for step in zip(*(m for m in layers if len(m) == longest), strict=True)]


def _tune(model: LMM, part: str, tune: Tune, seed: int, compute: torch.dtype, device: torch.device) -> PartTuning:
    module: nn.Module = getattr(model, part)
    total = sum(p.numel() for p in module.parameters())
    module.requires_grad_(tune == "full")
    if isinstance(tune, str):
        return PartTuning(tune, 0, total)
    settings = tune.lora or tune.qlora
    if settings is not None:
        adapter = add_adapter(model, part, settings, seed, compute, device)
        held = f" on {adapter.quantization.bits}-bit weights" if adapter.quantization else ""
        mode = f"adapters of rank {adapter.config['r']} on {len(adapter.config['target_modules'])} layers{held}"
        return PartTuning(mode, 0, total, adapter)
    blocks = _blocks(model, part)
    if not blocks:
        raise UserError(f"tune.{part}: the part has no blocks to train from one on; use frozen")
    depth = model.vision_tower.depth if part == "vision_tower" else len(blocks)
    first = tune.from_layer
    assert first is not None  # TuneHow's validator holds this
    index = int(first * depth) if isinstance(first, float) else first
    if index >= len(blocks):
        raise UserError(
            f"tune.{part}.from_layer is {first}, but the part runs {len(blocks)} blocks (0 to {len(blocks) - 1})"
        )
    for block in blocks[index:]:
        block.requires_grad_(True)
    return PartTuning(f"from block {index} of {depth}", 0, total)


def _blocks(model: LMM, part: str) -> list[nn.Module]:
    if part == "vision_tower":
        return list(model.vision_tower.blocks)
    return list(decoder_blocks(model.llm)) if part == "llm" else connector_blocks(model.connector)


def _unreached(model: LMM, with_tower: bool) -> set[nn.Parameter]:
    """Parameters of the connector (and tower) that no output depends on, found out on one blank image.

    Asking the graph holds for every kind of tower and connector; a list of names would hold for those it was made for.
    """
    tower, connector = model.vision_tower, model.connector
    parts = nn.ModuleList([connector, *([tower] if with_tower else [])])
    parameters = list(parts.parameters())
    modes = [(module, module.training) for module in parts.modules()]
    flags = [parameter.requires_grad for parameter in parameters]
    parts.eval().requires_grad_(True)
    like = next(tower.parameters())
    shape = (1, 3, tower.image_size, tower.image_size) if with_tower else (1, tower.num_tokens, tower.hidden_size)
    blank = torch.zeros(shape, dtype=like.dtype, device=like.device)
    with without_flash(parts), torch.enable_grad():
        output = connector(tower(blank) if with_tower else blank)
        gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True) if parameters else ()
    for module, mode in modes:
        module.training = mode
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad = flag
    return {p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None}

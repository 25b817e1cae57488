"""What a training leaves as it is: which files of it the result links to, and what is held of it in memory.

Weights that come from outside the store (published ones, or drawn at random) are written to `published/` once, under the
SHA-256 of what they are, however many trainings start from them; each training holds hard links to them from its beginning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import nn

from tinylmm.config.fields import PARTS
from tinylmm.config.recipe import TuneHow, TuneSpec
from tinylmm.models.checkpoint import LoadedModel, link_tree, part_state, save_part
from tinylmm.store import integrity
from tinylmm.store.layout import StoreLayout
from tinylmm.training.ranks import barrier, rank

KEPT = "kept"
"""Folder in the work folder for weights that this stage keeps as they are and that lie in no other stage's output."""


def kept_parts(
    loaded: LoadedModel, tune: TuneSpec, parents: dict[str, Path], work: Path, store: StoreLayout
) -> dict[str, Path]:
    """Return folders with the weights of parts that this stage does not change: frozen ones, and those adapters sit on.

    They are linked into this stage's model. Where no earlier stage's output has exactly them (published or random parts, a
    new adapter on a merged one), they are written now: once they are cast to the stage's precision, quantised or wrapped in
    adapters, they cannot be had from memory. Rank 0 writes; the others wait for it before they read.
    """
    kept = {}
    for part in PARTS:
        how = getattr(tune, part)
        adapter = isinstance(how, TuneHow) and how.from_layer is None
        if how != "frozen" and not adapter:
            continue
        folder = None if part in loaded.rebuilt else loaded.folder
        if folder is not None and not (adapter and part in loaded.adapters):
            kept[part] = folder / part
        elif part in parents:
            kept[part] = parents[part]
        else:
            kept[part] = work / KEPT / part
            if rank() == 0:
                _hold_once(loaded, part, kept[part], store)
    return kept


def _hold_once(loaded: LoadedModel, part: str, folder: Path, store: StoreLayout) -> None:
    """Make `folder` from the files that the store has of these weights, or write them and let the store have them."""
    shutil.rmtree(folder, ignore_errors=True)
    published = store.published / _content_key(loaded, part)
    if not published.exists():
        save_part(loaded.model, part, folder)
        integrity.write_manifest(folder, {"format": 1, "part": part})
        integrity.mark_complete(folder)
        published.parent.mkdir(parents=True, exist_ok=True)
        draft = published.with_name(f".{published.name}.{folder.parent.parent.name}")
        shutil.rmtree(draft, ignore_errors=True)
        link_tree(folder, draft)
        try:
            draft.rename(published)
        except OSError:  # another training published the same: theirs is as good
            shutil.rmtree(draft)
    elif problems := integrity.check_folder(published):
        raise integrity.IntegrityError("\n".join([f"{published} cannot be used; move it away:", *problems]))
    else:
        link_tree(published, folder)
    for name in (integrity.MANIFEST_FILE, integrity.MARKER_FILE):
        (folder / name).unlink(missing_ok=True)


def _content_key(loaded: LoadedModel, part: str) -> str:
    """SHA-256 of a part's entry in the model's description and of its tensors, 32 digits."""
    description = loaded.description.as_json()
    digest = hashlib.sha256(json.dumps([part, description.get(part)], sort_keys=True).encode())
    for name, tensor in sorted(part_state(loaded.model, part).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def own_copy(folder: Path, work: Path, store: StoreLayout) -> Path:
    """The model at `folder` as files that nobody else writes to, since unchanged parts are linked into the result.

    That holds for a stage's output in the store; a folder of the user's is copied. Every rank must call it.
    """
    if folder.is_relative_to(store.stages):
        return folder
    copy = work / KEPT / "model"
    if rank() == 0:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
    barrier()
    return copy


def frozen_in_trained_parts(model: nn.Module, kept: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Copies of the parameters that stay as they are in parts of which others are trained: they are saved from here."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and name.partition(".")[0] not in kept
    }


def cast_frozen(model: nn.Module, kept: dict[str, Path], precision: str, device: torch.device) -> None:
    """Hold what is not trained in the compute precision: half the memory, same result under autocast.

    Only in parts whose files are kept: what is written from memory is not to be rounded.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None or device.type == "cpu":
        return
    for name, parameter in model.named_parameters():
        quantised = not parameter.is_floating_point()  # such weights stay as they are
        if name.partition(".")[0] in kept and not parameter.requires_grad and not quantised:
            parameter.data = parameter.data.to(dtype)

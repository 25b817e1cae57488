"""LLaVA's layouts, and TinyLLaVABench's, which are LLaVA's: full models, projectors alone, LoRA with its other weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from tinylmm.convert.configs import flat_llm_config, known_tower_config, make_config, vision_config
from tinylmm.convert.connectors import spec_of_type
from tinylmm.convert.lora import PEFT_PREFIX, merge_lora, read_adapter
from tinylmm.convert.parts import Parts
from tinylmm.convert.source import Source
from tinylmm.convert.tensors import Ledger, Tensors, read_file, read_weights
from tinylmm.errors import UserError

LLM_KINDS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_phi": "phi",
    "tiny_llava": "llama",
    "tiny_llava_stablelm": "stablelm",
    "tiny_llava_phi": "phi",
    "tiny_llava_qwen": "qwen2",
}
"""`model_type` -> transformers' type of the LLM inside."""
TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
SELECTS = {"patch": "patch", "cls_patch": "all"}


def read_full(source: Source) -> Parts:
    """Read a whole model; its tower is a base part where it was not trained."""
    return _parts(source, read_weights(source.folder), None)


def read_projector(source: Source) -> Parts:
    """Read `mm_projector.bin` of a pretraining; tower and LLM are base parts."""
    tensors = read_file(source.folder / "mm_projector.bin")
    name = str(source.config.get("_name_or_path", "see its config.json"))
    fields, llm = source.base_tensors("llm", name)
    return _parts(source, {**_renamed(tensors), **llm}, make_config(fields))


def read_lora(source: Source) -> Parts:
    """Read a peft adapter with `non_lora_trainables.bin`, on a base LLM."""
    config, adapter = read_adapter(source.folder)
    fields, llm = source.base_tensors("llm", str(config.get("base_model_name_or_path")))
    trained = _renamed(read_file(source.folder / "non_lora_trainables.bin"))
    source.notes.append(
        f"the LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']}) is merged into the weights"
    )
    merged = merge_lora({**llm, **trained}, config, adapter, str(source.folder))
    return _parts(source, merged, make_config(fields))


def _renamed(tensors: Tensors) -> Tensors:
    """Names as in the whole model: without peft's prefix, and always below `model.`."""
    plain = {name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    return {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor for name, tensor in plain.items()
    }


def _parts(source: Source, tensors: Tensors, llm_config: PreTrainedConfig | None) -> Parts:
    config = source.config
    if config.get("mm_use_im_start_end") or config.get("mm_patch_merge_type", "flat") != "flat":
        raise UserError(
            f"{source.folder}: mm_use_im_start_end={config.get('mm_use_im_start_end')}, "
            f"mm_patch_merge_type={config.get('mm_patch_merge_type')}; importable are models without start and end tokens "
            "around images, and with the merge type 'flat'."
        )
    kind = str(config.get("model_type"))
    ledger = Ledger(tensors, str(source.folder))
    tower, connector = ledger.take(TOWER), ledger.take(PROJECTOR)
    ledger.ignore(r"model\.image_newline", "the merge type 'flat' puts no newline token between rows of tiles")
    llm = ledger.take("model.", "model.") | ledger.take("lm_head.", "lm_head.")
    ledger.finish()
    source.ignored |= ledger.ignored
    if llm_config is None:
        if kind not in LLM_KINDS:
            raise UserError(f"{source.folder}: model_type is '{kind}'; importable are {', '.join(LLM_KINDS)}.")
        llm_config = flat_llm_config(config, LLM_KINDS[kind])
    if llm_config.model_type == "phi" and "lm_head.weight" in llm and "lm_head.bias" not in llm:
        llm["lm_head.bias"] = llm["lm_head.weight"].new_zeros(llm["lm_head.weight"].shape[0])
        source.notes.append(
            "Phi's output layer has a bias in transformers, but none in this checkpoint; it is filled with zeros"
        )
    tower_name = str(config.get("mm_vision_tower") or config.get("vision_tower", ""))
    tower_config, tower = _tower(source, tower, tower_name)
    feature = str(config.get("mm_vision_select_feature", "patch"))
    if feature not in SELECTS:
        raise UserError(
            f"{source.folder}: mm_vision_select_feature is '{feature}'; importable are {', '.join(SELECTS)}."
        )
    return Parts(
        llm_config=llm_config,
        tower_config=tower_config,
        llm=llm,
        tower=tower,
        connector=connector,
        connector_spec=spec_of_type(str(config.get("mm_projector_type", "linear"))),
        select_layer=int(config.get("mm_vision_select_layer", -2)),
        select=SELECTS[feature],
        aspect=config.get("image_aspect_ratio"),
        tower_name=tower_name,
        llm_name=str(config.get("_name_or_path", "")),
    )


def _tower(source: Source, tensors: Tensors, name: str) -> tuple[PreTrainedConfig, Tensors]:
    """Config and weights of the tower: weights from the checkpoint if it was trained, else from the base part."""
    if not tensors:
        fields, tensors = source.base_tensors("tower", name)
        return vision_config(fields), tensors
    given: dict[str, Any] | None = source.part_config("tower")
    config = vision_config(given) if given is not None else known_tower_config(name)
    if config is None:
        raise UserError(
            f"{source.folder} holds its tower's weights, but not the config of '{name}'. "
            "Give a folder with the tower's config.json: --tower FOLDER."
        )
    return config, tensors

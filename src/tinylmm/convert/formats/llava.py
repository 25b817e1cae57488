"""LLaVA's layouts, and TinyLLaVABench's, which are LLaVA's: full models, projectors alone, LoRA with its other weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from tinylmm.convert.configs import flat_llm_config, known_tower_config, make_config, vision_config
from tinylmm.convert.connectors import spec_of_type
from tinylmm.convert.format import Format
from tinylmm.convert.head_bias import NOTE, missing_bias
from tinylmm.convert.lora import merge_run, plain_name, read_adapter
from tinylmm.convert.parts import Parts
from tinylmm.convert.source import Source
from tinylmm.convert.tensors import Ledger, Tensors, has_weights, read_file, read_weights
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
PROJECTOR_FILE, TRAINED_FILE = "mm_projector.bin", "non_lora_trainables.bin"
SELECTS = {"patch": "patch", "cls_patch": "all"}
"""`mm_vision_select_feature` -> `Parts.select`."""


def detect(source: Source) -> str | None:
    """Tell the layout by what was saved: an adapter, a projector alone, or a model of one of LLaVA's or Bench's types."""
    folder, kind = source.folder, source.model_type
    if (folder / "language_model").is_dir():  # LLaVA has no folder a part, TinyLLaVA Factory has
        return None
    if source.has_adapter:  # beside an adapter of a transformers model, nothing is saved apart
        ours = source.model_type not in (
            "",
            "llava",
        )  # else peft's own folder of an adapter, which transformers' reader takes
        return "llava-lora" if ours or (folder / TRAINED_FILE).is_file() else None
    if kind == "tinyllava" or (kind == "llava" and "vision_config" in source.config):  # the Factory's and transformers'
        return None
    if not has_weights(folder) and (folder / PROJECTOR_FILE).is_file():
        return "llava-projector"
    if kind.startswith("tiny_llava"):
        return "bench"
    return "llava" if kind.startswith("llava") else None


def read_full(source: Source) -> Parts:
    """Read a whole model; its tower is a base part where it was not trained."""
    return _parts(source, read_weights(source.folder), None)


def read_projector(source: Source) -> Parts:
    """Read `mm_projector.bin` of a pretraining; tower and LLM are base parts."""
    tensors = read_file(source.folder / PROJECTOR_FILE)
    name = str(source.config.get("_name_or_path", "see its config.json"))
    fields, llm = source.base_tensors("llm", name)
    return _parts(source, {**_renamed(tensors), **llm}, make_config(fields))


def read_lora(source: Source) -> Parts:
    """Read a peft adapter with `non_lora_trainables.bin`, on a base LLM."""
    config, adapter = read_adapter(source.folder)
    fields, llm = source.base_tensors("llm", str(config.get("base_model_name_or_path")))
    trained = _renamed(read_file(source.folder / TRAINED_FILE))
    return _parts(source, merge_run(source, {**llm, **trained}, config, adapter), make_config(fields))


def _renamed(tensors: Tensors) -> Tensors:
    """Names as in the whole model: without what peft adds, and always below `model.`."""
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
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
    ledger = Ledger(tensors, str(source.folder))
    tower, connector = ledger.take(TOWER), ledger.take(PROJECTOR)
    ledger.ignore(r"model\.image_newline", "the merge type 'flat' puts no newline token between rows of tiles")
    llm = ledger.take("model.", "model.") | ledger.take("lm_head.", "lm_head.")
    ledger.finish()
    source.ignored |= ledger.ignored
    llm_config, llm = _llm(source, llm, llm_config)
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


def _llm(source: Source, tensors: Tensors, config: PreTrainedConfig | None) -> tuple[PreTrainedConfig, Tensors]:
    """Config and weights of the LLM; without a base part's config, its fields lie among LLaVA's own."""
    kind = source.model_type
    if config is None:
        if kind not in LLM_KINDS:
            raise UserError(f"{source.folder}: model_type is '{kind}'; importable are {', '.join(LLM_KINDS)}.")
        config = flat_llm_config(source.config, LLM_KINDS[kind])
    if head_bias := missing_bias(config, tensors):
        source.notes.append(NOTE)
    return config, tensors | head_bias


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


FORMAT = Format(
    holds="a checkpoint of LLaVA",
    readers={"bench": read_full, "llava": read_full, "llava-projector": read_projector, "llava-lora": read_lora},
    detect=detect,
)

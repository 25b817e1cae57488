"""TinyLLaVA Factory's layouts: three folders of a pretraining, one merged save, LoRA runs, and the published models.

The published models (`trust_remote_code`) are the merged layout beside Python files, which are never opened.
"""

from __future__ import annotations

from typing import Any

from tinylmm.convert.configs import known_tower_config, make_config, vision_config
from tinylmm.convert.connectors import QFORMER, spec_of_type
from tinylmm.convert.lora import merge_lora, read_adapter
from tinylmm.convert.parts import Parts
from tinylmm.convert.source import Source, read_json
from tinylmm.convert.tensors import Ledger, Tensors, has_weights, read_weights
from tinylmm.errors import UserError

LLM, TOWER, CONNECTOR = "language_model.", "vision_tower._vision_tower.", "connector._connector."
FOLDERS = {"language_model": LLM, "vision_tower": TOWER, "connector": "connector."}
"""Sub-folder -> what the merged layout has in front of its tensor names."""
SELECTS = {"patch": "cut", "cls_patch": "all"}
"""The Factory's "patch" drops index 0 of every tower, CLS token or not; see the 728 tokens of its SigLIP models."""


def read_merged(source: Source) -> Parts:
    """Read one Hugging Face save of the whole model (the Factory's finetuning, and published models)."""
    return _parts(source, read_weights(source.folder))


def read_folders(source: Source) -> Parts:
    """Read `language_model/`, `vision_tower/` and `connector/` (the Factory's pretraining)."""
    return _parts(source, _folders(source))


def read_lora(source: Source) -> Parts:
    """Read a LoRA run: the three folders with `.base_layer` in their names, and a peft adapter for the whole model."""
    config, adapter = read_adapter(source.folder)
    base: Tensors = {}
    for name, tensor in _folders(source).items():
        base[name.replace(".base_layer.", ".")] = tensor
    source.notes.append(
        f"the LoRA adapter (rank {config['r']}, alpha {config['lora_alpha']}) is merged into the weights"
    )
    return _parts(source, merge_lora(base, config, adapter, str(source.folder)))


def _folders(source: Source) -> Tensors:
    tensors: Tensors = {}
    for name, prefix in FOLDERS.items():
        folder = source.folder / name
        if has_weights(folder):
            tensors |= {prefix + key: value for key, value in read_weights(folder).items()}
        elif name == "connector" and source.config.get("connector_type") != "identity":
            raise UserError(f"{folder} holds no weights; the connector is in no base part. Is the run complete?")
    return tensors


def _parts(source: Source, tensors: Tensors) -> Parts:
    config = source.config
    ledger = Ledger(tensors, str(source.folder))
    llm, tower = ledger.take(LLM), ledger.take(TOWER)
    connector = ledger.take(CONNECTOR)
    ledger.finish()
    llm_fields = _part_config(source, "language_model", "text_config")
    tower_fields = _part_config(source, "vision_tower", "vision_config")
    tower_name = str(config.get("vision_model_name_or_path", "")).rpartition(":")[2]
    if not llm:
        llm_fields, llm = source.base_tensors("llm", str(config.get("llm_model_name_or_path")))
    if not tower:
        tower_fields, tower = source.base_tensors("tower", tower_name)
    if llm_fields is None:
        llm_fields = read_json(source.base_folder("llm", str(config.get("llm_model_name_or_path"))) / "config.json")
    tower_config = known_tower_config(tower_name) if tower_fields is None else vision_config(tower_fields)
    if tower_config is None:
        tower_config = vision_config(read_json(source.base_folder("tower", tower_name) / "config.json"))
    strategy = str(config.get("vision_feature_select_strategy", "patch"))
    if strategy not in SELECTS:
        raise UserError(f"vision_feature_select_strategy is '{strategy}'; importable are {', '.join(SELECTS)}.")
    spec = spec_of_type(str(config.get("connector_type", "mlp2x_gelu")), config)
    if spec["_target_"] == QFORMER and "query_tokens" in connector and "qformer.layernorm.weight" not in connector:
        # The Factory's queries pass no norm with weights; one and zero change nothing.
        width = connector["query_tokens"].shape[-1]
        connector["qformer.layernorm.weight"] = connector["query_tokens"].new_ones(width)
        connector["qformer.layernorm.bias"] = connector["query_tokens"].new_zeros(width)
        source.notes.append(
            "the norm of the Q-Former's queries has no weights in the Factory; one and zero are filled in"
        )
    return Parts(
        llm_config=make_config(llm_fields),
        tower_config=tower_config,
        llm=llm,
        tower=tower,
        connector=connector,
        connector_spec=spec,
        select_layer=int(config.get("vision_feature_layer", -2)),
        select=SELECTS[strategy],
        aspect=config.get("image_aspect_ratio"),
        tower_name=tower_name,
        llm_name=str(config.get("llm_model_name_or_path", "")),
    )


def _part_config(source: Source, folder: str, key: str) -> dict[str, Any] | None:
    """The part's own config.json where there is one, else its place in the model's."""
    path = source.folder / folder / "config.json"
    if path.is_file():
        return read_json(path)
    fields = source.config.get(key)
    return fields if isinstance(fields, dict) and "model_type" in fields else None

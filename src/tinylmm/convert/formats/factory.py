"""TinyLLaVA Factory's layouts: three folders of a pretraining, one merged save, LoRA runs, and the published models.

The published models (`trust_remote_code`) are the merged layout beside Python files, which are never opened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from tinylmm.convert.ask_importer import ask_importer, importer_tolerance
from tinylmm.convert.asking import Program
from tinylmm.convert.configs import known_tower_config, make_config, vision_config
from tinylmm.convert.connectors import QFORMER, QUERY_NORM, fields_of_spec, from_ours, spec_of_type
from tinylmm.convert.format import Export, Format, Written
from tinylmm.convert.images import USUAL_IMAGES, mode_of
from tinylmm.convert.lora import merge_run, plain_name, read_adapter
from tinylmm.convert.outlets import FACTORY
from tinylmm.convert.parts import Parts
from tinylmm.convert.source import CONFIG, Source, read_json, write_json
from tinylmm.convert.tensors import PICKLE, SAFETENSORS, Ledger, Tensors, has_weights, read_weights
from tinylmm.convert.tower import dropped_tokens, layer_read, selection_of
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.vision import HFVisionTower

MODEL_TYPE, ARCHITECTURE = "tinyllava", "TinyLlavaForConditionalGeneration"
LLM_NAME, TOWER_NAME = "llm_model_name_or_path", "vision_model_name_or_path"
LAYER, STRATEGY, ASPECT = "vision_feature_layer", "vision_feature_select_strategy", "image_aspect_ratio"
STRATEGIES = {"cut": "patch", "all": "cls_patch"}
"""`Parts.select` -> the Factory's word. Its "patch" drops index 0 of every tower, CLS token or not."""

_POSITIONS = r"connector\._connector\.bert\.embeddings\.position_ids"
"""The Factory's trainer saves it with a Q-Former: a buffer of the BERT whose position embeddings are taken out."""


class PartFiles(NamedTuple):
    """Where a part's tensors and config are.

    Attributes:
        folder: the part's own, in layouts with three folders; the merged save has its name in front of the tensors'.
        merged: what the merged save has in front of a tensor's name.
        inner: what the part's own folder has in front of it.
        config: the part's key in the merged save's config.json.
    """

    folder: str
    merged: str
    inner: str
    config: str | None


FILES = {
    "llm": PartFiles("language_model", "language_model.", "", "text_config"),
    "vision_tower": PartFiles("vision_tower", "vision_tower._vision_tower.", "", "vision_config"),
    "connector": PartFiles("connector", "connector._connector.", "_connector.", None),
}


def detect(source: Source) -> str | None:
    """Tell the layout: three folders, with an adapter or without, or config.json says that it is the Factory's."""
    if all((source.folder / FILES[part].folder).is_dir() for part in ("llm", "connector")):
        return "factory-lora" if source.has_adapter else "factory-folders"
    ours = source.model_type == MODEL_TYPE or ARCHITECTURE in source.architectures
    return "factory" if ours and not source.has_adapter else None


def read_merged(source: Source) -> Parts:
    """Read one Hugging Face save of the whole model (the Factory's finetuning, and published models)."""
    return _parts(source, read_weights(source.folder))


def read_folders(source: Source) -> Parts:
    """Read `language_model/`, `vision_tower/` and `connector/` (the Factory's pretraining)."""
    return _parts(source, _folders(source))


def read_lora(source: Source) -> Parts:
    """Read a LoRA run: the three folders with `.base_layer` in their names, and a peft adapter for the whole model."""
    config, adapter = read_adapter(source.folder)
    base = {plain_name(name): tensor for name, tensor in _folders(source).items()}
    return _parts(source, merge_run(source, base, config, adapter))


def write_merged(export: Export, folder: Path) -> Written:
    """Write one safetensors save of the whole model."""
    parts = _write_common(export, folder)
    whole = {FILES[part].merged + name: tensor for part, found in parts.items() for name, tensor in found.items()}
    save_file(whole, folder / SAFETENSORS, metadata={"format": "pt"})
    return Written(len(whole))


def write_folders(export: Export, folder: Path) -> Written:
    """Write three folders of pickles, which the Factory's next stage starts from."""
    parts = _write_common(export, folder)
    config = read_json(folder / CONFIG)
    for part, tensors in parts.items():
        files = FILES[part]
        (folder / files.folder).mkdir()
        torch.save({files.inner + name: t for name, t in tensors.items()}, folder / files.folder / PICKLE)
        if files.config is not None:
            write_json(folder / files.folder / CONFIG, config[files.config])
    return Written(sum(len(part) for part in parts.values()))


def obstacles(export: Export) -> list[str]:
    """Return every reason why the Factory could not use the model."""
    loaded, tower = export.loaded, export.loaded.model.vision_tower
    reasons = []
    if missing := [f"--{option}" for option, name in _names(export).items() if not name]:
        reasons.append(
            "the Factory loads tokenizer and image processor by name, and this model does not say them: "
            f"give {' and '.join(missing)} (a hub id such as microsoft/phi-2, or a folder)."
        )
    if loaded.model.tiled:
        reasons.append(
            "its images are seen in tiles (anyres), whose newline the Factory's connector has no tensor for."
        )
    try:
        fields_of_spec(loaded.description.connector)
    except UserError as error:
        reasons.append(str(error))
    state = loaded.model.connector.state_dict()
    norm = {name: tensor for name, tensor in state.items() if name.startswith(QUERY_NORM)}
    if any(not torch.equal(tensor, torch.full_like(tensor, name.endswith("weight"))) for name, tensor in norm.items()):
        reasons.append("the norm of the Q-Former's queries was trained, and the Factory's has no weights.")
    if type(tower) is not HFVisionTower:
        name = type(tower).__name__
        reasons.append(f"the tower is {name}, for which TinyLLaVA Factory's layout has no names here.")
    elif dropped_tokens(tower) > 1:
        reasons.append(
            "the Factory drops at most one token of a tower, and this model drops the CLS token and a patch."
        )
    return reasons


def _folders(source: Source) -> Tensors:
    tensors: Tensors = {}
    for part, files in FILES.items():
        folder = source.folder / files.folder
        if has_weights(folder):
            tensors |= {files.merged + name.removeprefix(files.inner): t for name, t in read_weights(folder).items()}
        elif part == "connector" and source.config.get("connector_type") != "identity":
            raise UserError(f"{folder} holds no weights; the connector is in no base part. Is the run complete?")
    return tensors


def _parts(source: Source, tensors: Tensors) -> Parts:
    config = source.config
    spec = spec_of_type(str(config.get("connector_type", "mlp2x_gelu")), config)
    ledger = Ledger(tensors, str(source.folder))
    ledger.ignore(_POSITIONS, "a buffer of BERT's code, which numbers positions and is not read")
    source.ignored |= ledger.ignored
    llm, tower, connector = (ledger.take(FILES[part].merged) for part in ("llm", "vision_tower", "connector"))
    ledger.finish()
    llm_name, tower_name = str(config.get(LLM_NAME, "")), str(config.get(TOWER_NAME, "")).rpartition(":")[2]
    llm_fields, tower_fields = _part_config(source, FILES["llm"]), _part_config(source, FILES["vision_tower"])
    if not llm:
        llm_fields, llm = source.base_tensors("llm", llm_name)
    if not tower:
        tower_fields, tower = source.base_tensors("tower", tower_name)
    if llm_fields is None:
        llm_fields = read_json(source.base_folder("llm", llm_name) / CONFIG)
    tower_config = known_tower_config(tower_name) if tower_fields is None else vision_config(tower_fields)
    if tower_config is None:
        tower_config = vision_config(read_json(source.base_folder("tower", tower_name) / CONFIG))
    strategy = str(config.get(STRATEGY, STRATEGIES["cut"]))
    if strategy not in STRATEGIES.values():
        raise UserError(f"{STRATEGY} is '{strategy}'; importable are {', '.join(STRATEGIES.values())}.")
    return Parts(
        llm_config=make_config(llm_fields),
        tower_config=tower_config,
        llm=llm,
        tower=tower,
        connector=_with_query_norm(source, connector) if spec.target == QFORMER else connector,
        connector_spec=spec,
        select_layer=int(config.get(LAYER, -2)),
        select=next(select for select, word in STRATEGIES.items() if word == strategy),
        aspect=config.get(ASPECT),
        tower_name=tower_name,
        llm_name=llm_name,
    )


def _part_config(source: Source, files: PartFiles) -> dict[str, Any] | None:
    """The part's own config.json where there is one, else what stands for it in the model's."""
    own = source.folder / files.folder / CONFIG
    if own.is_file():
        return read_json(own)
    fields = source.config.get(str(files.config))
    return fields if isinstance(fields, dict) and "model_type" in fields else None


def _with_query_norm(source: Source, connector: Tensors) -> Tensors:
    if "query_tokens" not in connector or f"{QUERY_NORM}weight" in connector:
        return connector
    source.notes.append("the norm of the Q-Former's queries has no weights in the Factory; one and zero are filled in")
    queries = connector["query_tokens"]
    norm = {"weight": queries.new_ones(queries.shape[-1]), "bias": queries.new_zeros(queries.shape[-1])}
    return connector | {QUERY_NORM + name: tensor for name, tensor in norm.items()}


def _names(export: Export) -> dict[str, str | None]:
    """Option -> what the Factory loads tokenizer or image processor from; the checkpoint's own names by default."""
    origin = export.loaded.description.origin or {}
    return {"llm": export.llm or origin.get("llm"), "tower": export.tower or origin.get("vision_tower")}


def _write_common(export: Export, folder: Path) -> dict[str, Tensors]:
    """Write config.json and the tokenizer; return each part's tensors by the Factory's names below the part."""
    loaded = export.loaded
    names = {option: str(name) for option, name in _names(export).items()}
    _note_images(export, names["tower"])
    write_json(folder / CONFIG, _config(loaded, names["llm"], names["tower"]))
    loaded.tokenizer.save_pretrained(folder)
    export.notes.append(
        f"the Factory does not store chat templates; ours is '{loaded.model.template}' (its --conv_version)"
    )
    state = loaded.model.connector.state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(QUERY_NORM)}
    parts: dict[str, Tensors] = {
        "llm": dict(loaded.model.llm.named_parameters()),  # tied ones once, as the Factory saves them
        "vision_tower": {f"vision_model.{k}": v for k, v in loaded.model.vision_tower.whole_encoder_state().items()},
        "connector": from_ours(loaded.description.connector, kept),
    }
    return {
        part: {name: tensor.detach().to(export.dtype).contiguous() for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }


def _note_images(export: Export, tower_name: str) -> None:
    image = export.loaded.description.as_json()["image"]
    usual = USUAL_IMAGES.get(str(export.loaded.model.vision_tower.config.model_type), {})
    differs = any(image[key] != value for key, value in usual.items() if key != "mode")
    if differs or mode_of(image) not in ("pad", usual.get("mode")):
        export.notes.append(
            f"the Factory prepares images as '{tower_name}' says, and this model was trained with {image}"
        )


def _config(loaded: LoadedModel, llm_name: str, tower_name: str) -> dict[str, Any]:
    model, tower, image = loaded.model, loaded.model.vision_tower, loaded.description.image
    llm = model.config
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        LLM_NAME: llm_name,
        "tokenizer_name_or_path": llm_name,
        TOWER_NAME: tower_name,
        f"{TOWER_NAME}2": "",
        **fields_of_spec(loaded.description.connector),
        "hidden_size": model.connector.llm_dim,
        "vocab_size": llm.vocab_size,
        "vision_hidden_size": tower.hidden_size,
        LAYER: layer_read(tower),
        STRATEGY: STRATEGIES[selection_of(tower)],
        ASPECT: "pad" if image.mode == "pad" else "square",
        "image_token_index": -200,
        "ignore_index": -100,
        "pad_token": loaded.tokenizer.pad_token,
        "pad_token_id": loaded.tokenizer.pad_token_id,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": int(getattr(llm, "max_position_embeddings", 2048)),
        "tokenizer_use_fast": True,
        "use_cache": True,
        "text_config": llm.to_dict(),
        "vision_config": {**tower.config.to_dict(), "model_name_or_path": tower_name, "model_name_or_path2": ""},
    }


def _program(read: Callable[[Source], Parts]) -> Program:
    return Program(
        "tinylmm's importer",
        "tinylmm's own importer reads the folder back, and its engine is asked what came in",
        lambda: None,
        partial(ask_importer, read=read),
        importer_tolerance,
        ("TinyLLaVA Factory itself was not run.",),
    )


FORMAT = Format(
    holds="a checkpoint of TinyLLaVA Factory",
    readers={"factory-folders": read_folders, "factory": read_merged, "factory-lora": read_lora},
    detect=detect,
    writers={"factory": write_merged, "factory-folders": write_folders},
    obstacles=obstacles,
    programs={"factory": _program(read_merged), "factory-folders": _program(read_folders)},
    outlets={"factory": FACTORY, "factory-folders": FACTORY},
)

"""transformers' own `LlavaForConditionalGeneration`, in the old key scheme (`language_model.model...`) and in the new one.

What it can hold: an encoder that transformers' AutoModel knows, read at one layer with at most its first token dropped; two
linear layers with an activation between them; a causal LM that is AutoModel's decoder and an output layer, without bias or
behind a layer norm (`head_bias`).
What is written gives the logits that our model gives, or is not written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_MAPPING,
    LlavaConfig,
    PreTrainedConfig,
)

from tinylmm.convert.ask_elsewhere import ask_transformers, transformers_tolerance
from tinylmm.convert.asking import Program
from tinylmm.convert.configs import make_config
from tinylmm.convert.connectors import MLP, connector_of
from tinylmm.convert.format import Export, Format
from tinylmm.convert.head_bias import NOTE, can_fold, has_bias, missing_bias
from tinylmm.convert.hf_folder import (
    ACTIVATIONS,
    HEAD,
    LAYERS,
    LLM,
    MODEL,
    OURS_FILE,
    PROJECTOR,
    STRATEGIES,
    TOWER,
    activation_of,
    renamed,
    write_folder,
)
from tinylmm.convert.lora import merge_run, read_adapter
from tinylmm.convert.outlets import HF
from tinylmm.convert.parts import Parts, causal_class
from tinylmm.convert.proof import TOLERANCE
from tinylmm.convert.source import CONFIG, Source, read_json, read_json_if_any
from tinylmm.convert.tensors import Ledger, Tensors, read_weights
from tinylmm.convert.tower import dropped_tokens
from tinylmm.errors import UserError
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower

NESTED = "vision_model."
"""What folders on the hub, and transformers 4 in memory, have between an encoder and its tensors."""
OLD_SCHEME = {
    f"{LLM}model.": MODEL + LLM,
    f"{LLM}{HEAD}": HEAD,
    TOWER + NESTED: MODEL + TOWER,
    MODEL + TOWER + NESTED: MODEL + TOWER,
    TOWER: MODEL + TOWER,
    PROJECTOR: MODEL + PROJECTOR,
}
_READ = {"vision_feature_layer": -2, "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
"""Fields of LlavaConfig of which not every value can be imported, and their defaults."""


def detect(source: Source) -> str | None:
    """Tell it by a config.json with a config a part, or by an adapter whose modules have transformers' names."""
    if source.has_adapter:
        if source.model_type not in ("", None, "llava"):  # of the family's own trainers, whose config.json says so
            return None
        names = read_adapter(source.folder)[1]
        return "transformers-lora" if any(TOWER in name or LLM in name for name in names) else None
    whole = source.model_type == "llava" and "vision_config" in source.config
    return "transformers" if whole else None


def read(source: Source) -> Parts:
    """Read the whole model; tensors of the added image token are cut off again where our own export added it."""
    return _parts(source, read_weights(source.folder))


def read_lora(source: Source) -> Parts:
    """Read a peft adapter (of TRL, LLaMA-Factory, ...), merged into the whole model that --llm names."""
    config, adapter = read_adapter(source.folder)
    if source.llm is None:
        raise UserError(
            f"{source.folder} is an adapter of a whole model ('{config.get('base_model_name_or_path')}'). Give a local "
            "folder of that model: --llm FOLDER; or merge it first (peft's merge_and_unload) and import the result."
        )
    base = replace(source, folder=source.llm, config=read_json(source.llm / CONFIG))
    if base.model_type != "llava" or base.has_adapter:
        raise UserError(f"--llm {base.folder}: an adapter of a whole model needs a whole model of type llava there.")
    # the adapter has the names of the class that it was trained in, the base those of whoever wrote it
    tensors, adapter = renamed(read_weights(base.folder), OLD_SCHEME), renamed(adapter, OLD_SCHEME)
    parts = _parts(base, merge_run(source, tensors, config, adapter))
    source.template = base.template
    return parts


def _parts(source: Source, tensors: Tensors) -> Parts:
    whole = _read_config(source)
    llm_config, tower_config = make_config(whole.text_config.to_dict()), make_config(whole.vision_config.to_dict())
    llm, tower, projector = _sorted(source, tensors, causal_class(llm_config).base_model_prefix)
    ours = read_json_if_any(source.folder / OURS_FILE)
    rows = int(ours.get("vocab_size", llm_config.vocab_size))
    for name in (f"{HEAD}weight", f"{causal_class(llm_config).base_model_prefix}.embed_tokens.weight"):
        if rows < llm_config.vocab_size and name in llm:
            llm[name] = llm[name][:rows].clone()
    llm_config.vocab_size = rows
    llm_config.tie_word_embeddings = whole.tie_word_embeddings
    source.template = source.template or ours.get("template")
    if head_bias := missing_bias(llm_config, llm):
        llm |= head_bias
        source.notes.append(NOTE)
    return Parts(
        llm_config=llm_config,
        tower_config=tower_config,
        llm=llm,
        tower=tower,
        connector=renamed(projector, {theirs: family for family, theirs in LAYERS.items()}),
        connector_spec=connector_of(MLP, {"depth": 2, "activation": whole.projector_hidden_act}),
        select_layer=whole.vision_feature_layer,
        select=next(ours for ours, word in STRATEGIES.items() if word == whole.vision_feature_select_strategy),
        aspect="pad" if ours.get("image_mode") == "pad" else None,
        tower_name=str(source.config["vision_config"].get("_name_or_path", "")),
        scales_images=False,
        llm_name=str(source.config.get("text_config", {}).get("_name_or_path", "")),
    )


def _read_config(source: Source) -> Any:
    """Build the LlavaConfig, which fills in what its parts leave out: old ones state only what differs from its defaults."""
    fields = {key: value for key, value in source.config.items() if key != "auto_map"}
    read = {key: fields.get(key, default) for key, default in _READ.items()}
    layer, activation, strategy = read.values()
    if not isinstance(layer, int) or activation not in ACTIVATIONS.values() or strategy not in STRATEGIES.values():
        said = ", ".join(f"{key}={value}" for key, value in read.items())
        raise UserError(f"{source.folder}: {said}; importable are one layer, gelu or relu, and default or full.")
    try:
        return LlavaConfig.from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"{source.folder}: config.json is no LlavaConfig: {' '.join(str(error).split())}") from error


def _sorted(source: Source, tensors: Tensors, base: str) -> tuple[Tensors, Tensors, Tensors]:
    """Tensors of LLM, tower and projector; `base` is what the causal LM calls its decoder."""
    ledger = Ledger(tensors, str(source.folder))
    if ledger.has(MODEL + LLM):
        llm = ledger.take(MODEL + LLM, f"{base}.") | ledger.take(HEAD, HEAD)
        ledger.put(ledger.take(MODEL))
    else:
        llm = ledger.take(LLM)
    tower, projector = ledger.take(TOWER), ledger.take(PROJECTOR)
    ledger.finish()
    return llm, tower, projector


def obstacles(export: Export) -> list[str]:
    """Return every reason why `LlavaForConditionalGeneration` cannot hold the model exactly; none if it can."""
    model = export.loaded.model
    return [*_connector_obstacles(model), *_tower_obstacles(model), *_llm_obstacles(model)]


def _connector_obstacles(model: LMM) -> list[str]:
    connector = model.connector
    if isinstance(connector, MLPConnector) and len(connector.layers) == 3 and activation_of(connector) is not None:
        return []
    found = type(connector).__name__
    if isinstance(connector, MLPConnector):
        found += f" of {(len(connector.layers) + 1) // 2} linear layers"
    return [f"its projector is two linear layers with GELU or ReLU between them; this connector is {found}"]


def _tower_obstacles(model: LMM) -> list[str]:
    tower = model.vision_tower
    built = _own_model(tower.config)
    if type(tower) is not HFVisionTower or built is None:
        return [f"its tower is one encoder of transformers; this one is {type(tower).__name__}"]
    if built is not type(tower.encoder):
        return [f"AutoModel builds another class than {type(tower.encoder).__name__} from this tower's config"]
    if dropped_tokens(tower) > 1:
        return ["it can drop one token of the tower, and this model drops two (the CLS token and the first patch)"]
    return []


def _own_model(config: PreTrainedConfig) -> type | None:
    """What AutoModel builds from a config in a process that knows nothing of tinylmm, where others register nothing."""
    found = MODEL_MAPPING.get(type(config), None)
    return found if found is not None and found.__module__.startswith("transformers.") else None


@torch.no_grad()
def _llm_obstacles(model: LMM) -> list[str]:
    llm: Any = model.llm
    name = type(llm).__name__
    if _own_model(llm.config) is not type(llm.get_decoder()):
        return [f"its language model is one that transformers' AutoModel builds from its config, and {name} is none"]
    head = llm.get_output_embeddings()
    reasons = []
    if has_bias(llm) and not can_fold(llm):
        reasons.append(
            f"its output layer has no bias, that of {name} has one that is not zero, and no layer norm before it whose weights "
            "could say it"
        )
    ids = torch.arange(3)[None]
    plain, whole = head(llm.get_decoder()(ids).last_hidden_state), llm(ids).logits
    if not torch.allclose(plain, whole, atol=TOLERANCE, rtol=0):
        cap = getattr(llm.config, "final_logit_softcapping", None)
        known = f" (final_logit_softcapping is {cap})" if cap else ""
        reasons.append(f"its logits are the output layer's, and {name} changes them afterwards{known}")
    return reasons


FORMAT = Format(
    holds="a LlavaForConditionalGeneration of transformers",
    readers={"transformers": read, "transformers-lora": read_lora},
    detect=detect,
    writers={"hf": write_folder},
    obstacles=obstacles,
    programs={
        "hf": Program(
            "transformers",
            "transformers, in a fresh process without network, reads the folder and its chat template",
            lambda: None,
            ask_transformers,
            transformers_tolerance,
            ("vLLM was not run.", "Everything ran on the CPU, one question at a time."),
        )
    },
    outlets={"hf": HF},
)

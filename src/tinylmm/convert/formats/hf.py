"""transformers' own `LlavaForConditionalGeneration`, in the old key scheme (`language_model.model...`) and in the new one.

What it can hold: an encoder that transformers' AutoModel knows, read at one layer with at most its first token dropped; two
linear layers with an activation between them; a causal LM that is AutoModel's decoder and an output layer without bias.
What is written gives the logits that our model gives, or is not written.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken
from transformers import (
    MODEL_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from tinylmm.constants import IMAGE_SLOT
from tinylmm.convert.chat_template import jinja_template
from tinylmm.convert.configs import make_config
from tinylmm.convert.connectors import MLP, connector_of, from_ours
from tinylmm.convert.format import Export, Format, Written
from tinylmm.convert.images import image_processor
from tinylmm.convert.lora import merge_run, read_adapter
from tinylmm.convert.parts import Parts, causal_class
from tinylmm.convert.proof import TOLERANCE, logit_difference, token_notes
from tinylmm.convert.source import CONFIG, Source, read_json, read_json_if_any, write_json
from tinylmm.convert.tensors import Ledger, Tensors, listed, read_weights
from tinylmm.convert.tower import dropped_tokens, layer_read, selection_of
from tinylmm.data.chat import get_template
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower

OURS_FILE = "tinylmm.json"
"""What `tinylmm export --format hf` knows and transformers' own files cannot say; optional."""
MODEL = "model."
"""The new key scheme has it in front of the parts' names, and the output layer outside."""
LLM, TOWER, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
HEAD = "lm_head."
OLD_SCHEME = {f"{LLM}model.": MODEL + LLM, f"{LLM}{HEAD}": HEAD, TOWER: MODEL + TOWER, PROJECTOR: MODEL + PROJECTOR}
STRATEGIES = {"cut": "default", "all": "full"}
"""`Parts.select` -> `vision_feature_select_strategy`."""
LAYERS = {"0.": "linear_1.", "2.": "linear_2."}
"""The family's names of the projector's two layers -> transformers'."""
ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu"}
"""Class -> `projector_hidden_act`, which is our connector's `activation`, too."""
_READ = {"vision_feature_layer": -2, "projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
"""Fields of LlavaConfig of which not every value can be imported, and their defaults."""
VOCAB_MULTIPLE = 64
"""Rows added for the image token bring the vocabulary to a multiple of this, as in bczhou/tiny-llava-v1-hf."""


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
    tensors = read_weights(base.folder)
    tensors = _renamed(tensors, OLD_SCHEME) if any(name.startswith(LLM) for name in tensors) else tensors
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
    return Parts(
        llm_config=llm_config,
        tower_config=tower_config,
        llm=llm,
        tower=tower,
        connector=_renamed(projector, {theirs: family for family, theirs in LAYERS.items()}),
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


def _renamed(tensors: Tensors, prefixes: dict[str, str]) -> Tensors:
    """The tensors with one prefix for another; names with none of them stay."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        renamed[prefixes.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed


def write(export: Export, folder: Path) -> Written:
    """Write model, processor and chat template; load the model again and compare its logits with ours.

    Raises:
        UserError: the LLM has tensors that the class has no place for.
        IntegrityError: the written folder gives other logits.
    """
    loaded, model = export.loaded, export.loaded.model
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(AddedToken(IMAGE_SLOT, special=True, normalized=False), special_tokens=True)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_SLOT))
    old_rows = model.llm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    rows = old_rows if image_id < old_rows else -(-(image_id + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if rows > old_rows:
        export.notes.append(
            f"the vocabulary has no free row for the image token: {rows - old_rows} rows of zeros are added to {old_rows}"
        )
    config, state = _config(model, image_id, rows), _state(loaded, rows)
    _check_names(config, state)
    template = jinja_template(get_template(model.template).fitted(loaded.tokenizer))
    if template is None:
        export.notes.append(f"the template '{model.template}' is no chat, so the folder has no chat template")
    exported = LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=export.dtype)
    _set_generation(exported, loaded.tokenizer, model.template, image_id)
    exported.save_pretrained(folder)
    processor = _processor(loaded, tokenizer, template)
    processor.save_pretrained(folder)
    _write_ours(folder, loaded, old_rows)
    again = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    difference = logit_difference(model, again, image_id, old_rows)
    if template is not None:
        export.notes += token_notes(processor, loaded)
    return Written(len(state), difference)


def obstacles(export: Export) -> list[str]:
    """Return every reason why `LlavaForConditionalGeneration` cannot hold the model exactly; none if it can."""
    model = export.loaded.model
    return [*_connector_obstacles(model), *_tower_obstacles(model), *_llm_obstacles(model)]


def _connector_obstacles(model: LMM) -> list[str]:
    connector = model.connector
    if isinstance(connector, MLPConnector) and len(connector.layers) == 3 and _activation(connector) is not None:
        return []
    found = type(connector).__name__
    if isinstance(connector, MLPConnector):
        found += f" of {(len(connector.layers) + 1) // 2} linear layers"
    return [f"its projector is two linear layers with GELU or ReLU between them; this connector is {found}"]


def _activation(connector: MLPConnector) -> str | None:
    return ACTIVATIONS.get(type(connector.layers[1]).__name__)


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
    if getattr(head, "bias", None) is not None and bool(head.bias.any()):
        reasons.append(f"its output layer has no bias, and that of {name} has one that is not zero")
    ids = torch.arange(3)[None]
    plain, whole = head(llm.get_decoder()(ids).last_hidden_state), llm(ids).logits
    if not torch.allclose(plain, whole, atol=TOLERANCE, rtol=0):
        cap = getattr(llm.config, "final_logit_softcapping", None)
        known = f" (final_logit_softcapping is {cap})" if cap else ""
        reasons.append(f"its logits are the output layer's, and {name} changes them afterwards{known}")
    return reasons


def _config(model: LMM, image_id: int, rows: int) -> LlavaConfig:
    tower, llm = model.vision_tower, copy.deepcopy(model.config)
    llm.vocab_size = rows
    connector = model.connector
    assert isinstance(connector, MLPConnector), "obstacles() lets nothing else through"
    return LlavaConfig(
        text_config=llm.to_dict(),
        vision_config=tower.config.to_dict(),
        image_token_index=image_id,
        image_seq_length=tower.num_tokens,
        projector_hidden_act=_activation(connector),
        vision_feature_layer=layer_read(tower),
        vision_feature_select_strategy=STRATEGIES[selection_of(tower)],
    )


def _state(loaded: LoadedModel, rows: int) -> Tensors:
    """Every tensor of the model by transformers' new names; a tied output layer is left out."""
    model, llm = loaded.model, loaded.model.llm
    state = _llm_state(llm, rows)
    for name, tensor in model.vision_tower.whole_encoder_state().items():
        state[f"{MODEL}{TOWER}{name}"] = tensor
    projector = _renamed(from_ours(loaded.description.connector, dict(model.connector.state_dict())), LAYERS)
    for name, tensor in projector.items():
        # What multiplies the connector's output (Gemma of the Factory) goes into its last layer, which is linear.
        scale = model.image_scale if name.startswith(LAYERS["2."]) else 1.0
        state[f"{MODEL}{PROJECTOR}{name}"] = tensor * scale
    return state


def _llm_state(llm: Any, rows: int) -> Tensors:
    """Tensors of decoder and output layer, with rows of zeros behind the vocabulary up to `rows`."""
    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    table = llm.get_input_embeddings().weight
    state: Tensors = {f"{MODEL}{LLM}{name}": tensor for name, tensor in decoder.state_dict().items()}
    if head.weight is not table:
        state[f"{HEAD}weight"] = head.weight.detach()
    left_out = int(head.weight is table) + int(getattr(head, "bias", None) is not None)
    if len(state) != len(llm.state_dict()) - left_out:
        raise UserError(f"{type(llm).__name__} has tensors outside its decoder and output layer. Nothing was written.")
    embedding = next(name for name, parameter in decoder.named_parameters() if parameter is table)
    for name in {f"{MODEL}{LLM}{embedding}", f"{HEAD}weight"} & set(state):
        missing = rows - state[name].shape[0]
        if missing > 0:
            state[name] = torch.cat([state[name], state[name].new_zeros(missing, state[name].shape[1])])
    return state


def _check_names(config: LlavaConfig, state: Tensors) -> None:
    """Hold our names against those that transformers' class has: each tensor one place, each place one tensor."""
    with torch.device("meta"):
        skeleton = LlavaForConditionalGeneration(config)
    expected = set(skeleton.state_dict())
    if config.tie_word_embeddings:
        expected.discard("lm_head.weight")
    if differing := sorted(expected ^ set(state)):
        raise UserError(f"LlavaForConditionalGeneration has other tensors: {listed(differing)}. Nothing was written.")


def _set_generation(exported: Any, tokenizer: PreTrainedTokenizerBase, template: str, image_id: int) -> None:
    """Greedy by default, ends where our chat ends, and the image token is never an answer."""
    settings = exported.generation_config
    settings.eos_token_id = get_template(template).stop_ids(tokenizer)
    settings.pad_token_id = int(tokenizer.pad_token_id)
    settings.suppress_tokens = [image_id]
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = settings.repetition_penalty = None


def _processor(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> LlavaProcessor:
    """Build the processor that prepares images and text as our own code does; the tokenizer knows the image token."""
    tower = loaded.model.vision_tower
    return LlavaProcessor(
        image_processor(loaded.description.as_json()["image"]),
        tokenizer,
        patch_size=int(tower.config.patch_size),
        vision_feature_select_strategy=STRATEGIES[selection_of(tower)],
        num_additional_image_tokens=tower.num_prefix,
        chat_template=template,
    )


def _write_ours(folder: Path, loaded: LoadedModel, rows: int) -> None:
    content = {
        "about": "written by `tinylmm export --format hf`, read by `tinylmm import`; transformers does not need it",
        "template": loaded.model.template,
        "image_mode": loaded.description.image.mode,
        "vocab_size": rows,
    }
    write_json(folder / OURS_FILE, content)


FORMAT = Format(
    holds="a LlavaForConditionalGeneration of transformers",
    readers={"transformers": read, "transformers-lora": read_lora},
    detect=detect,
    writers={"hf": write},
    obstacles=obstacles,
)

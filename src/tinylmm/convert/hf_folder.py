"""Writes one of our models as a folder that transformers alone, vLLM and converters read, by the names that the hub has.

What comes out is loaded by transformers again and has to give our model's logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tinylmm.constants import IMAGE_SLOT
from tinylmm.convert.chat_template import jinja_template
from tinylmm.convert.connectors import from_ours
from tinylmm.convert.format import Export, Written
from tinylmm.convert.head_bias import fold, has_bias
from tinylmm.convert.images import image_processor
from tinylmm.convert.proof import TOLERANCE, logit_difference, token_notes
from tinylmm.convert.source import read_json, write_json
from tinylmm.convert.tensors import Tensors, listed
from tinylmm.convert.tower import layer_read, selection_of
from tinylmm.data.chat import get_template
from tinylmm.errors import IntegrityError, UserError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM

OURS_FILE = "tinylmm.json"
"""What `tinylmm export --to hf` knows and transformers' own files cannot say; optional."""
MODEL = "model."
"""The new key scheme has it in front of the parts' names, and the output layer outside."""
LLM, TOWER, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
HEAD = "lm_head."
STRATEGIES = {"cut": "default", "all": "full"}
"""`Parts.select` -> `vision_feature_select_strategy`."""
LAYERS = {"0.": "linear_1.", "2.": "linear_2."}
"""The family's names of the projector's two layers -> transformers'."""
ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu"}
"""Class -> `projector_hidden_act`, which is our connector's `activation`, too."""
SHARD = "5GB"
_VISION_MODEL = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Encoders whose tensors lie one level deeper in folders on the hub than in transformers 5."""
_SCALES_ALL = ("gemma",)
"""LLMs that multiply what comes in: all of it in transformers 4, what they look up themselves in transformers 5."""
_NEW_TOKENIZERS = ("TokenizersBackend",)
VOCAB_MULTIPLE = 64
"""Rows added for the image token bring the vocabulary to a multiple of this, as in bczhou/tiny-llava-v1-hf."""


def write_folder(export: Export, folder: Path) -> Written:
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
    moved = _without_head_bias(export) if has_bias(model.llm) else 0.0
    config, state = _config(model, image_id, rows), _state(loaded, rows)
    _check_names(config, state)
    template = jinja_template(get_template(model.template).fitted(loaded.tokenizer))
    if template is None:
        export.notes.append(f"the template '{model.template}' is no chat, so the folder has no chat template")
    config.dtype = export.dtype
    config.save_pretrained(folder)
    _say_rotary_as_before(folder / "config.json")
    generation_of(loaded.tokenizer, model.template, image_id).save_pretrained(folder)
    save_torch_state_dict(_by_hub_names(state, model, export.dtype), folder, max_shard_size=SHARD)
    processor = _processor(loaded, tokenizer, template)
    _write_processor(processor, folder)
    _write_ours(folder, loaded, old_rows)
    difference = logit_difference(model, _loaded_again(folder), image_id, old_rows)
    if model.config.model_type in _SCALES_ALL:
        export.notes.append(
            "transformers 4 multiplies the image features of a Gemma by the root of its width, transformers 5 only those of "
            "its tokens, as in training: the folder's answers are this model's under transformers 5"
        )
    if template is not None:
        export.notes += token_notes(processor, loaded)
    return Written(len(state), difference + moved)


def _without_head_bias(export: Export) -> float:
    """Say the output layer's bias by its weights, in place; how far that moves logits."""
    moved, largest = fold(export.loaded.model.llm, export.dtype)
    if export.dtype == torch.float32 and not moved <= TOLERANCE * max(1.0, largest):
        raise IntegrityError(
            f"without its output layer's bias the LLM's logits differ by {moved:.1e}. Nothing was written."
        )
    export.notes.append(
        "the class's output layer has no bias: that of the LLM is said by the weights of its last norm and output layer, which "
        f"moves logits by {moved:.1e} of {largest:.1f} at most"
    )
    return moved


def _config(model: LMM, image_id: int, rows: int) -> LlavaConfig:
    tower, llm = model.vision_tower, copy.deepcopy(model.config)
    llm.vocab_size = rows
    llm.architectures = [type(model.llm).__name__]  # what vLLM and llama.cpp choose their own class by
    connector = model.connector
    assert isinstance(connector, MLPConnector), "obstacles() lets nothing else through"
    return LlavaConfig(
        architectures=[LlavaForConditionalGeneration.__name__],
        text_config=_without_path(llm.to_dict()),
        vision_config=_without_path(tower.config.to_dict()),
        image_token_index=image_id,
        image_seq_length=tower.num_tokens,
        projector_hidden_act=activation_of(connector),
        vision_feature_layer=layer_read(tower),
        vision_feature_select_strategy=STRATEGIES[selection_of(tower)],
    )


def activation_of(connector: MLPConnector) -> str | None:
    return ACTIVATIONS.get(type(connector.layers[1]).__name__)


def _state(loaded: LoadedModel, rows: int) -> Tensors:
    """Every tensor of the model by transformers' new names; a tied output layer is left out."""
    model, llm = loaded.model, loaded.model.llm
    state = _llm_state(llm, rows)
    for name, tensor in model.vision_tower.whole_encoder_state().items():
        state[f"{MODEL}{TOWER}{name}"] = tensor
    projector = renamed(from_ours(loaded.description.connector, dict(model.connector.state_dict())), LAYERS)
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


def _by_hub_names(state: Tensors, model: LMM, dtype: torch.dtype) -> Tensors:
    """The tensors as folders on the hub call them, which transformers of any version, vLLM and llama.cpp read.

    transformers 5 calls the parts of an encoder and of a decoder otherwise in memory, and takes these names all the same;
    transformers 4 leaves what it does not know random, with a warning.
    """
    base = f"{model.llm.base_model_prefix}."
    names = {MODEL + PROJECTOR: PROJECTOR, MODEL + TOWER: TOWER}
    if model.vision_tower.config.model_type in _VISION_MODEL:
        names[MODEL + TOWER] = f"{TOWER}vision_model."
    if base == MODEL:  # else only the new form says where the decoder is
        names |= {MODEL + LLM: LLM + MODEL, HEAD: LLM + HEAD}
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in renamed(state, names).items()}


def _loaded_again(folder: Path) -> LlavaForConditionalGeneration:
    """The folder as transformers loads it.

    Raises:
        IntegrityError: it leaves a tensor out, or finds one that it has no place for.
    """
    again, found = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    lost = sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])})
    if lost:
        raise IntegrityError(f"{folder}: transformers does not find or know {listed(lost)}. Nothing was written.")
    return cast(LlavaForConditionalGeneration, again.eval())


def generation_of(tokenizer: PreTrainedTokenizerBase, template: str, image_id: int) -> GenerationConfig:
    """Greedy by default, ends where our chat ends, and the image token is never an answer."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=get_template(template).stop_ids(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        suppress_tokens=[image_id],
        do_sample=False,
    )


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


def _write_processor(processor: LlavaProcessor, folder: Path) -> None:
    """Write it as transformers 5 does, and for transformers 4 what it reads: a file and a class that it knows."""
    processor.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", processor.image_processor.to_dict())
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    for name in ("local_files_only", "is_local", "backend"):  # how it was loaded here
        settings.pop(name, None)
    if settings.get("tokenizer_class") in _NEW_TOKENIZERS:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["padding_side"] = "left"  # the answers of a batch go on where its questions end
    settings["model_input_names"] = [
        "input_ids",
        "attention_mask",
    ]  # transformers 4 adds a third that no LLM here takes
    write_json(path, settings)


def _say_rotary_as_before(path: Path) -> None:
    """Say rotary positions in the words of transformers 4 too, which would else take its own defaults in silence."""
    content = read_json(path)
    text = content["text_config"]
    rotary = text.get("rope_parameters") or {}
    text |= {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
    if rotary.get("rope_type", "default") != "default":
        text["rope_scaling"] = {name: value for name, value in rotary.items() if name != "rope_theta"}
    write_json(path, content)


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    """A part's config without the folder that it was loaded from: a path of this machine says nothing elsewhere."""
    name = str(config.get("_name_or_path") or "")
    return {key: value for key, value in config.items() if key != "_name_or_path" or not Path(name).is_absolute()}


def _write_ours(folder: Path, loaded: LoadedModel, rows: int) -> None:
    content = {
        "about": "written by `tinylmm export --to hf`, read by `tinylmm import`; transformers does not need it",
        "template": loaded.model.template,
        "image_mode": loaded.description.image.mode,
        "vocab_size": rows,
    }
    write_json(folder / OURS_FILE, content)


def renamed(tensors: Tensors, prefixes: dict[str, str]) -> Tensors:
    """The tensors with one prefix for another; names with none of them stay."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        renamed[prefixes.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed

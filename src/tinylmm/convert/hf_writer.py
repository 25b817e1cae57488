"""Export to transformers' own `LlavaForConditionalGeneration`, where that class can hold the model exactly.

What it can hold: an encoder that transformers' AutoModel knows, read at one layer with at most its first token dropped; two
linear layers with an activation between them; a causal LM that is AutoModel's decoder and an output layer without bias.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import MODEL_MAPPING, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from tinylmm.constants import IMAGE_SLOT, IMAGE_TOKEN_ID
from tinylmm.convert.chat_template import jinja_template
from tinylmm.convert.hf_reader import OURS_FILE
from tinylmm.convert.processor import dropped_tokens, make_processor
from tinylmm.convert.report import ExportReport, draft_of
from tinylmm.convert.tensors import listed
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.slots import expand, positions_of
from tinylmm.errors import IntegrityError, UserError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower

TOLERANCE = 1e-5
VOCAB_MULTIPLE = 64
"""Rows added for the image token bring the vocabulary to a multiple of this, as in bczhou/tiny-llava-v1-hf."""
ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu"}


def export_hf(loaded: LoadedModel, destination: Path, dtype: torch.dtype) -> ExportReport:
    """Write a folder that transformers alone loads: model, processor, chat template; its logits are compared with ours.

    Args:
        loaded: the model, in fp32 on the CPU; its weights are rounded to `dtype` in place.
        destination: a folder that does not exist yet.
        dtype: of the written weights.

    Raises:
        UserError: `LlavaForConditionalGeneration` cannot hold this model; every reason is given.
        IntegrityError: the written folder gives other logits.
    """
    model = loaded.model.to(dtype).float().eval()
    if reasons := obstacles(model):
        raise UserError(
            "this model cannot be a LlavaForConditionalGeneration of transformers:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
            + "\nNothing was written."
        )
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(AddedToken(IMAGE_SLOT, special=True, normalized=False), special_tokens=True)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_SLOT))
    old_rows = model.llm.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    rows = old_rows if image_id < old_rows else -(-(image_id + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    notes = []
    if rows > old_rows:
        notes.append(
            f"the vocabulary has no free row for the image token: {rows - old_rows} rows of zeros are added to {old_rows}"
        )
    config = _config(model, image_id, rows)
    state = _state(model, rows)
    _check_names(config, state)
    template = jinja_template(get_template(model.template).fitted(loaded.tokenizer))
    if template is None:
        notes.append(f"the template '{model.template}' is no chat, so the folder has no chat template")
    with draft_of(destination) as draft:
        exported = LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        _set_generation(exported, loaded.tokenizer, model.template, image_id)
        exported.save_pretrained(draft)
        processor = make_processor(loaded.description["image"], tokenizer, model.vision_tower, template)
        processor.save_pretrained(draft)
        _write_ours(draft, loaded, old_rows)
        again = LlavaForConditionalGeneration.from_pretrained(draft, dtype=torch.float32, local_files_only=True).eval()
        difference = _difference(model, again, image_id, old_rows)
        if template is not None:
            notes += _same_ids(processor, loaded)
    return ExportReport("hf", len(state), difference, notes)


def obstacles(model: LMM) -> list[str]:
    """Return every reason why `LlavaForConditionalGeneration` cannot hold `model` exactly; none if it can."""
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
    if type(tower) is not HFVisionTower or type(tower.config) not in MODEL_MAPPING:
        return [f"its tower is one encoder of transformers; this one is {type(tower).__name__}"]
    if MODEL_MAPPING[type(tower.config)] is not type(tower.encoder):
        return [f"AutoModel builds another class than {type(tower.encoder).__name__} from this tower's config"]
    if dropped_tokens(tower) > 1:
        return ["it can drop one token of the tower, and this model drops two (the CLS token and the first patch)"]
    return []


@torch.no_grad()
def _llm_obstacles(model: LMM) -> list[str]:
    llm: Any = model.llm
    name = type(llm).__name__
    if type(llm.config) not in MODEL_MAPPING or MODEL_MAPPING[type(llm.config)] is not type(llm.get_decoder()):
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
        vision_feature_layer=len(tower.blocks) - tower.depth - 1,
        vision_feature_select_strategy="default" if dropped_tokens(tower) else "full",
    )


def _state(model: LMM, rows: int) -> dict[str, Tensor]:
    """Every tensor of the model by transformers' new names; a tied output layer is left out."""
    llm: Any = model.llm
    base = llm.base_model_prefix
    head = {"lm_head": llm.get_output_embeddings(), base: llm.get_decoder()}
    tied = head["lm_head"].weight is llm.get_input_embeddings().weight
    state: dict[str, Tensor] = {}
    for name, tensor in head[base].state_dict().items():
        state[f"model.language_model.{name}"] = tensor
    if not tied:
        state["lm_head.weight"] = head["lm_head"].weight.detach()
    embedding = next(n for n, p in head[base].named_parameters() if p is llm.get_input_embeddings().weight)
    for name in (f"model.language_model.{embedding}", "lm_head.weight"):
        if name in state and state[name].shape[0] < rows:
            state[name] = torch.cat(
                [state[name], state[name].new_zeros(rows - state[name].shape[0], state[name].shape[1])]
            )
    for name, tensor in model.vision_tower.whole_encoder_state().items():
        state[f"model.vision_tower.{name}"] = tensor
    # What multiplies the connector's output (Gemma of the Factory) goes into its last layer, which is linear.
    for ours, theirs, scale in (("layers.0.", "linear_1.", 1.0), ("layers.2.", "linear_2.", model.image_scale)):
        for name, tensor in model.connector.state_dict().items():
            if name.startswith(ours):
                state[f"model.multi_modal_projector.{theirs}{name.removeprefix(ours)}"] = tensor * scale
    written = len(llm.state_dict()) - int(tied) - int(getattr(head["lm_head"], "bias", None) is not None)
    if len([name for name in state if name.startswith(("model.language_model.", "lm_head."))]) != written:
        raise UserError(f"{type(llm).__name__} has tensors outside its decoder and output layer. Nothing was written.")
    return state


def _check_names(config: LlavaConfig, state: dict[str, Tensor]) -> None:
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


def _write_ours(folder: Path, loaded: LoadedModel, rows: int) -> None:
    content = {
        "about": "written by `tinylmm export --format hf`, read by `tinylmm import`; transformers does not need it",
        "template": loaded.model.template,
        "image_mode": loaded.description["image"]["mode"],
        "vocab_size": rows,
    }
    (folder / OURS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _difference(model: LMM, exported: Any, image_id: int, rows: int) -> float:
    """Largest difference of logits over a row of text, one random image, and text.

    Raises:
        IntegrityError: it is above TOLERANCE.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(rows, image_id), (1, 8), generator=generator)
    slots = torch.full((1, model.image_tokens), IMAGE_TOKEN_ID)
    row = torch.cat([ids[:, :4], slots, ids[:, 4:]], dim=1)
    pixels = torch.randn(1, 3, model.vision_tower.image_size, model.vision_tower.image_size, generator=generator)
    embeddings, _ = model.embed(row, pixels, None)
    ours = model.llm(inputs_embeds=embeddings).logits
    theirs = exported(input_ids=row.masked_fill(row == IMAGE_TOKEN_ID, image_id), pixel_values=pixels).logits[
        ..., :rows
    ]
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise IntegrityError(f"the exported model's logits differ from ours by {difference:.1e}. Nothing was written.")
    return difference


def _same_ids(processor: Any, loaded: LoadedModel) -> list[str]:
    """Compare the processor's ids of some prompts with ours; a difference is a note, not an error."""
    template, slots = get_template(loaded.model.template).fitted(loaded.tokenizer), loaded.model.image_tokens
    one = f"{IMAGE_SLOT}\nWhat is it?"
    for turns in ([Turn(one, None)], [Turn(IMAGE_SLOT, None)], [Turn(one, "a cat"), Turn("Why?", None)]):
        ours = template.render_prompt(turns, loaded.tokenizer)
        text = template.text(turns).replace(IMAGE_SLOT, IMAGE_SLOT * slots)
        has_bos = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
        theirs = processor.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]  # as apply_chat_template does
        expanded = expand(ours, positions_of(ours, [slots] * ours.count(IMAGE_TOKEN_ID)))
        if theirs != [processor.image_token_id if token == IMAGE_TOKEN_ID else token for token in expanded]:
            return [
                "the tokenizer, given the whole prompt as text, splits it into other tokens than the model was trained on"
            ]
    return []

"""Foreign tensors, sorted into parts, become one of our models; every tensor has one place and every place one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from tinylmm.config.description import ModelDescription
from tinylmm.config.identities import ConnectorIdentity, TowerOutput
from tinylmm.config.spec import ImageSpec
from tinylmm.config.targets import resolve_target
from tinylmm.config.video import SamplingSpec
from tinylmm.convert.connectors import to_ours
from tinylmm.convert.images import image_settings
from tinylmm.convert.source import Source
from tinylmm.convert.tensors import Ledger, Tensors, listed
from tinylmm.convert.tokenizer import choose_template, read_tokenizer
from tinylmm.convert.tower import fitted_tower
from tinylmm.errors import UserError
from tinylmm.models.build import build_connector
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.models.encoders import find_anatomy
from tinylmm.models.lmm import LMM
from tinylmm.models.vision import HFVisionTower, make_tower

TOWER = "tinylmm.models.vision.HFVisionTower"
_ROTARY = r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"

PUBLISHED_SAMPLING = SamplingSpec(uniform=16)
"""Of TinyLLaVA-Video's released models, but for those that its table calls 1fps."""


@dataclass
class Parts:
    """A checkpoint's content, sorted but not yet checked.

    Attributes:
        llm_config, tower_config: transformers configs.
        llm: tensors by the names of the causal LM (`model.layers...`, `lm_head...`).
        tower: tensors of the encoder, with or without `vision_model.` in front.
        connector: tensors by the family's names (`0.weight`).
        connector_spec: our connector.
        select_layer: index into the tower's hidden states.
        select: "patch" (drop the CLS token), "all", or "cut" (drop index 0 whatever it is, as the Factory does).
        aspect: LLaVA's image_aspect_ratio, or None.
        tower_name, llm_name: what the checkpoint calls its parts; hub ids as a rule.
        scales_images: whether an LLM that scales embeddings (Gemma) scaled image features too when this was trained.
    """

    llm_config: PreTrainedConfig
    tower_config: PreTrainedConfig
    llm: Tensors
    tower: Tensors
    connector: Tensors
    connector_spec: ConnectorIdentity
    select_layer: int
    select: str
    aspect: str | None
    tower_name: str
    llm_name: str
    scales_images: bool = True


def assemble(parts: Parts, source: Source) -> LoadedModel:
    """Build the model of these parts.

    Raises:
        UserError: tensors are missing, left over or of another shape; each is named.
    """
    where = str(source.folder)
    llm_class = causal_class(parts.llm_config)
    llm = build_part("language model", llm_class, parts.llm_config, _llm_tensors(parts, source), where)
    encoder_config, tensors, layer = fitted_tower(parts.tower_config, parts.tower, parts.select_layer, source)
    encoder_class = cast(type[PreTrainedModel], MODEL_MAPPING[type(encoder_config)])
    encoder = build_part("vision tower", encoder_class, encoder_config, tensors, where)
    has_cls = bool(find_anatomy(encoder).num_cls)
    output = TowerOutput(
        select_layer=layer,
        select="all" if parts.select == "all" else "patch",
        drop_first_token=parts.select == "cut" and not has_cls,
    )
    image = ImageSpec.model_validate(image_settings(source, encoder_config, parts.tower_name, parts.aspect))
    tower = make_tower(HFVisionTower, encoder, output, image)
    connector = build_connector(parts.connector_spec, tower.hidden_size, llm, [])
    weights = to_ours(parts.connector_spec, parts.connector)
    expected = {name: tensor.shape for name, tensor in connector.state_dict().items()}
    _check_names("connector", expected, weights, [], where)
    connector.load_state_dict(weights)
    tokenizer = read_tokenizer(source)
    template = choose_template(source, tokenizer, str(parts.llm_config.model_type))
    # Gemma multiplied all embeddings inside the model when the family trained it; transformers 5 does the tokens' alone.
    scaled = parts.scales_images and parts.llm_config.model_type == "gemma"
    targets = (_target_of(llm_class), TOWER, _target_of(encoder_class))
    names = {"llm": parts.llm_name, "vision_tower": parts.tower_name}
    # A path of the author's disk says nothing here, and is nobody's business.
    origin = {part: name for part, name in names.items() if name and not name.startswith(("/", ".", "~"))}
    description = ModelDescription.of_targets(
        *targets, output, parts.connector_spec, image, template, scaled, origin=origin
    )
    if connector.takes_clips:
        description = description.with_sampling(PUBLISHED_SAMPLING)
        source.notes.append(
            "the checkpoint does not say which frames of videos it was trained with; taken is "
            f"{PUBLISHED_SAMPLING.in_words}, as in the released models of 16 frames"
        )
    return LoadedModel(LMM(llm, tower, connector, template, scaled), tokenizer, description, None)


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the causal LM that transformers knows for a config, its own or one that was registered with it.

    Raises:
        UserError: it has none.
    """
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise UserError(f"transformers has no causal language model of type '{config.model_type}'.")
    return cast(type[PreTrainedModel], resolve_target(_target_of(found), (), PreTrainedModel, role="llm"))


def _target_of(model_class: type[PreTrainedModel]) -> str:
    """The dotted path of a class as specs write it: transformers' own ones have short paths."""
    home = model_class.__module__
    return f"{'transformers' if home.startswith('transformers.') else home}.{model_class.__name__}"


def _llm_tensors(parts: Parts, source: Source) -> Tensors:
    ledger = Ledger(parts.llm, str(source.folder))
    ledger.ignore(_ROTARY, "rotary buffers are computed from the config")
    source.ignored |= ledger.ignored
    return ledger.take("")


def build_part(
    role: str, model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Tensors, source: str
) -> PreTrainedModel:
    """Build a part that holds exactly these tensors, in their own dtype."""
    with torch.device("meta"):
        skeleton = model_class(config)
    names_of: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    tied = [names for names in names_of.values() if len(names) > 1]
    options: dict[str, Any] = {"config": config, "state_dict": tensors, "dtype": _common_dtype(tensors)}
    if (
        set(tensors) - set(expected)
        and set(expected) - set(tensors)
        and not model_class._keys_to_ignore_on_load_unexpected
    ):
        # transformers 5 renames some encoders' tensors (ViT, DINOv2) while it loads them; then its own account counts.
        model, account = model_class.from_pretrained(
            None, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        if not (account["missing_keys"] or account["unexpected_keys"] or account["mismatched_keys"]):
            return cast(PreTrainedModel, model)
    _check_names(role, expected, tensors, tied, source)
    return cast(PreTrainedModel, model_class.from_pretrained(None, **options))


def _check_names(
    role: str, expected: dict[str, torch.Size], tensors: Tensors, tied: list[list[str]], source: str
) -> None:
    """Hold names and shapes against those of the module; of tied names one is enough, and all must be equal."""
    covered = {name for names in tied if any(n in tensors for n in names) for name in names}
    missing = sorted(set(expected) - set(tensors) - covered)
    unused = sorted(set(tensors) - set(expected))
    shapes = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    differing = [names for names in tied if _differ([tensors[n] for n in names if n in tensors])]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    if unused:
        faults.append(f"{len(unused)} tensors belong to nothing in it: {listed(unused)}")
    if shapes:
        faults.append(f"shapes differ: {listed(shapes)}")
    faults += [f"the config ties {' and '.join(names)}, but their tensors differ" for names in differing]
    if faults:
        raise UserError(f"{source}: the {role} does not fit its config. {'; '.join(faults)}. Nothing was written.")


def _differ(tensors: list[Tensor]) -> bool:
    return any(tensor.shape != tensors[0].shape or not torch.equal(tensor, tensors[0]) for tensor in tensors[1:])


def _common_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype that holds all of them without loss."""
    dtype = None
    for tensor in tensors.values():
        if tensor.is_floating_point():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    return dtype or torch.float32

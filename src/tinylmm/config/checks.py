"""Checks of the composed spec that no single model can make: across groups, and of open mappings. No torch.

They read the plain data, not the validated models, so that they report beside pydantic's findings and not after them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinylmm.config.faults import show
from tinylmm.config.fields import PARTS
from tinylmm.config.overrides import holds_secret, looks_secret, secret_fault
from tinylmm.config.part_checks import check_parts
from tinylmm.config.plain import mapping_at, walk
from tinylmm.config.targets import Role, backend_target, check_target, check_trust, shipped_backends
from tinylmm.config.trainer import NO_ADAM, NO_EPSILON, OWN_OPTIMIZERS, TrainerSpec, refused_field
from tinylmm.errors import Fault, suggestion
from tinylmm.sizing.compatibility import check_compatibility

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAME_WORDS = "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 100"

_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"llm\._target_"), "llm"),
    (re.compile(r"vision_tower\._target_"), "vision_tower"),
    (re.compile(r"vision_tower\.encoder"), "encoder"),
    (re.compile(r"connector\._target_"), "connector"),
    (re.compile(r"(?:data|(?:llm|vision_tower)\.build\.data|eval\.[^.]+\.data)\.build\._target_"), "data"),
)
"""Where a target may stand, and which role it plays there. Anywhere else the key is refused."""

_CODE_KEYS = {
    "auto_map", "trust_remote_code", "custom_pipelines", "code_revision", "name_or_path", "quantization_config",
    "attn_implementation", "experts_implementation", "kernel_config",
}  # fmt: skip
"""Fields of a Hugging Face config that make transformers fetch or choose code."""


def check_all(raw: Mapping[str, Any]) -> list[Fault]:
    """Return every fault in `raw`, the composed spec as plain data, that models alone do not see."""
    return [
        *check_targets(raw),
        *_check_names(raw),
        *_check_stages(raw),
        *_check_sharding(raw),
        *_check_evaluations(raw),
        *_check_tokenizer(raw),
        *check_compatibility(
            mapping_at(raw, "vision_tower"), mapping_at(raw, "connector"), mapping_at(raw, "recipe", "stages")
        ),
        *check_parts(raw),
        *_check_trainer(raw),
    ]


def check_leaves(raw: Mapping[str, Any]) -> list[Fault]:
    """Return faults of single values wherever they stand: secrets, and numbers that JSON cannot carry."""
    faults = []
    for path, value in walk(raw):
        if looks_secret(path) or (isinstance(value, str) and holds_secret(value)):
            faults.append(secret_fault(path))
        elif isinstance(value, float) and not math.isfinite(value):
            faults.append(Fault(path, f"is {value}, which is no finite number."))
        elif isinstance(value, bytes):
            faults.append(Fault(path, "is binary data; a spec holds text, numbers, lists and mappings only."))
    return faults


def check_targets(raw: Mapping[str, Any]) -> list[Fault]:
    """Judge every `_target_`, wherever it stands, and refuse other keys by which a config could choose code."""
    trust = (
        [entry for entry in raw.get("trust") or [] if isinstance(entry, str)]
        if isinstance(raw.get("trust"), list)
        else []
    )
    faults = [Fault("trust", wrong) for wrong in map(check_trust, trust) if wrong]
    for path, value in walk(raw):
        key = path.rsplit(".", 1)[-1]
        role = next((role for pattern, role in _ROLES if pattern.fullmatch(path)), None)
        if path == "launch.backend" and isinstance(value, str):
            faults += _check_backend(value, trust)
        elif role is not None:
            wrong = check_target(value, trust, role) if isinstance(value, str) else None
            faults += [Fault(path, wrong if wrong.endswith("?") else f"{wrong}.")] if wrong else []
        elif key == "_target_":
            faults.append(Fault(path, "may not stand here: only parts and data builders are made by `_target_`."))
        elif key in _CODE_KEYS or (key.startswith("_") and not key.endswith("]")):
            faults.append(
                Fault(path, "is refused: it could choose code to be run, and nothing here needs it.", "Remove it.")
            )
    return faults


def _check_backend(name: str, trust: Sequence[str]) -> list[Fault]:
    if "." not in name and name not in (shipped := shipped_backends()):
        fix = f"{suggestion(name, shipped)} There are {', '.join(shipped)}, or a class of a package that `trust` names."
        return [Fault("launch.backend", f"is {name!r}, which is no launch backend.", fix.strip())]
    wrong = check_target(backend_target(name), trust, "backend")
    return [Fault("launch.backend", f"{wrong}.")] if wrong else []


def _check_trainer(raw: Mapping[str, Any]) -> list[Fault]:
    """Refuse what TrainerSpec does not have, each with its reason, and numbers of a schedule that a stage does not have."""
    trainer = mapping_at(raw, "trainer")
    faults = [refused_field(str(name)) for name in trainer if name not in TrainerSpec.model_fields]
    faults += _check_adam(trainer.get("optim"), mapping_at(raw, "recipe", "stages"))
    schedules = {
        name: mapping_at(raw, "recipe", "stages", name).get("schedule") for name in mapping_at(raw, "recipe", "stages")
    }
    others = [f"{name} has {schedule}" for name, schedule in schedules.items() if schedule in ("linear", "constant")]
    if trainer.get("lr_scheduler_kwargs") is not None and others:
        what = f"is for schedule=cosine alone, but stage {' and stage '.join(others)}."
        faults.append(
            Fault("trainer.lr_scheduler_kwargs", what, "Remove it, or set recipe.stages.<stage>.schedule=cosine.")
        )
    return faults


def _check_adam(optim: Any, stages: Mapping[str, Any]) -> list[Fault]:
    """Numbers of Adam that the chosen optimiser does not read would make another stage with the same result."""
    unread = {"adam_betas": NO_ADAM, "adam_epsilon": NO_EPSILON}
    return [
        Fault(f"recipe.stages.{name}.{field}", f"is not read by trainer.optim={optim}.", "Remove it.")
        for name in stages
        for field, optimizers in unread.items()
        if optim in optimizers and mapping_at(stages, name).get(field) is not None
    ]


def check_strays(raw: Mapping[str, Any]) -> list[Fault]:
    """A misspelt stage or benchmark makes an entry that holds hardly anything: one fault, not one a missing field."""
    kinds = (
        ("recipe.stages", mapping_at(raw, "recipe", "stages"), {"from", "data", "tune"}, "stage of this recipe"),
        ("eval", mapping_at(raw, "eval"), {"benchmark", "data", "source"}, "chosen benchmark"),
    )
    faults = []
    for where, entries, needed, kind in kinds:
        for name, entry in entries.items():
            if isinstance(entry, Mapping) and not needed & entry.keys():
                others = [other for other in entries if other != name]
                fix = f"{suggestion(str(name), others)} There are: {', '.join(others) or 'none'}.".strip()
                faults.append(Fault(f"{where}.{name}", f"is no {kind}, nor does it define one.", fix))
    return faults


def _check_names(raw: Mapping[str, Any]) -> list[Fault]:
    names = {"name": raw.get("name")}
    names |= {f"{group}.name": mapping_at(raw, group).get("name") for group in (*PARTS, "recipe", "data")}
    names |= {f"recipe.stages.{stage}": stage for stage in mapping_at(raw, "recipe", "stages")}
    names |= {f"eval.{benchmark}": benchmark for benchmark in mapping_at(raw, "eval")}
    return [
        Fault(where, f"is {show(where, name)}, which cannot be a name: {_NAME_WORDS}.")
        for where, name in names.items()
        if isinstance(name, str) and not _NAME.fullmatch(name)
    ]


def _check_stages(raw: Mapping[str, Any]) -> list[Fault]:
    faults = []
    for name, stage in mapping_at(raw, "recipe", "stages").items():
        where = f"recipe.stages.{name}"
        if not isinstance(stage, Mapping):
            continue
        mixed = stage.get("data")
        for source in [mixed] if isinstance(mixed, str) else [*mixed] if isinstance(mixed, Mapping) else []:
            faults += _check_source(where, source, raw)
        faults += _check_tune(where, stage)
        faults += _check_newline(where, stage, raw)
    return faults


def _check_source(where: str, source: Any, raw: Mapping[str, Any]) -> list[Fault]:
    """Whether the data set has a source that a stage trains on, and whether it can be trained on."""
    sources = mapping_at(raw, "data", "sources")
    if not isinstance(source, str) or not sources:
        return []
    if source not in sources:
        what = f"is '{source}', which data={mapping_at(raw, 'data').get('name')} does not have."
        fix = f"{suggestion(source, sources)} Sources: {', '.join(sources)}.".strip()
        if source == "share_pretrain":
            fix += " The share recipe needs data=sharegpt4v, or digits."
        return [Fault(f"{where}.data", what, fix)]
    if mapping_at(sources, source).get("format") == "questions":
        return [Fault(f"{where}.data", f"is '{source}', which holds questions for evaluation, not conversations.")]
    return []


def _check_tune(where: str, stage: Mapping[str, Any]) -> list[Fault]:
    tune = stage.get("tune")
    if not isinstance(tune, Mapping):
        return []
    frozen = {"llm": "frozen", "vision_tower": "frozen", "connector": "full"} | dict(tune)
    trained = [part for part in PARTS if frozen[part] != "frozen"]
    if not trained:
        return [Fault(f"{where}.tune", "freezes every part, so there is nothing to train.", "Set one part to full.")]
    rates = stage.get("lr")
    if not isinstance(rates, Mapping):
        return []
    faults = [
        Fault(f"{where}.lr.{part}", f"is set, but {where}.tune freezes {part}.", f"Remove it, or set tune.{part}=full.")
        for part in rates
        if part in PARTS and part not in trained
    ]
    missing = [part for part in trained if part not in rates]
    if missing:
        faults.append(
            Fault(f"{where}.lr", f"names no rate for {', '.join(missing)}, which this stage trains.", "Add it.")
        )
    return faults


def _check_newline(where: str, stage: Mapping[str, Any], raw: Mapping[str, Any]) -> list[Fault]:
    """Whether a stage that cuts images into tiles can learn the newline that its connector has for them."""
    before = mapping_at(raw, "vision_tower", "image").get("mode")
    start = stage.get("from")
    if (
        isinstance(start, str)
        and (asked := mapping_at(raw, "recipe", "stages", start).get("image_mode", "auto")) != "auto"
    ):
        before = asked
    tune = mapping_at(stage, "tune").get("connector", "full")
    if stage.get("image_mode") != "anyres" or before == "anyres" or tune == "full":
        return []
    what = f"is anyres, whose rows of tokens end in a newline to be learned, but {where}.tune.connector is not full."
    return [Fault(f"{where}.image_mode", what, f"Set {where}.tune.connector=full, or vision_tower.image.mode=anyres.")]


def _check_sharding(raw: Mapping[str, Any]) -> list[Fault]:
    optim = mapping_at(raw, "trainer").get("optim")
    if optim in OWN_OPTIMIZERS and mapping_at(raw, "launch").get("deepspeed_stage") in (2, 3):
        what = f"is {optim}, which needs whole tensors on every rank, and ZeRO shares them out."
        return [Fault("trainer.optim", what, "Use launch=local or torchrun, or another optimiser.")]
    if mapping_at(raw, "launch").get("deepspeed_stage") in (2, 3):
        for name, stage in mapping_at(raw, "recipe", "stages").items():
            if isinstance(stage, Mapping) and stage.get("fp8"):
                what = "is true, and ZeRO does not hold weights in eight-bit floats."
                return [Fault(f"recipe.stages.{name}.fp8", what, "Use launch=local or torchrun, or fp8=false.")]
    if mapping_at(raw, "launch").get("deepspeed_stage") != 3:
        return []
    return [
        Fault(f"recipe.stages.{name}.tune.{part}", "is qlora, whose 4- or 8-bit weights ZeRO-3 cannot share out.", fix)
        for name in mapping_at(raw, "recipe", "stages")
        for part, tune in mapping_at(raw, "recipe", "stages", name, "tune").items()
        if tune == "qlora" or (isinstance(tune, Mapping) and tune.get("qlora") is not None)
        for fix in ["Use launch=zero2 or torchrun, or lora instead."]
    ]


def _check_evaluations(raw: Mapping[str, Any]) -> list[Fault]:
    faults = []
    places = [(f"eval.{name}", spec) for name, spec in mapping_at(raw, "eval").items()]
    places += [(f"{group}.build", mapping_at(raw, group, "build")) for group in ("llm", "vision_tower")]
    for where, spec in places:
        if not isinstance(spec, Mapping):
            continue
        source, sources = spec.get("source"), mapping_at(spec, "data", "sources")
        if isinstance(source, str) and sources and source not in sources:
            fix = f"{suggestion(source, sources)} Sources: {', '.join(sources)}.".strip()
            faults.append(Fault(f"{where}.source", f"is '{source}', which {where}.data does not have.", fix))
        elif where.endswith(".build") and mapping_at(sources, str(source)).get("format") == "questions":
            what = f"is '{source}', which holds questions for evaluation, not conversations."
            faults.append(Fault(f"{where}.source", what))
    return faults


def _check_tokenizer(raw: Mapping[str, Any]) -> list[Fault]:
    llm = mapping_at(raw, "llm")
    tokenizer = mapping_at(llm, "tokenizer")
    origins = (llm.get("pretrained"), tokenizer.get("pretrained"), tokenizer.get("vocab_size"))
    if llm.get("init") == "pretrained" and tokenizer and origins == (None, None, None):
        fix = "Set it to a hub id or a local folder: llm.pretrained=ORG/NAME."
        return [Fault("llm.pretrained", "is not given, so there is nothing to load.", fix)]
    if tokenizer.get("vocab_size") is None or llm.get("build") is not None:
        return []
    what = "is set, so the tokenizer is trained here, but llm.build names no data to train it on."
    return [Fault("llm.tokenizer.vocab_size", what, "Add llm.build, or set llm.tokenizer.pretrained instead.")]

"""Checks of the composed spec that no single model can make: across groups, and of open mappings. No torch.

They read the plain data, not the validated models, so that they report beside pydantic's findings and not after them.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tinylmm.config.faults import show
from tinylmm.config.fields import PARTS
from tinylmm.config.overrides import holds_secret, looks_secret, secret_fault
from tinylmm.config.targets import Role, check_target, check_trust, package_folder
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

_STAGE = "recipe.stages.<stage>."
OWNED_TRAINER_KEYS = {
    "output_dir": "store", "logging_dir": "store", "run_name": "name", "project": "tracking.wandb.project",
    "seed": "seed", "data_seed": "seed", "full_determinism": "seed",
    "learning_rate": _STAGE + "lr", "weight_decay": _STAGE + "weight_decay",
    "adam_beta1": _STAGE + "adam_betas", "adam_beta2": _STAGE + "adam_betas",
    "adam_epsilon": _STAGE + "adam_epsilon", "max_grad_norm": _STAGE + "max_grad_norm",
    "num_train_epochs": _STAGE + "epochs", "max_steps": _STAGE + "max_steps", "lr_scheduler_type": _STAGE + "schedule",
    "warmup_steps": _STAGE + "warmup_ratio", "warmup_ratio": _STAGE + "warmup_ratio",
    "bf16": _STAGE + "precision", "fp16": _STAGE + "precision",
    "gradient_accumulation_steps": _STAGE + "global_batch", "train_batch_size": _STAGE + "global_batch",
    "per_device_train_batch_size": "launch.micro_batch", "auto_find_batch_size": "launch.micro_batch",
    "per_device_eval_batch_size": "launch.eval_batch", "gradient_checkpointing": "launch.gradient_checkpointing",
    "activation_checkpointing": "launch.gradient_checkpointing", "dataloader_num_workers": "launch.num_workers",
    "save_steps": "launch.save_steps", "save_strategy": "launch.save_steps",
    "save_total_limit": "launch.keep_checkpoints", "save_only_model": "launch.save_steps",
    "save_on_each_node": "launch.save_steps", "enable_jit_checkpoint": "launch.save_steps",
    "use_cpu": "launch.device", "no_cuda": "launch.device", "ddp_timeout": "launch.step_timeout_s",
    "ddp_backend": "launch", "local_rank": "launch", "deepspeed": "launch=zero2 or launch=zero3", "fsdp": "launch",
    "fsdp_config": "launch", "parallelism_config": "launch", "accelerator_config": "launch",
    "logging_steps": "tracking.log_steps", "logging_strategy": "tracking.log_steps", "report_to": "tracking",
    "logging_first_step": "tracking.log_steps", "ddp_find_unused_parameters": "", "ddp_broadcast_buffers": "",
    "eval_strategy": "eval", "evaluation_strategy": "eval", "eval_steps": "eval", "do_eval": "eval",
    "do_predict": "eval", "eval_on_start": "eval", "load_best_model_at_end": "eval", "metric_for_best_model": "eval",
    "do_train": "recipe", "train_sampling_strategy": "recipe", "group_by_length": "recipe", "ignore_data_skip": "",
    "resume_from_checkpoint": "", "overwrite_output_dir": "", "remove_unused_columns": "", "label_names": "",
    "logging_nan_inf_filter": "", "average_tokens_across_devices": "", "dataloader_drop_last": "",
    "push_to_hub": "", "hub_model_id": "", "hub_strategy": "", "hub_always_push": "",
    "hub_private_repo": "", "hub_revision": "",
}  # fmt: skip
"""TrainingArguments that tinylmm sets itself -> the key to set instead; empty where there is nothing to set."""


def check_all(raw: Mapping[str, Any]) -> list[Fault]:
    """Return every fault in `raw`, the composed spec as plain data, that models alone do not see."""
    return [
        *check_targets(raw),
        *_check_names(raw),
        *_check_stages(raw),
        *_check_sharding(raw),
        *_check_evaluations(raw),
        *_check_templates(raw),
        *_check_tokenizer(raw),
        *check_compatibility(_mapping(raw, "vision_tower"), _mapping(raw, "connector")),
        *check_trainer(_mapping(raw, "trainer")),
    ]


def check_leaves(raw: Mapping[str, Any]) -> list[Fault]:
    """Return faults of single values wherever they stand: secrets, and numbers that JSON cannot carry."""
    faults = []
    for path, value in _walk(raw):
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
    for path, value in _walk(raw):
        key = path.rsplit(".", 1)[-1]
        role = next((role for pattern, role in _ROLES if pattern.fullmatch(path)), None)
        if role is not None:
            wrong = check_target(value, trust, role) if isinstance(value, str) else None
            faults += [Fault(path, wrong if wrong.endswith("?") else f"{wrong}.")] if wrong else []
        elif key == "_target_":
            faults.append(Fault(path, "may not stand here: only parts and data builders are made by `_target_`."))
        elif key in _CODE_KEYS or (key.startswith("_") and not key.endswith("]")):
            faults.append(
                Fault(path, "is refused: it could choose code to be run, and nothing here needs it.", "Remove it.")
            )
    return faults


def check_trainer(trainer: Mapping[str, Any]) -> list[Fault]:
    """Judge the keys of `trainer` against the fields of transformers.TrainingArguments, read from its source."""
    if not trainer:
        return []
    faults = []
    fields = training_arguments()
    for key in map(str, trainer):
        where = f"trainer.{key}"
        if key in OWNED_TRAINER_KEYS:
            instead = OWNED_TRAINER_KEYS[key]
            faults.append(Fault(where, "is set by tinylmm.", f"Set {instead} instead." if instead else "Remove it."))
        elif key not in fields:
            owned = suggestion(key.lower(), OWNED_TRAINER_KEYS) if not suggestion(key.lower(), fields) else ""
            faults.append(
                Fault(where, "is no field of transformers.TrainingArguments.", suggestion(key.lower(), fields) or owned)
            )
    return faults


@cache
def training_arguments() -> frozenset[str]:
    """Names of the fields of TrainingArguments. Reading the source takes 20 ms, importing it seconds."""
    root = package_folder("transformers")
    assert root is not None, "transformers is a dependency of tinylmm"
    tree = ast.parse((root / "training_args.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    names = (node.target for node in body if isinstance(node, ast.AnnAssign))
    return frozenset(name.id for name in names if isinstance(name, ast.Name))


def check_strays(raw: Mapping[str, Any]) -> list[Fault]:
    """A misspelt stage or benchmark makes an entry that holds hardly anything: one fault, not one a missing field."""
    kinds = (
        ("recipe.stages", _mapping(raw, "recipe", "stages"), {"from", "data", "tune"}, "stage of this recipe"),
        ("eval", _mapping(raw, "eval"), {"benchmark", "data", "source"}, "chosen benchmark"),
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
    names |= {f"{group}.name": _mapping(raw, group).get("name") for group in (*PARTS, "recipe", "data")}
    names |= {f"recipe.stages.{stage}": stage for stage in _mapping(raw, "recipe", "stages")}
    names |= {f"eval.{benchmark}": benchmark for benchmark in _mapping(raw, "eval")}
    return [
        Fault(where, f"is {show(where, name)}, which cannot be a name: {_NAME_WORDS}.")
        for where, name in names.items()
        if isinstance(name, str) and not _NAME.fullmatch(name)
    ]


def _check_stages(raw: Mapping[str, Any]) -> list[Fault]:
    faults = []
    for name, stage in _mapping(raw, "recipe", "stages").items():
        where = f"recipe.stages.{name}"
        if not isinstance(stage, Mapping):
            continue
        mixed = stage.get("data")
        for source in [mixed] if isinstance(mixed, str) else [*mixed] if isinstance(mixed, Mapping) else []:
            faults += _check_source(where, source, raw)
        faults += _check_tune(where, stage)
    return faults


def _check_source(where: str, source: Any, raw: Mapping[str, Any]) -> list[Fault]:
    """Whether the data set has a source that a stage trains on, and whether it can be trained on."""
    sources = _mapping(raw, "data", "sources")
    if not isinstance(source, str) or not sources:
        return []
    if source not in sources:
        what = f"is '{source}', which data={_mapping(raw, 'data').get('name')} does not have."
        fix = f"{suggestion(source, sources)} Sources: {', '.join(sources)}.".strip()
        if source == "share_pretrain":
            fix += " The share recipe needs data=sharegpt4v, or digits."
        return [Fault(f"{where}.data", what, fix)]
    if _mapping(sources, source).get("format") == "questions":
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


def _check_sharding(raw: Mapping[str, Any]) -> list[Fault]:
    if _mapping(raw, "launch").get("deepspeed_stage") != 3:
        return []
    return [
        Fault(f"recipe.stages.{name}.tune.{part}", "is qlora, whose 4- or 8-bit weights ZeRO-3 cannot share out.", fix)
        for name in _mapping(raw, "recipe", "stages")
        for part, tune in _mapping(raw, "recipe", "stages", name, "tune").items()
        if tune == "qlora" or (isinstance(tune, Mapping) and tune.get("qlora") is not None)
        for fix in ["Use launch=zero2 or torchrun, or lora instead."]
    ]


def _check_evaluations(raw: Mapping[str, Any]) -> list[Fault]:
    faults = []
    places = [(f"eval.{name}", spec) for name, spec in _mapping(raw, "eval").items()]
    places += [(f"{group}.build", _mapping(raw, group, "build")) for group in ("llm", "vision_tower")]
    for where, spec in places:
        if not isinstance(spec, Mapping):
            continue
        source, sources = spec.get("source"), _mapping(spec, "data", "sources")
        if isinstance(source, str) and sources and source not in sources:
            fix = f"{suggestion(source, sources)} Sources: {', '.join(sources)}.".strip()
            faults.append(Fault(f"{where}.source", f"is '{source}', which {where}.data does not have.", fix))
    return faults


def _check_templates(raw: Mapping[str, Any]) -> list[Fault]:
    from tinylmm.data.chat import TEMPLATES  # needs no torch; at use, as the data package is no concern of other checks

    places = {"llm.template": (_mapping(raw, "llm").get("template"), list(TEMPLATES))}
    for group, key in (("recipe.stages", "stages"), ("eval", "")):
        specs = _mapping(raw, "recipe", "stages") if key else _mapping(raw, "eval")
        for name, spec in specs.items():
            if isinstance(spec, Mapping):
                places[f"{group}.{name}.template"] = (spec.get("template"), ["auto", *TEMPLATES])
    return [
        Fault(
            where,
            f"is '{name}', which is no chat template.",
            f"{suggestion(name, allowed)} Allowed: {', '.join(allowed)}.".strip(),
        )
        for where, (name, allowed) in places.items()
        if isinstance(name, str) and name not in allowed
    ]


def _check_tokenizer(raw: Mapping[str, Any]) -> list[Fault]:
    llm = _mapping(raw, "llm")
    tokenizer = _mapping(llm, "tokenizer")
    origins = (llm.get("pretrained"), tokenizer.get("pretrained"), tokenizer.get("vocab_size"))
    if llm.get("init") == "pretrained" and tokenizer and origins == (None, None, None):
        fix = "Set it to a hub id or a local folder: llm.pretrained=ORG/NAME."
        return [Fault("llm.pretrained", "is not given, so there is nothing to load.", fix)]
    if tokenizer.get("vocab_size") is None or llm.get("build") is not None:
        return []
    what = "is set, so the tokenizer is trained here, but llm.build names no data to train it on."
    return [Fault("llm.tokenizer.vocab_size", what, "Add llm.build, or set llm.tokenizer.pretrained instead.")]


def _mapping(raw: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The mapping at `path`, or an empty one where there is none: a wrong type there is pydantic's to report."""
    found: Any = raw
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every key and list item, parents first."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            below = f"{path}.{key}" if path else str(key)
            yield below, item
            yield from _walk(item, below)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
            yield from _walk(item, f"{path}[{index}]")

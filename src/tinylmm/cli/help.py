"""The text of `tinylmm-train --help`: usage, groups and choices, keys, exit codes. Loads neither Hydra nor torch."""

from __future__ import annotations

from pathlib import Path

from tinylmm.config.groups import DEFAULT_GROUPS, EXPERIMENTS, conf_folder, experiment_folders, user_conf
from tinylmm.errors import EXIT_DONE, EXIT_STAGE_FAILED, EXIT_STOPPED, EXIT_USER

_USAGE = """\
tinylmm-train [group=choice ...] [key=value ...] [-m]

Composes the chosen parts and recipe, checks everything, runs what is not in the store yet, and prints the results.
Give the same command again to resume after an interruption.

Examples:
  tinylmm-train                                     the embedded digits: no GPU, no network, minutes on two cores
  tinylmm-train llm=phi2 vt=siglip recipe=share     TinyLLaVA-share-Sig-Phi (`vt` is short for `vision_tower`)
  tinylmm-train recipe.stages.finetune.lr=1e-5      change any value by its dotted key
  tinylmm-train -m vt=clip,siglip seed=0,1          a sweep of four runs; what they share runs once
  tinylmm-train experiment=paper_table_a1           a study: a page of YAML with all its runs

Options:
  -m, --multirun    run every combination of comma-separated values
  -h, --help        show this text
"""

_KEYS = """\
Keys:
  seed=0                  of every random choice in every stage
  name=...                folder under store/runs; by default made of the chosen parts and recipe
  store=store             where finished stages are kept and reused from (or set TINYLMM_STORE)
  tracking.wandb.enabled  true for Weights & Biases; the key comes from WANDB_API_KEY
  trainer.<field>=...     further fields of transformers.TrainingArguments
  trust=[package]         packages besides tinylmm, torch and transformers that a `_target_` may name
  <group>.<key>=...       any key of a chosen group; a misspelt one gets a suggestion
"""


def train_help() -> str:
    """Return the whole help text, with the choices that are there in this folder."""
    codes = (
        f"Exit codes: {EXIT_DONE} done, {EXIT_STAGE_FAILED} a stage failed, {EXIT_USER} wrong input, "
        f"{EXIT_STOPPED} stopped by a signal with its state saved\n"
    )
    return "\n".join([_USAGE, _groups(), _KEYS, codes])


def first_comment(path: Path) -> str:
    """Return what a YAML file's first comment line says, or an empty text if it begins otherwise."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                return ""
            text = line.lstrip("#").strip()
            if text and not text.startswith("@package"):
                return text
    return ""


def _groups() -> str:
    lines = ["Groups:"]
    user = user_conf()
    for group in DEFAULT_GROUPS:
        folders = [conf_folder() / group, *([user / group] if user is not None else [])]
        lines.append(f"  {group}")
        lines += _choices({path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")})
    experiments = {
        _study(path.relative_to(folder).with_suffix("")): path
        for folder in reversed(experiment_folders())
        for path in folder.rglob("*.yaml")
    }
    if experiments:
        lines += [f"  {EXPERIMENTS}", *_choices(experiments)]
    return "\n".join([*lines, ""])


def _study(path: Path) -> str:
    """`name` of an experiment in a folder of its own, `name/name`; else its path."""
    return path.name if path.parent.name == path.name else path.as_posix()


def _choices(paths: dict[str, Path]) -> list[str]:
    return [f"    {name:<14}  {first_comment(path)}".rstrip() for name, path in sorted(paths.items())]

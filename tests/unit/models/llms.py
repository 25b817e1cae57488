"""Every conf/llm choice at tiny size: the real class with the YAML's own flags, few layers and small widths."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
import yaml
from omegaconf import OmegaConf

from tests.builders import tiny_tower
from tinylmm.config.groups import conf_folder
from tinylmm.config.targets import resolve_target
from tinylmm.models.connectors import MLPConnector
from tinylmm.models.llm import random_llm
from tinylmm.models.lmm import LMM

VOCAB, WIDTH, HEADS = 131, 64, 4
NAMES = sorted(path.stem for path in (conf_folder() / "llm").glob("*.yaml") if path.stem != "hf")
WINDOW = 4
"""Shorter than the samples, so that local attention matters."""


@cache
def choice(name: str, group: str = "llm") -> dict[str, Any]:
    """The content of a YAML, merged into that of the choices its defaults name."""
    found = yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    bases = [base for base in found.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    merged = OmegaConf.merge(*(choice(base, group) for base in bases), found)
    return cast(dict[str, Any], OmegaConf.to_container(merged))


def shrink(published: dict[str, Any]) -> dict[str, Any]:
    """The same architecture in small: flags, ratios of heads, dropout and soft caps stay."""
    small = copy.deepcopy(published)
    if "model_dim" in small:  # OpenELM: two groups of key heads, and layers that differ in heads and width
        small |= {
            "model_dim": WIDTH,
            "num_transformer_layers": 3,
            "head_dim": 8,
            "num_gqa_groups": 2,
            "ffn_dim_divisor": 16,
        }
    else:
        queries, keys = small["num_attention_heads"], small.get("num_key_value_heads", small["num_attention_heads"])
        small |= {"hidden_size": WIDTH, "intermediate_size": 96, "num_attention_heads": HEADS}
        small["num_key_value_heads"] = 1 if keys == 1 else HEADS if keys == queries else 2
        small["num_hidden_layers"] = 6 if "sliding_window" in small else 2  # one full layer in six (Gemma 3)
    if "head_dim" in small and "hidden_size" in small:
        small["head_dim"] = 24  # not width / heads
    if "sliding_window" in small:
        small["sliding_window"] = WINDOW
    pad_is_eos = small.get("pad_token_id") == small["eos_token_id"]
    if "pad_token_id" in small:
        small["pad_token_id"] = 2 if pad_is_eos else 0
    return small | {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}


def tiny_llm(name: str, seed: int = 0, **changes: Any) -> Any:
    """The YAML's class with random weights."""
    torch.manual_seed(seed)
    spec = choice(name)
    llm = random_llm(resolve_target(spec["_target_"]), shrink(spec["architecture"]) | changes, "auto")
    for parameter_name, parameter in llm.named_parameters():
        if parameter_name.endswith("bias"):  # zero at first, and then no test would miss them
            torch.nn.init.normal_(parameter, std=0.1)
    return llm


def tiny(name: str, seed: int = 0) -> LMM:
    """The YAML's LLM behind a tiny tower and connector, in eval mode."""
    llm = tiny_llm(name, seed)
    tower = tiny_tower()
    connector = MLPConnector(tower.hidden_size, WIDTH)
    return LMM(llm, tower, connector, "llama", bool(choice(name).get("scale_image_features"))).eval()

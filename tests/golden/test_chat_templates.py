"""Exact renderings of the chat templates.

Source: TinyLLaVA_Factory main (53f12c7) `tinyllava/data/template/*`, whose text for phi and llama is byte-identical
with the TWO style of LLaVA's `v1` and TinyLLaVABench's `phi`; LLaVA's `plain` is the Factory's `pretrain`.
"""

from __future__ import annotations

import pytest

from tinylmm.data.chat import Turn, get_template

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ONE = (Turn("<image>\nWhat is it?", "A cat."),)
TWO = (*ONE, Turn("What colour?", "Black."))
OPEN = (Turn("<image>\nWhat is it?", None),)

CASES = [
    ("phi", ONE, f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.<|endoftext|>"),
    (
        "phi",
        TWO,
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.<|endoftext|>"
        "USER: What colour? ASSISTANT: Black.<|endoftext|>",
    ),
    ("phi", OPEN, f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"),
    ("phi", (Turn("Hi", "Hello."),), f"{SYSTEM} USER: Hi ASSISTANT: Hello.<|endoftext|>"),
    (
        "phi",
        (Turn("What is it?\n<image>", "A cat."),),
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.<|endoftext|>",
    ),
    ("phi", (Turn("<image> a <image> b", "c"),), f"{SYSTEM} USER: <image> a <image> b ASSISTANT: c<|endoftext|>"),
    (
        "llama",
        TWO,
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT: Black.</s>",
    ),
    (
        "llama",
        (*ONE, Turn("What colour?", None)),
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT:",
    ),
    ("pretrain", ONE, "<image>A cat.\n"),
    ("plain", ONE, "<image>A cat.\n"),
    ("pretrain", (Turn("Describe it.\n<image>", "A cat."),), "<image>A cat.\n"),
    ("pretrain", (Turn("Describe.", "A cat."),), "A cat.\n"),
    ("pretrain", OPEN, "<image>"),
]
IDS = [
    "phi-one-turn",
    "phi-two-turns",
    "phi-prompt-has-no-trailing-space",
    "phi-text-only",
    "phi-one-slot-goes-in-front",
    "phi-two-slots-stay",
    "llama-two-turns",
    "llama-prompt-after-a-turn",
    "pretrain-caption",
    "plain-equals-pretrain",
    "pretrain-throws-the-question-away",
    "pretrain-without-image-has-no-slot",
    "pretrain-prompt",
]


@pytest.mark.parametrize(("name", "turns", "expected"), CASES, ids=IDS)
def test_template_renders_byte_exactly(name: str, turns: tuple[Turn, ...], expected: str) -> None:
    assert get_template(name).text(turns) == expected

"""Chat templates by name: a conversation becomes token ids and their loss labels together, never by splitting text.

`data/segments.py` says what a conversation is made of and tokenises it, `data/slots.py` where its images stand,
`data/templates.py` has the layouts, `data/native.py` the one that a tokenizer brings along. No torch and no transformers are
loaded here.
"""

from __future__ import annotations

from dataclasses import replace

from tinylmm.data.native import NativeTemplate
from tinylmm.data.segments import Rendered, Turn
from tinylmm.data.templates import (
    CaptionTemplate,
    ChatTemplate,
    HFLlavaTemplate,
    Llama2Template,
    RoleTemplate,
    TinyLlamaTemplate,
    VicunaTemplate,
)
from tinylmm.errors import ConfigError, Fault, suggestion

__all__ = [
    "TEMPLATES",
    "VICUNA_SYSTEM",
    "ChatTemplate",
    "Rendered",
    "Turn",
    "get_template",
]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)

_KNOWN: tuple[ChatTemplate, ...] = (
    # TinyLLaVA Factory, main branch
    VicunaTemplate("phi", VICUNA_SYSTEM, "<|endoftext|>"),  # also StableLM-2 and Qwen1.5
    VicunaTemplate("llama", VICUNA_SYSTEM, "</s>"),  # LLaVA's v1: TinyLlama, OpenELM, Vicuna
    VicunaTemplate("gemma", VICUNA_SYSTEM, "<eos>"),
    VicunaTemplate("qwen2_base", VICUNA_SYSTEM, "<|endoftext|>"),
    VicunaTemplate("qwen2_instruct", VICUNA_SYSTEM, "<|im_end|>"),
    CaptionTemplate("pretrain", "", None),
    # TinyLLaVABench and LLaVA
    CaptionTemplate("plain", "", None),  # LLaVA's name for the same text
    TinyLlamaTemplate("tiny_llama", VISION_SYSTEM, "</s>"),
    TinyLlamaTemplate("tiny_llama_bench", VISION_SYSTEM, "</s>", as_published=True),  # for imported checkpoints
    Llama2Template("llava_llama_2", VISION_SYSTEM, "</s>"),
    RoleTemplate("mpt", MPT_SYSTEM, "<|im_end|>", opening="<|im_start|>{role}\n", markers=("<|im_start|>",)),
    # transformers' LLaVA (card of bczhou/tiny-llava-v1-hf)
    HFLlavaTemplate("hf_llava", "", "</s>", cue="\nASSISTANT:"),
    HFLlavaTemplate("hf_llava_1_5", "", "</s>"),  # of llava-hf's converted LLaVA-1.5 and its kin
    # the LLMs' own formats
    RoleTemplate(
        "chatml",
        "You are a helpful assistant.",
        "<|im_end|>",
        opening="<|im_start|>{role}\n",
        markers=("<|im_start|>",),
        closing="\n",
    ),
    RoleTemplate(
        "gemma_chat",
        "",
        "<end_of_turn>",
        opening="<start_of_turn>{role}\n",
        markers=("<start_of_turn>",),
        closing="\n",
        roles=(None, "user", "model"),
        start="<bos>",
        strips=True,
    ),
    RoleTemplate(
        "phi3",
        "",
        "<|end|>",
        opening="<|{role}|>\n",
        markers=("<|system|>", "<|user|>", "<|assistant|>"),
        closing="\n",
    ),
    RoleTemplate(
        "llama3",
        "",
        "<|eot_id|>",
        opening="<|start_header_id|>{role}<|end_header_id|>\n\n",
        markers=("<|start_header_id|>", "<|end_header_id|>"),
        start="<|begin_of_text|>",
        strips=True,
    ),
    NativeTemplate("native", "", None),  # the tokenizer's own
)
_CHOICES = tuple((template.name, template.tokens) for template in _KNOWN if template.eos is not None)
TEMPLATES = {template.name: replace(template, choices=_CHOICES) for template in _KNOWN}
"""Every chat template by name. Stages name theirs in `template`, an LLM its own in `llm.template`."""


def get_template(name: str) -> ChatTemplate:
    """Return the template called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    what = f"unknown chat template '{name}'. {suggestion(name, TEMPLATES)}".rstrip()
    raise ConfigError([Fault("template", what, f"Allowed: {', '.join(TEMPLATES)}.")])

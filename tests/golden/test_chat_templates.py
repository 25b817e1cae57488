"""Exact renderings of the chat templates.

Source: TinyLLaVA_Factory main (53f12c7) `tinyllava/data/template/*`, whose text for phi and llama is byte-identical
with the TWO style of LLaVA's `v1` and TinyLLaVABench's `phi`; LLaVA's `plain` is the Factory's `pretrain`. LLAMA_2, MPT and
TINY_LLAMA styles: LLaVA's and TinyLLaVABench's `conversation.py`. Chat formats: the chat templates that Qwen2, Gemma, Phi-3
and Llama-3 publish in their tokenizers.
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
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."

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
    # a question that is only an image: the Factory and LLaVA strip the newline behind the slot
    ("llama", (Turn("<image>\n\n", "Two ducks."),), f"{SYSTEM} USER: <image> ASSISTANT: Two ducks.</s>"),
    ("phi", (Turn(" \n<image>", None),), f"{SYSTEM} USER: <image> ASSISTANT:"),
    (
        "llama",
        (*ONE, Turn("<image>\n", "Two ducks.")),
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: <image> ASSISTANT: Two ducks.</s>",
    ),
    ("hf_llava", (Turn("<image>\n", None),), "USER: <image>\nASSISTANT:"),
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
    "llama-only-an-image",
    "phi-prompt-of-only-an-image",
    "llama-only-an-image-in-a-later-turn",
    "hf-llava-prompt-of-only-an-image",
    "pretrain-caption",
    "plain-equals-pretrain",
    "pretrain-throws-the-question-away",
    "pretrain-without-image-has-no-slot",
    "pretrain-prompt",
]


@pytest.mark.parametrize(("name", "turns", "expected"), CASES, ids=IDS)
def test_template_renders_byte_exactly(name: str, turns: tuple[Turn, ...], expected: str) -> None:
    assert get_template(name).text(turns) == expected


Q1, Q2 = "<image>\nWhat is it?", "What colour?"
FORMATS = {
    "gemma": f"{SYSTEM} USER: {Q1} ASSISTANT: A cat.<eos>USER: {Q2} ASSISTANT: Black.<eos>",
    "qwen2_base": f"{SYSTEM} USER: {Q1} ASSISTANT: A cat.<|endoftext|>USER: {Q2} ASSISTANT: Black.<|endoftext|>",
    "qwen2_instruct": f"{SYSTEM} USER: {Q1} ASSISTANT: A cat.<|im_end|>USER: {Q2} ASSISTANT: Black.<|im_end|>",
    "hf_llava": f"USER: {Q1}\nASSISTANT: A cat.</s>USER: {Q2}\nASSISTANT: Black.</s>",
    "hf_llava_1_5": f"USER: {Q1} ASSISTANT: A cat.</s>USER: {Q2} ASSISTANT: Black.</s>",
    "llava_llama_2": f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n{Q1} [/INST] A cat. </s><s>[INST] {Q2} [/INST] Black. </s>",
    "tiny_llama": f"<s><|system|>\n{VISION}\n<|user|>\n{Q1}\n<|assistant|>\nA cat.</s>"
    f"<s><|user|>\n{Q2}\n<|assistant|>\nBlack.</s>",
    "tiny_llama_bench": f"|system|>\n{VISION}\n<|user|>\n{Q1}\n<|assistant|>\nA cat.</s>"
    f"<s><|user|>\n{Q2}\n<|assistant|>\nBlack.</s>",
    "mpt": f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n{Q1}<|im_end|><|im_start|>assistant\nA cat.<|im_end|>"
    f"<|im_start|>user\n{Q2}<|im_end|><|im_start|>assistant\nBlack.<|im_end|>",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    f"<|im_start|>user\n{Q2}<|im_end|>\n<|im_start|>assistant\nBlack.<|im_end|>\n",
    "gemma_chat": f"<bos><start_of_turn>user\n{Q1}<end_of_turn>\n<start_of_turn>model\nA cat.<end_of_turn>\n"
    f"<start_of_turn>user\n{Q2}<end_of_turn>\n<start_of_turn>model\nBlack.<end_of_turn>\n",
    "phi3": f"<|user|>\n{Q1}<|end|>\n<|assistant|>\nA cat.<|end|>\n"
    f"<|user|>\n{Q2}<|end|>\n<|assistant|>\nBlack.<|end|>\n",
    "llama3": f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{Q1}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{Q2}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nBlack.<|eot_id|>",
}
"""Two turns in every format that `CASES` does not have."""
ENDINGS = {"hf_llava": "\nASSISTANT:", "llava_llama_2": " [/INST]", "tiny_llama": "\n<|assistant|>\n"}
"""How prompts end; that of Vicuna's kind ends in ` ASSISTANT:`, a role format's where its answer begins."""
SYSTEMS = {
    "llama": "Be brief. USER: Hi ASSISTANT: Hello.</s>",
    "llava_llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. </s>",
    "tiny_llama": "<s><|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello.</s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n",
    "gemma_chat": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello.<|end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>",
    "pretrain": "Hello.\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_two_turns_render_byte_exactly(name: str) -> None:
    assert get_template(name).text(TWO) == FORMATS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_prompt_is_the_text_up_to_the_answer(name: str) -> None:
    prompt = get_template(name).text((*ONE, Turn("What colour?", None)))
    assert FORMATS[name].startswith(prompt)
    assert FORMATS[name][len(prompt) :].lstrip(" ").startswith("Black.")
    assert prompt.endswith(ENDINGS.get(name, ""))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_conversations_own_system_message_takes_the_templates_place(name: str) -> None:
    assert get_template(name).text((Turn("Hi", "Hello."),), system="Be brief.") == SYSTEMS[name]


@pytest.mark.parametrize(
    ("name", "start"),
    [("llama", "USER: Hi"), ("chatml", "<|im_start|>user\nHi"), ("llava_llama_2", "[INST] Hi")],
)
def test_an_empty_system_message_leaves_no_trace(name: str, start: str) -> None:
    assert get_template(name).text((Turn("Hi", "Hello."),), system="").startswith(start)


def test_literal_image_words_beside_real_slots_stay_text() -> None:
    turn = Turn("ignored", "x", around=("", " what does <image> mean?"))
    assert turn.num_images == 1
    assert get_template("llama").text((turn,)) == f"{SYSTEM} USER: <image>\nwhat does <image> mean? ASSISTANT: x</s>"

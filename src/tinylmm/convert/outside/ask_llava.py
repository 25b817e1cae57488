"""What transformers makes of an exported folder: read from stdin, answered on the last line of stdout, both JSON.

It imports nothing of tinylmm: whoever loads the folder elsewhere has no more than this.

{"folder", "adapter", "tokens", "rows", "questions": [{"text", "raw", "images", "answer": [id], "looked_at": [[id]]}]}
-> {"versions", "lost", "image_id", "ends", "answers": [{"prompt", "ids", "text", "log_probs": [[float]]}]}
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(job: dict[str, Any]) -> tuple[Any, list[str], dict[str, str]]:
    """The model in fp32, tensors that the folder lacks or that have no place, and versions."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    model, found = LlavaForConditionalGeneration.from_pretrained(
        job["folder"], dtype=torch.float32, output_loading_info=True
    )
    lost = sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])})
    if job["adapter"] is not None:
        import peft

        versions["peft"] = peft.__version__
        model = peft.PeftModel.from_pretrained(model, job["adapter"])
        there = peft.utils.save_and_load.load_peft_weights(job["adapter"])
        have = set(peft.get_peft_model_state_dict(model))
        lost += sorted(have ^ set(there))
    return model.eval(), lost, versions


def inputs_of(processor: Any, question: dict[str, Any]) -> Any:
    """Prompt and pixels: by the folder's chat template, or from the prompt's words where it has none."""
    images = [Image.open(path).convert("RGB") for path in question["images"]]
    if processor.chat_template is None:
        return processor(text=question["raw"], images=images or None, return_tensors="pt")
    parts = [{"type": "image", "image": image} for image in images]
    asked = [{"role": "user", "content": [*parts, {"type": "text", "text": question["text"]}]}]
    return processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def answer(model: Any, processor: Any, question: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The greedy answer, and the log-probabilities of the tokens looked at, along the answer that is expected."""
    inputs = inputs_of(processor, question)
    prompt = inputs["input_ids"]
    row = model.generate(**inputs, max_new_tokens=job["tokens"], do_sample=False)[0, prompt.shape[1] :]
    expected = question["answer"]
    if processor.image_token_id in expected:  # a model that was never trained may say it; no picture stands there
        expected = expected[: expected.index(processor.image_token_id)]
    whole = torch.cat([prompt, torch.tensor([expected], dtype=prompt.dtype)], dim=1)
    pixels = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    logits = model(input_ids=whole, **pixels).logits[0, prompt.shape[1] - 1 :, : job["rows"]]
    log_probs = logits.float().log_softmax(-1)
    places = zip(log_probs, question["looked_at"], strict=False)
    looked_at = [row[torch.tensor(ids)].tolist() for row, ids in places]
    text = processor.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"prompt": prompt[0].tolist(), "ids": row.tolist(), "text": text.strip(), "log_probs": looked_at}


def main() -> None:
    """Answer all questions, one by one."""
    job = json.load(sys.stdin)
    processor = AutoProcessor.from_pretrained(job["folder"])
    model, lost, versions = load(job)
    ends = model.generation_config.eos_token_id
    found = {
        "versions": versions,
        "lost": lost,
        "image_id": processor.image_token_id,
        "ends": ends if isinstance(ends, list) else [ends],
        "answers": [] if lost else [answer(model, processor, question, job) for question in job["questions"]],
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()

"""What transformers alone makes of exported folders: read from stdin, answered on stdout, both JSON. Imports nothing of ours.

{"folders": [...], "images": [...], "questions": [...], "tokens": n} -> {"version", "folders": {folder: answers}}
"""

import json
import sys
import warnings

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def asked_of(folder, images, questions, tokens):
    processor = AutoProcessor.from_pretrained(folder)
    model, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)

    def talk(question, count=1):
        return [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question}]}]

    def answers(talks, pictures):
        texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in talks]
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        rows = model.generate(**inputs, max_new_tokens=tokens)
        texts = [processor.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in rows]
        return [text.strip() for text in texts]

    system = [{"role": "system", "content": "Be brief."}, *talk(questions[0])]
    pipe = pipeline("image-text-to-text", model=folder)
    piped = [
        pipe(
            text=[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}],
            max_new_tokens=tokens,
            return_full_text=False,
        )[0]["generated_text"].strip()
        for image, question in zip(images, questions, strict=True)
    ]
    return {
        "lost": {
            name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        },
        "single": [answers([talk(question)], [image])[0] for question, image in zip(questions, images, strict=True)],
        "batch": answers([talk(question) for question in questions], images),
        "pipeline": piped,
        "several": answers([talk(questions[0], 2)], [images[:2]])[0],
        "system": answers([system], [images[0]])[0],
        "system_text": processor.apply_chat_template(system, add_generation_prompt=True),
    }


def main():
    job = json.load(sys.stdin)
    images = [Image.open(path) for path in job["images"]]
    found = {folder: asked_of(folder, images, job["questions"], job["tokens"]) for folder in job["folders"]}
    json.dump({"version": transformers.__version__, "folders": found}, sys.stdout)


main()

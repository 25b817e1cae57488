"""What vLLM alone makes of exported folders: read from stdin, answered on the last line of stdout, both JSON.

{"folders": {folder: whose implementation}, "adapters": {folder: folder of its base}, "images": [...], "questions": [...],
"tokens": n} -> {"version", "folders": {folder: answers}}
"""

import base64
import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in this process: starting one costs half a minute
}

import vllm
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def loaded(folder, implementation, **more):
    return vllm.LLM(
        folder,
        model_impl=implementation,
        dtype="float32",
        mm_processor_kwargs={"backend": "pil"},  # as training resizes; torchvision's pixels differ by a level
        max_model_len=192,
        max_num_seqs=16,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
        disable_log_stats=True,
        **more,
    )


def asked_of(model, images, questions, tokens, adapter=None):
    greedy = vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=0)
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]

    def talk(shown, question):
        return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]

    def answers(talks):
        found = [done.outputs[0] for done in model.chat(talks, greedy, use_tqdm=False, lora_request=adapter)]
        return [
            {
                "ids": list(one.token_ids),
                "log_probs": [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)],
            }
            for one in found
        ]

    talks = [talk([part], question) for part, question in zip(parts, questions, strict=True)]
    return {
        "class": type(model.llm_engine.model_executor.driver_worker.worker.model_runner.model).__name__,
        "batch": answers(talks),
        "single": [answers([one])[0] for one in talks],
        "several": answers([talk(parts[:2], questions[0])])[0],
        "system": answers([[{"role": "system", "content": "Be brief."}, *talks[0]]])[0],
    }


def with_lora(base):
    return loaded(base, "auto", enable_lora=True, max_lora_rank=8)


def told(work):
    """What a folder answers, or why it does not: it is wanted beside the answers of the others."""
    try:
        return work()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def main():
    job = json.load(sys.stdin)
    images = []
    for path in job["images"]:
        images.append(f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}")
    asked, found = (images, job["questions"], job["tokens"]), {}
    for folder, implementation in job["folders"].items():
        found[folder] = told(lambda: asked_of(loaded(folder, implementation), *asked))  # noqa: B023 - called at once
    for folder, base in job["adapters"].items():
        adapter = LoRARequest("adapter", 1, folder)
        found[folder] = told(lambda: asked_of(with_lora(base), *asked, adapter))  # noqa: B023
    sys.stdout.write(f"\n{json.dumps({'version': vllm.__version__, 'folders': found})}\n")


if __name__ == "__main__":
    main()

"""What a llama.cpp server says of exported GGUF files over HTTP, a later one than the binding of `ask_gguf.js`.

Read from stdin, answered on the last line of stdout, both JSON:
[{"model", "mmproj", "talks": [{"messages", "tokens": n}], "prompts": [{"prompt", "images"}], "vocabulary": n}]
-> {"version", "models": [{"chat": [OpenAI's answer], "first": [{"length", "log_probs": {id: number}}]}]}
with images as base64, and of each prompt its length in tokens and the log-probabilities of the answer's first token.
"""

import json
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import xllamacpp


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=300) as reply:
            return json.load(reply)
    except HTTPError as error:
        raise RuntimeError(error.read().decode()) from error


def served(job):
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = job["model"], job["mmproj"]
    params.n_ctx, params.n_gpu_layers, params.n_parallel, params.mmproj_use_gpu = 512, 0, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.cache_prompt, params.use_jinja = False, False, True
    server = xllamacpp.Server(params)
    greedy = {"temperature": 0, "cache_prompt": False}
    chat = [
        ask(
            f"{server.listening_address}/v1/chat/completions",
            greedy | {"messages": one["messages"], "max_tokens": one["tokens"]},
        )
        for one in job["talks"]
    ]
    marker = ask(f"{server.listening_address}/props")["media_marker"]  # another for each server
    first = []
    for one in job["prompts"]:
        prompt = one["prompt"].replace("<__media__>", marker)
        if one["images"]:
            prompt = {"prompt_string": prompt, "multimodal_data": one["images"]}
        body = greedy | {"prompt": prompt, "n_predict": 8, "n_probs": job["vocabulary"]}
        found = ask(f"{server.listening_address}/completion", body)
        # none are sent of a token that is a part of a character, where the rest of it does not follow
        probabilities = found.get("completion_probabilities", [{"top_logprobs": []}])[0]["top_logprobs"]
        first.append({"length": found["tokens_evaluated"], "log_probs": {p["id"]: p["logprob"] for p in probabilities}})
    return {"chat": chat, "first": first}


def main():
    found = [served(job) for job in json.load(sys.stdin)]
    sys.stdout.write(f"\n{json.dumps({'version': xllamacpp.__version__, 'models': found})}\n")


main()

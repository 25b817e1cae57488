"""Asks other programs, each in a process of its own, what they make of an exported folder: transformers (with peft), llama.cpp.

A folder that one of them cannot read, or of which it leaves tensors random, is an `IntegrityError`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinylmm.constants import IMAGE_SLOT
from tinylmm.convert.ask_ours import with_slots_closed
from tinylmm.convert.asking import Answered, Asking, Heard, Question, Tolerance
from tinylmm.convert.tensors import listed
from tinylmm.data.chat import Turn, get_template
from tinylmm.errors import IntegrityError, UserError

OUTSIDE = Path(__file__).parent / "outside"
MARKER = "<__media__>"
"""Where an image stands in what llama.cpp is asked."""
BINDING = "@fugood/llama.node"
BINDING_VERSION = "1.7.15"
_PACKAGES = f"{BINDING}@{BINDING_VERSION} @fugood/node-llama-linux-x64@{BINDING_VERSION}"
PROBABILITIES = 256
"""Of the first token, so many of llama.cpp's likeliest are looked at: our likeliest are among them, or far off."""
A_PROCESS = 4
"""Questions that llama.cpp answers in one process: each takes two contexts, which it keeps until it ends."""
SPARE = 64
"""Room of llama.cpp's context above the longest prompt and its answer."""
_LINES = 3

EXACT = Tolerance(
    1e-3,
    "both compute in fp32 from the same weights, so only the order of sums differs: 1e-5 and less at nano size, "
    "with room for deep models",
)
_LLAMA_CPP = {
    "fp32": Tolerance(
        0.01, "both compute in fp32, but the GELU of llama.cpp's connector is the tanh one: 0.001 at nano size"
    ),
    "fp16": Tolerance(0.05, "llama.cpp computes with activations in fp16 too: 0.004 at nano size"),
    "bf16": Tolerance(0.15, "llama.cpp computes with activations in bf16 too: 0.03 at nano size"),
    "q8_0": Tolerance(
        0.3, "the LLM's weights are rounded to 8 bits, and compared with the whole ones: 0.07 at nano size"
    ),
}


def transformers_tolerance(dtype: str) -> Tolerance:
    """What counts as rounding, in any dtype: ours has the rounded weights, too."""
    return EXACT


def llama_cpp_tolerance(dtype: str) -> Tolerance:
    """What counts as rounding where llama.cpp computes."""
    return _LLAMA_CPP[{"f32": "fp32", "f16": "fp16"}.get(dtype, dtype)]


def ask_transformers(asking: Asking) -> Heard:
    """Ask transformers in a fresh process that may use no network."""
    return _ask_llava(asking, asking.folder, None)


def ask_peft(asking: Asking, base: str) -> Heard:
    """Ask transformers with the adapter of the folder on the base in a folder below it."""
    return _ask_llava(asking, asking.folder / base, asking.folder)


def _ask_llava(asking: Asking, folder: Path, adapter: Path | None) -> Heard:
    template = get_template(asking.loaded.model.template).fitted(asking.loaded.tokenizer)
    job = {
        "folder": str(folder),
        "adapter": None if adapter is None else str(adapter),
        "tokens": asking.tokens,
        "rows": asking.rows,
        "questions": [
            {
                "text": question.text,
                "raw": template.text([Turn(question.with_slots, None)]),
                "images": list(map(str, question.images)),
                "answer": list(expected.ids or ()),
                "looked_at": [list(place) for place in expected.log_probs],
            }
            for question, expected in zip(asking.questions, asking.expected, strict=True)
        ],
    }
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    said = _asked(
        [sys.executable, str(OUTSIDE / "ask_llava.py")], job, offline | {"CUDA_VISIBLE_DEVICES": ""}, "transformers"
    )
    if said["lost"]:
        raise IntegrityError(
            f"transformers does not find all tensors of the folder, or finds others: {listed(said['lost'])}"
        )
    answers = [_told(row, expected, said) for row, expected in zip(said["answers"], asking.expected, strict=True)]
    return Heard(answers, said["versions"])


def _told(row: Mapping[str, Any], expected: Answered, said: Mapping[str, Any]) -> Answered:
    ids, places = list(row["ids"]), zip(expected.log_probs, row["log_probs"], strict=False)
    end = next((place for place, token in enumerate(ids) if token in said["ends"]), len(ids))
    return Answered(
        length=len(row["prompt"]),
        text=row["text"],
        log_probs=tuple(dict(zip(looked_at, values, strict=True)) for looked_at, values in places),
        ids=tuple(ids[:end]),
        prompt=with_slots_closed(row["prompt"], said["image_id"]),
    )


def require_llama_cpp() -> None:
    """See that llama.cpp can be asked.

    Raises:
        UserError: Node.js or the binding is missing.
    """
    _llama_cpp_versions(os.environ.get("NODE_PATH", ""))


@lru_cache(maxsize=1)
def _llama_cpp_versions(node_path: str) -> dict[str, str]:
    node = shutil.which("node")
    code = (
        f"const m = require('{BINDING}'), p = require('{BINDING}/package.json'); process.stdout.write(JSON.stringify("
        "{'llama.cpp': 'b' + m.BuildInfo.number, [p.name]: p.version, node: process.version.slice(1)}))"
    )
    done = None if node is None else subprocess.run([node, "-e", code], capture_output=True, text=True, timeout=120)
    if done is None or done.returncode:
        what = "Node.js" if node is None else f"the npm package {BINDING}"
        raise UserError(
            f"--verify asks llama.cpp itself, through Node.js and the npm package {BINDING}, and {what} is not found here. "
            f"Install it: npm install --ignore-scripts --prefix ~/llama-cpp {_PACKAGES}, and set "
            "NODE_PATH=~/llama-cpp/node_modules; or export without --verify. Nothing was written."
        )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def ask_llama_cpp(asking: Asking, text: str, vision: str) -> Heard:
    """Ask llama.cpp about the two files of the folder, in fresh processes and contexts."""
    template = get_template(asking.loaded.model.template).fitted(asking.loaded.tokenizer)
    job = {
        "model": str(asking.folder / text),
        "mmproj": str(asking.folder / vision),
        "context": max(expected.length for expected in asking.expected) + asking.tokens + SPARE,
        "tokens": asking.tokens,
        "looked_at": min(PROBABILITIES, asking.rows),
    }
    told: list[dict[str, Any]] = []
    for first in range(0, len(asking.questions), A_PROCESS):
        part = [_for_llama_cpp(question, template) for question in asking.questions[first : first + A_PROCESS]]
        told += _asked(["node", str(OUTSIDE / "ask_gguf.js")], job | {"questions": part}, {}, "llama.cpp")
    known = _known_by_text(asking.loaded.tokenizer, asking.expected)
    answers = [
        Answered(
            length=row["length"],
            text=_without_special(row["text"], asking.loaded.tokenizer),
            log_probs=(_by_token(row["chances"], expected.log_probs[0], known),),
        )
        for row, expected in zip(told, asking.expected, strict=True)
    ]
    return Heard(answers, _llama_cpp_versions(os.environ.get("NODE_PATH", "")))


def _for_llama_cpp(question: Question, template: Any) -> dict[str, Any]:
    text = template.text([Turn(question.with_slots, None)])
    return {"prompt": text.replace(IMAGE_SLOT, MARKER), "images": list(map(str, question.images))}


def _without_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer as our own text has it: llama.cpp shows special tokens that a model says, we leave them out."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.strip()


def _known_by_text(tokenizer: PreTrainedTokenizerBase, expected: Sequence[Answered]) -> dict[int, str]:
    """Token -> its text, of our likeliest first tokens, where that text stands for this token alone."""
    wanted = {token for one in expected for token in one.log_probs[0] if token < len(tokenizer)}
    texts = [text_of(tokenizer, number) for number in range(len(tokenizer))]
    count: dict[str, int] = {}
    for text in texts:
        count[text] = count.get(text, 0) + 1
    return {token: texts[token] for token in wanted if count[texts[token]] == 1 and "\ufffd" not in texts[token]}


def text_of(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """What llama.cpp shows of a token; decoding one token of SentencePiece alone loses the space in front."""
    token = str(tokenizer.convert_ids_to_tokens(number))
    if "▁" not in tokenizer.get_vocab():
        return str(tokenizer.decode([number]))
    return chr(int(token[3:5], 16)) if token.startswith("<0x") else token.replace("▁", " ")


def _by_token(
    chances: Sequence[tuple[str, float]], ours: Mapping[int, float], known: Mapping[int, str]
) -> dict[int, float]:
    """llama.cpp's log-probabilities of our likeliest tokens; one that is not among its own is at most as likely as its last."""
    theirs = {text: _log(chance) for text, chance in chances}
    least = min(theirs.values())
    found = {}
    for token in ours:
        if token in known and (known[token] in theirs or ours[token] > least):
            found[token] = theirs.get(known[token], least)
    return found


def _log(chance: float) -> float:
    return math.log(chance) if chance > 0 else -math.inf


def _asked(command: list[str], job: Mapping[str, Any], more: Mapping[str, str], name: str) -> Any:
    """What a program says to a job on the last line of its stdout.

    Raises:
        IntegrityError: it ends with an error.
    """
    done = subprocess.run(command, input=json.dumps(job), env=os.environ | more, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.strip().splitlines()[-_LINES:]) or f"it ended with code {done.returncode}"
        raise IntegrityError(f"{name} cannot use the folder: {said}")
    return json.loads(done.stdout.splitlines()[-1])

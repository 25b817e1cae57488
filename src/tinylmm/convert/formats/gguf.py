"""GGUF for llama.cpp and Ollama: the LLM in one file, tower and connector in another, and an Ollama Modelfile beside them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tinylmm.convert.ask_elsewhere import ask_llama_cpp, llama_cpp_tolerance, require_llama_cpp
from tinylmm.convert.asking import Program
from tinylmm.convert.format import Export, Format, Written
from tinylmm.convert.gguf_files import Q8_0, GGUFFile, gguf_package, type_name
from tinylmm.convert.gguf_text import architecture_of, text_obstacles, text_tensors, write_text_keys
from tinylmm.convert.gguf_vision import (
    preprocessing_note,
    vision_obstacles,
    write_vision_keys,
    write_vision_tensors,
)
from tinylmm.convert.gguf_vocab import vocabulary_of, write_vocabulary
from tinylmm.convert.outlets import GGUF
from tinylmm.data.chat import get_template

TEXT, VISION, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"


def write(export: Export, folder: Path) -> Written:
    """Write both files and the Modelfile."""
    text = _write_text(export, folder / TEXT)
    vision = _write_vision(export, folder / VISION)
    _write_modelfile(export, folder / MODELFILE)
    export.notes.append(preprocessing_note(export.loaded.description.as_json()["image"]))
    return Written(text.tensors + vision.tensors)


def _write_text(export: Export, path: Path) -> GGUFFile:
    loaded, template = export.loaded, export.loaded.model.template
    llm, tokenizer = loaded.model.llm, loaded.tokenizer
    tensors = text_tensors(llm)
    architecture = architecture_of(llm)
    assert architecture is not None, "obstacles() lets nothing else through"
    file = GGUFFile(path, architecture.name, type_name(export.dtype, export.quantization))
    file.writer.add_type("model")
    write_text_keys(llm, file)
    vocabulary = vocabulary_of(tokenizer)
    assert not isinstance(vocabulary, str), "obstacles() lets nothing else through"
    rows = tensors["token_embd.weight"].shape[0]
    if not write_vocabulary(tokenizer, vocabulary, template, rows, file):
        export.notes.append(f"the template '{template}' is no chat, so the file has no chat template")
    export.notes += vocabulary.notes
    for name, tensor in tensors.items():
        file.add_tensor(name, tensor)
    file.close()
    return file


def _write_vision(export: Export, path: Path) -> GGUFFile:
    """Tower and connector; the quantisation is the text model's alone, as in llama.cpp's own files."""
    stored = "F16" if export.quantization else type_name(export.dtype, None)
    file, model = GGUFFile(path, "clip", stored), export.loaded.model
    write_vision_keys(model, export.loaded.description.as_json()["image"], file)
    write_vision_tensors(model, file)
    file.close()
    return file


def _write_modelfile(export: Export, path: Path) -> None:
    """What `ollama create` reads. A TEMPLATE in it would turn off the chat template of the file, so there is none."""
    tokenizer, model = export.loaded.tokenizer, export.loaded.model
    stops = get_template(model.template).stop_ids(tokenizer)
    lines = [f"FROM ./{TEXT}", f"FROM ./{VISION}", "PARAMETER temperature 0"]
    lines += [f"PARAMETER num_ctx {model.config.max_position_embeddings}"]
    lines += [f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(token))}" for token in stops]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def obstacles(export: Export) -> list[str]:
    """Return every reason why llama.cpp would answer otherwise than this model.

    Raises:
        UserError: the package gguf is not installed.
    """
    gguf_package()
    model = export.loaded.model
    found = vocabulary_of(export.loaded.tokenizer)
    return [*vision_obstacles(model), *text_obstacles(model.llm), *([found] if isinstance(found, str) else [])]


FORMAT = Format(
    holds="GGUF files for llama.cpp",
    writers={"gguf": write},
    obstacles=obstacles,
    quantizations=(Q8_0,),
    programs={
        "gguf": Program(
            "llama.cpp",
            "llama.cpp, through its npm binding in fresh processes, reads both files; of its log-probabilities those of each "
            "answer's first token are compared",
            require_llama_cpp,
            partial(ask_llama_cpp, text=TEXT, vision=VISION),
            llama_cpp_tolerance,
            (
                "Pictures were brought to the tower's size first: llama.cpp prepares others in a way of its own.",
                "Prompts were given as text; the file's chat template was proven to give the same text when it was written.",
                "Ollama was not run; it runs llama.cpp on such files.",
                "Everything ran on the CPU, one question at a time.",
            ),
            squared=True,
        )
    },
    outlets={"gguf": GGUF},
)

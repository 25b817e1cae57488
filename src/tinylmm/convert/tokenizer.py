"""Tokenizer and chat template of a foreign checkpoint, read as data. No code of it runs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tinylmm.convert.chat_template import template_of
from tinylmm.convert.source import Source, read_json_if_any
from tinylmm.data.chat import TEMPLATES, VICUNA_SYSTEM, get_template
from tinylmm.errors import DataError, UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the checkpoint, or else from the LLM's base folder; it has a padding token afterwards.

    Its files are read from a copy without config.json, whose `model_type` and `auto_map` are not ours to follow.

    Raises:
        UserError: neither folder has one.
        DataError: it cannot be loaded.
    """
    folders = [f for f in (source.folder, source.llm) if f is not None]
    found = next(
        (f for f in folders if any((f / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))),
        None,
    )
    if found is None:
        raise UserError(
            f"{source.folder} holds no tokenizer. Give the folder of the language model it was trained on, with its tokenizer: "
            "--llm FOLDER."
        )
    with tempfile.TemporaryDirectory() as temporary:
        for name in TOKENIZER_FILES:
            if (found / name).is_file():
                shutil.copy2(found / name, Path(temporary) / name)
        try:
            settings = read_json_if_any(found / "tokenizer_config.json")
            if "tokenizer_class" in settings and "auto_map" not in settings:
                tokenizer = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)
            else:  # a tokenizer.json says everything but the names of the special tokens, which lie beside it
                tokenizer = PreTrainedTokenizerFast.from_pretrained(temporary, local_files_only=True)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise DataError(f"the tokenizer in {found} cannot be loaded: {str(error).splitlines()[0]}") from error
    tokenizer.name_or_path = found.name  # not the temporary folder's
    for key in ("name_or_path", "is_local", "local_files_only"):  # how it was loaded is no property of it
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token is None:
        wanted = source.config.get("pad_token") or tokenizer.unk_token or tokenizer.eos_token
        tokenizer.pad_token = wanted
        source.notes.append(f"the tokenizer has no padding token; '{wanted}' is taken")
    return cast(PreTrainedTokenizerBase, tokenizer)


def choose_template(source: Source, tokenizer: PreTrainedTokenizerBase, llm_kind: str) -> str:
    """Return the chat template's name: the user's, the one in the checkpoint's files, or the family's for this LLM's EOS.

    Raises:
        ConfigError: the user's is unknown.
        UserError: none of the family's ends answers with the tokenizer's EOS.
        DataError: a file with a chat template cannot be read.
    """
    if source.template is not None:
        return get_template(source.template).name
    if (stored := _stored_template(source, tokenizer)) is not None:
        return stored
    fitting = [t.name for t in TEMPLATES.values() if t.system == VICUNA_SYSTEM and t.eos == tokenizer.eos_token]
    fitting.sort(key=lambda name: not llm_kind.startswith(name.split("_")[0]))  # stable: the LLM's own first
    if not fitting:
        raise UserError(
            f"the checkpoint does not say its chat template, and none of the family's ends answers with "
            f"'{tokenizer.eos_token}'. Name the one it was trained with: --template (one of {', '.join(TEMPLATES)})."
        )
    source.notes.append(
        f"the chat template is not stored in the checkpoint; '{fitting[0]}' is taken for its end token "
        f"'{tokenizer.eos_token}' (--template says another)"
    )
    return fitting[0]


def _stored_template(source: Source, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template of ours that asks as the checkpoint's own chat template does; a note says where it was read.

    A processor's template is the model's. That of a tokenizer may be the language model's from before it saw images, and is
    read only if it knows of them.
    """
    for path, text in _stored_texts(source.folder):
        try:
            name = template_of(text, tokenizer)
        except DataError as error:
            raise DataError(
                f"{path}: its chat template {error}. Name the one it was trained with: --template."
            ) from error
        if name is None:
            source.notes.append(
                f"the chat template in {path.name} is none of ours, and is not taken (--template names one)"
            )
            return None
        source.notes.append(f"the chat template '{name}' asks as the one in {path.name} does")
        return name
    return None


def _stored_texts(folder: Path) -> Iterator[tuple[Path, str]]:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        yield jinja, jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        text = read_json_if_any(folder / name).get("chat_template")
        if isinstance(text, str) and (name != "tokenizer_config.json" or "image" in text):
            yield folder / name, text

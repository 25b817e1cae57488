"""Tokenizer and chat template of a foreign checkpoint, read as data. No code of it runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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
    """Return the chat template's name: the user's, or the family's for this LLM's EOS. No layout but ours stores it.

    Raises:
        ConfigError: the user's is unknown.
        UserError: none of the family's ends answers with the tokenizer's EOS.
    """
    if source.template is not None:
        return get_template(source.template).name
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

"""What can be known of a published checkpoint without network: its config.json, where a copy is on this machine. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tinylmm.config.spec import LLMSpec, PretrainedPart, TokenizerSpec
from tinylmm.errors import ConfigError, Fault


def known_architecture(part: PretrainedPart) -> dict[str, Any] | None:
    """Return a part's architecture: the spec's own, or else the checkpoint's config.json; None where there is no copy of it.

    Looks into a local folder, or into the hub's cache at the part's revision; asks nobody.

    Raises:
        ConfigError: the config.json is there but holds no mapping.
    """
    if part.architecture or part.pretrained is None:
        return part.architecture
    return read_config(part.pretrained, part.revision)


def read_config(pretrained: str, revision: str | None) -> dict[str, Any] | None:
    """Return a checkpoint's config.json from a local folder or the hub's cache; None where there is no copy.

    Raises:
        ConfigError: it is there but holds no mapping.
    """
    path = _config_file(pretrained, revision)
    if path is None:
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Fault("pretrained", f"is '{pretrained}', but {path} cannot be read: {error}.")]) from error
    if not isinstance(fields, dict):
        raise ConfigError([Fault("pretrained", f"is '{pretrained}', but {path} holds no mapping.")])
    return cast(dict[str, Any], fields)


def unknown_numbers(role: str, part: PretrainedPart) -> str | None:
    """Return a sentence on what a plan cannot know of a part, or None where all is known."""
    if known_architecture(part) is not None:
        return None
    return (
        f"{role}: the architecture and size of '{part.pretrained}' are not known here: its config.json is neither in a local "
        "folder nor in the hub's cache. It is read when the run starts."
    )


def unpinned(role: str, part: PretrainedPart) -> str | None:
    """Return a sentence on weights that the hub may change, or None where they are pinned, local or our own."""
    if part.init != "pretrained" or part.pretrained is None or part.revision is not None:
        return None
    names = [name for name in part.pretrained.split("+") if not Path(name).is_dir()]
    if not names or Path(part.pretrained).is_dir():
        return None
    return (
        f"{role}: {' and '.join(names)} has no revision, so the weights are whatever the hub has when they are first fetched, "
        f"and another machine may train on others. Set {role}.revision to a commit to pin them; the one used is recorded."
    )


def pad_token_fault(llm: LLMSpec) -> Fault | None:
    """Say of a tokenizer whose padding token has no row in the LLM's embedding what is wrong with it.

    That is what adding a token without resizing the embedding leaves. None where it has one, or where a file is not here.

    Raises:
        ConfigError: the LLM's config.json is there but holds no mapping.
    """
    if llm.init != "pretrained" or llm.tokenizer.pretrained is None:
        return None
    rows = (known_architecture(llm) or {}).get("vocab_size")
    pad = _pad_token(llm.tokenizer)
    if pad is None or not isinstance(rows, int) or pad[1] < rows:
        return None
    token, number = pad
    return Fault(
        "llm.tokenizer",
        f"pads with '{token}', token {number}, but the embedding of '{llm.pretrained}' has rows for 0 to {rows - 1} alone.",
        "Resize the embedding where the token was added, or take another padding token out of the tokenizer's files "
        "(`pad_token` in tokenizer_config.json) and set llm.tokenizer.pad_token to one that the LLM knows, such as '<unk>'.",
    )


def _pad_token(tokenizer: TokenizerSpec) -> tuple[str, int] | None:
    """The padding token and its id, as the tokenizer's files say; None where they are not here or name none."""
    assert tokenizer.pretrained is not None
    files = [_file_of(tokenizer.pretrained, tokenizer.revision, n) for n in ("tokenizer_config.json", "tokenizer.json")]
    if any(file is None or not file.is_file() for file in files):
        return None
    try:
        config, content = (json.loads(file.read_text(encoding="utf-8")) for file in files if file is not None)
        token = config.get("pad_token") or tokenizer.pad_token
        token = token.get("content") if isinstance(token, dict) else token
        vocab = content["model"]["vocab"]
        numbered = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
        ids = dict(numbered) | {added["content"]: added["id"] for added in content.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # what is wrong with them is said when they are loaded
    number = ids.get(token)
    return (token, number) if isinstance(token, str) and isinstance(number, int) else None


def _config_file(pretrained: str, revision: str | None) -> Path | None:
    return _file_of(pretrained, revision, "config.json")


def _file_of(pretrained: str, revision: str | None, name: str) -> Path | None:
    """A file of a local folder, or of the hub's cache."""
    folder = Path(pretrained)
    if folder.is_dir():
        return folder / name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(pretrained, name, revision=revision)
    except HFValidationError:  # a path to a folder that is not there
        return None
    return Path(found) if isinstance(found, str) else None

"""What can be known of a published checkpoint without network: its config.json, where a copy is on this machine. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from tinylmm.config.spec import PretrainedPart
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


def _config_file(pretrained: str, revision: str | None) -> Path | None:
    folder = Path(pretrained)
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(pretrained, "config.json", revision=revision)
    except HFValidationError:  # a path to a folder that is not there
        return None
    return Path(found) if isinstance(found, str) else None

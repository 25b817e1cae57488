"""What `tinylmm serve` and `tinylmm demo` have in common. Loads torch: imported when they run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from tinylmm.generation.session import ChatModel, load
from tinylmm.serving.http import LOOPBACK
from tinylmm.serving.options import ServeOptions

KEY = "TINYLMM_API_KEY"


def limits(given: Mapping[str, Any], **more: Any) -> ServeOptions:
    """The limits among a command's options.

    Raises:
        UserError: one is out of range.
    """
    return ServeOptions(
        **{field.name: given[field.name] for field in fields(ServeOptions) if field.name in given} | more
    )


def loaded(where: str | Path, device: str, dtype: str, trust: Sequence[str] | None, store: Path | None) -> ChatModel:
    """A model that answers many at once.

    Raises:
        UserError, IntegrityError: see `load`.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Rows of different lengths need a mask, which flash-attn does not take.
    return load(where, device=device, dtype=dtype, trust=trust or [], store=store, attention="sdpa")


def key_and_hosts(
    taken: socket.socket, host: str, more: Sequence[str] | None
) -> tuple[str | None, tuple[str, ...] | None]:
    """The key that is asked for, None for none, and the names that a server on the loopback answers to, None elsewhere."""
    key = os.environ.get(KEY) or None
    local = taken.getsockname()[0] in LOOPBACK
    if not local and key is None:
        logging.getLogger(__name__).warning("anybody who reaches %s may ask: set %s to ask for a key", host, KEY)
    return key, (*LOOPBACK, host.lower(), *(more or [])) if local else None


def address(taken: socket.socket, host: str) -> str:
    """Where a server listens, as a URL."""
    return f"http://{f'[{host}]' if ':' in host else host}:{taken.getsockname()[1]}"

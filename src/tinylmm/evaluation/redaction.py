"""Keeping a key out of what a server says, however the server writes it."""

from __future__ import annotations

import base64
import html
import re
from urllib.parse import unquote

LEFT_OUT = "(left out: the server's words hold the key)"
SHORT = 8
"""A key of fewer characters (the `EMPTY` of local servers) is no secret to look for in disguise."""
_ROUNDS = 3
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]+)\}|x([0-9a-fA-F]{2})|([^ux]))")


def without_key(text: str, key: str) -> str:
    """Return a text with `<key>` for the key; one that holds it escaped, encoded or by half is left out whole.

    Args:
        text: all of it, as a part may end in the middle of the key.
        key: may be empty.
    """
    if not key:
        return text
    plain = text.replace(key, "<key>")
    return LEFT_OUT if len(key) >= SHORT and _shows(plain, key) else plain


def holds_key(text: str, key: str) -> bool:
    """Whether a text gives a key away: as it is, escaped, encoded or by half. A short one is no secret, but a word like any."""
    return len(key) >= SHORT and _shows(text, key)


def _shows(text: str, key: str) -> bool:
    half = max(SHORT, (len(key) + 1) // 2)
    parts = {key[start : start + half] for start in range(len(key) - half + 1)}
    searched = {_bare(part) for part in parts} | {part.casefold() for part in parts} | _encoded(key)
    for _ in range(_ROUNDS):
        if any(part in form for form in (text.casefold(), _bare(text)) for part in searched if len(part) >= SHORT // 2):
            return True
        text = html.unescape(unquote(_ESCAPE.sub(_unescaped, text)))
    return False


def _bare(text: str) -> str:
    """Letters and digits alone, so that nothing put between them hides them."""
    return "".join(filter(str.isalnum, text)).casefold()


def _encoded(key: str) -> set[str]:
    """The key in hexadecimal and in base64, wherever in a longer text it was when that was encoded."""
    data = key.encode()
    shifted = [base64.b64encode(b"\0" * shift + data).decode().rstrip("=") for shift in range(3)]
    inner = [text[2 + shift : -2] for shift, text in enumerate(shifted)]  # what no neighbour of the key has a part in
    return {data.hex().casefold(), *(_bare(text) for text in inner)}


def _unescaped(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if digits is None:
        return found[4]
    return chr(min(int(digits, 16), 0x10FFFF))

"""The version of this package. It imports nothing, so every module may import it."""

from __future__ import annotations

__version__ = "0.1.0"
"""As in pyproject.toml; `tests/unit/test_version.py` holds the two together."""

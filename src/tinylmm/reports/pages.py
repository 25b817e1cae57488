"""The Jinja environment of every page: what data and models say is escaped as HTML, and turns no line of the page around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tinylmm.errors import printable


def page_environment(**filters: Callable[..., Any]) -> Environment:
    """Return an environment for the templates of this package, with these filters besides Jinja's own."""
    environment = Environment(
        loader=PackageLoader("tinylmm.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= filters
    return environment


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

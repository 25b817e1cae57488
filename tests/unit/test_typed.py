"""What a stage, a run and a model are told is typed to the end: nobody looks their fields up by a string."""

from __future__ import annotations

import ast

from docs.architecture import SOURCE

TYPED = {"spec", "settings", "launch", "tracking", "tune", "build", "description", "location", "tower_output"}
"""Names of what has a typed model; a subscript with a string would read it as a dict."""


def string_reads() -> list[str]:
    """`file:line: text` of every read such as `job.spec["lr"]` in src/tinylmm."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.ctx, ast.Load)
                and isinstance(node.slice, ast.Constant)
                and isinstance(node.slice.value, str)
                and getattr(node.value, "attr", getattr(node.value, "id", None)) in TYPED
            ):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_fields_of_specs_settings_and_descriptions_are_read_by_name() -> None:
    assert string_reads() == []

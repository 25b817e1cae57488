"""Files and functions stay of a size that a reader takes in at once."""

from __future__ import annotations

import ast

from docs.architecture import SOURCE

FILE_LINES, FUNCTION_LINES, USUAL_LINES = 400, 60, 24


def function_lines() -> dict[str, int]:
    """`file: function` -> lines, of every function in src/tinylmm."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                name = f"{path.relative_to(SOURCE)}:{node.lineno}: {node.name}"
                found[name] = node.end_lineno - node.lineno + 1
    return found


def test_no_function_is_longer_than_a_screen() -> None:
    assert {name: lines for name, lines in function_lines().items() if lines > FUNCTION_LINES} == {}


def test_nine_functions_of_ten_are_short() -> None:
    lines = sorted(function_lines().values())
    assert lines[int(len(lines) * 0.9)] <= USUAL_LINES


def test_no_file_is_longer_than_a_few_screens() -> None:
    lengths = {
        str(path.relative_to(SOURCE)): len(path.read_text("utf-8").splitlines()) for path in SOURCE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}

"""docs/choices.md says what conf/ holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("choices", ROOT / "docs/choices.py")
assert SPEC is not None and SPEC.loader is not None
choices = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(choices)


def test_the_page_is_what_the_files_say() -> None:
    assert choices.PAGE.read_text(encoding="utf-8") == choices.render(), "run `make docs` and commit the page"


def test_a_file_that_does_not_say_what_it_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "silent.yaml"
    path.write_text("name: silent\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"silent\.yaml does not begin with a comment"):
        choices.describe(path)

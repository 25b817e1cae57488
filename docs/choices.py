"""Write docs/choices.md: every choice of every config group, read from the YAML files themselves.

`make docs` writes it; a test compares it with what is committed, so the page cannot fall behind the configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "choices.md"
GROUPS = {
    "llm": "Language models",
    "vision_tower": "Vision towers",
    "connector": "Connectors",
    "recipe": "Recipes",
    "data": "Data",
    "eval": "Evaluations",
    "launch": "Launchers",
}
INTRO = """# What can be chosen

One row a file under `conf/`. `tinylmm-train group=choice` selects it, `group.key=value`
changes a field of it. Made from the files by `make docs`.
"""


def render(conf: Path = ROOT / "conf") -> str:
    """Return the page."""
    sections = [INTRO]
    for group, title in GROUPS.items():
        files = sorted((conf / group).glob("*.yaml"), key=lambda path: path.stem)
        details = group in ("llm", "vision_tower", "connector")
        head = ["`" + group + "=`", "What it is, and where its numbers come from"] + (["Class"] if details else [])
        lines = [f"## {title}\n", _row(head), _row(["---"] * len(head))]
        for path in files:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            cells = [f"[{path.stem}](../conf/{group}/{path.name})", describe(path)]
            lines.append(_row(cells + ([_class(content, files)] if details else [])))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def describe(path: Path) -> str:
    """Return the comment that a YAML file begins with, up to the end of its paragraph.

    Raises:
        ValueError: the file begins with something else.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    if not lines:
        raise ValueError(f"{path} does not begin with a comment that says what it is and where its numbers come from")
    return " ".join(lines).replace("|", "\\|")


def _class(content: dict[str, Any], files: list[Path]) -> str:
    """The class that a part's YAML names, or that of the file it inherits from."""
    for entry in content.get("defaults", []):
        if "_target_" not in content and isinstance(entry, str) and entry != "_self_":
            (base,) = [path for path in files if path.stem == entry]
            return _class(yaml.safe_load(base.read_text(encoding="utf-8")), files)
    target = str(content["_target_"])
    encoder = content.get("encoder")
    return f"`{target.rpartition('.')[2]}`" + (f" of `{str(encoder).rpartition('.')[2]}`" if encoder else "")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

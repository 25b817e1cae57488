"""What the documentation pages show is run as it stands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.integration.project import environment, tiny_project

DOCS = Path(__file__).parents[2] / "docs"
FILES = re.compile(r"^```\w+ title=(\S+)\n(.*?)^```", re.M | re.S)
COMMANDS = re.compile(r"^\$ PYTHONPATH=\. (tinylmm\S*) (.*)$", re.M)
MODULES = {"tinylmm": ["tinylmm.cli.main"], "tinylmm-train": ["tinylmm.cli.train"]}


def test_a_part_is_added_by_one_class_and_one_yaml(tmp_path: Path) -> None:
    page = (DOCS / "add-a-part.md").read_text(encoding="utf-8")
    project = tiny_project(tmp_path)
    files = FILES.findall(page)
    assert [Path(name).suffix for name, _ in files] == [".py", ".yaml"]
    for name, text in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "my_lab/__init__.py").touch()
    words = [word for word in project.words if not word.startswith("connector")]
    commands = COMMANDS.findall(page)
    assert [program for program, _ in commands] == ["tinylmm", "tinylmm-train"]
    python = project.command()[0]
    for program, arguments in commands:
        done = subprocess.run(
            [python, "-m", *MODULES[program], *arguments.split(), *words],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": "."},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    model = project.model("finetune")
    assert "GatedConnector" in (model / "config.json").read_text(encoding="utf-8")

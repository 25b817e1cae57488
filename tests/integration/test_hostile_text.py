"""What data and models say is shown and never obeyed: in the terminal, in logs, in a report's Markdown and its page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import tinylmm
from tests.builders import tiny_loaded
from tests.integration.project import Project, environment, tiny_project
from tinylmm.models.checkpoint import save_model

TERMINAL = "\x1b[2J\x1b]0;owned\x07\u202egnp\x9b31m"
MARKUP = "[click](http://evil.example) <img src=x onerror=a()> ![i](http://evil.example/i.png) @you `x` $y$ | [/red]"
HOSTILE = f"{TERMINAL}{MARKUP}"
OBEYED = "\x1b\x07\x9b\u202e"
SHORT = [f"recipe.stages.{stage}.max_steps=1" for stage in ("pretrain", "finetune")]


def obeyed(text: str) -> set[str]:
    return {character for character in OBEYED if character in text}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Records, file names, questions, answers and categories that try everything; two of the samples are too long."""
    made = tiny_project(tmp_path_factory.mktemp("hostile"))
    images = made.root / "data/images"
    name = f"{TERMINAL}.png"
    Image.new("RGB", (16, 16), (255, 0, 0)).save(images / name)
    turns = [{"from": "human", "value": f"<image>{TERMINAL}"}, {"from": "gpt", "value": HOSTILE}]
    record = {"id": HOSTILE, "image": name, "conversations": turns}
    bad = {"id": HOSTILE, "image": f"../{name}", "conversations": turns}
    for stage in ("pretrain", "finetune"):
        (made.root / f"data/{stage}.json").write_text(json.dumps([record, record | {"id": f"2{HOSTILE}"}, bad]))
    asked = {"image": name, "text": HOSTILE, "category": HOSTILE, "answer": HOSTILE, "options": 4}
    rows = [asked | {"question_id": f"{number}{HOSTILE}"} for number in range(3)]
    (made.root / "data/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "{annotations: test.jsonl, images: images, format: questions}"
    data = f"{{name: mine, root: {made.root / 'data'}, sources: {{test: {source}}}}}"
    words = [f"+eval.mine={{benchmark: digits, data: {data}, source: test, max_new_tokens: 8, blind: true}}"]
    words += [
        f"data.sources.{stage}.{rule}" for stage in ("pretrain", "finetune") for rule in ("on_bad=skip", "max_bad=1")
    ]
    words += [f"recipe.stages.{stage}.max_length=512" for stage in ("pretrain", "finetune")]
    kept = tuple(word for word in made.words if word != "eval=none")
    return Project(made.root, (*kept, "eval=none", *words, *SHORT, f"store={made.root / 'store'}", "name=first"))


def said(project: Project, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=project.root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(project: Project) -> str:
    """What the training says; after it, the store has a run."""
    done = project.train()
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_train_obeys_nothing_that_records_and_answers_say(project: Project, trained: str) -> None:
    assert "scores" in trained and obeyed(trained) == set()
    fresh = f"store={project.root / 'fresh'}"
    failing = project.train("data.sources.finetune.on_bad=fail", "data.sources.finetune.max_bad=0", fresh)
    assert failing.returncode == 2 and "owned" in failing.stderr and obeyed(failing.stderr + failing.stdout) == set()
    short = project.train("recipe.stages.finetune.max_length=110", fresh)
    assert short.returncode == 2 and "owned" in short.stderr and obeyed(short.stderr + short.stdout) == set()


def test_logs_can_be_shown_in_a_terminal(project: Project, trained: str) -> None:
    logs = [*project.root.rglob("log.txt"), *project.root.rglob("error.txt")]
    assert logs and all(obeyed(path.read_text(encoding="utf-8")) == set() for path in logs)


@pytest.mark.parametrize(
    "words", [("report",), ("report", "--json"), ("report", "--overlap"), ("runs",), ("store", "ls")], ids=" ".join
)
def test_commands_about_a_run_obey_nothing(project: Project, trained: str, words: tuple[str, ...]) -> None:
    shown = said(project, "tinylmm.cli.main", *words)
    assert obeyed(shown) == set() and ("first" in shown or "train" in shown or words[-1] == "--json")


def test_a_reports_files_carry_no_live_markup_and_nothing_that_turns_the_line(project: Project, trained: str) -> None:
    folder = project.store / "reports/first"
    markdown, page = ((folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    assert obeyed(markdown) == obeyed(page) == set()
    text = markdown.partition("```")[0]
    assert "owned" in text and "http://" not in text and "<img" not in text and "@you" not in text
    assert re.search(r"(?<!\\)\[click", text) is None and re.search(r"(?<!\\)`x", text) is None
    assert "<img src=x" not in page and "evil.example" in page and 'href="http' not in page


def speaker(folder: Path, text: str) -> Path:
    """A model that answers with `text`, whose tokens must all differ: what it says next hangs on the last token alone."""
    loaded = tiny_loaded()
    llm = loaded.model.llm
    ids = loaded.tokenizer(f":{text}</s>")["input_ids"]  # a prompt ends with `ASSISTANT:`
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        for layer in llm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        llm.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
        llm.lm_head.weight.zero_()
        llm.lm_head.weight[ids[1:]] = torch.nn.functional.normalize(llm.model.embed_tokens.weight[ids[:-1]])
    save_model(loaded, folder, None, {})
    return folder


def test_a_model_that_says_escape_codes_owns_no_terminal(tmp_path: Path) -> None:
    spoken = "\x1b[2J\x07\u202e"
    model = speaker(tmp_path / "model", spoken)
    assert tinylmm.load(model).chat("Hi") == spoken, "this is what it says"
    hostile = f"{TERMINAL}.png"
    Image.new("RGB", (16, 16)).save(tmp_path / hostile)
    command = [sys.executable, "-m", "tinylmm.cli.main", "chat", str(model)]
    once = subprocess.run([*command, "--prompt", "Hi"], env=environment(), capture_output=True, text=True, timeout=120)
    assert once.stdout == "\\x1b[2J\\u202e\n", "rich drops the bell"
    lines = f"/image {tmp_path / hostile}\nHi\n/image {tmp_path}/no{hostile}\n[/red]\n/exit\n"
    talk = subprocess.run(command, input=lines, env=environment(), capture_output=True, text=True, timeout=120)
    assert talk.returncode == 0 and obeyed(talk.stdout + talk.stderr) == set()
    assert talk.stdout.count("\\x1b[2J\\u202e") == 2 and "no such image file" in talk.stdout.replace("\n", "")

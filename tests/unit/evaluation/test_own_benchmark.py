"""A benchmark of one's own is one module and one YAML beside the folder that one works in: nothing of ours is edited."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.builders import tiny_loaded
from tests.integration.project import write_images
from tinylmm.cli.main import main
from tinylmm.config.compose import compose_run
from tinylmm.errors import ConfigError
from tinylmm.evaluation.benchmarks.records import Answer
from tinylmm.evaluation.benchmarks.registry import get_benchmark
from tinylmm.models.checkpoint import save_model
from tinylmm.planning.planner import RunPlan, plan_run, require_files
from tinylmm.stages import evaluate
from tinylmm.stages.job import make_job

MODULE = '''"""Shapes: is it round?"""

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.files import image_file, read_jsonl
from tinylmm.evaluation.benchmarks.records import Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import count_items, percent, pick_variant


class Shapes(Benchmark):
    name = "shapes"
    variants = ("strict", "folded")
    headline = "accuracy"
    max_new_tokens = 4

    def load(self, root, layout="llava"):
        rows = read_jsonl(root / "shapes.jsonl", ("id", "image", "round"))
        return [
            Item(str(row["id"]), row["id"], "Is it round?", (image_file(root, row["image"], "shapes.jsonl"),), "", row, 2)
            for row in rows
        ]

    def truth(self, item):
        return item.reference["round"]

    def score(self, items, answers, variant=None, judge=None):
        variant = pick_variant(self, variant)
        fold = str.lower if variant == "folded" else str
        said = {name: fold(answer.text) for name, answer in answers.items()}
        rows = [ItemScore(i.item_id, float(said.get(i.item_id) == i.reference["round"])) for i in items]
        counts = count_items(items, answers, rows)
        return Scores(self.name, variant, {"accuracy": percent(row.score for row in rows)}, tuple(rows), counts)
'''
YAML = """shapes:
  benchmark: shape_lab.shapes.Shapes
  root: files
  max_new_tokens: 4
"""
WORDS = ("eval=shapes", "trust=[shape_lab]")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ./shape_lab, ./conf/eval/shapes.yaml and the benchmark's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("shape_lab", "conf/eval", "files"):
        Path(name).mkdir(parents=True)
    Path("shape_lab/__init__.py").touch()
    Path("shape_lab/shapes.py").write_text(MODULE)
    Path("conf/eval/shapes.yaml").write_text(YAML)
    names = write_images(Path("files"))
    rows = [{"id": n, "image": name, "round": "yes" if n % 2 else "no"} for n, name in enumerate(names)]
    Path("files/shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "shape_lab"]:
        del sys.modules[name]


def plan(*words: str) -> RunPlan:
    return plan_run(compose_run([*WORDS, *words]), "run")


def digest(planned: RunPlan) -> str:
    return next(stage.digest for stage in planned.graph if stage.kind == "eval")


def test_it_composes_plans_and_is_identified_by_its_questions(workplace: Path) -> None:
    planned = plan()
    require_files(planned)
    assert [stage.name for stage in planned.graph if stage.kind == "eval"] == ["shapes@finetune"]
    assert digest(plan("eval.shapes.limit=3")) != digest(planned)
    assert digest(plan("eval.shapes.variant=folded")) != digest(planned)
    with pytest.raises(ConfigError, match=r"eval\.shapes\.variant: 'soft' is unknown.*shapes has strict, folded"):
        plan("eval.shapes.variant=soft")


def test_without_trust_it_is_refused(workplace: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"eval\.shapes\.benchmark: is 'shape_lab.shapes.Shapes', which is not allowed"
    ):
        plan_run(compose_run(["eval=shapes"]), "run")


def test_another_version_of_it_that_asks_otherwise_is_another_evaluation(workplace: Path) -> None:
    before = digest(plan())
    Path("shape_lab/shapes.py").write_text(MODULE.replace('Is it round?"', 'Is it a circle?"'))
    for name in [name for name in sys.modules if name.split(".")[0] == "shape_lab"]:
        del sys.modules[name]
    assert digest(plan()) != before


def test_it_loads_scores_and_says_what_is_right(workplace: Path) -> None:
    benchmark = get_benchmark("shape_lab.shapes.Shapes", ["shape_lab"])
    items = benchmark.load(Path("files"))
    assert [benchmark.truth(item) for item in items[:3]] == ["no", "yes", "no"]
    rows = [{"question_id": item.question_id, "text": "Yes"} for item in items]
    answers = benchmark.pair(items, rows)
    assert answers["0"] == Answer("Yes")
    assert benchmark.score(items, answers).aggregate == {"accuracy": 0.0}
    assert benchmark.score(items, answers, "folded").aggregate == {"accuracy": 50.0}


def test_the_command_scores_it(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("answers.jsonl").write_text("".join(json.dumps({"question_id": n, "text": "yes"}) + "\n" for n in range(12)))
    words = ["--answers", "answers.jsonl", "--root", "files", "--json", "out.json", "--trust", "shape_lab"]
    monkeypatch.setattr(sys, "argv", ["tinylmm", "score", "shape_lab.shapes.Shapes", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and json.loads(Path("out.json").read_text())["aggregate"] == {"accuracy": 50.0}


def test_its_stage_asks_and_scores_it(workplace: Path) -> None:
    save_model(tiny_loaded(), workplace / "model" / "model", None, {})
    (stage,) = [stage for stage in plan("eval.shapes.template=llama").graph if stage.kind == "eval"]
    parents = {"model": workplace / "model"}
    job = make_job(
        "eval", stage.name, stage.digest, stage.spec, parents, stage.settings, workplace / "work", workplace / "store"
    )
    job.output.mkdir(parents=True)
    summary = evaluate.run(job)
    assert summary["protocol"] == "shapes-strict" and summary["questions"] == 12
    rows = [json.loads(line) for line in (job.output / "generations.jsonl").read_text().splitlines()]
    assert [row["truth"] for row in rows[:2]] == ["no", "yes"]

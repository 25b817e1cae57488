"""A sweeper of Hydra that learns from results, on top of grids: the documented search, at toy size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.integration.project import Project
from tests.integration.test_embedded import WORDS

PAGE = (Path(__file__).parents[2] / "docs/studies.md").read_text(encoding="utf-8")
DOCUMENTED = shlex.split(
    re.findall(r"^tinylmm-train (-m hydra/sweeper=(?:.*\\\n)*.*)$", PAGE, re.M)[0].replace("\\\n", " ")
)
SEARCH = (*DOCUMENTED, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1")


def test_a_search_runs_batches_as_grids_names_the_best_and_repeats_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path, WORDS)
    done = project.train(*SEARCH)
    assert done.returncode == 0, done.stderr
    assert "2 runs ask for" in done.stdout and "best of 3:" in done.stdout
    (found,) = [yaml.safe_load(path.read_text()) for path in project.store.glob("searches/*/optimization_results.yaml")]
    rows = [json.loads(path.read_text())["rows"] for path in project.store.glob("reports/*/results.json")][-1]
    scores = [row["value"] for row in rows if row["metric"] == "accuracy" and row["stage"] == "finetune"]
    assert len(scores) == 3 and found["best_value"] == max(scores)
    records = [json.loads(path.read_text()) for path in project.store.glob("runs/*/run.json")]
    rates = {record["spec"]["recipe"]["stages"]["finetune"]["lr"] for record in records}
    assert found["best_params"]["recipe.stages.finetune.lr"] in rates and len(rates) == 3

    again = project.train_here(*SEARCH)
    assert again.returncode == 0 and f"{found['best_value']:.4g}" in again.stdout
    newest = sorted(project.store.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime)[-3:]
    assert {row["status"] for path in newest for row in json.loads(path.read_text())["stages"]} == {"reused"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=gqa/accuracy"], "objective=gqa: is no evaluation of these runs. Evaluations: digits."),
        (["hydra.sweeper.trials=3"], "Could not override 'hydra.sweeper.trials'"),
        (["hydra/sweeper=nope"], "Could not find 'hydra/sweeper/nope'"),
    ],
    ids=["objective", "key", "sweeper"],
)
def test_a_wrong_word_of_a_search_is_named_before_anything_runs(words: list[str], said: str, tmp_path: Path) -> None:
    project = Project(tmp_path, WORDS)
    refused = project.train_here(*SEARCH, *words)
    assert refused.returncode == 2 and said in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not project.store.exists()


def test_a_search_over_nothing_is_refused(tmp_path: Path) -> None:
    refused = Project(tmp_path, WORDS).train_here(
        *[word for word in SEARCH if "interval" not in word and "," not in word]
    )
    assert refused.returncode == 2 and "nothing to search over" in refused.stderr

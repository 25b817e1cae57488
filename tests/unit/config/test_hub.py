"""What a plan knows of a checkpoint without asking anybody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.cli.plan import plan
from tinylmm.config.compose import compose_run
from tinylmm.config.hub import known_architecture, unknown_numbers
from tinylmm.errors import ConfigError
from tinylmm.planning.planner import plan_record, plan_run


def words(pretrained: str | Path, tmp_path: Path) -> list[str]:
    return [
        "llm=hf",
        f"llm.pretrained={pretrained}",
        "vt=siglip",
        f"store={tmp_path / 'store'}",
        f"data.root={tmp_path}",
    ]


def test_a_checkpoint_that_is_not_here_is_planned_and_its_numbers_are_called_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compose_run(words("org/no-such-llm", tmp_path))
    assert known_architecture(run.llm) is None
    record = plan_record([plan_run(run, "run"), plan_run(run, "again")])
    (sentence,) = record["unknown"]
    assert sentence.startswith("llm: the architecture and size of 'org/no-such-llm' are not known here")
    assert {stage["kind"] for stage in record["stages"]} == {"images", "prepare", "train"}
    plan(words("org/no-such-llm", tmp_path))
    assert "unknown: llm: the architecture and size of 'org/no-such-llm'" in " ".join(capsys.readouterr().out.split())
    assert unknown_numbers("llm", compose_run(words(tmp_path / "no" / "such" / "folder", tmp_path)).llm)


def test_a_local_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    run = compose_run(words(tmp_path / "llm", tmp_path))
    assert known_architecture(run.llm) == {"model_type": "llama", "hidden_size": 8}
    assert plan_record([plan_run(run, "run")])["unknown"] == []


def test_the_hubs_cache_is_read_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--llm"
    for commit, width in (("a" * 40, 8), ("b" * 40, 16)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text(json.dumps({"hidden_size": width}))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("b" * 40)
    assert known_architecture(compose_run(words("org/llm", tmp_path)).llm) == {"hidden_size": 16}
    pinned = compose_run([*words("org/llm", tmp_path), f"llm.revision={'a' * 40}"])
    assert known_architecture(pinned.llm) == {"hidden_size": 8}


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_folder_that_is_no_checkpoint_is_an_error(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    if content is not None:
        (tmp_path / "llm/config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"llm[/\\]config\.json"):
        plan_run(compose_run(words(tmp_path / "llm", tmp_path)), "run")


def test_shipped_parts_are_known_whole(tmp_path: Path) -> None:
    run = compose_run(["llm=openelm_3b", "vt=siglip"])
    assert (
        known_architecture(run.llm) == run.llm.architecture
        and unknown_numbers("vision_tower", run.vision_tower) is None
    )

"""What reaches transformers.TrainingArguments."""

from __future__ import annotations

from pathlib import Path

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import StageSettings, TrainStage
from tinylmm.training.arguments import training_arguments


def test_every_trainer_field_that_is_set_arrives_whether_it_decides_or_not(tmp_path: Path) -> None:
    words = ["trainer.optim=sgd", "trainer.log_level=error", "trainer.lr_scheduler_kwargs={num_cycles: 2}"]
    stage = next(s for s in build_graph(compose_run(words), NoFiles()) if s.kind == "train")
    settings, spec = StageSettings.model_validate(stage.settings), TrainStage.model_validate(stage.spec)
    assert spec.trainer == {"optim": "sgd", "lr_scheduler_kwargs": {"num_cycles": 2.0}}
    found = training_arguments(spec, settings.launch, settings.tracking, settings.trainer, tmp_path, 4, 1, use_cpu=True)
    assert (found.optim, found.log_level, found.lr_scheduler_kwargs) == ("sgd", "error", {"num_cycles": 2.0})

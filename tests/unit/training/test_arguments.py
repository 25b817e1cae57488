"""What reaches transformers.TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import StageSettings, TrainStage
from tinylmm.training.arguments import training_arguments


def test_every_trainer_field_that_is_set_arrives_whether_it_decides_or_not(tmp_path: Path) -> None:
    words = ["trainer.optim=sgd", "trainer.log_level=error", "trainer.lr_scheduler_kwargs={num_cycles: 2}"]
    stage = next(s for s in build_graph(compose_run(words), NoFiles()) if s.kind == "train")
    settings, spec = StageSettings.model_validate(stage.settings), TrainStage.model_validate(stage.spec)
    assert spec.trainer.as_arguments() == {"optim": "sgd", "lr_scheduler_kwargs": {"num_cycles": 2.0}}
    found = training_arguments(
        spec, settings.launch, settings.tracking, settings.trainer, tmp_path, 4, 1, use_cpu=True, readers=0
    )
    assert (found.optim, found.log_level, found.lr_scheduler_kwargs) == ("sgd", "error", {"num_cycles": 2.0})


def test_one_process_trains_on_one_gpu_however_many_it_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would wrap the model in nn.DataParallel, which cannot gather our outputs."""
    stage = next(s for s in build_graph(compose_run([]), NoFiles()) if s.kind == "train")
    settings, spec = StageSettings.model_validate(stage.settings), TrainStage.model_validate(stage.spec)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=2),
        mock.patch("torch.cuda.set_device"),
        mock.patch("accelerate.state.check_cuda_p2p_ib_support", return_value=True),
    ):
        found = training_arguments(
            spec, settings.launch, settings.tracking, settings.trainer, tmp_path, 4, 1, use_cpu=False, readers=0
        )
        assert found.device == torch.device("cuda:0") and found.n_gpu == 1
    assert "sees 2 GPUs and uses the first" in caplog.text

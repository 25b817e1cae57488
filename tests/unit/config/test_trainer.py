"""`trainer` takes the fields of TrainingArguments that do something here, and gives a reason for each other one."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments

from tinylmm.config.trainer import (
    DECIDING,
    NO_ADAM,
    NO_EPSILON,
    OWN_OPTIMIZERS,
    REFUSED,
    Optimizer,
    TrainerSpec,
    refused_field,
)

NAMES = {field.name for field in fields(TrainingArguments) if field.init and not field.name.startswith("_")}


def test_every_field_of_the_installed_transformers_is_allowed_or_refused_with_a_reason() -> None:
    assert not NAMES - TrainerSpec.model_fields.keys() - REFUSED.keys() - {"hub_token"}, "decide on these too"
    assert not TrainerSpec.model_fields.keys() & REFUSED.keys()
    assert TrainerSpec.model_fields.keys() <= NAMES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("label_smoothing_factor", "may not be set: our loss does not use it."),
        ("dataloader_prefetch_factor", "our data loader does not use it; set launch.num_workers for more of them."),
        ("learning_rate", "is set by tinylmm. Set recipe.stages.<stage>.lr instead."),
        ("optm", "does something here. Did you mean 'optim'? Allowed: optim, "),
        ("label_smoothing", "Did you mean 'label_smoothing_factor'?"),
    ],
)
def test_a_field_is_refused_by_its_reason(name: str, message: str) -> None:
    assert message in str(refused_field(name))


def test_only_what_decides_the_result_is_part_of_an_identity() -> None:
    spec = TrainerSpec.model_validate({"optim": "sgd", "optim_args": "momentum=0.9", "log_level": "info"})
    assert spec.deciding == {"optim": "sgd", "optim_args": "momentum=0.9"}
    assert spec.as_arguments() == spec.deciding | {"log_level": "info"} == spec.model_dump(mode="json")
    assert TrainerSpec().deciding == TrainerSpec().as_arguments() == {}
    assert TrainerSpec.model_fields.keys() >= DECIDING


def optimizer_arguments(optim: str, **numbers: float) -> dict[str, object]:
    arguments = TrainingArguments(output_dir="x", optim=optim, use_cpu=True, report_to=[], **numbers)
    return dict(Trainer.get_optimizer_cls_and_kwargs(arguments)[1])


@pytest.mark.parametrize("optim", sorted(set(get_args(Optimizer)) - OWN_OPTIMIZERS))
def test_which_optimiser_reads_numbers_of_adam_is_as_transformers_has_it(optim: str) -> None:
    plain = optimizer_arguments(optim)
    assert (optimizer_arguments(optim, adam_beta2=0.5) == plain) == (optim in NO_ADAM)
    assert (optimizer_arguments(optim, adam_epsilon=0.5) == plain) == (optim in NO_EPSILON)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optim_args": "momentum=0.9"}, "optim=adamw_torch does not read"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "Did you mean 'momentum'?"),
        ({"optim": "sgd", "optim_args": "weight_decay=1"}, "reads KEY=NUMBER of momentum, dampening, nesterov"),
        ({"optim": "sgd", "optim_args": "momentum"}, "KEY=NUMBER"),
        ({"optim": "galore_adamw"}, "Input should be 'adamw_torch'"),
    ],
)
def test_optimiser_and_its_arguments_fit_each_other(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("?", r"\?")):
        TrainerSpec.model_validate(given)

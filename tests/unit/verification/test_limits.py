"""A run cut down to a few samples and steps is otherwise the user's own."""

from __future__ import annotations

from tinylmm.config.compose import compose_run
from tinylmm.config.recipe import TuneHow
from tinylmm.verification.limits import BUILD_STEPS, limited


def test_the_embedded_run_becomes_one_of_seconds() -> None:
    own = compose_run(["recipe=share"])
    small = limited(own, samples=8, steps=3, precision=None)
    assert own.data.build is not None and small.data.build is not None and small.llm.build is not None
    assert set(small.data.build.options.values()) == {96} and set(own.data.build.options.values()) != {96}
    assert {source.limit for source in small.data.sources.values()} == {96}
    assert small.llm.build.steps == BUILD_STEPS and small.llm.build.data.build == small.data.build
    for name, stage in small.recipe.stages.items():
        before = own.recipe.stages[name]
        assert (stage.global_batch, stage.max_steps, stage.max_dropped) == (8, 3, 1.0)
        kept = {"global_batch", "max_steps", "max_dropped"}
        assert stage.model_dump(exclude=kept) == before.model_dump(exclude=kept)
    assert small.eval == {} and small.launch == own.launch


def test_what_is_smaller_already_stays_and_dropout_goes() -> None:
    words = ["recipe=lora", "recipe.stages.finetune.tune.llm.lora.dropout=0.1", "recipe.stages.pretrain.global_batch=4"]
    own = compose_run([*words, "data.sources.pretrain.limit=5", "launch.attention=sdpa"])
    small = limited(own, samples=8, steps=3, precision="fp32")
    assert small.recipe.stages["pretrain"].global_batch == 4 and small.data.sources["pretrain"].limit == 5
    how = small.recipe.stages["finetune"].tune.llm
    assert isinstance(how, TuneHow) and how.lora is not None and how.lora.dropout == 0.0 and how.lora.r == 16
    assert small.launch.attention == "auto", "each way of training says its own"
    assert {stage.precision for stage in small.recipe.stages.values()} == {"fp32"}

"""factors.py: what varies between runs, from specs as Hydra composes them."""

from __future__ import annotations

from typing import Any

import pytest

from tinylmm.config.compose import compose_all
from tinylmm.reports.factors import Factors, find_factors


def factors_of(*words: str) -> Factors:
    return find_factors([spec.model_dump(mode="json") for _, spec in compose_all(list(words), multirun=True)])


def levels(found: Factors) -> dict[str, tuple[str, ...]]:
    return {factor.title: factor.levels for factor in found.varying}


def test_groups_vary_by_their_names_and_what_they_bring_along_is_no_factor() -> None:
    found = factors_of("llm=nano_small,nano", "recipe=base,lora", "seed=0,1")
    assert levels(found) == {"LLM": ("nano_small", "nano"), "Recipe": ("base", "lora")}
    assert len(found.seeds) == 8 and set(found.seeds) == {"0", "1"}
    assert [title for title, _ in found.constant] == ["Vision tower", "Connector", "Data"]


def test_a_study_that_is_a_sum_has_the_factors_of_its_parts() -> None:
    found = factors_of("experiment=nano_paper")
    assert list(levels(found)) == ["LLM", "Vision tower", "Connector", "Recipe"]
    assert len({found.cell_of(run) for run in range(len(found.seeds))}) == 13


def test_which_frames_are_one_factor_however_they_are_said() -> None:
    found = factors_of("recipe=video", "llm=nano_video", "vt=nano_video", "video.sampling={uniform:8},{fps:1,max:16}")
    assert levels(found) == {"sampling": ("uniform 8", "fps 1, max 16")} and found.along == ()


@pytest.mark.parametrize(
    ("word", "title", "expected"),
    [
        ("recipe.stages.finetune.lr=1e-2,1e-3", "lr", ("0.001", "0.01")),
        ("recipe.stages.finetune.max_steps=100,20", "max_steps", ("20", "100")),
        ("connector.options.depth=1,2", "depth", ("1", "2")),
        ("data.build.seed=3,4", "build.seed", ("3", "4")),
    ],
    ids=["rate", "steps", "option", "seed of the data"],
)
def test_an_option_is_a_factor_by_its_shortest_name(word: str, title: str, expected: tuple[str, ...]) -> None:
    assert levels(factors_of(word)) == {title: expected}


def test_options_of_equal_ends_keep_enough_of_their_keys() -> None:
    found = factors_of("recipe.stages.pretrain.lr=1e-2,1e-3", "recipe.stages.finetune.lr=1e-2,1e-3")
    assert list(levels(found)) == ["pretrain.lr", "finetune.lr"]


def test_an_option_that_one_level_lacks_is_one_factor_with_it() -> None:
    one = {"seed": 0, "connector": {"name": "mlp", "options": {"depth": 2}}}
    two = {"seed": 0, "connector": {"name": "mlp", "options": {"depth": 3}}}
    three = {"seed": 0, "connector": {"name": "linear", "options": {}}}
    assert levels(find_factors([one, two, three])) == {"Connector + depth": ("mlp + 2", "mlp + 3", "linear")}


def test_a_recipe_that_brings_its_data_is_one_factor_with_it() -> None:
    found = factors_of("experiment=paper_table_a1")
    assert levels(found) == {
        "LLM": ("tinyllama", "stablelm2", "phi2"),
        "Vision tower": ("clip", "siglip"),
        "Recipe + Data": ("bench + llava_v1_5", "share_bench + sharegpt4v"),
    }


def test_what_changes_along_with_a_factor_is_said_and_no_factor() -> None:
    runs: list[dict[str, Any]] = [
        {"seed": 0, "llm": {"name": name, "width": width}, "recipe": {"name": "base", "lr": lr}}
        for name, width, lr in (("small", 64, 1e-3), ("large", 128, 1e-4))
    ]
    found = find_factors(runs)
    assert list(levels(found)) == ["LLM"]
    assert found.lines() == ["The same in all runs: Recipe base, Seed 0.", "Changes with LLM: recipe.lr."]


def test_launch_and_names_are_no_factors() -> None:
    found = factors_of("launch.slots=1,2", "tracking.log_steps=5")
    assert not found.tell


def test_of_paths_the_last_part_is_shown_where_it_tells_them_apart() -> None:
    runs = [{"llm": {"name": "hf", "pretrained": name}} for name in ("org/a-1b", "other/b-2b")]
    assert levels(find_factors(runs)) == {"pretrained": ("a-1b", "b-2b")}
    clash = [{"llm": {"name": "hf", "pretrained": name}} for name in ("org/a", "other/a")]
    assert levels(find_factors(clash)) == {"pretrained": ("org/a", "other/a")}


def test_numbers_that_print_alike_stay_apart() -> None:
    runs = [{"recipe": {"name": "base", "lr": rate}} for rate in (0.1, 0.1 + 1e-12)]
    assert len(set(levels(find_factors(runs))["lr"])) == 2

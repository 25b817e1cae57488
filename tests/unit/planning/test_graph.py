"""What decides a stage's digest, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.planning.graph import build_graph
from tinylmm.planning.kinds import KINDS

EVERYTHING = {
    "digits",
    "tokenizer/nano",
    "llm/nano",
    "vision_tower/nano",
    "images[pretrain]",
    "prepare[pretrain]",
    "pretrain",
    "images[finetune]",
    "prepare[finetune]",
    "finetune",
    "digits@pretrain",
    "digits@finetune",
}
TRAINED = {"pretrain", "finetune", "digits@pretrain", "digits@finetune"}


def digests(*words: str) -> dict[str, str]:
    return {stage.name: stage.digest for stage in build_graph(compose_run(list(words)), NoFiles())}


def changed(*words: str) -> set[str]:
    """Names of the default run's stages whose digest is another with these words."""
    before, after = digests(), digests(*words)
    return {name for name in before if after.get(name) != before[name]}


def test_versions_are_raised_where_results_change_and_nowhere_else() -> None:
    """data 2: more first questions are about yes and no. prepare 2: a question that is only an image has no newline;
    prepare 3: a first answer is left out, an empty one is trained on. train 2: grey pictures of 16 bits are scaled.

    eval 2: intervals; eval 3: answers end at the turn's end of the template as fitted to the tokenizer.
    """
    versions = {kind: row.version for kind, row in KINDS.items()}
    assert versions == {"data": 2, "parts": 1, "images": 1, "prepare": 3, "train": 2, "eval": 3, "judge": 1}


def test_the_default_run_has_these_stages() -> None:
    assert set(digests()) == EVERYTHING


@pytest.mark.parametrize(
    "word",
    [
        "launch=torchrun",
        "launch=zero3",
        "launch.num_workers=4",
        "launch.micro_batch=3",
        "launch.packing=false",
        "launch.cache_features=false",
        "launch.save_steps=7",
        "tracking.tensorboard=false",
        "tracking.wandb.enabled=true",
        "name=other",
        "store=elsewhere",
        "eval=none",
    ],
)
def test_how_a_run_is_done_and_recorded_changes_no_digest(word: str) -> None:
    before, after = digests(), digests(word)
    assert after.items() <= before.items()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1"], TRAINED),
        (["recipe.stages.finetune.lr=1e-5"], {"finetune", "digits@finetune"}),
        (["recipe.stages.pretrain.lr=1e-5"], TRAINED),
        (["recipe.stages.finetune.max_length=128"], {"finetune", "digits@finetune"}),
        (["recipe.stages.pretrain.template=plain"], TRAINED | {"prepare[pretrain]"}),
        (["connector=linear"], TRAINED),
        (["trainer.optim=adafactor"], TRAINED),
        (["trainer.log_level=info"], set()),
        (["vision_tower.select_layer=-1"], TRAINED),
        (["vision_tower.build.steps=3"], TRAINED | {"vision_tower/nano"}),
        (["llm.build.steps=3"], TRAINED | {"llm/nano"}),
        (["data.build.options.finetune=9"], EVERYTHING - {"tokenizer/nano", "llm/nano", "vision_tower/nano"}),
        (["eval.digits.max_new_tokens=3"], {"digits@pretrain", "digits@finetune"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_change_reruns_just_what_depends_on_it(words: list[str], expected: set[str]) -> None:
    if "data.build" in words[0]:  # the benchmark and the parts keep their own data
        expected = TRAINED | {
            f"{stage}[{source}]" for stage in ("images", "prepare") for source in ("pretrain", "finetune")
        }
    assert changed(*words) - {"digits"} == expected


PADDED = "vision_tower.image.mode=pad"


@pytest.mark.parametrize(
    ("before", "words", "expected"),
    [
        ((), ["pretrain.image_mode=pad"], TRAINED),
        ((), ["finetune.image_mode=pad"], {"finetune", "digits@finetune"}),
        ((), ["pretrain.image_mode=auto", "finetune.image_mode=square"], set()),
        ((PADDED,), ["pretrain.image_mode=pad", "finetune.image_mode=pad"], set()),
        ((PADDED,), ["pretrain.image_mode=square"], TRAINED),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_a_stages_image_mode_decides_where_it_is_not_the_towers(
    before: tuple[str, ...], words: list[str], expected: set[str]
) -> None:
    old, new = digests(*before), digests(*before, *(f"recipe.stages.{word}" for word in words))
    assert {name for name in old if new[name] != old[name]} == expected


def test_an_image_mode_is_recorded_where_a_stages_start_has_another() -> None:
    words = ["vision_tower.image.mode=pad", "recipe.stages.pretrain.image_mode=square"]
    stages = {stage.name: stage.spec for stage in build_graph(compose_run(words), NoFiles())}
    assert (stages["pretrain"]["image_mode"], stages["finetune"]["image_mode"]) == ("squash", "pad")


def test_the_share_recipes_first_stage_is_the_base_recipes_pretraining() -> None:
    base, share = digests(), digests("recipe=share")
    assert base["pretrain"] == share["pretrain"] and base["prepare[pretrain]"] == share["prepare[pretrain]"]
    assert base["finetune"] != share["finetune"]


def test_share_shares_with_base_at_full_size_too() -> None:
    words = ("llm=phi2", "vt=siglip", "eval=none")
    base, share = digests(*words), digests(*words, "recipe=share")
    assert base["pretrain"] == share["pretrain"]


def test_a_local_folder_is_identified_by_content_not_by_path() -> None:
    def train(path: str, content: str) -> str:
        run = compose_run(["llm=phi2", "vt=siglip", "eval=none", f"llm.pretrained={path}"])

        class Files(NoFiles):
            def checkpoint(self, path_or_id: str) -> dict[str, Any]:
                return {"files": content} if path_or_id == path else {}

        graph = build_graph(run, Files())
        return next(stage.digest for stage in graph if stage.name == "pretrain")

    assert train("/a/phi", "same") == train("/b/phi", "same") != train("/b/phi", "other")


def test_parents_come_before_their_children() -> None:
    seen: set[str] = set()
    for stage in build_graph(compose_run(["recipe=share"]), NoFiles()):
        assert set(stage.parents.values()) <= seen
        seen.add(stage.digest)


MIXED = "recipe.stages.finetune.data={finetune: 1.0, share_pretrain: 0.5}"


def test_a_mixture_prepares_every_source_and_depends_on_each_and_on_weights() -> None:
    stages = {stage.name: stage for stage in build_graph(compose_run([MIXED]), NoFiles())}
    parts = {stages[f"prepare[finetune/{source}]"].digest for source in ("finetune", "share_pretrain")}
    assert {digest for role, digest in stages["finetune"].parents.items() if role.startswith("prepared")} == parts
    assert sorted(stages["finetune"].spec["mixture"]) == [0.5, 1.0]
    assert len(stages["finetune"].settings["locations"]) == 2
    assert stages["prepare[finetune/finetune]"].digest == digests()["prepare[finetune]"]
    assert digests(MIXED.replace("0.5", "0.6"))["finetune"] != stages["finetune"].digest


def test_a_mixtures_order_in_the_spec_and_one_of_a_single_source_decide_nothing() -> None:
    turned = "recipe.stages.finetune.data={share_pretrain: 0.5, finetune: 1.0}"
    assert digests(MIXED)["finetune"] == digests(turned)["finetune"]
    assert digests("recipe.stages.finetune.data={finetune: 1}") == digests()


def test_a_single_source_has_no_trace_of_mixtures_or_formats_in_its_identity() -> None:
    stages = {stage.name: stage for stage in build_graph(compose_run([]), NoFiles())}
    assert set(stages["finetune"].parents) == {"from", "prepared", "images", "data"}
    assert "mixture" not in stages["finetune"].spec and "data" not in stages["finetune"].spec
    source = {
        "file": "finetune.json",
        "images": "images",
        "format": "llava",
        "limit": None,
        "on_bad": "fail",
        "max_bad": 0,
    }
    assert stages["prepare[finetune]"].spec["source"] == source


def kinds(*words: str) -> dict[tuple[str, str], str]:
    return {(s.kind, s.name): s.digest for s in build_graph(compose_run(["llm=phi2", "vt=siglip", *words]), NoFiles())}


JUDGE = "eval.{}.judge={{base_url: http://localhost:1/v1, model: {}}}"


@pytest.mark.parametrize("benchmark", ["mmvet", "mmbench"])
def test_naming_or_changing_a_judge_asks_the_model_nothing_again(benchmark: str) -> None:
    words = (f"eval=[{benchmark},gqa]",)
    runs = [kinds(*words), *(kinds(*words, JUDGE.format(benchmark, judge)) for judge in ("one", "other"))]
    assert len({digests[("eval", f"{benchmark}@finetune")] for digests in runs}) == 1
    judged = {digests.get(("judge", f"{benchmark}@finetune")) for digests in runs}
    assert len(judged) == 3  # mmbench without a judge has none: its rules score it
    assert (None in judged) is (benchmark == "mmbench")
    repeated = kinds(*words, JUDGE.format(benchmark, "one"), f"eval.{benchmark}.judge.runs=5")
    assert repeated[("judge", f"{benchmark}@finetune")] not in judged
    assert ("judge", "gqa@finetune") not in runs[1]


def test_another_rule_of_judging_asks_the_model_nothing_again_either() -> None:
    first, other = (kinds("eval=mmvet", f"eval.mmvet.variant={variant}") for variant in ("official", "lmms"))
    assert first[("eval", "mmvet@finetune")] == other[("eval", "mmvet@finetune")]
    assert first[("judge", "mmvet@finetune")] != other[("judge", "mmvet@finetune")]


def test_parts_built_from_files_of_ones_own_know_where_these_lie() -> None:
    own = ["llm.build.data.build=null", "llm.build.data.root=/mine", "llm.build.data.sources.text.annotations=a.jsonl"]
    graph = build_graph(compose_run(["llm=nano", "vt=nano", *own]), NoFiles())
    for stage in (stage for stage in graph if stage.name in ("tokenizer/nano", "llm/nano")):
        assert "data" not in stage.parents
        location = stage.settings["location"]
        assert (location["root"], location["source"]["annotations"]) == ("/mine", "a.jsonl")


def test_a_benchmark_without_judge_is_one_stage() -> None:
    assert [kind for kind, name in kinds("eval=gqa") if name == "gqa@finetune"] == ["eval"]

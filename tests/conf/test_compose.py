"""Every YAML that is shipped composes to a valid spec, and means what its paper says."""

import os
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from tinylmm.config.compose import compose_all, compose_run, expand, rewrite_words, run_name
from tinylmm.config.faults import paths_by_leaf
from tinylmm.config.groups import DEFAULT_GROUPS, conf_folder
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.recipe import ScaleSpec
from tinylmm.config.session import session
from tinylmm.config.signatures import config_class, config_fields
from tinylmm.config.spec import RunSpec
from tinylmm.errors import ConfigError
from tinylmm.planning.planner import plan_run

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted(path.relative_to(conf_folder()) for path in conf_folder().rglob("*/*.yaml"))
NEED_MORE = {"custom", "custom_finetune", "evaluate"}
"""They need a model and data of one's own: tests/conf/test_from_model.py."""
STUDIES = sorted(path.relative_to(REPOSITORY / "experiments") for path in (REPOSITORY / "experiments").rglob("*.yaml"))
PUBLISHED = ["llm=phi2", "vt=siglip"]


@cache
def composed(group: str, choice: str) -> RunSpec:
    """The default run with one choice of one group changed."""
    words = [f"{group}={choice}"]
    if choice == "llava_v1_5":
        words.append("recipe=base")
    if choice == "mof_mlp":
        words.append("vt=mof")
    if choice == "sharegpt4v":
        words.append("recipe=share")
    if choice == "hf":
        words.append(f"{group}.pretrained=org/name")
    return compose_run(words)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem not in NEED_MORE], ids=str)
def test_every_choice_composes_with_the_defaults(path: Path) -> None:
    group, choice = path.parent.as_posix(), path.stem
    spec = composed(group, choice)
    if choice not in ("auto", "none", "local") and group not in ("launch", "eval"):
        assert getattr(spec, group).name == choice


def test_every_combination_of_parts_and_recipes_has_a_plan(tmp_path: Path) -> None:
    """No network and no weights: the graph of each is built, and no two share their last stage.

    Every three parts with one recipe, and every LLM and tower with every recipe: what a recipe reads of the connector is
    nothing.
    """
    default = compose_run([f"store={tmp_path}"])
    llms, towers, connectors, recipes = (chosen(name) for name in ("llm", "vision_tower", "connector", "recipe"))
    cases = {*product(llms, towers, connectors, ["share"]), *product(llms, towers, ["mlp"], recipes)}
    last_stages = set()
    for choices in cases:
        groups = zip(("llm", "vision_tower", "connector", "recipe"), choices, strict=True)
        parts = {group: getattr(composed(group, choice), group) for group, choice in groups}
        trained = [s for s in plan_run(default.model_copy(update=parts), "-".join(choices)).graph if s.kind == "train"]
        assert len(trained) == len(parts["recipe"].stages), choices
        last_stages.add(trained[-1].digest)
    # llm=openelm is llm=openelm_450m; recipe=video with nano's numbers, and no videos to train on, is recipe=base
    differ = {case for case in cases if case[0] != "openelm" and case[3] != "video"}
    assert len(last_stages) == len(differ), "all else differs"


def chosen(group: str) -> list[str]:
    return sorted(path.stem for path in SHIPPED if path.parent.as_posix() == group and path.stem not in NEED_MORE)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_file_begins_by_saying_what_it_is(path: Path) -> None:
    first = (conf_folder() / path).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_every_study_composes_all_its_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert compose_all([f"+experiments={path.with_suffix('').as_posix()}"], multirun=True)


def test_a_folder_beside_the_user_is_no_config_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("store", "seed", "name", "experiments"):
        (tmp_path / name).mkdir()
    spec = compose_run([f"store={tmp_path / 'elsewhere'}", "seed=3", "name=mine"])
    assert (spec.store, spec.seed, spec.name) == (tmp_path / "elsewhere", 3, "mine")


def test_the_default_is_the_embedded_experiment() -> None:
    spec = compose_run([])
    assert run_name(spec) == "nano-nano-mlp-base"
    assert (spec.data.name, list(spec.eval), spec.launch.backend) == ("digits", ["digits"], "local")
    assert spec.eval["digits"].data == spec.data


def test_nano_share_trains_the_upper_half_of_the_tower() -> None:
    tune = compose_run(["recipe=share"]).recipe.stages["share_pretrain"].tune.vision_tower
    assert not isinstance(tune, str) and tune.from_layer == 0.5


@pytest.mark.parametrize(
    ("recipe", "stage", "lr", "batch", "length", "template"),
    [
        ("base", "pretrain", 1e-3, 256, 2048, "pretrain"),
        ("base", "finetune", 2e-5, 128, 2048, "auto"),
        ("share", "pretrain", 1e-3, 256, 2048, "pretrain"),
        ("share", "share_pretrain", 2e-5, 256, 3072, "pretrain"),
        ("share", "finetune", 2e-5, 128, 3072, "auto"),
    ],
)
def test_recipes_carry_the_published_numbers(
    recipe: str, stage: str, lr: float, batch: int, length: int, template: str
) -> None:
    found = compose_run([*PUBLISHED, f"recipe={recipe}"]).recipe.stages[stage]
    assert (found.lr, found.global_batch, found.max_length, found.template) == (lr, batch, length, template)
    assert (found.warmup_ratio, found.schedule, found.weight_decay, found.epochs) == (0.03, "cosine", 0.0, 1)


def test_share_begins_with_the_very_pretraining_of_base_and_unfreezes_from_layer_12() -> None:
    base, share = (compose_run([*PUBLISHED, f"recipe={name}"]) for name in ("base", "share"))
    assert share.recipe.stages["pretrain"] == base.recipe.stages["pretrain"]
    assert share.data.sources["pretrain"] == base.data.sources["pretrain"]
    tune = share.recipe.stages["share_pretrain"].tune
    assert not isinstance(tune.vision_tower, str) and tune.vision_tower.from_layer == 12
    assert (tune.llm, tune.connector) == ("full", "full")


def test_an_llm_of_another_scale_brings_its_own_numbers() -> None:
    words = [*PUBLISHED, "recipe=share", "llm.scale={alignment: {lr: 0.5}, share: {from_layer: 0.25}}"]
    stages = compose_run(words).recipe.stages
    assert (stages["pretrain"].lr, stages["share_pretrain"].lr, stages["finetune"].lr) == (0.5, 2e-5, 2e-5)
    tune = stages["share_pretrain"].tune.vision_tower
    assert not isinstance(tune, str) and tune.from_layer == 0.25


def test_auto_means_the_published_data_for_published_parts() -> None:
    spec = compose_run([*PUBLISHED, "recipe=share"])
    assert (run_name(spec), spec.data.name) == ("phi2-siglip-mlp-share", "sharegpt4v")


def test_the_alias_and_plain_keys_reach_the_spec() -> None:
    spec = compose_run(["llm=phi2", "vt=clip", "vt.select_layer=-1", "seed=7", "trainer.optim=adafactor", "name=mine"])
    assert (spec.vision_tower.name, spec.vision_tower.select_layer, spec.seed, run_name(spec)) == (
        "clip",
        -1,
        7,
        "mine",
    )
    assert spec.trainer.as_arguments() == {"optim": "adafactor"}


def test_a_sweep_runs_in_hydras_order() -> None:
    runs = expand(["llm=phi2", "vt=glob(*ip)", "seed=range(0,2)"], multirun=True)
    assert runs == [
        ["llm=phi2", f"vision_tower={tower}", f"seed={seed}"] for tower in ("clip", "siglip") for seed in ("0", "1")
    ]
    towers = [compose_run(run).vision_tower.name for run in runs]
    assert towers == ["clip", "clip", "siglip", "siglip"]


def test_an_experiment_sweeps_by_its_own_yaml_and_the_command_line_wins() -> None:
    study = Path("experiments/towers")
    study.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /llm: phi2\n  - override /vision_tower: clip\nseed: 3\n"
    text += "hydra:\n  sweeper:\n    params:\n      vt: clip,siglip\n      recipe.stages.pretrain.lr: 1e-3,2e-3\n"
    (study / "towers.yaml").write_text(text)
    runs = [spec for _, spec in compose_all(["+experiments=towers"], multirun=True)]
    assert [(run.vision_tower.name, run.recipe.stages["pretrain"].lr, run.seed) for run in runs] == [
        ("clip", 0.001, 3), ("clip", 0.002, 3), ("siglip", 0.001, 3), ("siglip", 0.002, 3),
    ]  # fmt: skip
    assert len(compose_all(["+experiments=towers", "vt=siglip", "seed=5"], multirun=True)) == 2


def test_a_conf_folder_of_the_user_extends_a_group_but_shadows_nothing() -> None:
    Path("conf/llm").mkdir(parents=True)
    Path("conf/llm/mine.yaml").write_text("# Mine.\ndefaults: [phi2, _self_]\nname: mine\n")
    Path("conf/llm/phi2.yaml").write_text("name: stolen\n")
    assert compose_run(["llm=mine", "vt=clip"]).llm.name == "mine"
    assert compose_run(["llm=phi2", "vt=clip"]).llm.name == "phi2"


def test_the_repository_as_working_folder_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = compose_run(PUBLISHED)
    monkeypatch.chdir(REPOSITORY)
    assert compose_run(PUBLISHED) == elsewhere


def test_a_spec_survives_its_own_dump() -> None:
    spec = compose_run([*PUBLISHED, "recipe=share"])
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose_run([*PUBLISHED, "recipe=share"])
    assert not list(tmp_path.iterdir())


def test_a_part_of_the_hub_is_named_by_its_checkpoint_and_brings_its_tokenizer() -> None:
    spec = compose_run(["llm=hf", "llm.pretrained=org/Some-LLM 1.5B", "llm.revision=abc", "vt=siglip"])
    assert run_name(spec) == "Some-LLM-1.5B-siglip-mlp-base"
    assert (spec.llm.tokenizer.pretrained, spec.llm.tokenizer.revision) == ("org/Some-LLM 1.5B", "abc")
    with pytest.raises(ConfigError, match=r"llm\.pretrained: is not given"):
        compose_run(["llm=hf", "vt=siglip"])


@pytest.mark.parametrize(
    "words",
    [
        ["seed=4"],
        ["recipe.stages.finetune.lr=1e-4", "llm.architecture={hidden_size: 8}", "trust=[mine]"],
        ["~tracking.wandb", "seed=4"],
        ["eval=[gqa,pope]", "eval.gqa.limit=5"],
    ],
    ids=["plain", "nested", "removed", "groups"],
)
def test_a_sessions_copies_are_what_hydra_composes_itself(words: list[str]) -> None:
    from hydra import compose, initialize_config_module

    all_words = rewrite_words([*PUBLISHED, *words])
    with initialize_config_module("tinylmm.conf", version_base="1.3"):
        theirs: Any = OmegaConf.to_container(compose("train", all_words), resolve=False)
    with session() as opened:
        opened.load(rewrite_words(["llm=phi2", "vt=siglip", "seed=9"]))  # of which nothing must stay
        for _ in range(2):
            ours: Any = OmegaConf.to_container(opened.load(all_words), resolve=False)
            assert ours.pop("hydra") == {"mode": "", "sweeper": {"params": {}}}
            assert ours == theirs


def test_a_study_may_sweep_over_studies() -> None:
    for name, text in {
        "a": "hydra: {sweeper: {params: {vt: 'clip,siglip'}}}",
        "b/b": "defaults: [override /vision_tower: siglip]\nhydra: {sweeper: {params: {seed: '1,0'}}}",
        "one": "seed: 7",
        "all": "hydra: {mode: MULTIRUN, sweeper: {params: {experiments: 'a,b,one'}}}",
    }.items():
        path = Path(f"experiments/{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n")
    runs = [spec for _, spec in compose_all(["llm=phi2", "experiment=all", "connector=linear"], multirun=False)]
    assert [(run.vision_tower.name, run.seed) for run in runs] == [
        ("clip", 0), ("siglip", 0), ("siglip", 1), ("nano", 7),
    ], "what two studies ask for is one run"  # fmt: skip
    assert {run.connector.name for run in runs} == {"linear"}
    words = [words for words, _ in compose_all(["experiments=a,b", "llm=phi2"], True)]
    assert words == [
        ["vision_tower=clip", "experiments=a", "llm=phi2"],
        ["vision_tower=siglip", "experiments=a", "llm=phi2"],
        ["seed=1", "experiments=b/b", "llm=phi2"],
    ]


def test_a_study_that_sweeps_over_itself_is_refused() -> None:
    Path("experiments").mkdir()
    for name, other in (("a", "b"), ("b", "a")):
        text = f"# @package _global_\nhydra: {{sweeper: {{params: {{experiments: {other}}}}}}}\n"
        Path(f"experiments/{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match="experiments=b: sweeps over itself: b -> a -> b"):
        compose_all(["experiments=a"], True)


def test_planning_loads_no_torch() -> None:
    code = "import sys; from tinylmm.config.compose import compose_run"
    code += "; compose_run(['llm=phi2', 'vt=clip', 'trainer.optim=sgd'])"
    code += "; from tinylmm.cli.help import train_help; train_help()"
    code += "; assert not {'torch', 'transformers', 'datasets', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_help_lists_every_group_and_choice_without_hydra() -> None:
    code = "import sys; from tinylmm.cli.help import train_help; print(train_help()); assert 'hydra' not in sys.modules"
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(f"\n  {group}\n" in text for group in DEFAULT_GROUPS)
    assert all(path.stem in text for path in SHIPPED)


def test_benchmarks_add_up_and_the_papers_lists_are_groups() -> None:
    spec = compose_run(
        [*PUBLISHED, "data=llava_v1_5", "eval=[gqa,pope]", "eval.gqa.root=/files", "eval.pope.blind=true"]
    )
    assert list(spec.eval) == ["gqa", "pope"]
    assert (spec.eval["gqa"].root, spec.eval["gqa"].max_new_tokens, spec.eval["pope"].blind) == ("/files", 128, True)
    paper, factory = (
        compose_run([*PUBLISHED, "data=llava_v1_5", f"eval={name}"]).eval for name in ("paper", "factory")
    )
    assert set(paper) == {"vqav2", "gqa", "sqa", "textvqa", "mmvet", "pope", "llava_bench", "mme", "mmbench"}
    assert set(factory) == {"vqav2", "gqa", "sqa", "textvqa", "mmvet", "pope", "mme", "mmmu"}


def test_every_shipped_benchmark_is_one_that_exists() -> None:
    from tinylmm.evaluation.benchmarks.registry import benchmark_names

    shipped = {path.stem for path in (conf_folder() / "eval").glob("*.yaml")}
    names = sorted(shipped - {"auto", "none", "digits", "moving_digits", "paper", "factory", "video"})
    found = compose_run([f"eval=[{','.join(names)}]"]).eval
    assert list(found) == [spec.benchmark for spec in found.values()] == names and set(names) <= set(benchmark_names())


def test_the_local_launch_shows_every_knob_at_its_default() -> None:
    shown = OmegaConf.load(conf_folder() / "launch/local.yaml")
    assert dict(shown) == LaunchSpec().model_dump()


def test_every_other_launch_is_the_local_one_but_for_backend_and_ranks() -> None:
    sharding: dict[str, Literal["auto", 2, 3]] = {"torchrun": "auto", "zero2": 2, "zero3": 3}
    for name, stage in sharding.items():
        expected = LaunchSpec(backend="torchrun", nproc=2, deepspeed_stage=stage)
        assert compose_run([f"launch={name}"]).launch == expected


def test_the_roles_of_scale_are_what_the_recipes_read() -> None:
    """A key that no recipe reads, or a recipe that reads one that cannot be set, would be a number that does nothing."""
    texts = [path.read_text(encoding="utf-8") for path in (conf_folder() / "recipe").glob("*.yaml")]
    read = set(re.findall(r"oc\.select:llm\.scale\.(\w+\.\w+)", "".join(texts)))
    assert {path for _, path in paths_by_leaf(ScaleSpec) if "." in path} == read


@pytest.mark.parametrize("folder", ["llm", "vision_tower"])
def test_the_class_of_every_shipped_architecture_is_found(folder: str) -> None:
    """Where it is not, nothing is checked: an upgrade of transformers that moves its tables must show here."""
    for name in (path.stem for path in (conf_folder() / folder).glob("*.yaml") if path.stem != "hf"):
        part = getattr(composed(folder, name), folder)
        config = config_class(part.target if folder == "llm" else part.encoder)
        assert config is not None and set(part.architecture) <= set(config_fields(config) or ()), name


@pytest.mark.parametrize(
    ("words", "benchmarks"),
    [
        (["llm=phi2", "vt=siglip"], "vqav2 gqa sqa textvqa mmvet pope llava_bench mme mmbench"),
        (["llm=phi2", "vt=siglip", "recipe=share_factory"], "vqav2 gqa sqa textvqa mmvet pope mme mmmu"),
        ([], "digits"),
    ],
)
def test_eval_auto_is_what_the_recipes_paper_reports_as_far_as_it_is_there(words: list[str], benchmarks: str) -> None:
    run = compose_run(words)
    assert " ".join(run.eval) == benchmarks
    assert all(spec.optional is bool(words) for spec in run.eval.values())
    strict = compose_run([*words, "eval=paper"])
    assert not any(spec.optional for spec in strict.eval.values())


def test_keys_of_a_benchmark_that_eval_auto_chooses_can_be_set() -> None:
    run = compose_run(["llm=phi2", "vt=siglip", "eval.gqa.limit=5", "eval.pope.optional=false"])
    assert (run.eval["gqa"].limit, run.eval["gqa"].optional, run.eval["pope"].optional) == (5, True, False)

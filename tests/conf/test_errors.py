"""Claims about the answer to a wrong command line, spec or file: all faults, with key, what is allowed, suggestion."""

from pathlib import Path

import pytest

from tinylmm.config.compose import compose_all, compose_run, expand
from tinylmm.config.overrides import expand_alias
from tinylmm.errors import ConfigError

GOOD = ("llm=phi2", "vt=siglip", "data=llava_v1_5", "eval=none")  # no `auto`, so that each test composes once


def faults(*words: str, multirun: bool = False) -> dict[str, str]:
    """Where -> what and fix of every fault that `words` lead to."""
    with pytest.raises(ConfigError) as caught:
        compose_all([*GOOD, *words], multirun)
    assert "pydantic" not in str(caught.value) and "Traceback" not in str(caught.value)
    return {fault.where: f"{fault.what} {fault.fix}" for fault in caught.value.faults}


MISSPELT = [
    ("vt.select_layr=-1", "select_layer"), ("vt.drop_first=true", "drop_first_token"),
    ("llm.pretrain=x", "pretrained"), ("llm.tokenizer.pad=x", "pad_token"), ("connector.option={}", "options"),
    ("vt.image.sise=3", "size"), ("recipe.stages.pretrain.lrr=1", "lr"), ("recipe.stages.pretrain.batch=1", ""),
    ("recipe.stages.finetune.epoch=2", "epochs"), ("recipe.stages.finetune.max_lenght=9", "max_length"),
    ("recipe.stages.finetun.lr=1", "finetune"), ("recipe.stages.pretrain.scheduler=cosine", "schedule"),
    ("recipe.stages.pretrain.warmup=0", "warmup_ratio"), ("recipe.stages.finetune.tune.conector=full", "connector"),
    ("recipe.stages.finetune.tune.llm=ful", "full"), ("recipe.stages.finetune.precision=fp61", "fp16"),
    ("recipe.stages.finetune.schedule=cosin", "cosine"), ("recipe.stages.finetune.data=finetun", "finetune"),
    ("recipe.stages.finetune.template=lama", "llama"), ("launch.micro_batc=1", "micro_batch"),
    ("launch.nprocs=2", "nproc"), ("launch.backend=torchrn", "torchrun"),
    ("launch.attention=flash_attn_2", "flash_attention_2"), ("tracking.wandb.projct=x", "project"),
    ("trainer.optm=x", "optim"), ("trainer.torch_compil=true", "torch_compile"),
]  # fmt: skip


@pytest.fixture(scope="module")
def all_misspelt() -> dict[str, str]:
    """The faults of all misspelt words in one command."""
    return faults(*(word for word, _ in MISSPELT))


@pytest.mark.parametrize(("word", "meant"), MISSPELT, ids=lambda value: value)
def test_a_misspelt_key_or_value_gets_the_right_suggestion_among_many(
    word: str, meant: str, all_misspelt: dict[str, str]
) -> None:
    key = expand_alias(word).partition("=")[0]
    found = [text for where, text in all_misspelt.items() if key == where or key.startswith(f"{where}.")]
    assert len(found) == 1
    assert not meant or f"Did you mean '{meant}" in found[0]


WRONG = [
    ("seed=true", "seed", "a whole number"),
    ("seed='1'", "seed", "a whole number"),
    ("recipe.stages.finetune.image_mode=pat", "recipe.stages.finetune.image_mode", "Did you mean 'pad'"),
    ("seed=1.5", "seed", "a whole number"),
    ("name=a/b", "name", "letters, digits"),
    ("name=../x", "name", "letters, digits"),
    ("name=[a]", "name", "text"),
    ("trainer=3", "trainer", "a mapping"),
    ("trust=requests", "trust", "a list"),
    ("trust=[os]", "trust", "Python itself"),
    ("tracking.tensorboard=3", "tracking.tensorboard", "true or false"),
    ("tracking=1", "tracking", "a mapping with tensorboard"),
    ("launch.nproc=0", "launch.nproc", "above 0"),
    ("launch.keep_checkpoints=1", "launch.keep_checkpoints", "at least 2"),
    ("launch.deepspeed_stage=1", "launch.deepspeed_stage", "one of auto, 2, 3"),
    ("launch.nproc=2", "launch", "backend=torchrun"),
    (
        "recipe.stages.pretrain.lr=fast",
        "recipe.stages.pretrain.lr",
        "is 'fast'; it must be a number above 0, or a mapping",
    ),
    ("recipe.stages.pretrain.lr=-1", "recipe.stages.pretrain.lr", "above 0"),
    ("recipe.stages.pretrain.lr=inf", "recipe.stages.pretrain.lr", "finite"),
    ("recipe.stages.pretrain.lr=nan", "recipe.stages.pretrain.lr", "finite"),
    ("recipe.stages.pretrain.lr={connector: fast}", "recipe.stages.pretrain.lr.connector", "a number above 0"),
    ("recipe.stages.pretrain.lr={connector: 1, llm: 1}", "recipe.stages.pretrain.lr.llm", "freezes llm"),
    ("recipe.stages.finetune.lr={llm: 1}", "recipe.stages.finetune.lr", "names no rate for connector"),
    ("recipe.stages.pretrain.tune=full", "recipe.stages.pretrain.tune", "a mapping with llm, vision_tower, connector"),
    ("recipe.stages.pretrain.tune.connector=frozen", "recipe.stages.pretrain.tune", "nothing to train"),
    ("recipe.stages.pretrain.tune.llm={from_layer: 1.5}", "recipe.stages.pretrain.tune.llm.from_layer", "below 1"),
    ("recipe.stages.pretrain.tune.llm={layer: 1}", "recipe.stages.pretrain.tune.llm.layer", "from_layer"),
    ("recipe.stages.pretrain.adam_betas=[0.9]", "recipe.stages.pretrain.adam_betas", "a list of 2 values"),
    ("recipe.stages.pretrain.adam_betas=[0.9,2]", "recipe.stages.pretrain.adam_betas.1", "from 0 to 1"),
    ("recipe.stages.pretrain.warmup_ratio=3", "recipe.stages.pretrain.warmup_ratio", "from 0 to 1"),
    ("recipe.stages.pretrain.start=parts", "recipe.stages.pretrain.start", "Allowed: from"),
    ("recipe.stages.finetune.from=later", "recipe", "none of the earlier"),
    ("recipe.stages.finetune.data=x", "recipe.stages.finetune.data", "Sources: pretrain, finetune"),
    ("recipe.stages.finetune.template=x", "recipe.stages.finetune.template", "one of phi, llama"),
    ("recipe.published_data=x data=auto", "recipe.published_data", "'x' is not a choice of data"),
    ("llm.template=x", "llm.template", "one of phi, llama"),
    ("llm.init=built", "llm", "`build`"),
    ("llm.pretrained=null", "llm", "hub id"),
    ("llm={a: b}", "llm", "not a choice"),
    ("llm=null", "llm", "'null' is not a choice"),
    ("llm=[phi2]", "llm", "one choice"),
    ("vt.image.mean=[1,1]", "vision_tower.image.mean", "3"),
    ("llm._target_=os.system", "llm._target_", "not allowed"),
    ("vt.encoder=torch.load", "vision_tower.encoder", "encoder's class"),
    ("connector.options._target_=x", "connector.options._target_", "may not stand here"),
    ("trainer.label_smoothing_factor=0.5", "trainer.label_smoothing_factor", "our loss does not use it"),
    ("trainer.dataloader_prefetch_factor=4", "trainer.dataloader_prefetch_factor", "set launch.num_workers"),
    ("trainer.optim_args='momentum=0.9'", "trainer", "optim=adamw_torch does not read"),
    ("llm.scale.tunning.lr=1e-3", "llm.scale.tunning", "Did you mean 'tuning'?"),
    ("llm.scale.tuning.learning_rate=1e-3", "llm.scale.tuning.learning_rate", "Allowed: lr, global_batch"),
    ("llm.scale.lora.alfa=1", "llm.scale.lora.alfa", "Did you mean 'alpha'?"),
    ("llm.architecture.hiden_size=32", "llm.architecture.hiden_size", "Did you mean 'hidden_size'?"),
    ("vt.architecture.pach_size=8", "vision_tower.architecture.pach_size", "Did you mean 'patch_size'?"),
    ("connector.options.dept=3", "connector.options.dept", "Did you mean 'depth'?"),
    ("vt.options.refrence=true", "vision_tower.options.refrence", "there is no key"),
    ("trainer.learning_rate=1", "trainer.learning_rate", "Set recipe.stages.<stage>.lr"),
    ("trainer.output_dir=x", "trainer.output_dir", "Set store"),
    ("trainer.nope=1", "trainer.nope", "no field of transformers.TrainingArguments"),
    ("eval=[auto,digits]", "eval", "stand alone"),
    ("recipe=share data=llava_v1_5", "recipe.stages.share_pretrain.data", "needs data=sharegpt4v"),
    ("vt=clip,siglip", "vision_tower", "Add -m"),
    ("seed=1,2", "seed", "Add -m"),
    ("seed=interval(0,1)", "seed", "no end"),
    ("hydra.run.dir=x", "hydra.run.dir", "cannot be changed"),
    ("hydra/launcher=joblib", "hydra/launcher", "cannot be changed"),
    ("store=${oc.env:NOT_SET}", "store", "NOT_SET"),
    ("store=${nope}", "store", "nope"),
    ("name=???", "name", "no value"),
    ("a=b=c", "'a=b=c'", "cannot be read"),
    ("--lr", "'--lr'", "is no override"),
    ("llm", "'llm'", "one of"),
    ("=x", "'=x'", "cannot be read"),
    ("experiments=none_such", "experiments", "factory_table_1/share, factory_table_1/siglip, nano_paper/connectors"),
    ("~seed.x", "config", "seed.x"),
    ("~vt", "vision_tower", "is missing"),
]


@pytest.mark.parametrize(("words", "where", "part"), WRONG, ids=lambda value: value)
def test_a_wrong_value_is_refused_at_its_key_with_what_is_allowed(words: str, where: str, part: str) -> None:
    found = faults(*(words.split() if " data=" in words else [words]))
    assert where in found and part in found[where], found
    assert len(found) == 1


def test_faults_of_words_values_and_across_groups_come_at_once() -> None:
    found = faults(
        "lmm=phi2", "recipe=shar", "recipe.stages.pretrain.lr=fast", "recipe.stages.finetune.warmup_ration=1",
        "recipe.stages.finetune.data=x", "trainer.seed=1", "vt.encoder=os.system", "tracking.wandb.api_key=abc",
    )  # fmt: skip
    assert set(found) == {
        "lmm",
        "recipe",
        "recipe.stages.pretrain.lr",
        "recipe.stages.finetune.warmup_ration",
        "recipe.stages.finetune.data",
        "trainer.seed",
        "vision_tower.encoder",
        "tracking.wandb.api_key",
    }


SECRETS = {
    "WANDB_API_KEY=s3cretv4lue": "s3cretv4lue",
    "hf_token=s3cretv4lue": "s3cretv4lue",
    "+trainer.hub_token=s3cretv4lue": "s3cretv4lue",
    "tracking.wandb.api_key=s3cretv4lue": "s3cretv4lue",
    "password=s3cretv4lue": "s3cretv4lue",
    "--token=s3cretv4lue": "s3cretv4lue",
    "llm.pretrained=https://me:s3cretv4lue@host/x": "s3cretv4lue",
    "name=hf_AbCdEfGhIjKlMnOpQrSt": "AbCdEfGhIjKlMnOpQrSt",
    "name=AKIAIOSFODNN7EXAMPLE": "IOSFODNN7",
    "store=sk-abcdefghijklmnopqrstuvwx": "abcdefghijklmnop",
    "sk-abcdefghijklmnopqrstuvwx": "abcdefghijklmnop",
    "name=${oc.env:SOME_API_KEY}": "s3cretv4lue",
}


@pytest.mark.parametrize("word", SECRETS)
def test_a_secret_is_refused_and_never_shown(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cretv4lue")
    with pytest.raises(ConfigError) as caught:
        compose_run([*GOOD, word])
    assert SECRETS[word] not in str(caught.value)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize(
    "word", ["llm.tokenizer.pad_token=<x>", "launch.row_tokens=64", "llm.revision=" + "0123456789" * 4]
)
def test_what_only_sounds_like_a_secret_is_accepted(word: str) -> None:
    assert compose_run([*GOOD, word if "<" not in word else "llm.tokenizer.pad_token='<x>'"])


FILES = {
    "seed: [1\nllm: 2\n": ("study.yaml, line 3", "no valid YAML"),
    "seed: 1\nseed: 2\n": ("study.yaml, line 3", "duplicate key"),
    "seed: !!python/object/apply:os.system [x]\n": ("study.yaml, line 2", "no valid YAML"),
    "defaults:\n  - override /vision_tower: none_such\n": ("vision_tower", "not a choice"),
    "defaults:\n  - /nope: x\n": ("nope", "Could not"),
    "hydra:\n  callbacks:\n    x: {_target_: os.system}\n": ("hydra.callbacks.x", "refused"),
    "hydra:\n  launcher: {_target_: os.system}\n": ("hydra.launcher._target_", "not allowed"),
    "hydra:\n  job_logging: {handlers: {x: {(): os.system}}}\n": ("hydra.job_logging", "refused"),
    "store: ${a}\na: ${store}\n": ("store", "cannot be resolved"),
    "sede: 3\n": ("sede", "Did you mean 'seed'?"),
    "tracking: {wandb: {entity: '${oc.env:WANDB_API_KEY}'}}\n": ("tracking.wandb.entity", "secret"),
    "seed: &a [1]\nname: [" + ", ".join(["*a"] * 60) + "]\n": ("study.yaml", "aliases"),
    "name: " + "x" * 1_100_000: ("study.yaml", "bytes"),
    "seed: !!binary aGVsbG8=\n": ("seed", "binary"),
    "seed: .inf\n": ("seed", "finite"),
    "name: a\x00b\n": ("study.yaml", ""),
    "- 1\n- 2\n": ("study", ""),
    "seed: &a [*a]\n": ("", ""),
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: ascii(text[:30]))
def test_a_hostile_or_broken_file_gets_one_clear_message(text: str) -> None:
    Path("experiments").mkdir()
    Path("experiments/study.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(ConfigError) as caught:
        compose_run(
            ["vt=siglip", "llm=phi2", "experiments=study"]
            if "vision_tower" not in text
            else ["llm=phi2", "experiments=study"]
        )
    where, part = FILES[text]
    assert where in str(caught.value) and part in str(caught.value)


def test_an_experiment_without_its_package_line_is_told_so() -> None:
    Path("experiments").mkdir()
    Path("experiments/study.yaml").write_text("seed: 3\n")
    assert "# @package _global_" in faults("experiments=study")["experiments"]


def test_a_sweep_of_an_experiment_is_not_run_unasked() -> None:
    Path("experiments").mkdir()
    Path("experiments/study.yaml").write_text("# @package _global_\nhydra: {sweeper: {params: {seed: '1,2'}}}\n")
    with pytest.raises(ConfigError, match="Add -m"):
        expand([*GOOD, "experiments=study"], multirun=False)


def test_faults_of_every_run_of_a_sweep_are_told_once_each() -> None:
    found = faults("seed=1,x", "recipe.stages.finetune.lr=2,-1", "recipe.nmae=x", multirun=True)
    assert set(found) == {"seed", "recipe.stages.finetune.lr", "recipe.nmae"}
    assert set(faults("seed=1,2", "lmm=phi2", "connector=mlp,lin", "name=a/b", multirun=True)) == {
        "lmm",
        "connector",
        "name",
    }


@pytest.mark.parametrize(
    ("word", "where", "part"),
    [
        ("eval.gqa.judge.model=m", "eval.gqa.judge", "needs both `base_url` and `model`"),
        ("eval.gqa.root=null", "eval.gqa", "needs either `root`"),
        ("eval.gqa.layout=parquet", "eval.gqa.layout", "llava, hf"),
        ("eval.gqa.precision=int8", "eval.gqa.precision", "fp32, bf16, fp16"),
    ],
)
def test_a_benchmark_that_cannot_be_asked_is_refused(word: str, where: str, part: str) -> None:
    found = faults("eval=gqa", word)
    assert part in found[where] and len(found) == 1


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        (
            "{finetune: 1, pretrian: 2}",
            "",
            "is 'pretrian', which data=llava_v1_5 does not have. Did you mean 'pretrain'?",
        ),
        ("{finetune: 0}", ".finetune", "must be a number above 0"),
        ("{}", "", "mapping with no keys"),
        ("[finetune]", "", "must be text, or a mapping of names to a number above 0"),
    ],
)
def test_a_wrong_mixture_is_answered_with_what_it_may_be(value: str, where: str, what: str) -> None:
    found = faults(f"recipe.stages.finetune.data={value}")
    assert what in found[f"recipe.stages.finetune.data{where}"]


def test_a_stage_cannot_train_on_a_question_file() -> None:
    found = faults("data.sources.finetune.format=questions")
    assert "holds questions for evaluation" in found["recipe.stages.finetune.data"]


@pytest.mark.parametrize(
    ("words", "where", "what"),
    [
        (["eval=gqa", "eval.gqa.limit_seed=3"], "eval.gqa", "draws nothing without a `limit`"),
        (["eval=digits", "eval.digits.layout=hf"], "eval.digits", "a source of `data` has a `format`"),
        (
            ["recipe=qlora", "recipe.stages.finetune.tune.llm.qlora={bits: 8, quant_type: fp4}"],
            "recipe.stages.finetune.tune.llm.qlora",
            "which weights of 8 bits do not have",
        ),
        (
            ["trainer.optim=sgd", "recipe.stages.finetune.adam_betas=[0.9,0.95]"],
            "recipe.stages.finetune.adam_betas",
            "is not read by trainer.optim=sgd",
        ),
        (
            ["trainer.optim=lion_32bit", "recipe.stages.pretrain.adam_epsilon=1e-6"],
            "recipe.stages.pretrain.adam_epsilon",
            "is not read by trainer.optim=lion_32bit",
        ),
        (["trainer.optim=muon", "launch=zero2"], "trainer.optim", "needs whole tensors on every rank"),
        (["trainer.optim=adamw_bf16", "launch=zero3"], "trainer.optim", "Use launch=local or torchrun"),
        (["recipe.stages.pretrain.fp8=true", "launch=zero2"], "recipe.stages.pretrain.fp8", "ZeRO does not hold"),
        (["recipe.stages.finetune.fp8=true"], "recipe.stages.finetune", "set tune.llm=frozen"),
        (
            ["recipe.stages.pretrain.fp8=true", "recipe.stages.pretrain.precision=fp32"],
            "recipe.stages.pretrain",
            "precision=bf16",
        ),
    ],
    ids=[
        "limit_seed",
        "layout",
        "8 bits",
        "betas",
        "epsilon",
        "muon",
        "bf16 moments",
        "fp8 zero",
        "fp8 trained",
        "fp8 fp32",
    ],
)
def test_what_would_decide_nothing_is_refused(words: list[str], where: str, what: str) -> None:
    found = faults(*words)
    assert list(found) == [where] and what in found[where]


def test_what_decides_is_not_refused() -> None:
    betas = "recipe.stages.finetune.adam_betas=[0.9,0.95]"
    compose_all(
        [*GOOD, "trainer.optim=lion_32bit", betas, "eval=gqa", "eval.gqa.limit=9", "eval.gqa.limit_seed=3"], False
    )
    compose_all([*GOOD, "recipe=qlora", "recipe.stages.finetune.tune.llm.qlora={bits: 8}"], False)


@pytest.mark.parametrize("part", ["llm", "vision_tower"])
def test_a_part_cannot_be_built_on_a_question_file(part: str) -> None:
    found = faults("llm=nano", "vt=nano", f"{part}.build.source=test")
    assert "holds questions for evaluation" in found[f"{part}.build.source"]


def test_cycles_of_a_cosine_need_a_cosine_in_every_stage() -> None:
    found = faults("trainer.lr_scheduler_kwargs={num_cycles: 2}", "recipe.stages.finetune.schedule=linear")
    assert "stage finetune has linear" in found["trainer.lr_scheduler_kwargs"]


@pytest.mark.parametrize(
    ("words", "where", "what"),
    [
        (["launch=torchrun", "launch.nodes=2", "launch.rendezvous=node1"], "launch.rendezvous", "must be HOST:PORT"),
        (["launch=torchrun", "launch.nodes=2", "launch.slots=2"], "launch", "slots are places on one machine"),
        (["launch=slurm", "launch.slurm.hour=3"], "launch.slurm.hour", "Did you mean 'hours'"),
        (["launch=slurm", "launch.slurm.limit=0"], "launch.slurm.limit", "above 0"),
    ],
    ids=["rendezvous", "slots", "key", "limit"],
)
def test_a_wrong_word_for_several_machines_is_refused_at_its_key(words: list[str], where: str, what: str) -> None:
    found = faults(*words)
    assert list(found) == [where] and what in found[where]

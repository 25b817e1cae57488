"""Claims about command-line words: aliases, suggestions, choices, secrets, and what Hydra is handed."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tinylmm.config.overrides import (
    Vocabulary,
    check_words,
    expand_alias,
    holds_secret,
    is_sweep,
    looks_secret,
    quoted,
    redacted,
)

VOCABULARY = Vocabulary(
    groups={
        "llm": ("nano", "phi2", "tinyllama"),
        "vision_tower": ("clip", "nano", "siglip"),
        "connector": ("identity", "linear", "mlp"),
        "recipe": ("base", "share"),
        "data": ("auto", "digits", "llava_v1_5", "sharegpt4v"),
        "eval": ("auto", "digits", "none"),
        "launch": ("local", "torchrun", "zero2", "zero3"),
        "experiments": ("single", "study/study"),
    },
    defaults=("llm", "vision_tower", "connector", "recipe", "data", "eval", "launch"),
    keys=("name", "seed", "store", "llm", "vision_tower", "connector", "recipe", "data", "eval", "launch", "tracking",
          "trainer", "trust"),
    nested=(("lr", "llm.build.lr"), ("lr", "recipe.stages.<name>.lr"),
    ("max_length", "recipe.stages.<name>.max_length"),
            ("global_batch", "recipe.stages.<name>.global_batch"), ("log_steps", "tracking.log_steps")),
)  # fmt: skip

MISSPELT = [
    ("lmm=phi2", "llm"), ("model=phi2", "llm"), ("LLM=phi2", "llm"), ("llms=phi2", "llm"),
    ("language_model=phi2", "llm"), ("visiontower=clip", "vision_tower"), ("vision-tower=clip", "vision_tower"),
    ("tower=clip", "vision_tower"), ("vison_tower=siglip", "vision_tower"), ("vt_=clip", "vision_tower"),
    ("conector=mlp", "connector"), ("conn=linear", "connector"), ("projector=mlp", "connector"),
    ("recipie=share", "recipe"), ("receipt=base", "recipe"), ("launcher=zero2", "launch"), ("dat=sharegpt4v", "data"),
    ("dataset=llava_v1_5", "data"), ("evaluation=digits", ""), ("sed=1", "seed"), ("Seed=1", "seed"),
    ("nam=x", "name"), ("stor=x", "store"), ("traker.log_steps=1", "trac"), ("trainr.optim=x", "trainer"),
    ("trusted=[x]", "trust"), ("llm=ph2", "phi2"), ("llm=phi-2", "phi2"), ("llm=Phi2", "phi2"),
    ("llm=tinylama", "tinyllama"), ("llm=nan", "nano"), ("vt=siglp", "siglip"), ("vt=SigLIP", "siglip"),
    ("vt=clipp", "clip"), ("connector=linar", "linear"), ("connector=mpl", "mlp"), ("connector=identiy", "identity"),
    ("recipe=bas", "base"), ("recipe=shared", "share"), ("data=llava_v15", "llava_v1_5"),
    ("data=sharegpt4", "sharegpt4v"), ("data=digit", "digits"), ("eval=digit", "digits"), ("eval=[digts]", "digits"),
    ("launch=zero-3", "zero3"), ("launch=torch_run", "torchrun"), ("launch=loca", "local"),
    ("lr=1e-3", "recipe.stages.<name>.lr"), ("phi2", "llm=phi2"),
    ("max_length=99", "recipe.stages.<name>.max_length"), ("global_batch=9", "recipe.stages.<name>.global_batch"),

]  # fmt: skip


@pytest.mark.parametrize(("word", "meant"), MISSPELT, ids=lambda value: value)
def test_a_misspelt_group_choice_or_key_gets_the_right_suggestion(word: str, meant: str) -> None:
    judged = check_words([word], VOCABULARY)
    assert not judged.good
    assert len(judged.faults) == 1
    assert not meant or f"Did you mean '{meant}" in str(judged.faults[0])


@pytest.mark.parametrize(
    ("word", "written_out"),
    [
        ("vt=clip", "vision_tower=clip"),
        ("vt=clip,siglip", "vision_tower=clip,siglip"),
        ("~vt", "~vision_tower"),
        ("+vt=x", "+vision_tower=x"),
        ("++vt.select=all", "++vision_tower.select=all"),
        ("vt.select_layer=-1", "vision_tower.select_layer=-1"),
        ("vtx=clip", "vtx=clip"),
        ("name=vt", "name=vt"),
        ("llm.vt=1", "llm.vt=1"),
    ],
)
def test_the_alias_is_written_out_and_nothing_else(word: str, written_out: str) -> None:
    assert expand_alias(word) == written_out


@pytest.mark.parametrize(
    ("word", "for_hydra"),
    [
        ("vt=siglip", "vision_tower=siglip"),
        ("+llm=phi2", "llm=phi2"),
        ("llm=phi2,nano", "llm=phi2,nano"),
        ("eval=[digits]", "eval=[digits]"),
        ("experiments=single", "+experiments=single"),
        ("+experiments=study", "+experiments=study/study"),
        ("seed=1", "++seed=1"),
        ("+trainer.x=1", "++trainer.x=1"),
        ("++trainer.x=1", "++trainer.x=1"),
        ("llm.architecture.y=[1,2]", "++llm.architecture.y=[1,2]"),
        ("~eval", "~eval"),
        ("data@eval.digits.data=digits", "data@eval.digits.data=digits"),
        ("hydra.sweeper.params.seed='1,2'", "hydra.sweeper.params.seed='1,2'"),
    ],
)
def test_a_good_word_is_handed_on_so_that_hydra_accepts_it_and_twice_changes_nothing(word: str, for_hydra: str) -> None:
    judged = check_words([word], VOCABULARY)
    assert (judged.good, judged.faults) == ((for_hydra,), ())
    assert check_words(judged.good, VOCABULARY).good == judged.good


@pytest.mark.parametrize(
    "word", ["", " ", "=", "=x", "llm", "a b", "a=b=c", "--lr=3", "seed=[1", "seed={a", "seed='x", "++=1", "a..b=1"]
)
def test_a_malformed_word_is_one_fault_and_stops_no_other(word: str) -> None:
    judged = check_words([word, "seed=1"], VOCABULARY)
    assert judged.good == ("++seed=1",)
    assert len(judged.faults) == 1
    assert str(judged.faults[0]).isprintable()


def test_every_wrong_value_of_a_sweep_is_told() -> None:
    judged = check_words(["llm=phi2,ph3,qwen"], VOCABULARY)
    assert ["'ph3'" in str(judged.faults[0]), "'qwen'" in str(judged.faults[1])] == [True, True]


@pytest.mark.parametrize(
    "key", ["hydra.callbacks.x", "hydra.searchpath", "hydra/launcher", "hydra.job_logging.x", "hydra.run.dir"]
)
def test_settings_of_hydra_that_can_name_code_are_refused(key: str) -> None:
    assert "cannot be changed" in str(check_words([f"{key}=x"], VOCABULARY).faults[0])


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "WANDB_API_KEY",
        "x.hub_token",
        "token",
        "password",
        "a.secret",
        "aws-secret-key",
        "auth",
        "x.private_key",
    ],
)
def test_a_key_named_like_a_secret_is_one(key: str) -> None:
    assert looks_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "pad_token",
        "tokenizer",
        "max_new_tokens",
        "row_tokens",
        "bos_token_id",
        "llm.tokenizer.pad_token",
        "keys",
        "author",
    ],
)
def test_a_key_about_tokens_of_text_is_none(key: str) -> None:
    assert not looks_secret(key)


def test_a_value_in_the_form_of_a_secret_is_found_and_hidden() -> None:
    for value in ("hf_abcdefghijklmnopqrst", "sk-abcdefghijklmnopqrst", "AKIAIOSFODNN7EXAMPLE", "https://me:pw12@host"):
        assert holds_secret(value)
        assert "(hidden)" in redacted(value) and "pw12" not in redacted(value)
    assert holds_secret("${oc.env:MY_API_KEY}") and not holds_secret("${oc.env:TINYLMM_STORE,store}")


def test_a_sweep_is_told_from_a_list() -> None:
    assert [is_sweep(word) for word in ("a=1,2", "a=range(0,3)", "a=[1,2]", "a=1", "~a")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("value", ["été-データ", "lr=1e-3,epoch=2", "run(1)", 'q"q', "it's", "a#b", "a\\\"b' (c"])
def test_a_value_that_needs_quotes_is_one_fault_that_says_how_to_write_it(value: str) -> None:
    found = check_words([f"data.root={value}"], VOCABULARY)
    (fault,) = found.faults
    assert fault.what == "cannot be read: its value needs quotes."
    (word,) = shlex.split(fault.fix.removeprefix("Write "))
    assert found.good == (f"++{word}",)  # so that nothing is said to be missing
    again = check_words([word], VOCABULARY)
    assert again.faults == () and again.good == found.good
    (override,) = OverridesParser.create().parse_overrides(list(again.good))
    assert getattr(override.value(), "text", override.value()) == value


@pytest.mark.parametrize("text", ["", "a\\", 'a\\"', "null", "2024", "\\\\'\""])
def test_quoted_text_is_read_back_as_it_was(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"a={quoted(text)}"])
    assert getattr(override.value(), "text", override.value()) == text


@pytest.mark.parametrize("word", ["a b=é", "data.root=[a", "data.root={a", 'data.root="a', "=é"])
def test_what_quotes_would_not_mend_is_refused_without_them(word: str) -> None:
    found = check_words([word], VOCABULARY)
    assert found.good == () and "needs quotes" not in str(found.faults[0])

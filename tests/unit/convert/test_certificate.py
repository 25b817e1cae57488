"""Certificates of exported folders: what passes, what fails, and what is said where nobody can be asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tests.builders import tiny_loaded, tiny_tokenizer
from tinylmm.convert import conversion
from tinylmm.convert.ask_ours import ask_ours
from tinylmm.convert.asking import Answered, Question
from tinylmm.convert.certificate import CERTIFICATE, Certificate, Differing, OtherAnswersError
from tinylmm.convert.certify import digests_of, near_tie
from tinylmm.convert.conversion import Check, export_model, write_model
from tinylmm.convert.format import all_formats
from tinylmm.convert.formats.adapter import module_name
from tinylmm.convert.model_card import About
from tinylmm.convert.questions import completed, drawn_questions
from tinylmm.data.chat import get_template
from tinylmm.errors import UserError
from tinylmm.generation.prompts import PromptMaker
from tinylmm.models.checkpoint import save_model

NAMES = {"llm": "ours/llm", "tower": "ours/tower"}


def certificate(**more: Any) -> Certificate:
    said: dict[str, Any] = {
        "exported_as": "hf",
        "program": "transformers",
        "how": "asked",
        "model": {},
        "asked": "drawn",
        "questions": 4,
        "pictures": 3,
        "new_tokens": 8,
        "tolerance": 1e-3,
        "reason": "rounding",
        "dtype": "fp32",
        "device": "CPU",
        "date": "2026-01-01",
        "versions": {"transformers": "5"},
        "not_checked": (),
        "files": {},
        "equal_answers": 4,
        "largest_difference": 1e-6,
    }
    return Certificate(**said | more)


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ({}, True),
        ({"equal_answers": 3, "near_ties": 1}, True),
        ({"equal_answers": 3}, False),
        ({"largest_difference": 2e-3}, False),
        ({"largest_difference": float("inf")}, False),
        ({"largest_difference": float("nan")}, False),
        ({"largest_difference": None}, False),
        ({"error": "cannot read the folder"}, False),
    ],
    ids=str,
)
def test_only_equal_answers_within_the_tolerance_pass(found: dict[str, Any], passed: bool, tmp_path: Path) -> None:
    one = certificate(**found)
    assert one.passed == passed
    one.write(tmp_path)
    record = json.loads((tmp_path / CERTIFICATE).read_text())
    assert record["passed"] == passed and record["tolerance"] == 1e-3 and record["versions"] == {"transformers": "5"}


def answered(text: str, ids: tuple[int, ...] | None, *log_probs: dict[int, float]) -> Answered:
    return Answered(5, text, log_probs, ids, None)


@pytest.mark.parametrize("tells_ids", [True, False])
def test_an_answer_that_parts_where_two_tokens_are_as_likely_is_a_near_tie_and_no_other(tells_ids: bool) -> None:
    tokenizer = tiny_tokenizer()
    maker = PromptMaker(get_template("llama").fitted(tokenizer), tokenizer)
    red, three, what = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("red", "3", "what"))
    end = next(iter(maker.ends))
    sure, torn = {red: -0.1, three: -3.0}, {three: -0.7, what: -0.7005, end: -0.7006}
    ours = answered(maker.text([red, three]), (red, three), sure, torn, {end: -0.1})

    def theirs(*ids: int) -> Answered:
        return answered(maker.text(ids), ids if tells_ids else None, {})

    assert near_tie(ours, theirs(red, what, red), maker, 2e-3)
    assert near_tie(ours, theirs(red), maker, 2e-3), "the end of an answer is a token, too"
    assert not near_tie(ours, theirs(red, what), maker, 1e-4)
    assert not near_tie(ours, theirs(three, three), maker, 2e-3)
    assert not near_tie(ours, theirs(red, red), maker, 2e-3), "of which we do not know that it is likely"


def test_what_is_asked_is_always_the_same_and_has_words_alone_and_two_pictures(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    for name in "ab":
        (tmp_path / name).mkdir()
    first, again = (
        completed(drawn_questions(loaded, tmp_path / n, 6), loaded, tmp_path / n, squared=True) for n in "ab"
    )
    assert [one.text for one in first.items] == [one.text for one in again.items]
    assert digests_of(tmp_path / "a") == digests_of(tmp_path / "b")
    assert sorted(len(one.images) for one in first.items) == [0, *[1] * 6, 2] and first.pictures == 6
    loaded.model.llm.config.max_position_embeddings = 100
    small = completed(drawn_questions(loaded, tmp_path / "a", 6), loaded, tmp_path / "a", squared=False)
    assert max(len(one.images) for one in small.items) == 1
    assert any("about two pictures was asked" in why for why in small.left_out)
    loaded.model.template = "pretrain"  # whose prompts are pictures alone
    captions = completed(drawn_questions(loaded, tmp_path / "a", 6), loaded, tmp_path / "a", squared=False)
    assert min(len(one.images) for one in captions.items) == 1 and len(captions.left_out) == 2


def test_a_factory_folder_is_read_back_by_our_importer_and_the_certificate_says_that_no_more_was_done(
    tmp_path: Path,
) -> None:
    about = About("cell", {"run": "cell"}, ["microsoft/phi-2"], ["liuhaotian/LLaVA-Pretrain"], "mit")
    report = write_model(
        tiny_loaded(), tmp_path / "out", "factory", torch.float32, **NAMES, about=about, check=Check(3)
    )
    record = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert record["passed"] and record["equal_answers"] == record["questions"] == 5 and record["positions"] > 5
    assert (
        record["program"] == "tinylmm's importer" and "TinyLLaVA Factory itself was not run." in record["not_checked"]
    )
    assert record["files"] == digests_of(tmp_path / "out") and "model.safetensors" in record["files"]
    assert record["model"] == {"run": "cell"} and record["versions"]["torch"] == torch.__version__
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-text-to-text")
    assert (card.data.base_model, card.data.datasets) == (["microsoft/phi-2"], ["liuhaotian/LLaVA-Pretrain"])
    assert report.certificate is not None and report.certificate.sentence in card.text
    assert "tinylmm import ./out MODEL" in card.text and "Not checked: TinyLLaVA Factory itself" in card.text


def spoilt(monkeypatch: pytest.MonkeyPatch, format_: str, spoil: Callable[[Path], None]) -> None:
    """The format's writer, and something that happens to what it wrote."""

    def formats() -> list[Any]:
        return [replace(one, writers=one.writers | wrapped(one)) for one in all_formats()]

    def wrapped(one: Any) -> dict[str, Any]:
        def write(export: Any, folder: Path) -> Any:
            written = one.writers[format_](export, folder)
            spoil(folder)
            return written

        return {format_: write} if format_ in one.writers else {}

    monkeypatch.setattr(conversion, "all_formats", formats)


def corrupt(path: Path, ends: str = "layers.0.self_attn.v_proj.weight") -> None:
    """Give one tensor of a safetensors file other values."""
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "vision" not in name and name.endswith(ends))
    tensors[name] = tensors[name].flip(0) * 3 + 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_corrupted_tensor_fails_the_export_and_what_was_written_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(monkeypatch, "factory", lambda folder: corrupt(folder / "model.safetensors"))
    for kept in ("out.failed", "out.failed-2"):
        with pytest.raises(OtherAnswersError, match=r"--verify failed: .*is not to be used") as caught:
            write_model(tiny_loaded(), tmp_path / "out", "factory", torch.float32, **NAMES, check=Check(3))
        assert caught.value.exit_code == 1 and caught.value.folder == tmp_path / kept
        record = json.loads((tmp_path / kept / CERTIFICATE).read_text())
        assert not record["passed"] and record["largest_difference"] > 1e-2
        assert "**NO: do not use this folder**" in (tmp_path / kept / "README.md").read_text()
    assert not (tmp_path / "out").exists()


def test_a_tolerance_of_the_users_own_counts_and_is_told(tmp_path: Path) -> None:
    check = Check(2, tolerance=0.5)
    report = write_model(tiny_loaded(), tmp_path / "out", "factory", torch.float32, **NAMES, check=check)
    assert report.certificate is not None and report.certificate.tolerance == 0.5
    assert report.certificate.reason == "given by --tolerance, in place of 0.0001"


def test_without_llama_cpp_the_export_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_PATH", str(tmp_path))
    save_model(tiny_loaded(), tmp_path / "ours", None, {})
    with pytest.raises(UserError, match=r"npm install .*@fugood/llama.node@.*NODE_PATH=.*Nothing was written"):
        export_model(tmp_path / "ours", tmp_path / "gguf", "gguf", check=Check(2))
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_format_that_names_no_program_cannot_be_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [replace(one, programs={}) for one in all_formats()]
    monkeypatch.setattr(conversion, "all_formats", lambda: plain)
    save_model(tiny_loaded(), tmp_path / "ours", None, {})
    with pytest.raises(UserError, match="names no program that could be asked"):
        export_model(tmp_path / "ours", tmp_path / "hf", "hf", check=Check(2))


def test_a_card_without_certificate_says_so_and_names_no_licence(tmp_path: Path) -> None:
    write_model(tiny_loaded(), tmp_path / "out", "factory", torch.float32, **NAMES)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "exported without `--verify`" in card.text and "tinylmm export --license ID" in card.text
    assert not (tmp_path / "out" / CERTIFICATE).exists()


def test_a_model_without_adapters_has_no_peft_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no part of it was trained through an adapter.*--to hf writes it whole"):
        write_model(tiny_loaded(), tmp_path / "out", "adapter", torch.float32)


def test_an_adapters_modules_have_the_names_of_transformers_class(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    named = {
        (
            "llm",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
        ): "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        ("vision_tower", "encoder.layers.1.mlp.fc1"): "model.vision_tower.encoder.layers.1.mlp.fc1",
        ("connector", "layers.0.lora_B.weight"): "model.multi_modal_projector.linear_1.lora_B.weight",
        ("connector", "layers.2"): "model.multi_modal_projector.linear_2",
    }
    assert {key: module_name(loaded, *key) for key in named} == named


def test_differing_answers_are_shown_but_for_near_ties() -> None:
    found = (Differing("what?", "red", "blue", True), Differing("which?", "3", "8", False))
    error = OtherAnswersError(certificate(equal_answers=2, near_ties=1, differing=found), Path("out.failed"))
    assert "'which?': ours '3', theirs '8'" in str(error) and "blue" not in str(error)
    assert ask_ours(tiny_loaded(), [Question("hi")], 2)[0].prompt

"""The LMM's numbers: packing, leakage, supervised-only logits, placeholder counting, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.builders import IMAGE_SIZE, VOCAB, record, tiny_lmm
from tests.reference import generate
from tinylmm.data.collate import Collator

IMAGE = -200
PIXELS = {
    name: torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(i))
    for i, name in enumerate("abc")
}


def samples() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, VOCAB, (n,), generator=draw).tolist() for n in (9, 14, 6, 11)]
    return [
        record("one", [IMAGE, *ids[0]], 4, ("a",)),
        record("text", ids[1], 5),
        record("two", [*ids[2][:2], IMAGE, *ids[2][2:], IMAGE, *ids[2]], 3, ("b", "c")),
        record("last", [IMAGE, *ids[3]], 6, ("a",)),
    ]


def batch(model: Any, rows: list[dict[str, Any]], packing: bool, row_tokens: int = 64) -> dict[str, Any]:
    collator = Collator(model.image_tokens, 3, row_tokens, packing, PIXELS.__getitem__, 128)
    made = collator(rows)
    return {k: made[k] for k in ("input_ids", "position_ids", "targets", "pixel_values")}


def loss_and_gradients(packing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = tiny_lmm().train()
    output = model(**batch(model, samples(), packing))
    output.loss_sum.backward()
    return output.loss_sum, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_packed_and_unpacked_batches_give_the_same_loss_and_gradients() -> None:
    packed, packed_gradients = loss_and_gradients(packing=True)
    unpacked, unpacked_gradients = loss_and_gradients(packing=False)
    assert packed.item() == pytest.approx(unpacked.item(), rel=1e-5)
    assert packed_gradients.keys() == unpacked_gradients.keys() and len(packed_gradients) > 20
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, unpacked_gradients[name], rtol=1e-5, atol=1e-5)


def test_a_samples_loss_does_not_change_with_what_shares_its_row() -> None:
    model = tiny_lmm().eval()
    alone = model(**batch(model, samples()[:1], True)).loss_sum
    others = [record("noise", torch.randint(5, VOCAB, (20,)).tolist(), 1), samples()[0]]
    together = model(**batch(model, others, True))
    noise = model(**batch(model, others[:1], True))
    assert batch(model, others, True)["input_ids"].shape[0] == 1, (
        "both must share one row for this test to mean anything"
    )
    assert (together.loss_sum - noise.loss_sum).item() == pytest.approx(alone.item(), abs=1e-5)


def test_loss_at_supervised_positions_equals_the_full_computation() -> None:
    model = tiny_lmm().eval()
    inputs = batch(model, samples()[:1], False)
    embeddings, _ = model.embed(inputs["input_ids"], inputs["pixel_values"], None)
    logits = model.llm(inputs_embeds=embeddings).logits
    full = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(model(**inputs).loss_sum, full, rtol=1e-5, atol=1e-5)


def test_chunked_loss_equals_the_loss_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lmm().train()
    inputs = batch(model, samples(), True)
    whole = model(**inputs).loss_sum
    monkeypatch.setattr("tinylmm.models.loss.CHUNK_TOKENS", 4)
    chunked = model(**inputs).loss_sum
    chunked.backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    assert model.llm.lm_head.weight.grad.abs().sum() > 0


def test_cached_features_give_the_same_loss_as_pixels() -> None:
    model = tiny_lmm().eval()
    inputs = batch(model, samples(), True)
    pixels = inputs.pop("pixel_values")
    features = model.tower_features(pixels)
    torch.testing.assert_close(
        model(**inputs, image_features=features).loss_sum, model(**inputs, pixel_values=pixels).loss_sum
    )


def test_a_placeholder_without_its_image_is_an_error_with_both_numbers() -> None:
    model = tiny_lmm()
    inputs = batch(model, samples(), True)
    inputs["pixel_values"] = inputs["pixel_values"][:-1]
    with pytest.raises(ValueError, match="16 image placeholders but 12 image features"):
        model(**inputs)


def test_text_only_rows_never_run_the_tower() -> None:
    model = tiny_lmm().train()
    model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the tower ran"))
    assert model(**batch(model, samples()[1:2], True)).loss_sum > 0


def test_a_blank_image_keeps_the_connector_in_the_graph_where_ranks_must_agree() -> None:
    model = tiny_lmm().train()
    plain = model(**batch(model, samples()[1:2], True)).loss_sum
    model.blank_image = "connector"
    touched = model(**batch(model, samples()[1:2], True)).loss_sum
    touched.backward()
    assert touched.item() == plain.item()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


def test_generation_does_not_depend_on_what_else_is_in_the_batch() -> None:
    model = tiny_lmm().eval()
    prompts = [[IMAGE] * model.image_tokens + [7, 8, 9], [20, 21], [IMAGE] * model.image_tokens + [30] * 9]
    features = model.tower_features(torch.stack([PIXELS["a"], PIXELS["b"]]))
    together = generate(model, prompts, features, 6, 2, 3)
    alone = [
        generate(model, [prompts[0]], features[:1], 6, 2, 3)[0],
        generate(model, [prompts[1]], None, 6, 2, 3)[0],
        generate(model, [prompts[2]], features[1:], 6, 2, 3)[0],
    ]
    assert together == alone and all(len(row) <= 6 for row in together)

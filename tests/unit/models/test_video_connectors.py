"""TinyLLaVA-Video's connectors against a second, plainly written form: a loop over groups, heads and positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tinylmm.config.groups import conf_folder
from tinylmm.models.connectors import Connector, MLPConnector
from tinylmm.models.query_connectors import PerceiverConnector
from tinylmm.models.video_connectors import GroupResamplerConnector, NaiveResamplerConnector, joined, positions
from tinylmm.sizing.connectors import connector_part, takes_clips
from tinylmm.sizing.parameters import total_parameters

DV, DL, HEADS, HEAD = 12, 20, 2, 4
Weights = dict[str, Tensor]


def published_positions(length: int, width: int) -> Tensor:
    """Position p, column 2i: sin(p / 10000^(2i/width)), column 2i + 1: its cosine, kept in 16 bits."""
    table = torch.zeros(length, width, dtype=torch.float16)
    for i in range(width // 2):
        rate = torch.exp(torch.tensor(2.0 * i) * -(math.log(10000.0) / width))
        for p in range(length):
            table[p, 2 * i], table[p, 2 * i + 1] = torch.sin(p * rate), torch.cos(p * rate)
    return table.float()


def plain_resampler(media: Tensor, w: Weights, depth: int) -> Tensor:
    """One clip's tokens (P, D) to its latents' answers (Q, D)."""
    latents = w["latents"]
    for n in range(depth):
        block = {key.removeprefix(f"layers.{n}."): value for key, value in w.items() if key.startswith(f"layers.{n}.")}
        seen = layer_norm(media, (DL,), block["0.norm_media.weight"], block["0.norm_media.bias"])
        asking = layer_norm(latents, (DL,), block["0.norm_latents.weight"], block["0.norm_latents.bias"])
        queries = asking @ block["0.to_q.weight"].T / math.sqrt(HEAD)
        both = torch.cat([seen, asking]) @ block["0.to_kv.weight"].T
        keys, values = both[:, : HEADS * HEAD], both[:, HEADS * HEAD :]
        heads = []
        for head in range(HEADS):
            columns = slice(head * HEAD, (head + 1) * HEAD)
            heads.append((queries[:, columns] @ keys[:, columns].T).softmax(-1) @ values[:, columns])
        latents = latents + torch.cat(heads, -1) @ block["0.to_out.weight"].T
        hidden = layer_norm(latents, (DL,), block["1.0.weight"], block["1.0.bias"])
        latents = latents + gelu(hidden @ block["1.1.weight"].T) @ block["1.3.weight"].T
    return layer_norm(latents, (DL,), w["norm.weight"], w["norm.bias"])


def plain_naive(clip: Tensor, w: Weights, depth: int) -> Tensor:
    media = clip @ w["linear.weight"].T + w["linear.bias"]
    return plain_resampler(media + published_positions(*media.shape), w, depth)


def plain_group(clip: Tensor, w: Weights, depth: int, groups: int) -> Tensor:
    media = clip @ w["linear.weight"].T + w["linear.bias"]
    size, longer = len(media) // groups, len(media) % groups
    answers, start = [], 0
    for number in range(groups):
        end = start + size + (number < longer)
        answers.append(plain_resampler(media[start:end], w, depth))
        start = end
    assert start == len(media)
    output = torch.cat(answers)
    return output + published_positions(*output.shape)


def made(kind: type[Connector], **options: Any) -> Connector:
    torch.manual_seed(0)
    found = kind(DV, DL, heads=HEADS, head_dim=HEAD, init="torch", **options).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "norm" in name or name.endswith("1.0.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


def clips(tokens: int) -> Tensor:
    return torch.randn(2, tokens, DV, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [1, 7, 16, 300])
def test_the_naive_resampler_is_the_plain_form(tokens: int) -> None:
    connector = made(NaiveResamplerConnector, num_queries=5, depth=3)
    expected = [plain_naive(clip, connector.state_dict(), 3) for clip in clips(tokens)]
    torch.testing.assert_close(connector(clips(tokens)), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 18, 299, 300])
def test_the_group_resampler_is_the_plain_form(tokens: int) -> None:
    connector = made(GroupResamplerConnector, num_queries=12, groups=4, depth=3)
    expected = [plain_group(clip, connector.state_dict(), 3, 4) for clip in clips(tokens)]
    torch.testing.assert_close(connector(clips(tokens)), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_groups_answer_depends_on_its_own_tokens_alone() -> None:
    connector = made(GroupResamplerConnector, num_queries=12, groups=4, depth=1)
    first = clips(18)  # groups of 5, 5, 4 and 4
    second = first.clone()
    second[:, 10:14] += 1
    moved = (connector(first) - connector(second)).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [False] * 6 + [True] * 3 + [False] * 3


def test_order_in_time_matters_to_the_naive_resampler() -> None:
    connector = made(NaiveResamplerConnector, num_queries=5, depth=1)
    assert not torch.allclose(connector(clips(16)), connector(clips(16).flip(1)), atol=1e-3)


def test_the_position_table_is_rounded_to_16_bits_in_any_dtype() -> None:
    found = positions(torch.zeros(1, 700, DL))
    assert torch.equal(found, published_positions(700, DL))
    assert torch.equal(found, found.half().float())
    exact = torch.sin(torch.arange(700).double())
    assert 0 < (found[:, 0].double() - exact).abs().max() < 2**-11
    # 16 bits first, then bfloat16: rounding once would give other numbers.
    twice = positions(torch.zeros(1, 700, DL, dtype=torch.bfloat16))
    assert torch.equal(twice, found.bfloat16())


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("group_resampler", 2048, 115_714_048),
        ("naive_resampler", 2048, 116_697_088),
        ("group_resampler", 2560, 176_099_840),
        ("naive_resampler", 2560, 177_328_640),
    ],
)
def test_published_sizes_are_built_and_planned(name: str, width: int, parameters: int) -> None:
    spec = yaml.safe_load((conf_folder() / "connector" / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = {"naive_resampler": NaiveResamplerConnector, "group_resampler": GroupResamplerConnector}[name]
    with torch.device("meta"):
        connector = kind(1152, width, **spec["options"])
    assert sum(parameter.numel() for parameter in connector.parameters()) == parameters
    assert connector.num_tokens(16 * 728) == 512
    part = connector_part(spec["_target_"], spec["options"], 1152, 728, width, tiled=False)
    assert (total_parameters(part), part.tokens) == (parameters, 512)


def test_parameters_have_the_names_of_the_published_checkpoints() -> None:
    for connector in (made(GroupResamplerConnector, num_queries=12, groups=4), made(NaiveResamplerConnector)):
        block = {f"0.{name}.{kind}" for name in ("norm_media", "norm_latents") for kind in ("weight", "bias")}
        block |= {"0.to_q.weight", "0.to_kv.weight", "0.to_out.weight"}
        block |= {"1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"}
        expected = {"latents", "linear.weight", "linear.bias", "norm.weight", "norm.bias"}
        expected |= {f"layers.{n}.{name}" for n in range(3) for name in block}
        assert connector.state_dict().keys() == expected


@pytest.mark.parametrize("frames", [(3, 3), (1, 4, 2), (5, 1), (1, 1, 7)])
@pytest.mark.parametrize("kind", ["naive", "group"])
def test_clips_of_different_lengths_in_one_batch_are_as_each_alone(kind: str, frames: tuple[int, ...]) -> None:
    """Frames of 5 tokens, which 4 groups do not divide."""
    connector = (
        made(NaiveResamplerConnector, num_queries=5, depth=2)
        if kind == "naive"
        else made(GroupResamplerConnector, num_queries=12, groups=4, depth=2)
    )
    seen = torch.randn(sum(frames), 5, DV, generator=torch.Generator().manual_seed(3))
    together = connector(*joined(seen, frames))
    alone = torch.cat([connector(clip.flatten(0, 1)[None]) for clip in seen.split(list(frames))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_what_takes_clips_together_is_known_without_torch_too() -> None:
    for kind in (NaiveResamplerConnector, GroupResamplerConnector, PerceiverConnector, MLPConnector):
        assert takes_clips(f"{kind.__module__}.{kind.__name__}") == kind.takes_clips

"""Every shipped connector: what comes out, where its published form says so, what trains, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.builders import WIDTH, redescribe, tiny_lmm, tiny_loaded
from tinylmm.config.groups import conf_folder
from tinylmm.config.identities import ConnectorIdentity
from tinylmm.config.targets import resolve_target
from tinylmm.errors import ConfigError
from tinylmm.models.build import build_connector, check_fit
from tinylmm.models.checkpoint import load_model, save_model
from tinylmm.models.connectors import Connector, MLPConnector, MoFMLPConnector
from tinylmm.models.grid_connectors import (
    AveragePoolMLPConnector,
    LDPConnector,
    LDPv2Connector,
    PixelShuffleMLPConnector,
)
from tinylmm.models.lmm import LMM
from tinylmm.models.query_connectors import BenchResamplerConnector, PerceiverConnector, QFormerConnector

DV = 24
NAMES = sorted(path.stem for path in (conf_folder() / "connector").glob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {
    "qformer": {"num_queries": 5, "hidden_size": 16, "layers": 3, "heads": 2, "dropout": 0.0},
    "resampler": {"num_queries": 5, "heads": 2, "head_dim": 8, "depth": 2},
    "resampler_bench": {"num_queries": 5, "hidden_size": 16, "heads": 2, "depth": 2},
    "naive_resampler": {"num_queries": 5, "heads": 2, "head_dim": 8, "depth": 2},
    "group_resampler": {"num_queries": 6, "groups": 3, "heads": 2, "head_dim": 8, "depth": 2},
}
"""Sizes in place of the published ones; everything else is as in the YAML."""


def yaml_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / "connector" / f"{name}.yaml").read_text(encoding="utf-8"))


def connector(name: str, llm_dim: int = WIDTH, **options: Any) -> Connector:
    spec = yaml_of(name)
    if name == "identity":
        llm_dim = DV
    torch.manual_seed(0)
    made = resolve_target(spec["_target_"], (), Connector, "connector")
    return made(DV, llm_dim, **{**spec.get("options", {}), **SMALL.get(name, {}), **options})


def features(tokens: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, DV, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_it_gives_as_many_tokens_as_it_says_and_every_weight_learns(name: str) -> None:
    made = connector(name).train()
    output = made(features())
    assert output.shape == (2, made.num_tokens(16), made.llm_dim)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    silent = {n for n, p in made.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    # A constant added to every key moves no attention: its gradient is zero by the mathematics, up to rounding.
    assert not {n for n in silent if not n.endswith("key.bias")}
    torch.optim.SGD(made.parameters(), lr=1e-2).step()
    assert not torch.equal(made(features()), output)


def test_identity_hands_the_features_on() -> None:
    assert connector("identity")(features()).equal(features())
    with pytest.raises(ConfigError, match="needs equal widths, but the tower's is 24 and the LLM's 32"):
        build_connector(
            ConnectorIdentity.model_validate({"_target_": yaml_of("identity")["_target_"]}), DV, tiny_lmm().llm, []
        )


@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_mix(name: str) -> None:
    made = connector(name).eval()
    together = made(features())
    torch.testing.assert_close(made(features()[1:]), together[1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_the_start_of_the_weights_is_what_the_option_says(name: str) -> None:
    matrices = {init: [m.weight for m in connector(name, llm_dim=96, init=init).modules() if isinstance(m, nn.Linear)]
                for init in ("normal", "torch")}  # fmt: skip
    for weight in matrices["normal"]:
        assert abs(weight.std().item() - 0.02) < 0.004 and weight.abs().max() < 0.12
    for weight in matrices["torch"]:  # uniform within 1 / sqrt(inputs)
        bound = weight.shape[1] ** -0.5
        assert weight.abs().max() <= bound and abs(weight.std().item() - bound / 3**0.5) < 0.15 * bound
    with pytest.raises(ValueError, match="init is 'xavier'; allowed: normal, torch"):
        connector(name, init="xavier")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("identity", "mof_mlp")])
def test_a_model_with_it_trains_saves_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    spec = yaml_of(name)
    options = {
        **spec.get("options", {}),
        **SMALL.get(name, {}),
        **({"side": 2} if "side" in SMALL.get(name, {}) else {}),
    }
    loaded = tiny_loaded()
    redescribe(loaded, connector={"_target_": spec["_target_"], "options": options})
    tower, llm = loaded.model.vision_tower, loaded.model.llm
    made = build_connector(loaded.description.connector, tower.hidden_size, llm, [])
    check_fit(tower, made)
    loaded.model = LMM(llm, tower, made, "llama")
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[-200] * loaded.model.image_tokens + [5, 6, 7]])
    targets = torch.tensor([[-100] * loaded.model.image_tokens + [6, 7, 2]])
    loaded.model(tokens, torch.arange(tokens.shape[1])[None], targets, pixel_values=pixels).loss_sum.backward()
    assert all(p.grad is not None for p in made.parameters())
    save_model(loaded, tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", [])
    before, after = made.state_dict(), again.model.connector.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(
        again.model.eval().image_embeddings(pixels, None), loaded.model.eval().image_embeddings(pixels, None)
    )


# ------------------------------------------------------------------------------------------------- against the originals


def test_an_mlp_of_any_depth_takes_either_activation() -> None:
    for depth in (1, 2, 4):
        made = MLPConnector(DV, WIDTH, depth=depth, activation="relu")
        assert [type(m) for m in made.layers] == ([nn.Linear] + [nn.ReLU, nn.Linear] * (depth - 1))
    with pytest.raises(ValueError, match="activation is 'silu'; allowed: gelu, relu"):
        MLPConnector(DV, WIDTH, activation="silu")


def test_mof_mlp_maps_even_tokens_by_one_mlp_and_odd_by_the_other() -> None:
    made = MoFMLPConnector(DV, WIDTH)
    output = made(features(6))
    torch.testing.assert_close(output[:, 0::2], made.clip(features(6)[:, 0::2]))
    torch.testing.assert_close(output[:, 1::2], made.dinov2(features(6)[:, 1::2]))
    with pytest.raises(ValueError, match="takes pairs of tokens, but the tower gives 577"):
        made.num_tokens(577)


def test_the_perceiver_is_flamingos_written_out() -> None:
    made = PerceiverConnector(DV, 16, num_queries=3, depth=2, heads=2, head_dim=4, init="torch").eval()
    weights, x = made.state_dict(), features()
    latents, image = weights["latents"].expand(2, -1, -1), made.linear(x)
    for i in range(2):
        w = {k.removeprefix(f"layers.{i}."): v for k, v in weights.items() if k.startswith(f"layers.{i}.")}
        media = nn.functional.layer_norm(image, (16,), w["0.norm_media.weight"], w["0.norm_media.bias"])
        normed = nn.functional.layer_norm(latents, (16,), w["0.norm_latents.weight"], w["0.norm_latents.bias"])
        key, value = (torch.cat([media, normed], 1) @ w["0.to_kv.weight"].T).split(8, -1)
        query = normed @ w["0.to_q.weight"].T
        heads = []
        for h in range(2):
            q, k, v = (t[..., 4 * h : 4 * h + 4] for t in (query, key, value))
            heads.append((q @ k.mT / 2).softmax(-1) @ v)
        latents = latents + torch.cat(heads, -1) @ w["0.to_out.weight"].T
        hidden = nn.functional.layer_norm(latents, (16,), w["1.0.weight"], w["1.0.bias"])
        latents = latents + nn.functional.gelu(hidden @ w["1.1.weight"].T) @ w["1.3.weight"].T
    torch.testing.assert_close(made(x), made.norm(latents), atol=1e-5, rtol=1e-4)
    assert not any(layer.bias is not None for layer in made.layers.modules() if isinstance(layer, nn.Linear))


def test_the_bench_resampler_looks_at_the_image_alone() -> None:
    made = BenchResamplerConnector(DV, WIDTH, num_queries=3, hidden_size=16, depth=1, heads=2).eval()
    block, x = made.resampler_blocks[0], features()
    image, query = block.norm_image(x), block.to_q(block.norm_hidden(made.queries)).expand(2, -1, -1)
    key, value = block.to_k(image), block.to_v(image)
    heads = [(query[..., s] @ key[..., s].mT / 8**0.5).softmax(-1) @ value[..., s] for s in (slice(0, 8), slice(8, 16))]
    hidden = made.queries + block.to_out(torch.cat(heads, -1))
    hidden = hidden + block.feed_forward(hidden)
    torch.testing.assert_close(made(x), made.final_proj(made.post_norm(hidden)), atol=1e-5, rtol=1e-4)
    assert not any(m.bias is not None for m in made.modules() if isinstance(m, nn.Linear))


def test_the_published_sizes_have_the_published_shapes() -> None:
    with torch.device("meta"):
        qformer = QFormerConnector(1152, 2560, **yaml_of("qformer")["options"])
        bench = BenchResamplerConnector(1024, 2048, **yaml_of("resampler_bench")["options"])
        perceiver = PerceiverConnector(1152, 2560, **yaml_of("resampler")["options"])
    assert qformer.query_tokens.shape == (1, 128, 768)
    crossing = [i for i, layer in enumerate(qformer.qformer.encoder.layer) if layer.has_cross_attention]
    assert crossing == [0, 2, 4, 6, 8, 10]
    assert qformer.qformer.encoder.layer[0].crossattention.attention.key.weight.shape == (768, 1152)
    assert not hasattr(qformer.qformer.encoder.layer[0], "intermediate"), "no feed-forward for text"
    assert (len(bench.resampler_blocks), tuple(bench.final_proj.weight.shape)) == (3, (2048, 768))
    assert (len(perceiver.layers), tuple(perceiver.latents.shape)) == (3, (128, 2560))


def test_pixel_shuffle_folds_as_internvl_does() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    made = PixelShuffleMLPConnector(DV, WIDTH, factor=2, norm=False)
    made.layers = nn.Identity()
    x = features()
    expected = InternVLModel.pixel_shuffle(None, x.view(2, 4, 4, DV), 0.5).flatten(1, 2)
    torch.testing.assert_close(made(x), expected)


def test_average_pooling_covers_the_grid_evenly() -> None:
    made = AveragePoolMLPConnector(DV, WIDTH)
    made.layers = nn.Identity()
    x = features()
    assert [made.num_tokens(tokens) for tokens in (4, 576, 729)] == [1, 144, 196]
    assert AveragePoolMLPConnector(DV, WIDTH, side=12).num_tokens(729) == 144
    quarter = x.view(2, 4, 4, DV)[:, :2, 2:].mean(dim=(1, 2))
    torch.testing.assert_close(made(x)[:, 1], quarter)


def test_ldp_quarters_the_tokens_and_rounds_an_odd_side_up() -> None:
    made = LDPConnector(DV, WIDTH).eval()
    for tokens, expected in ((576, 144), (729, 196)):
        assert made.num_tokens(tokens) == expected
        assert made(features(tokens, batch=1)).shape == (1, expected, WIDTH)
    block = made.blocks[0]
    assert block.depthwise.groups == WIDTH and block.squeeze.out_channels == 8


def test_ldp_v2_with_a_silent_convolution_is_its_pooled_mlp() -> None:
    made = LDPv2Connector(DV, WIDTH)
    nn.init.zeros_(made.position.weight), nn.init.zeros_(made.position.bias)
    torch.testing.assert_close(
        made(features())[:, 0], made.mlp(features()).view(2, 4, 4, WIDTH)[:, :2, :2].mean((1, 2))
    )


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", ["pixel_shuffle_mlp", "avgpool_mlp", "ldp", "ldp_v2"])
@pytest.mark.parametrize("tokens", [728, 577])
def test_tokens_that_form_no_square_are_refused_with_what_to_set(name: str, tokens: int) -> None:
    with pytest.raises(
        ValueError, match=rf"gives {tokens} tokens an image, which is no square. Set vision_tower.select"
    ):
        connector(name).num_tokens(tokens)


REFUSED = [
    (lambda: connector("pixel_shuffle_mlp").num_tokens(729), r"grid of 27 x 27 patches; factors that do: 1, 3, 9, 27"),
    (lambda: connector("pixel_shuffle_mlp", factor=0), "factor is 0; it must be at least 1"),
    (lambda: connector("avgpool_mlp", side=3).num_tokens(4), "side is 3, more than the 2 x 2 patches"),
    (lambda: connector("ldp_v2", side=0), "side is 0; it must be at least 1"),
    (lambda: connector("resampler", num_queries=0), "num_queries is 0; at least 1 token"),
    (lambda: connector("group_resampler", groups=4), "num_queries is 6, which 4 groups do not divide"),
    (lambda: connector("qformer", heads=3), "hidden_size is 16, which 3 heads do not divide"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_connector_that_cannot_take_the_towers_tokens_is_a_fault_of_the_spec() -> None:
    tower = tiny_lmm().vision_tower
    tower.drop_first_token = True
    with pytest.raises(ConfigError, match=r"connector: LDPConnector folds a square grid.*gives 3 tokens"):
        check_fit(tower, connector("ldp"))

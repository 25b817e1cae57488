"""Images in tiles: geometry, tokens and newlines equal transformers' LlavaNext; they train, save and answer like others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from tests.builders import IMAGE, IMAGE_SIZE, WIDTH, record, redescribe, tiny_lmm, tiny_loaded
from tests.reference import generate
from tinylmm.config.spec import ImageSpec
from tinylmm.data.chat import get_template
from tinylmm.data.collate import Collator
from tinylmm.data.images import image_size, open_image
from tinylmm.data.slots import question
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import ConfigError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import PromptMaker
from tinylmm.models.anyres import TiledConnector, with_tiles
from tinylmm.models.checkpoint import load_model, save_model
from tinylmm.models.connectors import IdentityConnector, MLPConnector
from tinylmm.models.lmm import LMM
from tinylmm.models.query_connectors import PerceiverConnector
from tinylmm.sizing.tiling import Tiling
from tinylmm.training.dataset import PreparedSamples
from tinylmm.training.features import open_features

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ANYRES = IMAGE | {"mode": "anyres", "tiles": [list(grid) for grid in GRIDS]}
SIDE = 2
"""Tokens along a tile's edge of the tiny tower: 16 pixels in patches of 8."""
SHAPES = [(40, 30), (30, 40), (33, 33), (500, 20), (3, 700), (16, 16), (97, 31), (1, 1), (640, 480), (1000, 7)]


def tiled_lmm() -> LMM:
    model = tiny_lmm()
    connector = with_tiles(model.connector, ImageSpec(**ANYRES), model.vision_tower.num_tokens)
    assert isinstance(connector, TiledConnector)
    return LMM(model.llm, model.vision_tower, connector, "llama")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for name, shape in {"wide.png": (50, 20), "high.png": (20, 50), "square.png": (24, 24)}.items():
        paths[name] = tmp_path / name
        noise(*shape).save(paths[name])
    return paths


def collator(model: LMM, images: dict[str, Path], max_length: int = 200) -> Collator:
    transform = ImageTransform(**ANYRES)
    return Collator(
        image_tokens=lambda name: model.tokens_of(*image_size(images[name])),
        pad_id=0,
        row_tokens=max_length,
        packing=True,
        image=lambda name: transform(open_image(images[name])),
        max_length=max_length,
        size=lambda name: image_size(images[name]),
    )


def test_canvas_and_number_of_tiles_are_llava_nexts_for_every_shape() -> None:
    tiling = Tiling(24, GRIDS)
    pinpoints = [[rows * 24, columns * 24] for rows, columns in GRIDS]
    edges = [1, 2, 5, 11, 23, 24, 25, 36, 47, 48, 49, 71, 72, 73, 96, 130, 301, 999]
    for width in edges:
        for height in edges:
            rows, columns = tiling.grid(width, height)
            assert [rows * 24, columns * 24] == list(select_best_resolution((height, width), pinpoints))
            assert tiling.num_tiles(width, height) == image_size_to_num_patches((height, width), pinpoints, 24)


@pytest.mark.parametrize("side", [2, 5])
def test_tokens_of_an_image_are_laid_out_as_llava_next_packs_them(side: int) -> None:
    connector = TiledConnector(IdentityConnector(WIDTH, WIDTH), Tiling(side * 8, GRIDS), side * side)
    pinpoints = [[rows * side * 8, columns * side * 8] for rows, columns in GRIDS]
    vision = SimpleNamespace(image_size=side * 8, patch_size=8)
    reference = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    tiles = [torch.randn(connector.tiling.num_tiles(*shape), side * side, WIDTH) for shape in SHAPES]
    sizes = torch.tensor(SHAPES)
    expected, lengths = LlavaNextModel.pack_image_features(
        reference, tiles, sizes.flip(1), vision_feature_select_strategy="full", image_newline=connector.image_newline
    )
    assert torch.equal(connector(torch.cat(tiles), sizes), torch.cat(expected))
    assert [connector.tokens_of(*shape) for shape in SHAPES] == lengths.tolist()


def test_a_batch_of_images_of_any_shape_trains_tower_connector_and_newline(images: dict[str, Path]) -> None:
    model = tiled_lmm().train()
    rows = [
        record("a", [5, -200, 6, -200, 7, 8], 2, ("wide.png", "high.png")),
        record("b", [-200, 8, 9], 1, ("square.png",)),
    ]
    batch = collator(model, images)(rows)
    assert batch["image_sizes"].tolist() == [[50, 20], [20, 50], [24, 24]]
    assert len(batch["pixel_values"]) == 4 + 4 + 5
    counts = [model.tokens_of(*shape) for shape in batch["image_sizes"].tolist()]
    assert int((batch["input_ids"] == -200).sum()) == sum(counts) and len(set(counts)) > 1
    keys = ("input_ids", "position_ids", "targets", "pixel_values", "image_sizes")
    together = model(**{key: batch[key] for key in keys})
    together.loss_sum.backward()
    silent = {n for n, p in model.connector.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert not silent and model.vision_tower.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    alone = [collator(model, images)([row]) for row in rows]
    apart = sum(model(**{key: one[key] for key in keys}).loss_sum for one in alone)
    torch.testing.assert_close(together.loss_sum, apart)


def test_cached_features_of_tiles_train_as_the_tiles_themselves(images: dict[str, Path], tmp_path: Path) -> None:
    model = tiled_lmm().eval()
    transform = ImageTransform(**ANYRES)
    tiling = model.connector.tiling
    cache = open_features(
        model.vision_tower,
        list(images),
        lambda name: transform(open_image(images[name])),
        str,
        tmp_path / "features",
        tmp_path / "scratch",
        {},
        lambda name: tiling.num_tiles(*image_size(images[name])),
    )
    batch = collator(model, images)([record("a", [-200, -200, 8, 9], 1, ("square.png", "high.png"))])
    features = cache(batch["image_paths"])
    assert len(features) == 5 + 4
    from_cache = model.image_embeddings(None, features, batch["image_sizes"])
    torch.testing.assert_close(
        from_cache, model.image_embeddings(batch["pixel_values"], None, batch["image_sizes"]), atol=1e-6, rtol=1e-5
    )


def test_a_batch_without_images_still_touches_the_newline_where_ranks_must_agree() -> None:
    model = tiled_lmm().train()
    model.blank_image = "connector"
    ids = torch.tensor([[5, 6, 7]])
    model(ids, torch.arange(3)[None], torch.tensor([[6, 7, -100]])).loss_sum.backward()
    assert all(p.grad is not None and not p.grad.abs().sum() for p in model.connector.parameters())


def test_sizes_that_do_not_belong_to_the_tiles_are_refused(images: dict[str, Path]) -> None:
    model = tiled_lmm()
    batch = collator(model, images)([record("a", [-200, 8, 9], 1, ("wide.png",))])
    with pytest.raises(ValueError, match="1 images of these sizes have 5 tiles, but 4 came"):
        model.embed(batch["input_ids"], batch["pixel_values"], None, torch.tensor([[24, 24]]))
    with pytest.raises(ValueError, match="the sizes of the images are needed"):
        model.embed(batch["input_ids"], batch["pixel_values"], None)


def test_lengths_of_prepared_samples_count_each_image_by_its_shape(images: dict[str, Path], tmp_path: Path) -> None:
    model = tiled_lmm()
    rows = [record("a", [5, -200, 6], 1, ("wide.png",)), record("b", [-200, -200, 9], 1, ("square.png", "high.png"))]
    rows.append(record("c", [4, 5, 6], 2))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "prepared/samples")
    widths = {name: model.tokens_of(*image_size(path)) for name, path in images.items()}
    samples = PreparedSamples([tmp_path / "prepared"], widths.__getitem__, 200)
    assert samples.report.tokens == (2 + widths["wide.png"]) + (1 + widths["square.png"] + widths["high.png"]) + 3
    short = PreparedSamples([tmp_path / "prepared"], widths.__getitem__, widths["wide.png"] + 2)
    assert (short.report.dropped_ids, short.report.samples) == (["b"], 2)


def test_a_saved_model_brings_its_newline_back(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    redescribe(loaded, image=ANYRES)
    loaded.model = tiled_lmm()
    save_model(loaded, tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", []).model
    assert again.tiled and torch.equal(again.connector.image_newline, loaded.model.connector.image_newline)
    assert again.tokens_of(50, 20) == loaded.model.tokens_of(50, 20)


def test_answers_do_not_depend_on_the_other_images_of_the_batch(images: dict[str, Path]) -> None:
    model, tokenizer = tiled_lmm().eval(), tiny_loaded().tokenizer
    transform, maker = ImageTransform(**ANYRES), PromptMaker(get_template("llama"), tokenizer)
    sizes = {name: image_size(path) for name, path in images.items()}
    prompts = [
        maker.prompt(f"{name}{n}", [question(f"what is it? {n}", 1)], [name], [model.tokens_of(*sizes[name])])
        for name in images
        for n in range(3)
    ]

    def answers(rows: int) -> dict[str, list[int]]:
        greedy = Sampling(max_new_tokens=4)
        engine = Engine(
            model, lambda name: transform(open_image(images[name])), maker.ends, greedy, rows=rows, sizes=sizes
        )
        return {reply.item_id: reply.ids for batch in engine.replies(prompts) for reply in batch}

    expected = {}
    for prompt in prompts:
        tiles, shape = transform(open_image(images[prompt.images[0]])), sizes[prompt.images[0]]
        (ids,) = generate(model, [list(prompt.ids)], model.tower_features(tiles), 4, 1, 3, torch.tensor([shape]))
        expected[prompt.item_id] = ids
    assert answers(64) == answers(1) == expected


def test_a_connector_without_a_grid_cannot_be_tiled() -> None:
    tower = tiny_lmm().vision_tower
    resampler = PerceiverConnector(tower.hidden_size, WIDTH, num_queries=5, heads=2, head_dim=4)
    with pytest.raises(ConfigError, match=r"PerceiverConnector gives 5 a tile, which form none. Choose connector=mlp"):
        with_tiles(resampler, ImageSpec(**ANYRES), tower.num_tokens)
    with pytest.raises(ConfigError, match="MLPConnector gives 3 a tile"):
        with_tiles(MLPConnector(tower.hidden_size, WIDTH), ImageSpec(**ANYRES), 3)


def test_an_untiled_view_of_the_same_image_is_the_first_tile(images: dict[str, Path]) -> None:
    image = open_image(images["wide.png"])
    tiles: Tensor = ImageTransform(**ANYRES)(image)
    assert tiles.shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(tiles[0], ImageTransform(**IMAGE)(image))
    assert torch.equal(tiles[0], ImageTransform(**ANYRES).one_view(image))

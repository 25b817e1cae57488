"""Hostile and damaged images are refused by name; the transform equals transformers' image processors."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
)

from tinylmm.data.images import check_image, image_header, image_size, open_image, relative_name, safe_path
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import DataError
from tinylmm.sizing.tiling import Tiling

Check = Callable[[Path], object]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be width x height."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    noise(4, 4).save(folder / "a.png")
    noise(4, 4).save(folder / "sub" / "b.png")
    (folder / "inside.png").symlink_to(folder / "sub" / "b.png")
    (tmp_path / "secret.png").write_bytes((folder / "a.png").read_bytes())
    (tmp_path / "images2").mkdir()
    noise(4, 4).save(tmp_path / "images2" / "c.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder").symlink_to(tmp_path)
    return folder


@pytest.mark.parametrize("relative", ["a.png", "sub/b.png", "sub/../a.png", "./a.png", "inside.png"])
def test_path_inside_the_root_is_accepted(root: Path, relative: str) -> None:
    assert safe_path(root, relative).read_bytes()


@pytest.mark.parametrize(
    ("relative", "message"),
    [
        ("../secret.png", "leads out of the image folder"),
        ("sub/../../secret.png", "leads out"),
        ("../images2/c.png", "leads out"),
        ("link.png", "leads out"),
        ("folder/secret.png", "leads out"),
        ("folder/images2/c.png", "leads out"),
        ("/etc/hostname", "leads out of the image folder"),
        ("", "must be relative"),
        ("a\0.png", "must be relative"),
        ("gone.png", "'gone.png': not found"),
        ("a.png/b", "not found"),
        ("x" * 5000, "not found"),
        ("sub", "no regular file"),
    ],
    ids=lambda value: value[:20].replace("\0", "NUL") or "empty",
)
def test_path_that_is_no_file_inside_the_root_is_refused(root: Path, relative: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        safe_path(root, relative)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_known_formats_open_as_rgb(tmp_path: Path, name: str, mode: str) -> None:
    noise(9, 5).convert(mode).save(tmp_path / name)
    check_image(tmp_path / name)
    image = open_image(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (9, 5))


DAMAGED = {
    "text": (b"hello", "not a readable"),
    "empty": (b"", "not a readable"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable"),
    "bomb-196-megapixels": (png_header(14_000, 14_000), "14000 x 14000 = 196,000,000 pixels|too large"),
    "bomb-60-megapixels": (png_header(10_000, 6_000), "60,000,000 pixels.*at most 50,000,000"),
    "png-without-pixels": (png_header(10, 10), "damaged or cut short"),
}


@pytest.mark.parametrize("check", [open_image, check_image])
@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_or_hostile_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str, check: Check) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        check(tmp_path / "x.png")
    assert str(tmp_path / "x.png") in str(caught.value)


@pytest.mark.parametrize("check", [open_image, check_image])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif"])
def test_truncated_file_is_refused(tmp_path: Path, name: str, check: Check) -> None:
    noise(64, 64).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError):
        check(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif"])
def test_fuzzed_files_decode_or_raise_data_error_alone(tmp_path: Path, name: str) -> None:
    noise(24, 24).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(content)
        for position in random.integers(0, len(bad), 8):
            bad[position] = random.integers(0, 256)
        (tmp_path / name).write_bytes(bad)
        for check in (open_image, check_image):
            try:
                check(tmp_path / name)
            except DataError as error:
                assert name in str(error)


SIZES = [(40, 30), (30, 40), (33, 33), (17, 50), (101, 37), (7, 5)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [8, 32])
def test_center_crop_equals_the_clip_processor(width: int, height: int, size: int) -> None:
    clip = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image = noise(width, height)
    expected = torch.as_tensor(np.array(clip(image)["pixel_values"][0]))
    transform = ImageTransform(size, clip.image_mean, clip.image_std, "center_crop")
    torch.testing.assert_close(transform(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("size", [8, 32])
def test_squash_equals_the_siglip_processor(width: int, height: int, size: int) -> None:
    siglip = SiglipImageProcessorPil(size={"height": size, "width": size})
    image = noise(width, height)
    expected = torch.as_tensor(np.array(siglip(image)["pixel_values"][0]))
    transform = ImageTransform(size, siglip.image_mean, siglip.image_std, "squash")
    torch.testing.assert_close(transform(image), expected, atol=1e-6, rtol=0)


def test_pad_centres_the_image_on_the_mean_colour() -> None:
    image = Image.new("RGB", (8, 4), (255, 0, 0))
    pixels = ImageTransform(8, (0.5, 0.25, 0.1), (1.0, 1.0, 1.0), "pad")(image)
    fill = torch.tensor([127 / 255 - 0.5, 63 / 255 - 0.25, 25 / 255 - 0.1])
    torch.testing.assert_close(pixels[:, [0, 1, 6, 7], :], fill[:, None, None].expand(3, 4, 8))
    torch.testing.assert_close(pixels[:, 2:6, :], torch.tensor([0.5, -0.25, -0.1])[:, None, None].expand(3, 4, 8))


@pytest.mark.parametrize("mode", ["squash", "center_crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(40_000, 1), (1, 40_000)], ids=["wide", "high"])
def test_long_strip_needs_no_memory_for_what_is_cut_or_padded(mode: str, width: int, height: int) -> None:
    pixels = ImageTransform(64, (0.5,) * 3, (0.5,) * 3, mode)(Image.new("RGB", (width, height), (255, 255, 255)))
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == torch.float32


def test_box_of_a_long_strip_gives_the_same_pixels_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ImageTransform(16, (0.0,) * 3, (1.0,) * 3, "center_crop")
    image = noise(400, 32).resize((400, 20), Image.Resampling.BOX)
    plain = transform(image)
    monkeypatch.setattr("tinylmm.data.images.MAX_PIXELS", 1)
    torch.testing.assert_close(transform(image), plain, atol=3 / 255, rtol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        (8, (0.5,) * 3, (0.5,) * 3, "stretch"),
        (0, (0.5,) * 3, (0.5,) * 3, "pad"),
        (8, (0.5,), (0.5,) * 3, "pad"),
        (8, (0.5,) * 3, (0.5,) * 3, "square", "bicubic", "pad"),
        (8, (0.5,) * 3, (0.5,) * 3, "center_crop", "bicubic", "squash", 7),
        (8, (0.5,) * 3, (0.5,) * 3, "anyres", "bicubic", "squash", None, ()),
        (8, (0.5,) * 3, (0.5,) * 3, "anyres", "bicubic", "squash", None, ((0, 2),)),
    ],
    ids=["mode", "size", "mean", "square", "short_edge", "no tiles", "no rows"],
)
def test_impossible_transform_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"allowed|need a size|image.tiles is .* it needs pairs"):
        ImageTransform(*arguments)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_center_crop_out_of_a_larger_short_edge_equals_dinov2s_processor(width: int, height: int) -> None:
    bit = BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    image = noise(width, height)
    expected = torch.as_tensor(np.array(bit(image)["pixel_values"][0]))
    transform = ImageTransform(32, bit.image_mean, bit.image_std, "square", square="center_crop", short_edge=40)
    torch.testing.assert_close(transform(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pad_equals_llavas_processor(width: int, height: int) -> None:
    llava = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5, 0.25, 0.1]
    )
    image = noise(width, height)
    expected = torch.as_tensor(np.array(llava(image)["pixel_values"][0]))
    transform = ImageTransform(32, llava.image_mean, llava.image_std, "pad", square="center_crop")
    torch.testing.assert_close(transform(image), expected, atol=1e-6, rtol=0)


def test_bilinear_squash_is_within_a_level_of_the_tensor_resize_of_dinov3s_processor() -> None:
    """That processor needs torchvision, whose resize of tensors is torch's antialiased interpolation."""
    for width, height in SIZES:
        pixels = torch.from_numpy(np.array(noise(width, height))).permute(2, 0, 1)[None].float() / 255
        expected = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)[0]
        found = ImageTransform(32, (0.0,) * 3, (1.0,) * 3, "square", "bilinear")(noise(width, height))
        torch.testing.assert_close(found, expected, atol=1 / 255 + 1e-6, rtol=0)


def test_square_is_the_towers_own_mode() -> None:
    image = noise(40, 30)
    for own in ("squash", "center_crop"):
        square = ImageTransform(16, (0.5,) * 3, (0.5,) * 3, "square", square=own)(image)
        assert torch.equal(square, ImageTransform(16, (0.5,) * 3, (0.5,) * 3, own)(image))


PINPOINTS = [[rows * 32, columns * 32] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


@pytest.mark.parametrize(("width", "height"), [*SIZES, (64, 32), (200, 20), (20, 200), (97, 96), (31, 65), (1, 90)])
def test_anyres_equals_the_processor_of_llava_next(width: int, height: int) -> None:
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS, do_pad=False
    )
    image = noise(width, height)
    expected = torch.as_tensor(np.array(reference(image)["pixel_values"][0]))
    found = ImageTransform(32, reference.image_mean, reference.image_std, "anyres")(image)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert len(found) == Tiling(32, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))).num_tiles(width, height)


def test_only_the_header_is_read_for_an_images_size(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_header(30, 20))
    assert image_size(tmp_path / "x.png") == (30, 20)
    (tmp_path / "y.png").write_bytes(png_header(14_000, 14_000))
    with pytest.raises(DataError, match="too large"):
        image_size(tmp_path / "y.png")


@pytest.mark.parametrize("top", [65535, 4095])
def test_a_grey_picture_of_16_bits_is_scaled_not_clipped(tmp_path: Path, top: int) -> None:
    ramp = np.linspace(0, top, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (4, 1))).save(tmp_path / "ramp.png")
    opened = np.asarray(open_image(tmp_path / "ramp.png"))
    assert opened.shape == (4, 64, 3) and np.array_equal(opened[0, :, 0], ramp >> 8)


def test_an_absolute_path_inside_the_folder_is_accepted_and_named_from_there(root: Path) -> None:
    name = str(root / "sub" / "b.png")
    assert safe_path(root, name) == root / "sub" / "b.png"
    assert relative_name(root, name) == "sub/b.png"
    assert relative_name(root, "sub/b.png") == "sub/b.png"
    outside = str(root.parent / "secret.png")
    assert relative_name(root, outside) == outside
    assert relative_name(root, f"{root}/../secret.png") == f"{root}/../secret.png"


@pytest.mark.parametrize("name", ["link.png", "folder/secret.png", "folder/images2/c.png"])
def test_links_out_of_the_folder_are_followed_where_that_is_asked_for(root: Path, name: str) -> None:
    assert safe_path(root, name, follow_links=True).parent in (root.parent, root.parent / "images2")
    with pytest.raises(DataError, match="set the source's follow_links=true"):
        safe_path(root, name)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "folder/../../secret.png", "sub/../../images2/c.png"]
)
def test_a_path_that_climbs_out_by_its_own_words_is_refused_even_then(root: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"leads out|not found"):
        safe_path(root, name, follow_links=True)


def of_many_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    buffer = io.BytesIO()
    noise(side, side).save(buffer, "jpeg", progressive=True, quality=5)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


@pytest.mark.parametrize("check", [check_image, open_image])
def test_a_jpeg_is_bound_by_its_work_and_not_only_its_pixels(tmp_path: Path, check: Check) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(of_many_scans(600, 1000))
    with pytest.raises(DataError, match=r"a\.jpg: a JPEG of 610 scans of 1000 x 1000 pixels .* at most 500,000,000"):
        check(path)
    path.write_bytes(of_many_scans(30, 100))
    check(path)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("behind", [False, True], ids=["before-the-pixels", "behind-the-pixels"])
@pytest.mark.parametrize("check", [check_image, open_image, image_size])
def test_a_pngs_large_metadata_keeps_nobody_from_its_pixels(
    tmp_path: Path, kind: bytes, behind: bool, check: Check
) -> None:
    buffer, pixels = io.BytesIO(), noise(5, 4)
    pixels.save(buffer, "png")
    png, packed = buffer.getvalue(), zlib.compress(b"x" * 3_000_000)
    large = chunk(kind, b"name\0\1\0\0\0" + packed if kind == b"iTXt" else b"name\0\0" + packed)
    place = png.index(b"IEND" if behind else b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(png[:place] + large + png[place:])
    found = check(tmp_path / "a.png")
    assert found in (None, (5, 4), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_an_image_is_turned_as_its_camera_says_where_that_is_asked_for(
    tmp_path: Path, name: str, orientation: int
) -> None:
    stored = noise(6, 3).resize((60, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        pixels = image.convert("RGB")
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert open_image(tmp_path / name).tobytes() == pixels.tobytes()
    upright = open_image(tmp_path / name, upright=True)
    assert (upright.size, upright.tobytes()) == (expected.size, expected.tobytes())
    size = image_size(tmp_path / name, upright=True)
    assert size == upright.size == ((60, 30) if orientation < 5 else (30, 60))
    assert image_header(tmp_path / name)[2] == (orientation > 1)


def test_broken_exif_turns_nothing(tmp_path: Path) -> None:
    noise(6, 3).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert open_image(tmp_path / "a.jpg", upright=True) == open_image(tmp_path / "a.jpg")

"""Records of every format: what becomes of system messages, parts, several images, embedded images and wrong records."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tinylmm.data.chat import Turn
from tinylmm.data.image_names import MAX_EMBEDDED_BYTES
from tinylmm.data.sample import BadRecord, Sample, parse_record, read_samples
from tinylmm.errors import DataError

Record = dict[str, Any]


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(buffer, "png")
    return buffer.getvalue()


def said(*texts: Any, keys: tuple[str, str] = ("role", "content"), first: str = "") -> list[Record]:
    """Messages in turns of user and assistant, behind a system message if there is one."""
    head = [{keys[0]: "system", keys[1]: first}] if first else []
    return head + [{keys[0]: ("user", "assistant")[n % 2], keys[1]: text} for n, text in enumerate(texts)]


def part(text: str) -> Record:
    return {"type": "text", "text": text}


def image_part(url: str) -> Record:
    return {"type": "image_url", "image_url": {"url": url}}


FROM = ("from", "value")
DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
GOOD = {
    "openai-text": (
        "openai",
        {"messages": said("q", "a", "r", "b")},
        Sample("0", (Turn("q", "a"), Turn("r", "b")), ()),
    ),
    "openai-system": ("openai", {"messages": said("q", "a", first="s")}, Sample("0", (Turn("q", "a"),), (), "s")),
    "openai-parts": (
        "openai",
        {"messages": said([image_part("1.png"), part("or "), image_part("2.png"), part("?")], [part("x")])},
        Sample("0", (Turn("<image>or <image>?", "x"),), ("1.png", "2.png")),
    ),
    "openai-images-of-later-turns-in-order": (
        "openai",
        {"messages": said([image_part("1.png")], "a", [part("and "), image_part("2.png")], "b")},
        Sample("0", (Turn("<image>", "a"), Turn("and <image>", "b")), ("1.png", "2.png")),
    ),
    "openai-image-words-in-parts-are-text": (
        "openai",
        {"messages": said([image_part("1.png"), part("what is <image>?")], "a")},
        Sample("0", (Turn("<image>what is <image>?", "a", ("", "what is <image>?")),), ("1.png",)),
    ),
    "openai-image-word-without-images-is-text": (
        "openai",
        {"messages": said("what is <image>?", "a tag")},
        Sample("0", (Turn("what is <image>?", "a tag", ("what is <image>?",)),), ()),
    ),
    "openai-named-images-fill-slots-of-texts-and-parts": (
        "openai",
        {"messages": said("<image> a", "b", [{"type": "image"}, part("c")], "d"), "images": ["1.png", "2.png"]},
        Sample("0", (Turn("<image> a", "b"), Turn("<image>c", "d")), ("1.png", "2.png")),
    ),
    "sharegpt-system-turn": (
        "sharegpt",
        {"id": 5, "conversations": said("<image>q", "a", keys=FROM, first="s"), "images": ["1.png"]},
        Sample("5", (Turn("<image>q", "a"),), ("1.png",), "s"),
    ),
    "sharegpt-system-key": (
        "sharegpt",
        {"conversations": said("q", "a", keys=FROM), "system": "s"},
        Sample("0", (Turn("q", "a"),), (), "s"),
    ),
    "auto-messages": ("auto", {"messages": said("q", "a")}, Sample("0", (Turn("q", "a"),), ())),
    "auto-conversations": (
        "auto",
        {"image": "1.png", "conversations": said("<image>q", "a", keys=FROM, first="s")},
        Sample("0", (Turn("<image>q", "a"),), ("1.png",), "s"),
    ),
    "sharegpt-first-answer-is-left-out": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "hi"}, *said("q", "", keys=FROM)], "system": "s"},
        Sample("0", (Turn("q", ""),), (), "s", greeted=True),
    ),
    "cauldron-images-stand-in-front": (
        "auto",
        {
            "images": ["1.png", "2.png"],
            "texts": [{"user": "q", "assistant": "a", "source": "x"}, {"user": "r", "assistant": "b", "source": "x"}],
        },
        Sample("0", (Turn("<image>\n<image>\nq", "a"), Turn("r", "b")), ("1.png", "2.png")),
    ),
    "cauldron-image-words-are-text": (
        "parquet",
        {"images": ["1.png"], "texts": [{"user": "a <image>?", "assistant": "b"}]},
        Sample("0", (Turn("<image>\na <image>?", "b", ("", "\na <image>?")),), ("1.png",)),
    ),
}


@pytest.mark.parametrize(("layout", "record", "expected"), GOOD.values(), ids=GOOD.keys())
def test_record_becomes_a_sample(layout: str, record: Record, expected: Sample) -> None:
    assert parse_record(0, record, layout) == expected


def openai(*texts: Any, **fields: Any) -> Record:
    return {"messages": said(*texts), **fields}


BAD = {
    "neither": ("auto", {"id": 1, "text": "x"}, "neither `conversations`.* nor `texts`.*, but id, text"),
    "web-address": ("openai", openai([image_part("https://x.org/a.png")], "a"), r"address \(https://x.org.*nothing is fet"),
    "file-address": ("openai", openai([image_part("file:///etc/passwd")], "a"), "nothing is fetched"),
    "llava-web-address": ("llava", {"image": "http://x/a.png", "conversations": said("<image>", "a", keys=FROM)}, "address"),
    "no-base64": ("openai", openai([image_part("data:image/png;base64,a*b")], "a"), "broken base64"),
    "data-url-of-text": ("openai", openai([image_part("data:text/html,hi")], "a"), "data URL of another kind"),
    "data-url-too-large": (
        "openai",
        openai([image_part("data:image/png;base64," + "A" * (MAX_EMBEDDED_BYTES * 4 // 3 + 101))], "a"),
        "of more than 32,000,000 bytes",
    ),
    "reserved-name": ("openai", openai([image_part("embedded:ab")], "a"), "reserved"),
    "image-in-answer": ("openai", openai("q", [image_part("1.png")]), "message 1 has an image"),
    "audio": ("openai", openai([{"type": "input_audio"}], "a"), "part 0 of message 0 is of type 'input_audio'"),
    "tool": ("openai", {"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    "late-system": ("openai", {"messages": [*said("q", "a"), *said("q", "a", first="s")]}, "may only be the first"),
    "two-systems": ("sharegpt", {"system": "t", "conversations": said("q", "a", keys=FROM, first="s")}, "keep one"),
    "only-system": ("openai", {"messages": said(first="s")}, "no question behind the first message"),
    "open-question": ("openai", openai("q", "a", "r"), "last question has no answer"),
    "openai-answer-first": ("openai", {"messages": said("q", "a")[1:]}, "message 0 is from 'assistant'"),
    "answer-twice": ("openai", {"messages": [*said("q", "a"), {"role": "assistant", "content": "b"}]}, "from 'human' is"),
    "too-few-images": ("sharegpt", {"conversations": said("<image><image>", "a", keys=FROM), "image": "1.png"},
                       "2 <image> but the record names 1 images"),
    "too-many-images": ("openai", openai("<image>", "a", images=["1.png", "2.png"]), "1 <image> but the record names 2"),
    "slot-without-image": ("sharegpt", {"conversations": said("<image>", "a", keys=FROM)}, "1 <image> but .* 0 images"),
    "both-keys": ("openai", openai("<image>", "a", image="1.png", images=["1.png"]), "both `image` and `images`"),
    "llava-system": ("llava", {"conversations": said("q", "a", keys=FROM, first="s")[:2]}, "set the source's format to share"),
    "no-text": ("openai", openai(None, "a"), "value of message 0 is no text but missing"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "record", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_record_is_handed_on_with_its_reason(layout: str, record: Record, reason: str) -> None:
    bad = parse_record(0, record, layout)
    assert isinstance(bad, BadRecord)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad.reason)


def test_data_url_becomes_an_embedded_image_named_by_its_content() -> None:
    sample = parse_record(0, openai([image_part(DATA_URL), image_part(DATA_URL), image_part("b.png")], "a"), "openai")
    assert isinstance(sample, Sample)
    first, second, third = sample.images
    assert first == second and first.startswith("embedded:") and third == "b.png"
    assert sample.embedded == {first: png()}


def write_parquet(path: Path, rows: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


ROWS = [
    {
        "id": "a",
        "image": {"bytes": png(), "path": "x.png"},
        "conversations": said("<image>\nq", "a", keys=FROM),
        "n": 1,
    },
    {"id": "b", "image": {"bytes": None, "path": "b.png"}, "conversations": said("<image>q", "a", keys=FROM), "n": 2},
    {"id": "c", "image": None, "conversations": said("q", "a", "r", "b", keys=FROM), "n": 3},
]


def test_parquet_rows_are_samples_with_embedded_images_paths_or_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "all" / "train-1.parquet", ROWS[2:])
    write_parquet(tmp_path / "all" / "train-0.parquet", ROWS[:2])
    write_parquet(tmp_path / "one.parquet", ROWS)
    samples = list(read_samples(tmp_path / "one.parquet", "parquet"))
    assert samples == list(read_samples(tmp_path / "all", "auto"))
    assert [sample.sample_id for sample in samples] == ["a", "b", "c"]
    assert isinstance(samples[0], Sample) and list(samples[0].embedded.values()) == [png()]
    assert [len(sample.images) for sample in samples if isinstance(sample, Sample)] == [1, 1, 0]
    assert samples[1].images == ("b.png",)


def test_parquet_with_messages_and_several_images(tmp_path: Path) -> None:
    cells = [{"bytes": png(colour), "path": None} for colour in ("red", "blue")]
    content = [{"type": "image", "text": None}, {"type": "text", "text": "or"}, {"type": "image", "text": None}]
    row = {
        "images": cells,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [part("x")]}],
    }
    write_parquet(tmp_path / "a.parquet", [row])
    (sample,) = read_samples(tmp_path / "a.parquet", "auto")
    assert isinstance(sample, Sample) and sample.turns == (Turn("<image>or<image>", "x"),)
    assert [sample.embedded[name] for name in sample.images] == [png("red"), png("blue")]


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("a.parquet", "llava", "parquet, but the source's format is 'llava'. Set it to parquet or auto"),
        ("other.parquet", "parquet", r"no column `conversations`.*but question\. Rename"),
        ("broken.parquet", "auto", "no readable parquet file"),
        ("empty", "auto", r"holds no \.parquet file"),
        ("gone.parquet", "auto", "cannot be read"),
        ("a.json", "questions", "format is 'questions', which cannot be trained on"),
    ],
)
def test_unreadable_parquet_is_refused_with_advice(tmp_path: Path, name: str, layout: str, message: str) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    write_parquet(tmp_path / "other.parquet", [{"question": "x"}])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        list(read_samples(tmp_path / name, layout))


def test_json_lines_of_messages(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(openai(f"q{n}", "a")) for n in range(3)))
    assert [s.turns[0].user for s in read_samples(tmp_path / "a.jsonl", "openai") if isinstance(s, Sample)] == [
        "q0",
        "q1",
        "q2",
    ]

"""The LLaVA reader: what it accepts, and the reason it gives for each kind of bad record."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tinylmm.data.chat import Turn
from tinylmm.data.check import SourceFiles, check_source
from tinylmm.data.sample import BadRecord, Sample, parse_record, read_samples
from tinylmm.errors import DataError


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


GOOD = {"id": "a", "image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A cat.")]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (GOOD, Sample("a", (Turn("<image>\nWhat?", "A cat."),), ("a.png",))),
        ({"id": 7, "conversations": [human("Hi"), gpt("Hello")]}, Sample("7", (Turn("Hi", "Hello"),), ())),
        (
            {"conversations": [human("a"), gpt("b"), human("c"), gpt("d")]},
            Sample("3", (Turn("a", "b"), Turn("c", "d")), ()),
        ),
        (
            {"id": "m", "image": ["1.png", "2.png"], "conversations": [human("<image> or <image>?"), gpt("x")]},
            Sample("m", (Turn("<image> or <image>?", "x"),), ("1.png", "2.png")),
        ),
        (
            {"id": "u", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a <image>"}]},
            Sample("u", (Turn("q", "a <image>"),), ()),
        ),
        (
            {"id": "g", "image": "a.png", "conversations": [gpt("hello"), human("<image>q"), gpt("a")]},
            Sample("g", (Turn("<image>q", "a"),), ("a.png",), greeted=True),
        ),
        ({"id": "e", "conversations": [human("q"), gpt("")]}, Sample("e", (Turn("q", ""),), ())),
        (
            {"id": "h", "conversations": [human("what is <img>x</img> in HTML?"), gpt("nothing")]},
            Sample("h", (Turn("what is <img>x</img> in HTML?", "nothing"),), ()),
        ),
    ],
    ids=[
        "one-image",
        "text-only-with-number-as-id",
        "two-turns-without-id",
        "two-images",
        "image-word-in-answer-is-text",
        "first-answer-is-left-out",
        "empty-answer-is-one",
        "img-tag-that-names-no-picture",
    ],
)
def test_good_record_becomes_a_sample(record: dict[str, Any], expected: Sample) -> None:
    assert parse_record(3, record) == expected


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


BAD = {
    "not-an-object": ("text", "no object but a str"),
    "no-conversations": ({"id": "a", "image": "a.png"}, "`conversations` must be a list.*missing"),
    "conversations-is-text": (changed(conversations="hi"), "must be a list of messages, but is a str"),
    "empty-conversations": (changed(conversations=[]), "`conversations` is empty"),
    "gpt-alone": (changed(conversations=[gpt("a")]), "no question behind the first message"),
    "gpt-twice": (
        changed(conversations=[*GOOD["conversations"], gpt("b")]),
        "message 2 is from 'gpt' where .*'human' is due",
    ),
    "odd-number-of-messages": (changed(conversations=[*GOOD["conversations"], human("b")]), "3 messages.*no answer"),
    "unknown-role": (changed(conversations=[human("<image>"), {"from": "bot", "value": "x"}]), "unknown role 'bot'"),
    "gpt-first": (changed(conversations=[gpt("a"), human("<image>")]), "2 messages: the last question has no answer"),
    "human-twice": (changed(conversations=[human("<image>"), human("b")]), "message 1 is from 'human'"),
    "message-is-text": (changed(conversations=[human("<image>"), "b"]), "message 1 is no object"),
    "value-missing": (changed(conversations=[human("<image>"), {"from": "gpt"}]), "value of message 1.*missing"),
    "value-is-number": (changed(conversations=[human("<image>"), {"from": "gpt", "value": 3}]), "no text but a int"),
    "lone-surrogate": (changed(conversations=[human("<image>"), gpt("\ud83d")]), "half a character"),
    "qwen-vl": (
        {"id": "a", "conversations": [human("Picture 1: <img>a/0.png</img>\nwhat?"), gpt("a")]},
        "in Qwen-VL's way .*0.png.*text only.*name it in `image`",
    ),
    "path-with-half-a-character": (changed(image="\ud83d.png"), "path of image 0 holds half a character"),
    "image-without-path": (changed(image={"bytes": None}), "`image` must be a path .* holds None"),
    "nested-role": (changed(conversations=[human("<image>"), {"from": [[[[1]]]], "value": "x"}]), "unknown role"),
    "two-slots-one-image": (changed(conversations=[human("<image><image>"), gpt("a")]), "2 <image>.* names 1 images"),
    "no-slot-one-image": (changed(conversations=[human("what?"), gpt("a")]), "0 <image> but the record names 1"),
    "slot-without-image": ({"conversations": GOOD["conversations"]}, "1 <image> but the record names 0"),
    "image-is-number": (changed(image=5), "`image` must be a path or a list of paths, but holds 5"),
    "image-is-empty": (changed(image=""), "`image` must be a path"),
    "video": (changed(image=None, video="a.mp4"), "nothing says which frames of it to show: set video.sampling"),
    "image-and-video-in-one-slot": (changed(video="a.mp4"), "images and videos, but no <video> in its questions"),
    "reserved-name": (changed(image="video:a.mp4"), "begin with 'embedded:' or 'video:' are reserved"),
}


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_record_is_handed_on_with_its_index_and_reason(record: Any, reason: str) -> None:
    bad = parse_record(3, record)
    assert isinstance(bad, BadRecord)
    assert bad.index == 3
    assert bad.sample_id == ("a" if isinstance(record, dict) and "id" in record else "3")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad.reason)


ODD = (
    "\ud800", "\x1b[2Jx", "\u202e", "", " ", "<image>", "a.png", "\0", "human", "gpt", "system", "user", "embedded:x",
    "data:image/png;base64,AA", "http://x", 0, -1, 1.5, 1e400, True, None, [], {}, [[[[[[1]]]]]], "x" * 9000,
)  # fmt: skip
KEYS = ("id", "image", "images", "conversations", "messages", "texts", "system", "video", "videos", "from", "value", "role",
        "content", "type", "text", "image_url", "url", "path", "bytes", "user", "assistant", "\ud800", "\x1b")  # fmt: skip


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """Some JSON value, near to a record or far from one."""
    kind = draw.random()
    if kind < 0.45 or depth > 4:
        return deepcopy(draw.choice(ODD))  # or a list could be put into itself
    if kind < 0.6:
        return [odd_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(KEYS): odd_value(draw, depth + 1) for _ in range(draw.randrange(6))}


def odd_record(draw: random.Random) -> Any:
    """A good record with some value in it replaced by another one, or any value."""
    if draw.random() < 0.2:
        return odd_value(draw)
    record = json.loads(json.dumps(draw.choice([
        GOOD,
        {"id": 2, "video": "a.mp4", "conversations": [human("<video> <image>"), gpt("a")], "image": "a.png"},
        {"id": 1, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
                               {"role": "assistant", "content": "a"}]},
        {"images": [{"path": "a.png", "bytes": None}], "texts": [{"user": "q", "assistant": "a", "source": "s"}]},
    ])))  # fmt: skip
    for _ in range(draw.randint(1, 3)):
        place: Any = record
        while isinstance(place, (dict, list)) and place:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if draw.random() < 0.4 or not isinstance(place[key], (dict, list)):
                place[key] = odd_value(draw)
                break
            place = place[key]
    return record


@pytest.mark.parametrize("layout", ["llava", "sharegpt", "openai", "auto"])
def test_whatever_json_can_hold_is_a_sample_or_has_a_reason(tmp_path: Path, layout: str) -> None:
    draw = random.Random(layout)
    records = [odd_record(draw) for _ in range(2000)]
    file = tmp_path / "a.jsonl"
    digits = '{"id": ' + "9" * 5000 + ', "conversations": ' + "9" * 5000 + "}"
    file.write_text("\n".join([*map(json.dumps, records), digits]), encoding="utf-8")
    found = list(read_samples(file, layout))
    assert len(found) == len(list(read_samples(file, layout, videos=True))) == 2001
    for sample in found:
        said = [sample.sample_id, *(sample.images if isinstance(sample, Sample) else [sample.reason])]
        "".join(said).encode()  # fit for any file
    reasons = [sample.reason for sample in found if isinstance(sample, BadRecord)]
    assert 200 < len(reasons) < 2001
    assert all(reason.isprintable() and len(reason) < 600 for reason in reasons)
    assert found[-1].sample_id == "9" * 5000 and isinstance(found[-1], BadRecord)


def test_an_odd_record_hides_no_other_from_the_check(tmp_path: Path) -> None:
    odd = [{**GOOD, "id": "\ud800"}, {**GOOD, "image": {"size": 1}}, changed(conversations=[human("\ud800"), gpt("a")])]
    (tmp_path / "a.json").write_text(json.dumps([*odd, {**GOOD, "id": "\x1b[2J", "image": "\x1b]0;x\x07.png"}]))
    check = check_source(SourceFiles("a", tmp_path / "a.json", tmp_path, "llava", None))
    assert [bad.index for bad in check.faults] == [0, 1, 2, 3]
    assert check.faults[0].sample_id == r"\ud800" and check.faults[3].sample_id == r"\x1b[2J"
    assert all(bad.reason.isprintable() for bad in check.faults)


def test_list_and_json_lines_give_the_same_samples_in_file_order(tmp_path: Path) -> None:
    records = [GOOD, {"id": "bad"}, {**GOOD, "id": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    samples = list(read_samples(tmp_path / "a.json"))
    assert [sample.sample_id for sample in samples] == ["a", "bad", "b"]
    assert samples == list(read_samples(tmp_path / "a.jsonl"))


def test_json_lines_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n{broken", encoding="utf-8")
    reader = read_samples(tmp_path / "a.jsonl")
    assert isinstance(next(reader), Sample)
    with pytest.raises(DataError, match="line 2, column 2"):
        next(reader)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "the file is empty"),
        ("a.json", b'[{"id": 1},\n {"id": }]', r"line 2, column 9.*Fetch the file again"),
        ("a.json", b'{"id": 1}\n{"id": 2}', r"line 2, column 1.*must be named \.jsonl"),
        ("a.json", b'{"data": []}', "top level is a dict; expected a list"),
        ("a.json", b'["\xff\xfe"]', "not UTF-8.*Convert the file"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
    ],
    ids=["empty", "empty-lines", "broken", "lines-named-json", "object", "not-utf-8", "nesting-bomb"],
)
def test_unreadable_file_is_refused_with_place_and_advice(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_samples(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json: cannot be read \(No such file"):
        list(read_samples(tmp_path / "gone.json"))

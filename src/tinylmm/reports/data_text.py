"""What `tinylmm data` says in the terminal: the check of a source, and a sample with what is trained on in colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tinylmm.data.check import SourceCheck, doubling_bins, short_sides
from tinylmm.reports.data_preview import SeenImage, SeenSample

FAULTS_SHOWN = 50
GROUPS_SHOWN = 5
BAR_WIDTH = 30
PREVIEW_WIDTH = 32
"""Columns of an image in the terminal; two pixels stand in one character."""
SUPERVISED, IMAGE_STYLE = "black on green", "bold white on blue"


def source_counts(check: SourceCheck) -> list[tuple[str, str]]:
    """The counts of a source as (name, value)."""
    rows = [("records", f"{check.records:,}"), ("with a fault", f"{len(check.faults):,}")]
    alone = "without an image" if check.with_videos else "text only"
    rows += [
        (alone, f"{check.images[0]:,}"),
        ("with a system message", f"{check.with_system:,}"),
    ]
    several = sum(count for number, count in check.images.items() if number > 1)
    rows += [("with several images", f"{several:,}"), ("different images", f"{sum(check.sizes.values()):,}")]
    if check.seconds:
        rows += [("with a video", f"{check.with_videos:,}"), ("different videos", f"{len(check.seconds):,}")]
        rows.append(("length of the videos", f"{sum(check.seconds) / 60:,.1f} minutes"))
    if check.greeted:
        rows.append(("first answer left out", f"{check.greeted:,}"))
    if check.turned:
        how = "turned upright" if check.files.upright else "taken as stored (orientation=ignore)"
        rows.append(("images that the camera says to turn", f"{check.turned:,}, {how}"))
    if check.tokens:
        rows.append((f"tokens, {_images_as(check)}", f"{sum(check.tokens):,}"))
        rows.append(("trained on", f"{100 * check.supervised / sum(check.tokens):.0f}\N{NO-BREAK SPACE}%"))
    return rows


def histograms(check: SourceCheck) -> list[tuple[str, list[tuple[str, int]]]]:
    """The histograms of a source as (title, [(bin, count)]), those without anything in them left out."""
    found = [
        ("turns a sample", _plain(check.turns)),
        ("images a sample", _plain(check.images)),
        ("words a sample", doubling_bins(check.words)),
        (f"tokens a sample, {_images_as(check)}", doubling_bins(check.tokens)),
        ("shorter side of the images in pixels", short_sides(check.sizes)),
        ("seconds of the videos", doubling_bins([int(seconds) for seconds in check.seconds])),
        ("image formats", [(name, count) for name, count in check.formats.most_common()]),
    ]
    return [(title, bins) for title, bins in found if bins]


def repetitions(check: SourceCheck) -> list[tuple[str, int, list[str]]]:
    """What is there more than once, as (what, number of groups, a few of them in words)."""
    conversations = [
        ", ".join(f"record {index} (id '{name}')" for index, name in group) for group in check.same_conversations
    ]
    found = [
        ("conversations equal in every word and image", conversations),
        ("images with the same content under different names", [", ".join(names) for names in check.same_images]),
        ("ids of more than one record", [f"'{name}' {count} times" for name, count in check.same_ids]),
    ]
    return [(what, len(groups), [_short(group) for group in groups]) for what, groups in found if groups]


def verdict(check: SourceCheck) -> str:
    """One sentence on whether the source can be trained on."""
    if check.problem is not None:
        return f"cannot be trained on: {check.problem}"
    if check.faults:
        return f"{len(check.faults):,} of {check.records:,} records cannot be used."
    if check.too_long:
        least, counted = ("", "") if check.images_counted else ("at least ", ", an image counted as one token")
        allowed = "" if check.clean else "only "
        return (
            f"{least}{check.too_long:,} of {check.samples:,} samples would be left out: max_length={check.max_length} leaves "
            f"them no token to learn{counted} ({allowed}{check.max_dropped:.1%} may be left out: max_dropped)."
        )
    if check.with_videos and check.files.sampling is None:
        return (
            f"all {check.records:,} records can be read, but {check.with_videos:,} have videos, and nothing says which frames "
            "of them to show: set video.sampling={uniform: 16}, or another."
        )
    return f"all {check.records:,} records can be used."


def _images_as(check: SourceCheck) -> str:
    return "images counted in" if check.images_counted else "an image as one"


def render_check(check: SourceCheck) -> RenderableType:
    """The check of one source, for a rich console."""
    files = check.files
    head = Text.assemble((f"{files.name}: ", "bold"), (verdict(check), "green" if check.clean else "red"))
    parts: list[RenderableType] = [head, Text(f"{files.annotations} ({files.layout})", "dim")]
    table = Table.grid(padding=(0, 2))
    for name, value in source_counts(check):
        table.add_row(Text(name), Text(value))
    parts.append(table)
    for title, bins in histograms(check):
        parts += [Text(f"\n{title}", "bold"), _bars(bins)]
    for what, count, groups in repetitions(check):
        parts.append(Text(f"\n{count:,} × {what}", "yellow"))
        parts += [Text(f"  {group}") for group in groups[:GROUPS_SHOWN]]
        parts += [Text("  ...")] if count > GROUPS_SHOWN else []
    if check.faults:
        parts.append(Text("\nfaults", "bold red"))
        parts += [
            Text(f"  record {bad.index} (id '{bad.sample_id}'): {bad.reason}") for bad in check.faults[:FAULTS_SHOWN]
        ]
        if len(check.faults) > FAULTS_SHOWN:
            parts.append(Text(f"  ... and {len(check.faults) - FAULTS_SHOWN:,} more, all of them in the page"))
    return Group(*parts)


def render_sample(seen: SeenSample, colour: bool) -> RenderableType:
    """A sample as the model will see it, for a rich console: what is trained on is green, without colour «in quotes»."""
    where = f"record {seen.index} (id '{seen.sample.sample_id}') of {seen.files.annotations}"
    total = len(seen.tokens)
    counts = (
        f"template {seen.template}, stage {seen.stage}: {total} tokens with an image as one, "
        f"{seen.supervised} of them trained on ({'green' if colour else 'in «»'}); max_length {seen.max_length}"
    )
    parts: list[RenderableType] = [
        Text(where, "bold"),
        Text(counts, "dim"),
        Text(),
        _coloured(seen) if colour else _quoted(seen),
    ]
    for number, image in enumerate(seen.images):
        parts += [Text(), Text(image_caption(number, image), "bold")]
        parts += map(_preview, image.tiles) if colour else []
    return Group(*parts)


def image_caption(number: int, image: SeenImage) -> str:
    """What an image is and becomes, in words."""
    width, height = image.tiles[0].size
    kind, pieces = ("video", "frames") if image.video else ("image", "tiles")
    tiles = "" if len(image.tiles) == 1 else f"{len(image.tiles)} {pieces} of "
    return f"{kind} {number + 1}: {image.name}, {image.size[0]} × {image.size[1]} → {tiles}{width} × {height}"


def visible(text: str) -> str:
    """A token's text with its line breaks to be seen, and broken."""
    return text.replace("\n", "↵\n").replace("\t", "⇥")


def _coloured(seen: SeenSample) -> Text:
    text = Text(no_wrap=False, overflow="fold")
    for number, token in enumerate(seen.tokens):
        if token.image is not None:
            text.append(f"[image {token.image + 1}]", IMAGE_STYLE)
        else:
            shade = SUPERVISED if token.supervised else "underline" if number % 2 else ""
            text.append(visible(token.text), shade)
    return text


def _quoted(seen: SeenSample) -> Text:
    text, inside = "", False
    for token in seen.tokens:
        text += ("«" if token.supervised else "»") if token.supervised != inside else ""
        text += visible(token.text) if token.image is None else f"[image {token.image + 1}]"
        inside = token.supervised
    return Text(text + "»" * inside)


def _preview(image: Image.Image) -> Text:
    """An image in half blocks: the upper pixel is the character's colour, the lower one its background."""
    height = max(2, round(PREVIEW_WIDTH * image.height / image.width) // 2 * 2)
    small = image.resize((PREVIEW_WIDTH, height))
    text = Text()
    for row in range(0, height, 2):
        for column in range(PREVIEW_WIDTH):
            upper, lower = (small.getpixel((column, row + half)) for half in (0, 1))
            text.append("▀", f"{_hex(upper)} on {_hex(lower)}")
        text.append("\n")
    return text


def _hex(pixel: Any) -> str:
    return "#" + "".join(f"{value:02x}" for value in pixel)


def _bars(bins: Sequence[tuple[str, int]]) -> Table:
    table = Table.grid(padding=(0, 2))
    most = max(count for _, count in bins)
    for name, count in bins:
        bar = "█" * max(1 if count else 0, round(BAR_WIDTH * count / most))
        table.add_row(Text(f"  {name}", justify="right"), Text(bar, "blue"), Text(f"{count:,}"))
    return table


def _plain(counter: Counter[int]) -> list[tuple[str, int]]:
    """Counts by value; from 10 on, in bins that double."""
    small = [(str(value), counter[value]) for value in sorted(counter) if value < 10]
    large = doubling_bins(list(_repeated(counter, 10)))
    return small + [(f"10-{name.split('-')[1]}" if name.startswith("0-") else name, count) for name, count in large]


def _repeated(counter: Counter[int], least: int) -> Iterator[int]:
    for value, count in counter.items():
        if value >= least:
            yield from [value] * count


def _short(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."

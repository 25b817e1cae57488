"""Prompts by what they begin with: the same tokens over the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.generation.prompts import Prompt


@dataclass
class Group:
    """Prompts that begin with the same tokens over the same images."""

    prefix: tuple[int, ...]
    images: tuple[str, ...]
    prompts: list[Prompt] = field(default_factory=list)


def groups_of(prompts: Sequence[Prompt], share: bool) -> list[Group]:
    """Groups of prompts with equal beginnings, longest first (what does not fit shows at once), else as given.

    Args:
        share: whether there may be beginnings; without, groups are of prompts about the same images alone.
    """
    shared = _shared_lengths(prompts) if share else {}
    groups: dict[tuple[tuple[int, ...], tuple[str, ...]], Group] = {}
    for prompt in prompts:
        prefix = prompt.ids[: shared.get(_behind_images(prompt), 0)]
        groups.setdefault((prefix, prompt.images), Group(prefix, prompt.images)).prompts.append(prompt)
    longest = {key: max(len(prompt.ids) for prompt in group.prompts) for key, group in groups.items()}
    return [groups[key] for key in sorted(groups, key=lambda key: (-len(key[0]), -longest[key]))]


def images_of(prompts: Sequence[Prompt]) -> list[str]:
    """Keys of all their images, in order."""
    return [key for prompt in prompts for key in prompt.images]


def _shared_lengths(prompts: Sequence[Prompt]) -> dict[int, int]:
    """How long the prefixes are: where the images end -> there, and on for as long as all such prompts say the same.

    Prompts that end with an image have nothing left to ask behind a prefix; they share none.
    """
    tails: dict[int, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        end = _behind_images(prompt)
        tails.setdefault(end, []).append(prompt.ids[end:])
    return {end: end + _common(rows) if all(rows) else 0 for end, rows in tails.items()}


def _behind_images(prompt: Prompt) -> int:
    """Index behind the last image token, 0 where there is none."""
    return len(prompt.ids) - prompt.ids[::-1].index(IMAGE_TOKEN_ID) if prompt.images else 0


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of what all rows begin with, less one token of the shortest: something must be left to ask."""
    first, last = min(rows), max(rows)  # in lexical order all others lie between them
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, min(len(row) for row in rows) - 1)

"""Asks another program what our model is asked, and compares: equal greedy answers, and how far log-probabilities differ."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tinylmm.convert.ask_ours import ask_ours, rows_of
from tinylmm.convert.asking import Answered, Asking, Program, Questions, Tolerance
from tinylmm.convert.certificate import CERTIFICATE, SHOWN, Certificate, Differing
from tinylmm.data.chat import get_template
from tinylmm.errors import IntegrityError
from tinylmm.generation.prompts import PromptMaker
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.store.provenance import now
from tinylmm.version import __version__

TOKENS = 16
"""Most new tokens of an answer."""
CARD = "README.md"
_OURS = ("torch", "transformers", "tokenizers", "pillow")
_BLOCK = 2**20


def certify(
    program: Program,
    exported_as: str,
    folder: Path,
    loaded: LoadedModel,
    dtype: str,
    questions: Questions,
    model: Mapping[str, str | None],
    tolerance: float | None = None,
) -> Certificate:
    """Compare what `program` makes of a folder with our own engine's answers.

    Args:
        loaded: our model, in fp32 on the CPU, with the weights that the folder is to have.
        dtype: of the written weights, in the words of `--dtype`.
        questions: what both are asked, pictures and all.
        model: what the folder was made of, to be told.
        tolerance: the user's own, in nats; None takes the program's.
    """
    allowed = program.tolerance(dtype)
    if tolerance is not None:
        allowed = Tolerance(tolerance, f"given by --tolerance, in place of {allowed.value:g}")
    expected = ask_ours(loaded, questions.items, TOKENS)
    ours = {name: importlib.metadata.version(name) for name in _OURS}
    blank = Certificate(
        exported_as=exported_as,
        program=program.name,
        how=program.how,
        model=model,
        asked=questions.source,
        questions=len(questions.items),
        pictures=questions.pictures,
        new_tokens=TOKENS,
        tolerance=allowed.value,
        reason=allowed.reason,
        dtype=dtype,
        device=f"CPU: {cpu_name()}",
        date=now(),
        versions=ours | {"tinylmm": __version__, "python": platform.python_version()},
        not_checked=(*program.not_checked, *questions.left_out),
        files=digests_of(folder),
    )
    try:
        heard = program.ask(Asking(folder, loaded, questions.items, expected, TOKENS, rows_of(loaded)))
    except IntegrityError as error:
        return replace(blank, error=str(error))
    return _compared(
        replace(blank, versions={**blank.versions, **heard.versions}), loaded, questions, expected, heard.answers
    )


def _compared(
    blank: Certificate,
    loaded: LoadedModel,
    questions: Questions,
    expected: Sequence[Answered],
    heard: Sequence[Answered],
) -> Certificate:
    maker = PromptMaker(get_template(loaded.model.template), loaded.tokenizer)
    differing, prompts, largest, positions = [], 0, 0.0, 0
    for question, ours, theirs in zip(questions.items, expected, heard, strict=True):
        prompts += (theirs.prompt or ours.prompt) == ours.prompt and theirs.length == ours.length
        for mine, other in zip(ours.log_probs, theirs.log_probs, strict=False):
            positions += 1
            gaps = [abs(mine[token] - value) for token, value in other.items()]
            largest = max([largest, *(gap if gap == gap else float("inf") for gap in gaps)])
        same = ours.text == theirs.text if theirs.ids is None else ours.ids == theirs.ids
        if not same:
            tie = near_tie(ours, theirs, maker, 2 * blank.tolerance)
            differing.append(Differing(question.with_slots, ours.text, theirs.text, tie))
    ties = sum(one.near_tie for one in differing)
    return replace(
        blank,
        equal_answers=len(expected) - len(differing),
        near_ties=ties,
        equal_prompts=prompts,
        largest_difference=largest,
        positions=positions,
        distinct_answers=len({one.text for one in expected}),
        differing=tuple(sorted(differing, key=lambda one: one.near_tie)[:SHOWN]),
    )


def near_tie(ours: Answered, theirs: Answered, maker: PromptMaker, gap: float) -> bool:
    """Whether two answers part where another token is as likely as ours but for `gap`, and it is theirs.

    What each says behind that place is no more than what follows from it.
    """
    mine = ours.ids or ()
    if theirs.ids is not None:
        place = next((i for i, pair in enumerate(zip(mine, theirs.ids, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(mine), len(theirs.ids)) if place is None else place
        known = ours.log_probs[place] if place < len(ours.log_probs) else {}
        chosen = [theirs.ids[place]] if place < len(theirs.ids) else sorted(maker.ends)
        return any(token in known and max(known.values()) - known[token] <= gap for token in chosen)
    return any(
        _parts_there(ours, theirs.text, place, maker, gap) for place in _where_texts_part(mine, theirs.text, maker)
    )


def _where_texts_part(mine: Sequence[int], text: str, maker: PromptMaker) -> list[int]:
    """How many tokens of our answer a text begins with; several numbers where the last of them are parts of a character."""
    shown = [_shown(maker, mine[:place]) for place in range(len(mine) + 1)]
    begun = [place for place, prefix in enumerate(shown) if text.startswith(prefix)]
    return [place for place in begun if shown[place] == shown[begun[-1]]]


def _parts_there(ours: Answered, text: str, place: int, maker: PromptMaker, gap: float) -> bool:
    """Whether a text goes on, behind so many of our tokens, with another token that is as likely but for `gap`."""
    mine = ours.ids or ()
    if place >= len(ours.log_probs):
        return False
    known = ours.log_probs[place]
    close = [token for token, value in known.items() if max(known.values()) - value <= gap]
    others = [token for token in close if place == len(mine) or token != mine[place]]
    ends = text == maker.text(mine[:place]).strip() and any(token in maker.ends for token in others)
    return ends or any(
        text.startswith(_shown(maker, [*mine[:place], token])) for token in others if token not in maker.ends
    )


def _shown(maker: PromptMaker, ids: Sequence[int]) -> str:
    """Text of ids without a half-written character at its end."""
    return maker.text(ids).strip().rstrip("\ufffd").rstrip()


def digests_of(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of a folder's files, but for the certificate and the model card."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.relative_to(folder).as_posix() not in (CERTIFICATE, CARD):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def content_of(folder: Path) -> str:
    """One SHA-256 of a model folder's files and their names."""
    return hashlib.sha256(json.dumps(digests_of(folder), sort_keys=True).encode()).hexdigest()


def cpu_name() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()

"""Reading a letter out of what a model said: the parsing rules that several multiple-choice benchmarks share.

The published scripts disagree on nearly every answer that is not a bare letter, so each rule is its own function and says
whose it is. A rule returns None where it can read nothing; what the script does then (a random guess, usually) is the
caller's business, because it has to be counted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
LETTER_SUFFIX_CN = "请直接回答选项字母。"
WORD_SUFFIX = "Answer the question using a single word or phrase."

_MARKS = (",", ".", "!", "?", ";", ":", "'")
"""What MMMU's parser strips, one after the other and once each: a comma that a full stop hid stays."""
_BRACKETED, _SPACED = "({})", " {} "


def lettered(texts: Iterable[str]) -> dict[str, str]:
    """Options by letter: `["cat", "dog"]` -> `{"A": "cat", "B": "dog"}`."""
    return dict(zip(LETTERS, texts, strict=False))


def listing(options: Mapping[str, str], style: str = "{}. {}") -> str:
    """One option a line, as the prompts show them."""
    return "\n".join(style.format(letter, text) for letter, text in options.items())


def guess(item_id: str, letters: Sequence[str], seed: int = 42) -> str:
    """What stands for a script's unseeded random choice: the same for an item whatever the other answers are."""
    return random.Random(f"{seed}:{item_id}").choice(letters)


def parse_listed(text: str, options: Mapping[str, str], loose: bool = False) -> str | None:
    """The official parser of MMMU (`eval/eval_utils.py`): `(X)`, else ` X `, else the option's own words in a long answer.

    Of several candidates the one that occurs last wins.

    Args:
        text: the answer.
        options: text by letter.
        loose: as lmms-eval has it: `X ` and then `X.` count anywhere, also at the end of a word (`DNA is`).
    """
    for mark in _MARKS:
        text = text.strip(mark)
    return _listed(f" {text} ", options, loose)


def parse_leading(text: str, options: Mapping[str, str]) -> str | None:
    """TinyLLaVA-Video's parser: the very first character if it is a letter on offer, else as `parse_listed`.

    So "Best option: (A)" is B and "Answer: D" is A. The script fails on an empty answer; here that is None.
    """
    text = text.strip()
    for mark in _MARKS:
        text = text.strip(mark)
    if not text:
        return None
    return text[0] if text[0] in options else _listed(f" {text} ", options, loose=False)


def _listed(padded: str, options: Mapping[str, str], loose: bool) -> str | None:
    for spelling in (_BRACKETED, "{} ", "{}.") if loose else (_BRACKETED, _SPACED):
        found = [letter for letter in options if spelling.format(letter) in padded]
        if found:
            # lmms-eval finds `X ` and `X.` too, but ranks them by ` X ` all the same
            rank = _BRACKETED if spelling == _BRACKETED else _SPACED
            return max(found, key=lambda letter: padded.rfind(rank.format(letter)))
    if len(padded.split()) <= 5:
        return None
    lowered = padded.lower()
    found = [letter for letter, text in options.items() if text.lower() in lowered]
    return max(found, key=lambda letter: lowered.rfind(options[letter].lower()), default=None)


def first_capital(text: str, phrases: Sequence[str], letters: Sequence[str]) -> str | None:
    """Video-MME's and LongVideoBench's rule: take phrases away, then the first capital letter on offer, anywhere.

    So "Based on ..., C" is B.
    """
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    return next((letter for letter in text if letter in letters), None)


_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_NO_REPLY = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def infer_vlmeval(text: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's `can_infer` (vlmeval/utils/matching_util.py): a letter, else an option's own words.

    A letter is one distinct option as a word among the last four, else what follows the first "answer is", with asterisks or
    without, in either case and also as the beginning of a word ("the answer is a horse" is A, "answer is blue" is B).
    A word "Z" where no option is one, and four phrases by which models refuse, are "Z": read, and wrong. Words count where
    those of exactly one option occur, in an answer at most twice as long as all options together.
    """
    return (None if _NO_REPLY in text else _letter_vlmeval(text, options)) or _text_vlmeval(text, options)


def _letter_vlmeval(text: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = text.translate(_SEPARATORS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    stated = _STATED.search(text)
    letter = stated.group(1).upper() if stated else None
    return letter if letter in options else None


def _text_vlmeval(text: str, options: Mapping[str, str]) -> str | None:
    if len(text.lower()) > 2 * sum(len(option) for option in options.values()):
        return None
    return _only_text(text, options)


_AFFIXES = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


def infer_opencompass(text: str, options: Mapping[str, str]) -> str | None:
    """The parser MMBench began with (opencompass; lmms-eval keeps it): a bare letter, else one of twelve spellings, else text.

    The letters A to E count, also those not on offer. A word "A" in an answer of more than three words is taken for an
    article, and then no bare letter counts.
    """
    return (None if _NO_REPLY in text else _letter_opencompass(text)) or _only_text(text, options)


def _letter_opencompass(text: str) -> str | None:
    words = text.split()
    letters = LETTERS[:5]
    bare = [letter for letter in letters if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _AFFIXES:
        found = [letter for letter in letters if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return None


_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{the}{noun} is" for noun in _NOUNS for the in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_STRIPPED = (*",.!?;:", "'", '"')
_RANKS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}
"""Spellings of a letter in lmms-eval's extractor, and how much each counts; a phrase before it counts 7."""


def extract_lmms(text: str, letters: Sequence[str]) -> str | None:
    """lmms-eval's `extract_mcq_answer` (tasks/_task_utils/mcq_extract.py): the best of all spellings, of equals the last.

    A letter that the answer begins or ends with goes before all else, then one anywhere after a phrase like "the answer is"
    (of several the last, so "the answer is B, as A is red" is A), then `(X)`, `X.`, `X:`, `X)` and `X `, each also at the end
    of a word; a letter anywhere counts only where there is nothing else.
    """
    text = text.strip()
    for mark in _STRIPPED:
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found = [
        (rank, text.rfind(spelling.format(letter)), letter)
        for spelling, rank in _RANKS.items()
        for letter in letters
        if spelling.format(letter) in text
    ]
    lowered = text.lower()
    for phrase in _PHRASES:
        begin = lowered.find(phrase)
        after = [(text.find(letter, begin + len(phrase)), letter) for letter in letters] if begin >= 0 else []
        found += [(7, position, letter) for position, letter in after if position >= 0]
    found += [(10, 0, letter) for letter in letters if bare.startswith(letter) and not bare[1:2].isalpha()]
    found += [(9, len(text), letter) for letter in letters if bare.endswith(letter) and not bare[-2:-1].isalpha()]
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


def _only_text(text: str, options: Mapping[str, str]) -> str | None:
    lowered = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lowered]
    return found[0] if len(found) == 1 else None

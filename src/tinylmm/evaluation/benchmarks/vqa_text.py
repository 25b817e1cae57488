"""How the VQA family compares free text: the official normalisation, the m4c (EvalAI) one, and soft accuracy.

Source: VQA's own evaluation code and the EvalAIAnswerProcessor of mmf, which LLaVA and TinyLLaVA ship. Their oddities are
kept, since published scores were made with them; each is named where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")
_PAIRS = """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't
havent>haven't hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's Id've>I'd've
I'dve>I'd've Im>I'm Ive>I've isnt>isn't itd>it'd itd've>it'd've it'dve>it'd've itll>it'll let's>let's maam>ma'am
mightnt>mightn't mightnt've>mightn't've mightn'tve>mightn't've mightve>might've mustnt>mustn't mustve>must've
neednt>needn't notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at
shant>shan't shed've>she'd've she'dve>she'd've she's>she's shouldve>should've shouldnt>shouldn't
shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've
somebody'dve>somebody'd've somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've
someone'dve>someone'd've someonell>someone'll someones>someone's somethingd>something'd somethingd've>something'd've
something'dve>something'd've somethingll>something'll thats>that's thered>there'd thered've>there'd've
there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've
theyll>they'll theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've
werent>weren't whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd wheres>where's
whereve>where've whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll
whyre>why're whys>why's wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've
yall>y'all yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've
youd>you'd youd've>you'd've you'dve>you'd've youll>you'll youre>you're youve>you've
"""
CONTRACTIONS = dict(pair.split(">") for pair in _PAIRS.split())
"""120 whole words. Im, Ive, Id've and I'dve never match, as words are lower case by then; somebody'd is the wrong way round."""

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
"""The official code passes re.UNICODE (32) where the number of replacements belongs."""


def strip_punctuation(text: str) -> str:
    """Delete or replace by a space each of PUNCTUATION, and delete periods that no digit follows.

    A character is deleted where the text as given has it beside a space anywhere, or has a comma between digits anywhere;
    else every occurrence becomes a space. So "2." becomes "2" and "3.5" stays. Quotes, colons, $, %, # and & stay.
    """
    all_deleted = _DIGIT_COMMA_DIGIT.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        deleted = all_deleted or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def map_words(text: str) -> str:
    """Lower case, number words (none to ten) to digits, articles dropped, contractions spelt out, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean(text: str) -> str:
    """Newlines and tabs to spaces, stripped: what the official code does to every text before anything else."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=200_000)  # of two million references on VQAv2 val, few differ
def official_text(text: str) -> str:
    """The official VQA normalisation."""
    return map_words(strip_punctuation(clean(text)))


@lru_cache(maxsize=200_000)
def m4c_text(text: str) -> str:
    """The EvalAIAnswerProcessor: the official normalisation after commas and question marks are deleted and 's split off.

    "women's" becomes "women 's" (and loses against the official "women's"), "lime,mint" becomes "limemint".
    """
    word = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_text(word)


def soft_accuracy(text: str, references: Sequence[str]) -> float:
    """Mean over the annotators, each left out in turn, of min(1, matches among the others / 3), in [0, 1].

    Of ten annotators, 1, 2, 3, 4 matching ones give 0.3, 0.6, 0.9, 1 (not n/3). No references: 0.
    """
    count, total = references.count(text), len(references)
    if not total:
        return 0.0
    # each of those who agree sees one match fewer among the others than everybody else does
    agreeing, others = min(1.0, max(0, count - 1) / 3), min(1.0, count / 3)
    return (count * agreeing + (total - count) * others) / total

"""Jinja chat templates beside ours: one with the text of a template of ours, and the template of ours that one has the text of.

Both are proven by rendering: what a chat template means is the text that comes out of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.chat import TEMPLATES, ChatTemplate, Turn
from tinylmm.errors import DataError, UserError

_PROBES = (
    (("What is it?", None),),
    ((f"{IMAGE_SLOT}\nWhat is it?", None),),
    ((f"  Look: {IMAGE_SLOT} what is it? ", "a cat"), ("Sure?", None)),
    ((f"{IMAGE_SLOT} or {IMAGE_SLOT}?", "the first"), (f"and {IMAGE_SLOT}", "no"), ('Why "not"?\n', None)),
    (("one", "two"), ("three", "four")),
    ((IMAGE_SLOT, None),),
    ((f"{IMAGE_SLOT}\n\n", "Two ducks."), ("Sure?", "yes"), (f" \n{IMAGE_SLOT}", None)),
)

_SYSTEM = "s1|s1"
_SYSTEMS = ("Be brief.", "  Answer in\nFrench. ")

_SLOT = json.dumps(IMAGE_SLOT)
_MOVED = (
    "{% if ns.text.count(" + _SLOT + ") == 1 %}"
    "{% set ns.text = (" + _SLOT + " + '\\n' + ns.text.replace(" + _SLOT + ", '').strip()).strip() %}{% endif %}"
)
"""A question's only image moves in front of it."""
_MOVED_MARKED = (
    "{% set found = ns.text.split('<__media') %}{% if found | length == 2 %}"
    "{% set marker = '<__media' + found[1].split('__>')[0] + '__>' %}"
    "{% set ns.text = (marker + '\\n' + ns.text.replace(marker, '').strip()).strip() %}{% endif %}"
)
_MARKER = "<__media_a1__>"

FIRST = 2
_QUESTIONS = (
    [Turn(f"{IMAGE_SLOT}\nWhat is it?", None)],
    [Turn("What is it?", None)],
    [Turn(f"{IMAGE_SLOT}\nWhat is it?", "a cat"), Turn("Sure?", None)],
)
"""A first question, `FIRST` of them, and one that follows an answer."""


def jinja_template(template: ChatTemplate) -> str | None:
    """Return Jinja source that renders messages as `template` does, or None if no such text exists.

    Messages have string contents, or lists of {"type": "text"} and {"type": "image"} parts. A first message of the system
    takes the place of the template's own system text, where it has one. There is none for templates that throw the question
    away (captioning).
    """
    marks = ["q1|q1", "a1|a1", "q2|q2", "a2|a2", "q3|q3"]
    text = template.text([Turn(marks[0], marks[1]), Turn(marks[2], marks[3]), Turn(marks[4], None)])
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    before, answer, between = pieces[0], pieces[1], pieces[2]
    end = template.text([Turn(marks[0], marks[1])]).rpartition(marks[1])[2]
    own, found, behind = template.text([Turn(marks[0], None)], _SYSTEM).partition(marks[0])[0].partition(_SYSTEM)
    pieces = [before, answer, end, between.removeprefix(end), text]
    system = (own, behind) if found else None
    sources = [_source(pieces, system, strips, in_front) for strips in (False, True) for in_front in (True, False)]
    return next((source for source in sources if _proven(source, template, system is not None)), None)


def llama_cpp_template(template: ChatTemplate) -> str | None:
    """Return the same for llama.cpp, which puts a marker of its own into the text where an image stands; None as above.

    Markers begin with `<__media` and end with `__>`; what stands between differs from server to server.
    """
    source = jinja_template(template)
    if source is None:
        return None
    marked = source.replace(_MOVED, _MOVED_MARKED)
    for probe in _PROBES:
        turns = [Turn(user, answer) for user, answer in probe]
        asked = messages(turns)
        for part in (part for message in asked for part in message["content"] if part["type"] == "image"):
            part |= {"type": "text", "text": _MARKER}
        rendered, _ = render_jinja_template([asked], chat_template=marked, add_generation_prompt=probe[-1][1] is None)
        if rendered[0] != template.text(turns).replace(IMAGE_SLOT, _MARKER):
            return None
    return marked


def template_of(source: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the name of the template that asks as this Jinja source does, None if none of ours does.

    Compared are a first question with an image and one without; of templates that agree in these, one is taken that agrees in
    a second question too. The BOS is left out: tokenizers add it.

    Raises:
        DataError: the source cannot be rendered.
    """
    asked = [_rendered(source, turns, tokenizer) for turns in _QUESTIONS]
    agreeing = []
    for template in TEMPLATES.values():
        fitted = _fitted(template, tokenizer)
        bos = str(tokenizer.bos_token or "")
        ours = [] if fitted is None else [fitted.text(turns).removeprefix(bos) for turns in _QUESTIONS]
        if ours and ours[:FIRST] == asked[:FIRST]:
            agreeing.append((ours != asked, template.name))
    return min(agreeing, key=lambda found: found[0])[1] if agreeing else None


def _fitted(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The template as it is with this tokenizer; None where it does not fit, and where it is the tokenizer's own."""
    if template.name == "native":
        return None
    try:
        return template.fitted(tokenizer)
    except UserError:
        return None


def _rendered(source: str, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    names = {name: getattr(tokenizer, name) or "" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    asked = messages(turns)
    for part in (part for message in asked for part in message["content"] if part["type"] == "text"):
        part["text"] = part["text"].strip()  # the template puts the line between image and words itself
    try:
        rendered, _ = render_jinja_template([asked], chat_template=source, add_generation_prompt=True, **names)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"cannot be rendered: {' '.join(str(error).split())}") from error
    return str(rendered[0]).removeprefix(names["bos_token"])


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as transformers' chat messages, images as parts in their places."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(turn.user.split(IMAGE_SLOT)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        found.append({"role": "user", "content": parts})
        if turn.assistant is not None:
            found.append({"role": "assistant", "content": [{"type": "text", "text": turn.assistant}]})
    return found


def _source(pieces: Sequence[str], system: tuple[str, str] | None, strips: bool, in_front: bool) -> str:
    """Put constants into the one layout that chat templates of this kind share.

    Where images stand in a question is what `data/slots.py` says, in Jinja.

    Args:
        pieces: what stands before the first question, before answers, behind them, before later questions, and behind an
            open question.
        system: what stands around a system message before the first question; None where the template has no place for it.
        strips: contents lose the white space around them.
        in_front: a question's only image moves in front of it.
    """
    names = ("before", "answer", "end", "following", "prompt")
    q = {name: json.dumps(piece) for name, piece in zip(names, pieces, strict=True)}
    stripped = "{% set ns.text = ns.text.strip() %}" if strips else ""
    own, behind = map(json.dumps, system or ("", ""))
    refused = "{{ raise_exception('The system text is fixed; use only user and assistant.') }}"
    first = "{{ " + own + " + ns.text + " + behind + " }}"
    later = "{% if not loop.first and loop.previtem['role'] != 'system' %}{{ " + q["following"] + " }}{% endif %}"
    return (
        "{% if messages[0]['role'] != 'system' %}{{ " + q["before"] + " }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['content'] is string %}{% set ns = namespace(text=message['content']) %}"
        "{% else %}{% set ns = namespace(text='') %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{% set ns.text = ns.text + " + _SLOT + " %}"
        "{% else %}{% set ns.text = ns.text + part['text'] %}{% endif %}{% endfor %}{% endif %}"
        + stripped
        + "{% if message['role'] == 'user' %}"
        + later
        + (_MOVED if in_front else "")
        + "{{ ns.text }}"
        "{% elif message['role'] == 'assistant' %}{{ " + q["answer"] + " + ns.text + " + q["end"] + " }}"
        "{% elif message['role'] == 'system' and loop.first %}" + (first if system else refused) + "{% else %}"
        "{{ raise_exception('Roles are user and assistant, and system first.') }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + q["prompt"] + " }}{% endif %}"
    )


def _proven(source: str, template: ChatTemplate, system: bool) -> bool:
    for probe in _PROBES:
        turns = [Turn(user, answer) for user, answer in probe]
        is_open = turns[-1].assistant is None
        for said in (None, *(_SYSTEMS if system else ())):
            asked = [{"role": "system", "content": said}] if said is not None else []
            talk = [*asked, *messages(turns)]
            rendered, _ = render_jinja_template([talk], chat_template=source, add_generation_prompt=is_open)
            if rendered[0] != template.text(turns, said):
                return False
    return True

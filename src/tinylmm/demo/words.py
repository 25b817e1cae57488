"""What the page says around the models' own words, as HTML with every text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tinylmm.demo.questions import Question, QuestionSet
from tinylmm.demo.talk import Reply, Turn
from tinylmm.generation.session import ChatModel

NOTHING_YET = "Ask below, about images that you add with the clip."
OR_PICK = "Or pick a held-out question."
WAITING = "Reading the question and its images …"
NO_QUESTIONS = (
    "Models that were trained here and evaluated bring their held-out questions along. This one has none: it lies outside a "
    "store, or its run has no evaluation."
)


def header(names: Sequence[str], models: Sequence[ChatModel]) -> str:
    """The page's head: which models there are."""
    told = [
        f'<p class="models"><strong>{escape(name)}</strong> {escape(_facts(model))}</p>'
        for name, model in zip(names, models, strict=True)
    ]
    return f"<h1>tinylmm demo</h1>{''.join(told)}"


def _facts(model: ChatModel) -> str:
    parameter = next(model.model.llm.parameters())
    count = sum(one.numel() for one in model.model.parameters())
    kind = str(parameter.dtype).removeprefix("torch.")
    return f"{_counted(count)} parameters, {kind} on {parameter.device.type}"


def _counted(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def figures(turn: Turn | None, model: int) -> str:
    """The line below a model's answers: what the last one took, and the truth where it is known."""
    if turn is None:
        return ""
    reply = turn.replies[model]
    lines = [_line(reply)]
    if turn.truth is not None:
        recorded = turn.recorded[model]
        before = "" if recorded is None else f" · in its evaluation it said: {_said(recorded)}"
        lines.insert(0, f"truth: <b>{escape(turn.truth)}</b>{before}")
    return "".join(f"<p>{line}</p>" for line in lines)


def _line(reply: Reply) -> str:
    if reply.problem:
        return f'<span class="problem">{escape(reply.problem)}</span>'
    prompt = f"prompt {_tokens(reply.prompt_tokens)}, {reply.image_tokens:,} of them image tokens"
    if reply.cached_tokens:
        prompt += f", {reply.cached_tokens:,} cached"
    if reply.first is None:
        waiting = {None: WAITING, "stopped": "stopped before its first token"}.get(reply.ending, "it said nothing")
        return f"{waiting} · {prompt}"
    ending = {"stopped": " · stopped", "length": " · ended by the limit of new tokens"}.get(reply.ending or "", "")
    rate = "" if reply.rate is None else f" · {reply.rate:.3g} tokens/s"
    return f"{_tokens(reply.tokens)}{rate} · first token after {reply.first:.2f} s · {prompt}{ending}"


def _said(text: str) -> str:
    return f"<b>{escape(text)}</b>" if text else "<i>nothing</i>"


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def asked_before(question: Question, names: Sequence[str]) -> str:
    """A question of an evaluation, with the truth and what the models said."""
    said = [
        f"<dt>{escape(name)}</dt><dd>{_said(text)}</dd>"
        for name, text in zip(names, question.said, strict=True)
        if text is not None
    ]
    truth = escape(question.truth) or "not in the benchmark's files"
    return f'<p class="asked">{escape(question.text)}</p><dl><dt>truth</dt><dd class="truth">{truth}</dd>{"".join(said)}</dl>'


def of_its(chosen: QuestionSet) -> str:
    """Which questions of an evaluation are shown."""
    return (
        f"{chosen.name}: {len(chosen.questions):,} of its {chosen.count:,} questions, of every category, answered right and "
        "wrong. Pick one to see the truth."
    )


def told(text: str, kind: str = "problem") -> str:
    """A sentence for the user; an empty one clears it."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""

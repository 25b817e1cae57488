"""README.md of an exported folder, a model card in the form of the Hugging Face hub: front matter, then what a reader asks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tinylmm.convert.certificate import CERTIFICATE, Certificate
from tinylmm.convert.format import Outlet, Usage
from tinylmm.convert.outlets import IMAGE_TEXT
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.version import __version__

CARD = "README.md"
UNKNOWN = "unknown"
"""The hub's word for a licence that nobody has named."""
_LICENCE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
"""What the hub's words for licences have in common; it adds to them."""
_LIMITS = (
    "It answers as it was trained to; nothing was done to keep it from false, offensive or harmful answers.",
    "Figures hold for the questions, the prompt and the greedy decoding that they were made with.",
)


@dataclass(frozen=True)
class About:
    """Where a model comes from, as far as it is known.

    Attributes:
        name: of the run, or of the folder.
        model: run, training stage and digest; or the content of a folder from elsewhere.
        base_models, datasets: hub ids.
        licence: the hub's word; None where nobody has said.
        sections: titles and Markdown, in their order: results, recipe, data.
        results: rows of results as the hub's `EvalResult` takes them.

    Raises:
        UserError: the licence is no word that the hub could have.
    """

    name: str
    model: Mapping[str, str | None] = field(default_factory=dict)
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    licence: str | None = None
    sections: Sequence[tuple[str, str]] = ()
    results: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            raise UserError(
                f"--license is {self.licence!r}; it must be one of the hub's words, small letters, digits, dots and hyphens: "
                "apache-2.0, mit, cc-by-4.0, ..., or other. Nothing was written."
            )


@dataclass(frozen=True)
class Exported:
    """What was written, for the card.

    Attributes:
        name: of the folder.
        notes: what the writer found out, one sentence each.
        certificate: None where nobody was asked.
    """

    name: str
    format: str
    dtype: str
    outlet: Outlet
    notes: Sequence[str]
    certificate: Certificate | None


def write_card(folder: Path, about: About, loaded: LoadedModel, exported: Exported) -> None:
    """Write README.md into a folder."""
    card = ModelCard(
        f"---\n{_front(about, exported).to_yaml()}\n---\n\n{_text(about, loaded, exported)}",
        ignore_metadata_errors=False,
    )
    (folder / CARD).write_text(str(card).rstrip() + "\n", encoding="utf-8")


def _front(about: About, exported: Exported) -> ModelCardData:
    """The front matter. A base model of the hub's own ids only: what was trained from nothing has none."""
    return ModelCardData(
        license=about.licence or UNKNOWN,
        base_model=list(about.base_models) or None,
        datasets=list(about.datasets) or None,
        pipeline_tag=IMAGE_TEXT,
        library_name=exported.outlet.library,
        tags=list(exported.outlet.tags),
        model_name=about.name if about.results else None,
        eval_results=[EvalResult(**row) for row in about.results] or None,
    )


def _text(about: About, loaded: LoadedModel, exported: Exported) -> str:
    made = ", ".join(f"{key} `{value}`" for key, value in about.model.items() if value)
    blocks = [
        f"# {about.name}",
        f"A vision-language model, exported by tinylmm {__version__} as `{exported.format}` with weights in {exported.dtype}. "
        + (f"It was made of {made}." if made else "Where its weights come from is not recorded."),
        _parts(loaded),
    ]
    blocks += [f"## {title}\n\n{text}" for title, text in about.sections]
    blocks += ["## How to load it", *(_usage(usage, exported.name) for usage in exported.outlet.usage)]
    blocks.append(f"## Does it answer as in tinylmm?\n\n{quoted(exported.certificate)}")
    blocks.append(f"## Limits\n\n{_limits(about, exported)}")
    return "\n\n".join(blocks) + "\n"


def _parts(loaded: LoadedModel) -> str:
    model, image = loaded.model, loaded.description.as_json()["image"]
    rows = [
        ("language model", type(model.llm).__name__, sum(p.numel() for p in model.llm.parameters())),
        (
            "vision tower",
            type(getattr(model.vision_tower, "encoder", model.vision_tower)).__name__,
            sum(p.numel() for p in model.vision_tower.parameters()),
        ),
        ("connector", type(model.connector).__name__, sum(p.numel() for p in model.connector.parameters())),
    ]
    table = ["| part | class | parameters |", "| :-- | :-- | --: |"]
    table += [f"| {part} | {name} | {count:,} |" for part, name, count in rows]
    said = f"Pictures: {image['size']} x {image['size']} pixels ({image['mode']}), {model.image_tokens} tokens each."
    return "\n".join(table) + f"\n\n{said} Chat template: `{model.template}`. Answers are greedy by default."


def _usage(usage: Usage, name: str) -> str:
    code = usage.code.replace("FOLDER", f"./{name}").replace("NAME", name)
    return f"**{usage.program}**\n\n```{usage.language}\n{code}\n```" + (f"\n\n{usage.remark}" if usage.remark else "")


def _limits(about: About, exported: Exported) -> str:
    lines = [
        *_LIMITS,
        *exported.outlet.limits,
        *(f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in exported.notes),
    ]
    if about.licence is None:
        bases = f" ({', '.join(about.base_models)})" if about.base_models else ""
        lines.append(
            f"Its licence was not named when it was exported: what the base models{bases} and the data allow holds. "
            "`tinylmm export --license ID` names one."
        )
    return "\n".join(f"- {line}" for line in lines)


def quoted(certificate: Certificate | None) -> str:
    """What a comparison has found, as Markdown; and that there was none."""
    if certificate is None:
        return "Nobody compared: it was exported without `--verify`."
    found = certificate
    verdict = "Yes" if found.passed else "**NO: do not use this folder**"
    lines = [
        f"{verdict}. {found.sentence}.",
        "\n".join(
            [
                f"- Asked: {found.questions} questions about {found.pictures} pictures ({found.asked}).",
                f"- Answers of at most {found.new_tokens} new tokens, {found.distinct_answers} different ones; "
                f"{found.equal_prompts} prompts of the same tokens.",
                f"- How: {found.how}.",
                f"- Tolerance: {found.tolerance:g} nats; {found.reason}.",
                f"- Weights: {found.dtype}, on {found.device}, {found.date}.",
                f"- Versions: {', '.join(f'{name} {version}' for name, version in found.versions.items())}.",
                *(f"- Not checked: {one}" for one in found.not_checked),
            ]
        ),
        f"`{CERTIFICATE}` has all of it, with the SHA-256 of every file that was compared.",
    ]
    return "\n\n".join(lines)

"""The page itself, made with Gradio, which is known to this module and `app.py` alone."""

from __future__ import annotations

import logging
import mimetypes
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.chatbot import FileMessage, Message, TextMessage
from gradio.data_classes import FileData
from gradio.utils import get_upload_folder

from tinylmm.data.images import FORMATS
from tinylmm.demo import words
from tinylmm.demo.questions import Question, QuestionSet
from tinylmm.demo.talk import Talk, Turn
from tinylmm.errors import DataError, TinyLMMError, UserError
from tinylmm.evaluation.images import open_image_ref
from tinylmm.generation.choose import Sampling
from tinylmm.reports.thumbnails import ThumbnailError, load_image
from tinylmm.serving.errors import ApiError
from tinylmm.serving.requests import SEEDS
from tinylmm.serving.service import Service

log = logging.getLogger(__name__)

SUFFIXES = [f".{kind.lower()}" for kind in (*FORMATS, "jpg")]
ASK_HINT = "Ask about an image, several, or none"
KEYS = "Enter sends, Shift+Enter begins a new line, Escape stops the answer."
ESCAPE = """<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
});
</script>"""
CSS = Path(__file__).with_name("page.css")


class Page:
    """What the page does.

    Args:
        services: of the models, one or several.
        sets: questions that they were evaluated on.
        folder: where images of those questions are written to when they are asked.
    """

    def __init__(self, services: Sequence[Service], sets: Sequence[QuestionSet], folder: Path) -> None:
        self.services, self.folder = list(services), folder
        pairs = [(one, [(_thumbnail(question), question) for question in one.questions]) for one in sets]
        seen = [(one, [(image, question) for image, question in some if image is not None]) for one, some in pairs]
        self.sets = [replace(one, questions=tuple(question for _, question in some)) for one, some in seen]
        self.thumbnails = [[(image, question.text) for image, question in some] for _, some in seen]
        self.names = [service.name for service in services]

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title=f"tinylmm · {' and '.join(self.names)}", analytics_enabled=False) as blocks:
            models = [service.chat for service in self.services]
            gr.HTML(words.header(self.names, models), elem_id="head", padding=False)
            self.talk = gr.State(Talk())
            self._chats()
            self.notice = gr.HTML("", elem_id="notice", elem_classes="notice", padding=False)
            self.box = gr.MultimodalTextbox(
                file_types=SUFFIXES,
                file_count="multiple",
                sources=["upload"],
                show_label=False,
                label="Question",
                placeholder=ASK_HINT,
                max_plain_text_length=1_000_000,  # a long question is a question, not a file
                elem_id="question",
                autofocus=True,
            )
            _take_uploads_alone(self.box, [self.folder, Path(get_upload_folder())])
            with gr.Row(elem_classes="actions"):
                self.stop = gr.Button("Stop", elem_id="stop", interactive=False, size="sm", min_width=96, scale=0)
                self.new = gr.Button("New conversation", elem_id="new", size="sm", min_width=160, scale=0)
                gr.HTML(words.told(KEYS, "keys"), elem_classes="notice", padding=False)
            self._questions()
            self._settings()
            self._wire()
        return blocks

    def _chats(self) -> None:
        self.chats, self.figures = [], []
        with gr.Row():
            for number, name in enumerate(self.names):
                with gr.Column(min_width=300):
                    self.chats.append(
                        gr.Chatbot(
                            label=name,
                            height="44vh",
                            elem_id=f"chat-{number}",
                            elem_classes="chat",
                            buttons=["copy"],
                            render_markdown=False,  # a model's words are shown as they are, and load nothing
                            feedback_options=None,
                            latex_delimiters=[],
                            allow_tags=False,
                            placeholder=f"{words.NOTHING_YET} {words.OR_PICK if self.sets else ''}",
                        )
                    )
                    self.figures.append(gr.HTML("", elem_id=f"figures-{number}", elem_classes="figures", padding=False))

    def _questions(self) -> None:
        with gr.Accordion("Held-out questions", open=bool(self.sets), elem_id="questions"):
            about = words.of_its(self.sets[0]) if self.sets else words.NO_QUESTIONS
            self.heading = gr.HTML(words.told(about, "of-its"), elem_classes="notice", padding=False)
            self.choice = gr.Dropdown(
                [
                    (f"{one.name}: {len(one.questions)} of its {one.count:,} questions", i)
                    for i, one in enumerate(self.sets)
                ],
                value=0 if self.sets else None,
                label="Evaluation",
                visible=len(self.sets) > 1,
                elem_id="evaluation",
            )
            self.gallery = gr.Gallery(
                self.thumbnails[0] if self.sets else None,
                label="Questions",
                show_label=False,
                columns=6,
                height=300,
                object_fit="contain",
                allow_preview=False,
                buttons=[],
                interactive=False,
                visible=bool(self.sets),
                elem_id="gallery",
            )
            self.picked = gr.State(None)
            self.about = gr.HTML("", elem_id="picked", padding=False)
            with gr.Row():
                self.ask_picked = gr.Button(
                    "Ask it in a new conversation", elem_id="ask-picked", visible=False, variant="primary", size="sm"
                )
                self.take = gr.Button("Take its images into the box", elem_id="take", visible=False, size="sm")

    def _settings(self) -> None:
        most = max(service.options.max_new_tokens for service in self.services)
        with gr.Accordion("How tokens are chosen", open=False, elem_id="settings"), gr.Row():
            self.options = [
                gr.Number(most, label="Most new tokens", minimum=1, precision=0, elem_id="max-new-tokens"),
                gr.Number(0, label="Temperature", info="0 is greedy", minimum=0, step=0.1, elem_id="temperature"),
                gr.Number(1, label="Top-p", minimum=0, maximum=1, step=0.05, elem_id="top-p"),
                gr.Number(None, label="Seed", info="empty draws anew each time", precision=0, elem_id="seed"),
            ]

    def _wire(self) -> None:
        shown = [*self.chats, *self.figures, self.box, self.stop, self.notice]
        # "multiple": a question that comes too early is told so; by default the page would drop it without a word
        streamed: dict[str, Any] = {
            "outputs": shown,
            "show_progress": "hidden",
            "concurrency_limit": None,
            "trigger_mode": "multiple",
        }
        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "queue": False,
            "api_visibility": "private",
        }
        self.box.submit(self.ask, [self.box, self.talk, *self.options], api_name="ask", **streamed)
        self.ask_picked.click(self.ask_again, [self.picked, self.talk, *self.options], api_name="ask_again", **streamed)
        self.stop.click(self.end, [self.talk], None, **quick)
        self.new.click(self.begin_anew, [self.talk], shown, **quick)
        details = [self.picked, self.about, self.ask_picked, self.take]
        self.gallery.select(self.pick, [self.choice], details, **quick)
        self.choice.change(self.choose, [self.choice], [self.heading, self.gallery, *details], **quick)
        self.take.click(self.take_images, [self.picked, self.box], [self.box], **quick)

    # ------------------------------------------------------------------------------------------------ what it does

    async def ask(self, value: dict[str, Any] | None, talk: Talk, *options: Any) -> AsyncIterator[list[Any]]:
        """Ask what stands in the box."""
        value = value or {}
        files = [Path(path) for path in value.get("files") or []]
        async for shown in self._answered(talk, value.get("text") or "", files, None, options):
            yield shown

    async def ask_again(self, picked: Any, talk: Talk, *options: Any) -> AsyncIterator[list[Any]]:
        """Ask a question of the evaluation, in a conversation of its own as there."""
        question = self._question(picked)
        if talk.busy:
            yield self._told("The answer before is still being written. Stop it first.")
            return
        try:
            files = self._files(question)
        except DataError as error:
            yield self._told(str(error))
            return
        talk.clear()
        async for shown in self._answered(talk, question.text, files, question, options):
            yield shown

    async def _answered(
        self, talk: Talk, text: str, files: list[Path], known: Question | None, options: Sequence[Any]
    ) -> AsyncIterator[list[Any]]:
        turn: Turn | None = None
        extra = () if known is None else (known.truth or None, known.said)
        try:
            async for _ in talk.ask(self.services, text, files, _sampling(*options), *extra):
                if turn is None:
                    turn = talk.turns[-1]
                    box = _filled("", []) if known is None else gr.skip()
                    yield self._shown(talk, turn, box=box, running=True, clear=True)
                else:
                    yield self._shown(talk, turn, running=True)
        except TinyLMMError as error:
            yield self._told(str(error))
        except ApiError as error:
            yield self._told(error.message)
        else:
            yield self._ended(talk, turn, text, files)

    def _ended(self, talk: Talk, turn: Turn | None, text: str, files: list[Path]) -> list[Any]:
        """What is shown at the end; a question that nothing was said to stands in the box again."""
        kept = turn is None or turn in talk.turns or turn.truth is not None
        box = gr.skip() if kept else _filled(text, files)
        return self._shown(talk, turn, box=box, running=False)

    def end(self, talk: Talk) -> None:
        """End the answer that is being written."""
        talk.stop()

    def begin_anew(self, talk: Talk) -> list[Any]:
        """Forget the conversation."""
        talk.clear()
        return self._shown(talk, None, box=_filled("", []), running=False, clear=True)

    def choose(self, number: Any) -> list[Any]:
        """Show another evaluation's questions."""
        chosen = self.sets[int(number)]
        gallery = gr.update(value=self.thumbnails[int(number)], selected_index=None)
        return [
            words.told(words.of_its(chosen), "of-its"),
            gallery,
            None,
            "",
            gr.update(visible=False),
            gr.update(visible=False),
        ]

    def pick(self, number: Any, event: gr.SelectData) -> list[Any]:
        """Show a question's text and truth."""
        picked = [int(number), int(event.index)]
        text = words.asked_before(self._question(picked), self.names)
        return [picked, text, gr.update(visible=True), gr.update(visible=True)]

    def take_images(self, picked: Any, value: dict[str, Any] | None) -> Any:
        """Put a question's images into the box, beside what stands there."""
        value = value or {}
        there = [Path(path) for path in value.get("files") or []]
        return _filled(value.get("text") or "", [*there, *self._files(self._question(picked))])

    # ------------------------------------------------------------------------------------------------ what it shows

    def _shown(self, talk: Talk, turn: Turn | None, running: bool, box: Any = None, clear: bool = False) -> list[Any]:
        numbers = range(len(self.services))
        return [
            *[_messages(talk, number) for number in numbers],
            *[words.figures(turn, number) for number in numbers],
            gr.skip() if box is None else box,
            gr.update(interactive=running),
            "" if clear else gr.skip(),
        ]

    def _told(self, notice: str) -> list[Any]:
        """A sentence, with everything else left as it is."""
        return [gr.skip()] * (2 * len(self.services) + 2) + [words.told(notice)]

    def _question(self, picked: Any) -> Question:
        try:
            number, index = (int(one) for one in picked)
            if min(number, index) < 0:
                raise IndexError
            return self.sets[number].questions[index]
        except (TypeError, ValueError, IndexError):
            raise gr.Error("Pick a question first.", print_exception=False) from None

    def _files(self, question: Question) -> list[Path]:
        """A question's images as the evaluation opened them, as files without loss."""
        files = []
        for ref in question.images:
            path = self.folder / f"{secrets.token_hex(8)}.png"
            open_image_ref(ref).save(path)
            files.append(path)
        return files


def _thumbnail(question: Question) -> Any:
    """A small picture of a question's first image; None where there is none to show, or it cannot be opened."""
    try:
        return load_image(question.images[0]) if question.images else None
    except ThumbnailError as error:
        log.warning("a question is left out: %s", error)
        return None


def _take_uploads_alone(box: gr.MultimodalTextbox, folders: Sequence[Path]) -> None:
    """Have a box refuse files that a request names by an address, which Gradio would fetch, or by a path outside `folders`,
    which Gradio would read: it checks paths in apps alone that it serves itself.

    The method is replaced on the object, as Gradio writes a file beside the module of every class made from its own.
    """
    keep = box.async_move_resource_to_block_cache

    async def kept(url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None:
            if "://" in str(url_or_file_path):
                raise gr.Error("Images are uploaded; nothing is fetched from an address.", print_exception=False)
            path = Path(url_or_file_path).resolve()
            if not any(path.is_relative_to(folder.resolve()) for folder in folders):
                raise gr.Error("Images are uploaded; no file of the machine is read.", print_exception=False)
        return await keep(url_or_file_path)

    box.async_move_resource_to_block_cache = kept  # type: ignore[method-assign]


def _sampling(max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any) -> Sampling:
    """Raises: UserError: a value is missing or out of range."""
    if max_new_tokens is None:
        raise UserError("Say how many new tokens an answer may have at most.")
    drawn = secrets.randbelow(SEEDS) if seed is None else int(seed) % SEEDS
    return Sampling(int(max_new_tokens), float(temperature or 0), 1.0 if top_p is None else float(top_p), seed=drawn)


def _filled(text: str, files: Sequence[Path]) -> Any:
    return gr.update(value={"text": text, "files": [str(path) for path in files]})


def _image(path: Path) -> FileData:
    return FileData(path=str(path), mime_type=mimetypes.guess_type(path.name)[0], orig_name=path.name)


def _messages(talk: Talk, model: int) -> list[Message]:
    """The conversation as one model had it, every text as it is."""
    shown: list[Message] = []
    for turn in talk.turns:
        shown += [
            Message(role="user", content=[FileMessage(file=_image(path), alt_text=f"image {n}")])
            for n, path in enumerate(turn.images, start=1)
        ]
        shown += [Message(role="user", content=[TextMessage(text=turn.question)])] if turn.question else []
        if text := turn.replies[model].text:
            shown.append(Message(role="assistant", content=[TextMessage(text=text)]))
    return shown

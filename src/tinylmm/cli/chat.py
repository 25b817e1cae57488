"""`tinylmm chat`: talk to a model in the terminal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tinylmm.cli.terminal import terminal
from tinylmm.errors import TinyLMMError

if TYPE_CHECKING:
    from tinylmm.generation.inputs import Video
    from tinylmm.generation.session import Conversation

HELP = (
    "/image FILE or /video FILE puts that in front of your next question, /new forgets the conversation, /exit or Ctrl-D "
    "leaves; Ctrl-C stops an answer."
)


def chat(
    checkpoint: Annotated[str, typer.Argument(help="A model, stage or run folder, the name of a run, or RUN@STAGE.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image for the first question; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video for the first question; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer, leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from tokens with this much probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16 or fp16.")] = "auto",
    store: Annotated[Path | None, typer.Option(envvar="TINYLMM_STORE", help="Where runs are found by name.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose classes the model may use.")] = None,
) -> None:
    """Ask a trained model about images and videos, once (--prompt) or in a conversation; greedy without a temperature."""
    # imported here, as torch would slow down every other command's start
    from transformers.utils import logging as transformers_logging

    from tinylmm.generation.choose import Sampling
    from tinylmm.generation.inputs import Video, local_file
    from tinylmm.generation.session import load

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.WARNING)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    Sampling.of(options)  # what is wrong with the words is told before a model is loaded for them
    for what, files in (("image", image), ("video", video)):
        for file in files or ():
            local_file(file, what)
    console = terminal(highlight=False)
    model = load(checkpoint, device=device, dtype=dtype, trust=trust or [], store=store)
    conversation = model.conversation(image or None, list(map(Video, video)) if video else None)
    if prompt is not None:
        _answer(console, conversation, prompt, options)
        return
    console.print(Text(HELP, "dim"))
    while True:
        try:
            line = console.input(Text("you ", "bold cyan")).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/new":
            conversation = model.conversation()
        elif line.startswith("/image "):
            path = Path(line.removeprefix("/image ").strip()).expanduser()
            _guarded(console, lambda: _show(console, conversation, str(path), path))  # noqa: B023
        elif line.startswith("/video "):
            path = Path(line.removeprefix("/video ").strip()).expanduser()
            _guarded(console, lambda: _show(console, conversation, str(path), Video(path)))  # noqa: B023
        elif line.startswith("/"):
            console.print(Text(HELP, "dim"))
        elif line:
            console.print(Text("model ", "bold green"), end="")
            _guarded(console, lambda: _answer(console, conversation, line, options))  # noqa: B023


def _show(console: Console, conversation: Conversation, file: str, shown: Path | Video) -> None:
    conversation.show(shown)
    console.print(Text(f"Your next question comes with {file}.", "dim"))


def _answer(console: Console, conversation: Conversation, question: str, options: dict[str, Any]) -> None:
    for piece in conversation.stream(question, **options):
        console.print(piece, end="", soft_wrap=True)
    console.print()


def _guarded(console: Console, action: Any) -> None:
    """A wrong file or an answer that was stopped does not end the conversation."""
    try:
        action()
    except TinyLMMError as error:
        console.print(Text(str(error), "red"))
    except KeyboardInterrupt:
        console.print(Text(" (stopped)", "dim"))

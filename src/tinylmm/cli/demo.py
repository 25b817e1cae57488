"""`tinylmm demo`: talk to a model, or to two side by side, in the browser."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tinylmm.cli.serve import missing
from tinylmm.cli.terminal import echo
from tinylmm.errors import UserError

NO_NETWORK = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def demo(
    model: Annotated[str, typer.Argument(help="A model, stage or run folder, the name of a run, or RUN@STAGE.")],
    second: Annotated[str | None, typer.Argument(metavar="[MODEL2]", help="Another one, to answer beside it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 7860,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name that browsers may call this by.")] = None,
    questions: Annotated[int, typer.Option(help="Held-out questions shown of each evaluation.")] = 48,
    rows: Annotated[int, typer.Option(help="Most answers of a model at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer, unless the page says another.")] = 512,
    max_images: Annotated[int, typer.Option(help="Most images of a conversation.")] = 16,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of a conversation's images together.")] = 50_000_000,
    body_mb: Annotated[float, typer.Option(help="Most megabytes of an image's file.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16 or fp16.")] = "auto",
    store: Annotated[Path | None, typer.Option(envvar="TINYLMM_STORE", help="Where runs are found by name.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose classes the model may use.")] = None,
) -> None:
    """Show a page to talk to a model about images, or to two models side by side, until Ctrl-C.

    Held-out questions of the model's own evaluations stand ready with the truth. The environment's TINYLMM_API_KEY is asked of
    every user, if set.
    """
    given = locals()
    if questions < 0:
        raise UserError(f"--questions is {questions}; it must be 0 or more.")
    with tempfile.TemporaryDirectory(prefix="tinylmm-demo-") as folder:  # what users upload goes when this ends
        uploads = Path(folder).resolve() / "uploads"
        # before Gradio is imported, which otherwise makes a folder of its own for all users of the machine
        os.environ.update(NO_NETWORK | {"GRADIO_TEMP_DIR": str(uploads)})
        _show(given, [model] if second is None else [model, second], uploads.parent)


def _show(given: Mapping[str, Any], wanted: list[str], folder: Path) -> None:
    """Load the models and show the page.

    Args:
        given: the command's options.
        folder: as `demo.app.make_app` has it.
    """
    # imported here, as torch and Gradio would slow down every other command's start
    try:
        from tinylmm.cli.served import address, key_and_hosts, limits, loaded
        from tinylmm.demo.app import make_app
        from tinylmm.demo.questions import question_sets
        from tinylmm.serving.server import bind, run
        from tinylmm.serving.service import Service
    except ModuleNotFoundError as error:
        raise missing(error, "demo") from None
    from tinylmm.store.find_model import find_model

    options = limits(given, drain_s=2)
    host, taken = given["host"], bind(given["host"], given["port"])
    key, hosts = key_and_hosts(taken, host, given["allow_host"])
    found = [find_model(one, given["store"]) for one in wanted]
    sets = question_sets(found, given["questions"]) if given["questions"] else []
    names, how = _names(wanted), [given[name] for name in ("device", "dtype", "trust", "store")]
    services = [Service(loaded(one, *how), name, options) for one, name in zip(found, names, strict=True)]
    app = make_app(services, sets, folder, key, hosts)
    where = f"{' and '.join(names)} at {address(taken, host)}"
    run(app, taken, options, lambda: echo(f"showing {where} (Ctrl-C stops)"), app.state.stopping.set)


def _names(wanted: list[str]) -> list[str]:
    """What the page calls the models: each otherwise."""
    short = [Path(one).resolve().name for one in wanted]
    if max(Counter(short).values()) == 1:
        return short
    return wanted if len(set(wanted)) == len(wanted) else [f"{name} ({i})" for i, name in enumerate(short, start=1)]

"""`tinylmm serve`: answer requests as OpenAI's API does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinylmm.cli.terminal import echo
from tinylmm.errors import UserError


def serve(
    checkpoint: Annotated[str, typer.Argument(help="A model, stage or run folder, the name of a run, or RUN@STAGE.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default its run or folder.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name that requests may call this by.")] = None,
    rows: Annotated[int, typer.Option(help="Most answers at a time.")] = 32,
    queue: Annotated[int, typer.Option(help="Most answers that wait; more are told to come again (429).")] = 128,
    tokens: Annotated[int, typer.Option(help="Most tokens of all answers at a time, prompts counted in.")] = 32768,
    kept_tokens: Annotated[int, typer.Option(help="Most tokens of earlier turns kept in the cache.")] = 32768,
    kept_images: Annotated[int, typer.Option(help="Images that are not encoded again.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer where a request names none.")] = 512,
    max_images: Annotated[int, typer.Option(help="Most images and videos of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of a request's images, and of its frames.")] = 50_000_000,
    max_frames: Annotated[int, typer.Option(help="Most frames that a request's videos show.")] = 64,
    video_s: Annotated[float, typer.Option(help="Seconds that decoding a request's videos may take.")] = 20,
    body_mb: Annotated[float, typer.Option(help="Most megabytes of a request.")] = 32,
    read_s: Annotated[float, typer.Option(help="Seconds for a request to arrive, a piece to be taken.")] = 60,
    drain_s: Annotated[float, typer.Option(help="Seconds that answers may still take after SIGTERM.")] = 30,
    allow_images_from: Annotated[
        list[str] | None, typer.Option(metavar="HOST[:PORT]", help="A host that http images and videos come from.")
    ] = None,
    image_s: Annotated[float, typer.Option(help="Seconds that fetching an image or a video may take.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16 or fp16.")] = "auto",
    store: Annotated[Path | None, typer.Option(envvar="TINYLMM_STORE", help="Where runs are found by name.")] = None,
    trust: Annotated[list[str] | None, typer.Option(help="A package whose classes the model may use.")] = None,
) -> None:
    """Serve a model to OpenAI clients at /v1/chat/completions, until Ctrl-C or SIGTERM; then finish what is begun.

    Greedy unless a request names a temperature. The environment's TINYLMM_API_KEY is asked of every client, if set.
    """
    given = locals() | {"allow_images_from": tuple(allow_images_from or ())}
    # imported here, as torch would slow down every other command's start
    try:
        from tinylmm.cli.served import address, key_and_hosts, limits, loaded
        from tinylmm.serving.app import make_app
        from tinylmm.serving.server import bind, run
        from tinylmm.serving.service import Service
    except ModuleNotFoundError as error:
        raise missing(error, "serve") from None
    options = limits(given)
    taken = bind(host, port)
    key, hosts = key_and_hosts(taken, host, allow_host)
    service = Service(loaded(checkpoint, device, dtype, trust, store), name or Path(checkpoint).resolve().name, options)
    app = make_app(service, key, hosts if key is None else None)
    run(app, taken, options, lambda: echo(f"serving {service.name} at {address(taken, host)}/v1 (Ctrl-C stops)"))


def missing(error: ModuleNotFoundError, command: str) -> Exception:
    """What to tell where a package of an extra, called as its command, is not installed."""
    if error.name is None or error.name.partition(".")[0] == "tinylmm":
        return error
    return UserError(f"`tinylmm {command}` needs {error.name}: pip install 'tinylmm[{command}]'")

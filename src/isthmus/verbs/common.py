"""What the verbs share: options that several of them take, and JSON."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.options import completing


def _recipes() -> Iterable[str]:
    from isthmus.recipe_files import shipped_recipes

    return shipped_recipes()


def _systems() -> Iterable[str]:
    from isthmus.runs.folder import SHIPPED_RUNS

    return SHIPPED_RUNS


recipe_names, systems = completing(_recipes), completing(_systems)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="File, or name of a shipped recipe.", autocompletion=recipe_names
    ),
]
RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Run folder, or base, tiny.", autocompletion=systems),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Settings to change, as train.steps=500."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder; begin it if none is.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="KEY",
        help="When going on: let this setting differ, or data, code, or a package's version.",
    ),
]
Curves = Annotated[
    bool, typer.Option("--tensorboard", help="Also draw TensorBoard curves in the run folder.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")]
RunFolder = Annotated[
    Path | None, typer.Option("--output-dir", "-o", help="Run folder; runs/<name> unless given.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Beam = Annotated[
    int | None,
    typer.Option("--beam-size", min=1, help="Hypotheses kept; 1 is greedy."),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Utterances decoded together."),
]
Normaliser = Annotated[
    str, typer.Option(help="whisper, basic, basic-marks, lower, none or module:callable.")
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Run, or base, tiny, or a model such as Whisper.",
        autocompletion=systems,
    ),
]
Language = Annotated[
    str | None,
    typer.Option("--language", help="Of Whisper: what is spoken, such as de."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0 and so on, or mps.")]


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    json.dump(value, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()  # a full disk is to be noticed here, not when Python ends

"""Verbs that train, and those for their recipes."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import typer

from isthmus.errors import IsthmusError, suggest
from isthmus.verbs.common import (
    AllowChange,
    Curves,
    Json,
    Overrides,
    Overwrite,
    RecipeName,
    Resume,
    RunFolder,
    print_json,
)

app = typer.Typer()

if TYPE_CHECKING:
    from isthmus.recipe import AnyRecipe, CTCRecipe, Experiment, LanguageRecipe, Recipe
    from isthmus.training.checkpoint import Progress
    from isthmus.training.loop import OnStep
    from isthmus.training.runs import Opening

    Kind = TypeVar("Kind", bound=Experiment, contravariant=True)

    class Job(Protocol[Kind]):
        def __call__(
            self, recipe: Kind, folder: Path, opening: Opening, *, on_step: OnStep
        ) -> Progress: ...


@app.command()
def quickstart(
    audio: Annotated[
        list[Path] | None, typer.Argument(help="Recordings of yours to transcribe with the result.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="A new folder; runs/quickstart.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a projector learn to join two frozen models, then read held-out voices with it."""
    from isthmus.quickstart import free_folder, run

    result = run(output_dir or free_folder(), audio or [])
    if as_json:
        print_json(result)


def _training_verb(
    verb: str, purpose: str, parts: Callable[[], "tuple[type[AnyRecipe], Job[AnyRecipe]]"]
) -> None:
    """The verbs that train differ in `parts`: the kind of recipe, and the job that takes it."""

    @app.command(verb, help=purpose)
    def run(
        recipe: RecipeName,
        overrides: Overrides = None,
        output_dir: RunFolder = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        allow_change: AllowChange = None,
        tensorboard: Curves = False,
        as_json: Json = False,
    ) -> None:
        from isthmus.display import training_observer
        from isthmus.recipe import load_recipe
        from isthmus.training.parallel import leading
        from isthmus.training.runs import Opening

        kind, job = parts()
        chosen = load_recipe(recipe, overrides or [], kind=kind)
        folder = output_dir or Path("runs") / chosen.name
        if resume and overwrite:
            raise IsthmusError("--resume and --overwrite exclude each other. Give one of them.")
        opening = Opening(resume, overwrite, allow_change or ())
        curves = folder / "tensorboard" if tensorboard else None
        with training_observer(chosen.train.steps, curves) as observe:
            end = job(chosen, folder, opening, on_step=observe)
        if not leading():
            return
        if as_json:
            figures = {"step": end.step, "best_step": end.best_step, "best_loss": end.best_loss}
            print_json({"run": str(folder)} | figures)
        else:
            typer.echo(f"Trained to step {end.step}: {folder}")


def _train() -> "tuple[type[Recipe], Job[Recipe]]":
    from isthmus.recipe import Recipe
    from isthmus.training.runs import train

    return Recipe, train


def _pretrain_ctc() -> "tuple[type[CTCRecipe], Job[CTCRecipe]]":
    from isthmus.recipe import CTCRecipe
    from isthmus.training.runs import pretrain_ctc

    return CTCRecipe, pretrain_ctc


def _pretrain_lm() -> "tuple[type[LanguageRecipe], Job[LanguageRecipe]]":
    from isthmus.recipe import LanguageRecipe
    from isthmus.training.runs import pretrain_lm

    return LanguageRecipe, pretrain_lm


_training_verb("train", "Train what a recipe does not freeze: the projector, usually.", _train)
_training_verb("pretrain-ctc", "Train a Conformer encoder with CTC.", _pretrain_ctc)
_training_verb("pretrain-lm", "Train a small LLM on text made on the spot.", _pretrain_lm)


@app.command()
def cache(
    recipe: RecipeName,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only read what is there, and count it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compute the encoder's frames of a recipe's utterances once, and keep them on disk."""
    from isthmus.display import counting
    from isthmus.recipe import load_recipe
    from isthmus.training.runs import cache_features

    chosen = load_recipe(recipe, overrides or [])
    with counting("utterances") as on_utterance:
        found = cache_features(chosen, on_utterance, only_verify=verify)
    if found is None:
        typer.echo("The frames of this process' share are kept; --verify reads them all.")
    elif as_json:
        print_json(asdict(found))
    else:
        typer.echo(
            f"{found.sound} utterances, {found.bytes / 1e9:.2f} GB; {found.broken} broken entries"
        )


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from isthmus.recipe import shipped_recipes

    shipped = {name: _headline(path) for name, path in shipped_recipes().items()}
    if as_json:
        print_json(shipped)
    else:
        width = max(map(len, shipped), default=0)
        typer.echo("\n".join(f"{name:{width}}  {line}" for name, line in shipped.items()))


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Copy a shipped recipe, to change it."""
    from isthmus.files import write_atomic
    from isthmus.recipe import find_recipe

    if file.exists():
        raise IsthmusError(f"{file} exists. Name another file.")
    write_atomic(file, find_recipe(name).read_text(encoding="utf-8"))
    typer.echo(f"Wrote {file}. Train it with: isthmus train {file}")


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="recipe, ctc or lm.")] = "recipe",
) -> None:
    """Print the JSON schema of recipes, so that editors complete them."""
    from isthmus.recipe import CTCRecipe, Experiment, LanguageRecipe, Recipe

    kinds: dict[str, type[Experiment]] = {"recipe": Recipe, "ctc": CTCRecipe, "lm": LanguageRecipe}
    if kind not in kinds:
        raise IsthmusError(
            f"No recipe kind {kind!r}.{suggest(kind, kinds)} Known: {', '.join(kinds)}."
        )
    print_json(kinds[kind].model_json_schema())


def _headline(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()

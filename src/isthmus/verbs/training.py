"""Verbs that train, and those for their recipes."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.errors import IsthmusError, suggest
from isthmus.options import takes
from isthmus.verbs.common import (
    AllowChange,
    Curves,
    Device,
    Json,
    Overrides,
    Overwrite,
    RecipeName,
    Resume,
    RunFolder,
    print_json,
    recipe_names,
)

app = typer.Typer()

if TYPE_CHECKING:
    from isthmus.display import Metrics
    from isthmus.recipe import Experiment


@app.command()
def quickstart(
    audio: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES]…",
            help="Recordings of yours to transcribe with the result; with --real corpora of yours.",
        ),
    ] = None,
    real: Annotated[
        bool, typer.Option("--real", help="Train the ears of base on corpora of yours.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="A new folder; runs/quickstart or runs/real."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a projector learn to join two frozen models, then read held-out voices with it."""
    from isthmus.lab.quickstart import free_folder, run

    if real:
        from isthmus.lab.quickstart_real import run as run_real
        from isthmus.speech.utterances import find_corpus

        corpora = [str(find_corpus(corpus)) for corpus in audio or []]
        if not corpora:
            raise IsthmusError("--real needs recordings with texts: name their manifest or folder.")
        result = run_real(output_dir or free_folder(Path("runs/real")), corpora)
    else:
        result = run(output_dir or free_folder(), audio or [])
    if as_json:
        print_json(result)


@dataclass(frozen=True)
class TrainingOptions:
    """What the verbs that train take."""

    recipe: RecipeName
    overrides: Overrides = None
    output_dir: RunFolder = None
    resume: Resume = False
    overwrite: Overwrite = False
    allow_change: AllowChange = None
    tensorboard: Curves = False
    device: Device = "auto"
    as_json: Json = False


def _training_verb(verb: str, purpose: str, kind: str, job: str) -> None:
    """The verbs that train differ in the kind of recipe (in isthmus.recipe) and in the job that
    takes it (module:function)."""

    @app.command(verb, help=purpose)
    @takes(TrainingOptions)
    def run(given: TrainingOptions) -> None:
        from isthmus.display import loading, training_observer
        from isthmus.model.device import check_device, on_device

        overrides = given.overrides or []
        if given.resume and given.overwrite:
            raise IsthmusError("--resume and --overwrite exclude each other. Give one of them.")
        check_device(given.device)
        from isthmus import recipe as recipes

        chosen = recipes.load_recipe(given.recipe, overrides, kind=getattr(recipes, kind))
        require_corpora(chosen, given.recipe)
        steps: list[int] = []
        with _told_when_interrupted(steps):
            with loading("torch"):
                from isthmus.training import runs
            folder = given.output_dir or Path("runs") / chosen.name
            opening = runs.Opening(given.resume, given.overwrite, given.allow_change or ())
            curves = folder / "tensorboard" if given.tensorboard else None
            with on_device(given.device), training_observer(chosen.train.steps, curves) as observe:

                def on_step(metrics: "Metrics") -> None:
                    steps.append(metrics["step"])
                    observe(metrics)

                module, _, function = job.partition(":")
                end = getattr(import_module(module), function)(
                    chosen, folder, opening, on_step=on_step
                )
        from isthmus.training.parallel import leading

        if not leading():
            return
        if given.as_json:
            figures = {"step": end.step, "best_step": end.best_step, "best_loss": end.best_loss}
            print_json({"run": str(folder)} | figures)
        else:
            typer.echo(f"Trained to step {end.step}: {folder}")


@contextmanager
def _told_when_interrupted(steps: Sequence[int]) -> Iterator[None]:
    """Ctrl-C is answered by a line, also where training has not taken it over yet."""
    try:
        yield
    except KeyboardInterrupt:
        where = f"in step {steps[-1] + 1}" if steps else "before the first step"
        typer.echo(f"interrupted {where}: go on with --resume, or start again.", err=True)
        raise


def require_corpora(chosen: "Experiment", recipe: str) -> None:
    """Raise IsthmusError, before torch is loaded, for data of a recipe that is not there."""
    from isthmus.recipe_files import find_recipe, made_by
    from isthmus.settings.datasets import DataSettings
    from isthmus.speech.utterances import find_corpus

    file, data = find_recipe(recipe), getattr(chosen, "data", DataSettings())
    faults: dict[str, str] = {}  # one of each root: what it lacks, it lacks for all below
    for role, corpus in [("train", one) for one in data.train] + [("dev", one) for one in data.dev]:
        path = corpus if isinstance(corpus, str) else corpus.path
        try:
            find_corpus(path)
        except IsthmusError as error:
            faults.setdefault(Path(path).parts[0], f"data.{role}: {error}{made_by(file, path)}")
    if faults:
        raise IsthmusError("\n  ".join([f"{file} names data that is not there:", *faults.values()]))


_training_verb(
    "train",
    "Train what a recipe does not freeze: the projector, usually.",
    "Recipe",
    "isthmus.lab.plateau:train_watched",
)
_training_verb(
    "pretrain-ctc",
    "Train a Conformer encoder with CTC.",
    "CTCRecipe",
    "isthmus.training.runs:pretrain_ctc",
)
_training_verb(
    "pretrain-lm",
    "Train a small LLM on text made on the spot.",
    "LanguageRecipe",
    "isthmus.lab.language_model:pretrain_lm",
)


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
    from rich.filesize import decimal

    from isthmus.display import counting, loading
    from isthmus.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or [])
    require_corpora(chosen, recipe)
    with loading("torch"):
        from isthmus.training.runs import cache_features

    with counting("utterances") as on_utterance:
        found = cache_features(chosen, on_utterance, only_verify=verify)
    if found is None:
        typer.echo("The frames of this process' share are kept; --verify reads them all.")
    elif as_json:
        print_json(asdict(found))
    else:
        done = "Verified" if verify else "Kept"
        typer.echo(
            f"{done}: {found.sound} utterances, {decimal(found.bytes)}; "
            f"{found.broken} broken entries"
        )


@app.command()
def units(
    recipe: RecipeName,
    overrides: Overrides = None,
    clusters: Annotated[int, typer.Option(min=1, help="Units to find.")] = 500,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write, for projector.path.")
    ] = Path("units.safetensors"),
    as_json: Json = False,
) -> None:
    """Find discrete units of a recipe's encoder by k-means over its training data."""
    from isthmus.display import counting
    from isthmus.recipe import load_recipe
    from isthmus.training.clusters import make_units

    chosen = load_recipe(recipe, overrides or [])
    with counting("utterances") as on_utterance:
        frames = make_units(chosen, output, clusters, on_utterance)
    if as_json:
        print_json({"file": str(output), "clusters": clusters, "frames": frames})
    else:
        typer.echo(f"Wrote {output}: {clusters} units of {frames} frames.")


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from isthmus.recipe_files import shipped_recipes

    shipped = {name: _description(path) for name, path in shipped_recipes().items()}
    if as_json:
        print_json(shipped)
    else:
        width = max(map(len, shipped), default=0)
        typer.echo("\n".join(f"{name:{width}}  {line}" for name, line in shipped.items()))


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe.", autocompletion=recipe_names)],
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Copy a shipped recipe, to change it."""
    from isthmus.files import write_atomic
    from isthmus.recipe_files import find_recipe

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


def _description(path: Path) -> str:
    """The comment that a recipe begins with, up to the first line that says what it is of."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    more = takewhile(re.compile(r"#(?! [A-Z]\w+: )").match, lines)
    return " ".join(line.removeprefix("#").strip() for line in (first, *more))

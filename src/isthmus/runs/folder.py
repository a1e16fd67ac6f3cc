"""What can be said of a run folder without torch: where it lies, its files, if we can read it."""

import logging
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.files import read_json
from isthmus.recipe_files import read_recipe

RECIPE, ENVIRONMENT, MODEL = "recipe.yaml", "environment.json", "model"
PARTS = "parts.json"
BEST, CHECKPOINTS = "best", "checkpoints"
CONFIG = "config.json"  # which every folder of a pretrained model has
ASSETS = Path(__file__).resolve().parent.parent / "assets"
BASE, TINY, DEFAULT = "base", "tiny", "default"
SHIPPED_RUNS = {name: ASSETS / name for name in (BASE, TINY)}
log = logging.getLogger(__name__)


def local_run(run: str | Path) -> Path | None:
    """The folder of a run, checked; None for `owner/name`, which the hub may have.

    `base` and `tiny` are the runs that ship, whatever lies here under these names, `default` is
    one of them.

    Raises IsthmusError for what is no run folder, or one that a newer isthmus wrote.
    """
    name = default_system() if str(run) == DEFAULT else str(run)
    if name in SHIPPED_RUNS and SHIPPED_RUNS[name].is_dir():
        if str(run) == name:
            _tell_shadowed(Path(name).absolute())
        return SHIPPED_RUNS[name]
    folder = Path(run)
    if folder.is_dir():
        check_run(folder)
        return folder
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(run)) and not folder.parent.is_dir()
    if of_hub and not str(run).startswith("runs/"):
        return None
    raise IsthmusError(
        f"No run folder {str(run)!r}. Name one that `isthmus train` made, or base or tiny; a model "
        "of Hugging Face is named owner/name."
    )


@cache
def _tell_shadowed(folder: Path) -> None:
    """Say, once, that a shipped run is read and not the folder of that name."""
    if any((folder / file).is_file() for file in (RECIPE, CONFIG, f"{MODEL}/{CONFIG}")):
        log.warning(
            "%s is the system that ships with isthmus; the folder here is named ./%s.",
            folder.name,
            folder.name,
        )


@cache
def default_system() -> str:
    """What reads where no system is named: base, if its parts are there or can be had, else tiny.

    Decided once in a process, which tells why it is tiny.
    """
    from isthmus.model.fetch import SYSTEMS, require_parts

    if not SHIPPED_RUNS[BASE].is_dir():
        return TINY
    try:
        require_parts(SYSTEMS[BASE])
    except IsthmusError as error:
        log.warning(
            "tiny reads, which knows digits, commands, keywords and orders in a coffee shop alone. "
            "For other English get base: isthmus fetch base. (%s)",
            error,
        )
        return TINY
    return BASE


def local_system(name: str | Path) -> Path | None:
    """The folder of what can transcribe: a run, or a pretrained model; None for `owner/name`.

    Of a run of `isthmus pretrain-ctc` it is the model in it. Raises IsthmusError for anything else.
    """
    for folder in (Path(name) / MODEL, Path(name)):
        if str(name) not in SHIPPED_RUNS and (folder / CONFIG).is_file():
            return folder
    run = local_run(name)
    if run is not None and "encoder" not in read_recipe(run / RECIPE)[1]:
        raise IsthmusError(
            f"{run} holds no model yet: its recipe is of `isthmus pretrain-ctc` or pretrain-lm, "
            "which write it at the end. Go on with --resume."
        )
    return run


def holds_run(folder: Path) -> bool:
    """Whether a folder is one of a run, which has a recipe."""
    return (folder / RECIPE).is_file()


def check_run(folder: Path) -> None:
    """Raise IsthmusError unless this is a run folder, and of no newer isthmus than this."""
    if not holds_run(folder):
        raise IsthmusError(
            f"{folder} is no run folder: it has no {RECIPE}. Name one that `isthmus train` made."
        )
    writer = written_by(folder)
    if writer is not None and _release(writer) > _release(version("isthmus")):
        raise IsthmusError(f"{folder} cannot be read:{versions(folder)} Install that one.")


def written_by(folder: Path) -> str | None:
    """The version of isthmus that last trained in a run folder, where it says so."""
    file = folder / ENVIRONMENT
    found = read_json(file) if file.exists() else None
    return str(found["isthmus"]) if isinstance(found, dict) and "isthmus" in found else None


def versions(folder: Path) -> str:
    """` It was written by isthmus 2.0, this is 1.0.`, or nothing where the folder does not say."""
    writer = written_by(folder)
    return f" It was written by isthmus {writer}, this is {version('isthmus')}." if writer else ""


def _release(name: str) -> tuple[int, ...]:
    """The numbers of a version, without what marks it as one before or after the release."""
    numbers = re.match(r"\d+(?:\.\d+)*", name)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()

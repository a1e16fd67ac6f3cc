"""Reading a run folder: the model that was trained in it. Nothing here trains."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from isthmus.build import build_model
from isthmus.errors import IsthmusError
from isthmus.files import read_json, recover_folder
from isthmus.model.device import choose_device
from isthmus.model.parts import Source, sources
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.weights import sha256
from isthmus.recipe import Experiment, Recipe, load_recipe
from isthmus.runs import checkpoint
from isthmus.runs.folder import (
    BEST,
    CHECKPOINTS,
    PARTS,
    RECIPE,
    check_run,
    local_run,
    versions,
)

log = logging.getLogger(__name__)


def load_run(folder: Path, ears: Path | None = None) -> tuple[SpeechLLM, Recipe]:
    """The trained model of a run folder, in evaluation mode, and its recipe.

    A run that has not been validated yet gives its newest sound checkpoint. `ears` is a run whose
    encoder and projector take the places of its own: what a language model has learnt to read,
    those of another encoder can say, where both say its tokens (LegoSLM, arXiv 2505.11352).

    Raises IsthmusError when a run is unfinished or damaged, when a frozen part is not the one it
    was trained with, and for ears that were made for another language model.
    """
    recipe, weights = _trained(folder)
    if ears is None:
        model = build_model(recipe)
        checkpoint.load_weights(weights, model.trained_state())
        return model.to(choose_device()).eval(), recipe
    heard, of_ears = _trained(ears)
    recipe = _with_ears(recipe, heard, ears)
    model = build_model(recipe)
    state = model.trained_state()
    for stored, own in ((weights, True), (of_ears, False)):
        taken = {name: v for name, v in state.items() if name.startswith("llm.") == own}
        missing = checkpoint.load_shared(stored, taken) & taken.keys() if taken else set()
        if missing:
            raise IsthmusError(f"{stored} lacks {', '.join(sorted(missing)[:4])}. Train it again.")
    return model.to(choose_device()).eval(), recipe


def _trained(folder: Path) -> tuple[Recipe, Path]:
    """The recipe of a run, its parts compared, and where its weights are."""
    check_run(folder)
    weights = trained_weights(folder)
    if weights.name != BEST:
        log.info("%s was never validated: its newest checkpoint %s", folder, weights.name)
    recipe = as_recorded(stored_recipe(folder), folder)
    compare_sources(recipe, folder)
    return recipe, weights


def trained_weights(folder: Path) -> Path:
    """What of a run is loaded: its best weights, or else its newest checkpoint.

    Raises IsthmusError where there is neither.
    """
    recover_folder(folder / BEST)
    if (folder / BEST).is_dir():
        return folder / BEST
    newest, faults = checkpoint.newest_checkpoint(folder / CHECKPOINTS)
    if newest is None:
        raise IsthmusError(
            f"{folder} has no trained weights yet. Go on with `isthmus train --resume`."
            + "".join(f" {fault}" for fault in faults)
        )
    return newest


def run_source(name: str, folder: Path) -> Source:
    """What another run is recorded by: its name, and the SHA-256 of its trained weights."""
    weights = trained_weights(folder) / checkpoint.WEIGHTS
    return Source(name, None, {weights.name: sha256(weights)})


def begin_from(model: SpeechLLM, recipe: Recipe, run: str) -> Source:
    """Give a model the trained weights of another run, as far as both have them; which they are.

    What is new is logged. Raises IsthmusError for weights of another shape or another language
    model, and where they share none.
    """
    folder = local_run(run)
    if folder is None:
        raise IsthmusError(f"start_from: {run} is no run folder. Train that recipe first.")
    check_run(folder)
    _same_llm(stored_recipe(folder), folder, recipe)
    state = model.trained_state()
    apart = checkpoint.load_shared(trained_weights(folder), state)
    new = sum(value.numel() for name, value in state.items() if name in apart)
    projector = [name for name in apart if name.startswith("projector.")]
    log.log(
        logging.WARNING if projector else logging.INFO,
        "begins with %s: %s parameters are new%s",
        folder,
        f"{new:,}",
        f"; only one of the two has {', '.join(sorted(projector)[:4])}" if projector else "",
    )
    return run_source(run, folder)


def _same_llm(heard: Recipe, folder: Path, recipe: Recipe) -> None:
    """Raises IsthmusError for a run whose projector says the tokens of another language model."""
    own, other = sources(recipe.llm)[""], sources(heard.llm)[""]
    if own.sha256 != other.sha256:
        raise IsthmusError(
            f"{folder} says the tokens of {other.name}, and the language model that is to listen "
            f"is {own.name}. Take a run that was trained for that one."
        )


def _with_ears(recipe: Recipe, heard: Recipe, ears: Path) -> Recipe:
    """The language model of one recipe behind the encoder and the projector of another."""
    _same_llm(heard, ears, recipe)
    types = heard.projector.type, recipe.projector.type
    if types != ("ctc-posterior", "ctc-posterior"):
        raise IsthmusError(
            f"{ears} has a projector of type {types[0]}, and the run that is to listen one of "
            f"type {types[1]}: only soft tokens can be swapped. Train both as ctc-posterior."
        )
    train = recipe.train.model_copy(update={"ctc_weight": heard.train.ctc_weight})
    parts = {"encoder": heard.encoder, "projector": heard.projector, "train": train}
    return recipe.model_copy(update=parts)


def stored_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder; raises IsthmusError, with the version that wrote it."""
    try:
        return load_recipe(folder / RECIPE)
    except IsthmusError as error:
        raise IsthmusError(f"{error}{versions(folder)}") from error


def as_recorded(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the commits that the run was trained with, where they come from the hub."""
    for name, part in read_json(folder / PARTS).items():
        if part["commit"]:
            recipe = _pinned(recipe, name.split("."), part["commit"])
    return recipe


def _pinned(settings: Any, path: Sequence[str], commit: str) -> Any:
    """Settings with the commit of the part at `path` below them."""
    if not path:
        return settings.at(commit)
    part = _pinned(getattr(settings, path[0]), path[1:], commit)
    return settings.model_copy(update={path[0]: part})


def compare_sources(recipe: Experiment, folder: Path) -> None:
    """What a run starts from is stored by checksum only: it must still be the same."""
    recorded = read_json(folder / PARTS)
    for name, part in sources(recipe).items():
        then = recorded.get(name, {}).get("sha256", {})
        different = [
            f"{file} (SHA-256 {then.get(file, 'none')} then, {part.sha256.get(file, 'none')} now)"
            for file in sorted({*then, *part.sha256})
            if then.get(file) != part.sha256.get(file)
        ]
        if different:
            raise IsthmusError(
                f"{folder} was trained with other files of the {name} {part.name}: "
                f"{', '.join(different[:3])}{' and others' * (len(different) > 3)}. Restore them; "
                "for a model of the hub, pin the revision."
            )

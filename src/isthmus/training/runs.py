"""Run folders, and the jobs that fill them."""

import json
import logging
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from isthmus.errors import IsthmusError
from isthmus.files import read_json, recover_folder, write_atomic, write_folder
from isthmus.model.llm import save_llm
from isthmus.model.parts import choose_device
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import (
    CTCRecipe,
    Experiment,
    LanguageRecipe,
    Recipe,
    dump_recipe,
    load_recipe,
)
from isthmus.training import checkpoint
from isthmus.training.batches import SpeechData
from isthmus.training.checkpoint import Progress
from isthmus.training.ctc import CTCTask
from isthmus.training.data import speech_data
from isthmus.training.language import LanguageTask
from isthmus.training.loop import BEST, CHECKPOINTS, METRICS, OnStep, fit
from isthmus.training.projector import SpeechTask

RECIPE = "recipe.yaml"
PARTS = "parts.json"
DATA = "data.json"
ENVIRONMENT = "environment.json"
MODEL = "model"
WRITTEN = {RECIPE, PARTS, DATA, ENVIRONMENT, METRICS, BEST, CHECKPOINTS, MODEL}
log = logging.getLogger(__name__)

VERSIONS = ("isthmus", "torch", "transformers", "tokenizers", "safetensors", "lhotse")


def check_folder(recipe: Experiment, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise IsthmusError when `folder` holds anything that the run must not touch."""
    stored = folder / RECIPE
    if not (stored.exists() and (folder / ENVIRONMENT).exists()):
        if folder.exists() and any(folder.iterdir()):
            raise IsthmusError(
                f"{folder} exists, is not empty and is no run folder. Name another folder."
            )
        if resume:
            raise IsthmusError(f"{folder} holds no run to resume.")
    elif resume:
        before, now = stored.read_text(encoding="utf-8"), dump_recipe(recipe)
        if before != now:
            raise IsthmusError(
                f"{folder} was trained with another recipe; {_differences(before, now)}. Resume "
                "with the recipe of the run, or train into a new folder."
            )
        _compare_sources(recipe, folder)
    elif not overwrite:
        raise IsthmusError(
            f"{folder} holds a run already. Add --resume to go on, --overwrite to replace "
            "it, or name another folder with --output-dir."
        )
    else:
        foreign = sorted(path.name for path in folder.iterdir() if not _is_written(path.name))
        if foreign:
            raise IsthmusError(
                f"{folder} holds {', '.join(foreign[:5])} beside a run, which --overwrite would "
                "not know how to make again. Move it away, or name another folder."
            )


def _is_written(name: str) -> bool:
    """Whether a run writes this, or leaves it when it is killed in writing."""
    halfway = re.fullmatch(r"\.(.+)\.(partial|replaced)", name)
    return (halfway[1] if halfway else name) in WRITTEN


def open_run(
    recipe: Experiment, folder: Path, *, resume: bool, data: Mapping[str, str] | None = None
) -> None:
    """Make the run folder; a run that is not resumed is removed first (see check_folder).

    `data` are checksums of what is trained on: IsthmusError if they are not those of the run that
    is resumed.
    """
    if resume:
        if data is not None and read_json(folder / DATA) != data:
            raise IsthmusError(
                f"{folder} was trained on other data: ids, durations or texts of the utterances "
                f"differ from those in {DATA}. Restore the manifests, or train into a new folder."
            )
        return
    for path in sorted(folder.glob("*")):
        if path.is_dir() and _is_written(path.name):
            shutil.rmtree(path)
        elif _is_written(path.name):
            path.unlink()
    environment = {name: version(name) for name in VERSIONS} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": sys.argv[1:],
    }
    _write_json(folder / ENVIRONMENT, environment)
    _write_json(folder / PARTS, {name: part.to_dict() for name, part in recipe.sources().items()})
    if data is not None:
        _write_json(folder / DATA, data)
    write_atomic(folder / RECIPE, dump_recipe(recipe))


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")


def _digests(train: SpeechData, dev: SpeechData | None) -> dict[str, str]:
    """SHA-256 of what is trained and validated on."""
    return {"train": train.digest()} | ({"dev": dev.digest()} if dev else {})


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train what a recipe does not freeze; `folder` is then a run to decode with.

    Nothing is written before the models and the data are loaded.
    """
    check_folder(recipe, folder, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.seed)
    model = (_as_recorded(recipe, folder) if resume else recipe).build().to(choose_device())
    for line in model.summary():
        log.info(line)
    train_data, dev = speech_data(recipe, model)
    open_run(recipe, folder, resume=resume, data=_digests(train_data, dev))
    task = SpeechTask(model, train_data, dev, recipe.train)
    return fit(task, recipe.train, folder, resume=resume, on_step=on_step)


def load_run(folder: Path) -> tuple[SpeechLLM, Recipe]:
    """The trained model of a run folder, in evaluation mode, and its recipe.

    A run that has not been validated yet gives its newest sound checkpoint.

    Raises IsthmusError when the run is unfinished or damaged, or when a frozen part is not the one
    it was trained with.
    """
    if not (folder / RECIPE).is_file():
        raise IsthmusError(
            f"{folder} is no run folder: it has no {RECIPE}. Name one that `isthmus train` made."
        )
    recover_folder(folder / BEST)
    weights = folder / BEST
    if not weights.is_dir():
        newest, faults = checkpoint.newest_checkpoint(folder / CHECKPOINTS)
        if newest is None:
            raise IsthmusError(
                f"{folder} has no trained weights yet. Go on with `isthmus train --resume`."
                + "".join(f" {fault}" for fault in faults)
            )
        log.info("%s was never validated: its newest checkpoint %s", folder, newest.name)
        weights = newest
    recipe = _as_recorded(load_recipe(folder / RECIPE), folder)
    _compare_sources(recipe, folder)
    model = recipe.build()
    checkpoint.load_weights(weights, model.trained_state())
    return model.to(choose_device()).eval(), recipe


def _as_recorded(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the commits that the run was trained with, where they come from the hub."""
    commits = {name: part["commit"] for name, part in read_json(folder / PARTS).items()}
    parts = {name: getattr(recipe, name).at(commit) for name, commit in commits.items() if commit}
    return recipe.model_copy(update=parts)


def _compare_sources(recipe: Experiment, folder: Path) -> None:
    """What a run starts from is stored by checksum only: it must still be the same."""
    recorded = read_json(folder / PARTS)
    for name, part in recipe.sources().items():
        if recorded.get(name, {}).get("sha256") != part.sha256:
            raise IsthmusError(
                f"{folder} was trained with other files of the {name} {part.name}: their "
                f"SHA-256 in {PARTS} differ from those found now. Restore them; for a model of "
                "the hub, pin the revision."
            )


def pretrain_ctc(
    recipe: CTCRecipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train a Conformer with CTC; `folder`/model is the encoder to name in a recipe."""
    check_folder(recipe, folder, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.seed)
    model = recipe.build()
    train_data, dev = speech_data(recipe, model)
    open_run(recipe, folder, resume=resume, data=_digests(train_data, dev))
    model.to(choose_device())
    task = CTCTask(model, train_data, dev, recipe.train, recipe.data.spec_augment)
    progress = fit(task, recipe.train, folder, resume=resume, on_step=on_step)
    checkpoint.load_weights(folder / BEST, task.state())
    write_folder(folder / MODEL, model.cpu().eval().save)
    return progress


def pretrain_lm(
    recipe: LanguageRecipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train a small language model; `folder`/model is the LLM to name in a recipe."""
    check_folder(recipe, folder, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.seed)
    llm = recipe.build()
    open_run(recipe, folder, resume=resume)
    llm.to(choose_device())
    task = LanguageTask(llm, recipe)
    progress = fit(task, recipe.train, folder, resume=resume, on_step=on_step)
    checkpoint.load_weights(folder / BEST, task.state())
    write_folder(folder / MODEL, partial(save_llm, llm.cpu().eval()))
    return progress


def _differences(old: str, new: str) -> str:
    """The keys in which two resolved recipes differ."""
    before, after = ({line.strip() for line in text.splitlines()} for text in (old, new))
    return f"it had {sorted(before - after)}, now {sorted(after - before)}"

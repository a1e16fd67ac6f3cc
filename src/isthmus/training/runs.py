"""Run folders, and the jobs that fill them."""

import json
import logging
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from isthmus.errors import IsthmusError
from isthmus.files import read_json, write_atomic
from isthmus.model.conformer import ConformerCTC, letter_tokenizer
from isthmus.model.llm import CHAT_TEMPLATE, LLMSettings, character_tokenizer, save_llm
from isthmus.model.parts import choose_device, resolve
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
from isthmus.training.checkpoint import Progress
from isthmus.training.ctc import CTCTask
from isthmus.training.data import speech_data
from isthmus.training.language import LanguageTask
from isthmus.training.loop import BEST, OnStep, fit
from isthmus.training.projector import SpeechTask

RECIPE = "recipe.yaml"
PARTS = "parts.json"
log = logging.getLogger(__name__)

VERSIONS = ("isthmus", "torch", "transformers", "tokenizers", "safetensors", "lhotse")


def check_folder(recipe: Experiment, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise IsthmusError when `folder` holds anything that the run must not touch."""
    stored = folder / RECIPE
    if not stored.exists():
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
    elif not overwrite:
        raise IsthmusError(
            f"{folder} holds a run already. Add --resume to go on, --overwrite to replace "
            "it, or name another folder with --output-dir."
        )


def open_run(recipe: Experiment, folder: Path, *, resume: bool) -> None:
    """Make the run folder; a run that is not resumed is removed first (see check_folder)."""
    if resume:
        return
    if folder.exists():
        shutil.rmtree(folder)
    environment = {name: version(name) for name in VERSIONS} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": sys.argv[1:],
    }
    write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    if isinstance(recipe, Recipe):
        sources = {name: part.to_dict() for name, part in recipe.sources().items()}
        write_atomic(folder / PARTS, json.dumps(sources, indent=2) + "\n")
    write_atomic(folder / RECIPE, dump_recipe(recipe))


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
    if resume:
        _compare_sources(recipe, folder)
    torch.manual_seed(recipe.seed)
    model = recipe.build().to(choose_device())
    for line in model.summary():
        log.info(line)
    train_data, dev = speech_data(recipe, model)
    open_run(recipe, folder, resume=resume)
    task = SpeechTask(model, train_data, dev, recipe.train)
    return fit(task, recipe.train, folder, resume=resume, on_step=on_step)


def load_run(folder: Path) -> tuple[SpeechLLM, Recipe]:
    """The trained model of a run folder, in evaluation mode, and its recipe.

    Raises IsthmusError when the run is unfinished or damaged, or when a frozen part is not the one
    it was trained with.
    """
    if not (folder / RECIPE).is_file():
        raise IsthmusError(
            f"{folder} is no run folder: it has no {RECIPE}. Name one that `isthmus train` made."
        )
    if not (folder / BEST).is_dir():
        raise IsthmusError(
            f"{folder} has no trained weights yet. Go on with `isthmus train --resume`."
        )
    recipe = load_recipe(folder / RECIPE)
    _compare_sources(recipe, folder)
    model = recipe.build()
    checkpoint.load_weights(folder / BEST, model.trained_state())
    return model.to(choose_device()).eval(), recipe


def _compare_sources(recipe: Recipe, folder: Path) -> None:
    """Frozen parts are stored by checksum only: they must still be the same."""
    recorded = read_json(folder / PARTS)
    for name, part in recipe.sources().items():
        if recorded.get(name, {}).get("sha256") != part.sha256:
            raise IsthmusError(
                f"{folder} was trained with other weights of the {name} {part.name}: their "
                f"SHA-256 in {PARTS} differ from those loaded now. Pin `{name}.revision`, or "
                "restore the folder."
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
    train_data, dev = speech_data(recipe)
    if recipe.start_from:
        model = ConformerCTC.load(resolve(recipe.start_from))
    else:
        units = letter_tokenizer(recipe.letters)
        model = ConformerCTC.initial(recipe.architecture, units, recipe.front_end)
    open_run(recipe, folder, resume=resume)
    model.to(choose_device())
    task = CTCTask(model, train_data, dev, recipe.train, recipe.data.spec_augment)
    progress = fit(task, recipe.train, folder, resume=resume, on_step=on_step)
    checkpoint.load_weights(folder / BEST, task.state())
    model.cpu().eval().save(folder / "model")
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
    if recipe.start_from:
        llm = LLMSettings(path=recipe.start_from).build()
        if recipe.chat:
            llm.tokenizer.chat_template = CHAT_TEMPLATE
    else:
        llm = recipe.architecture.build(character_tokenizer(recipe.chat))
    open_run(recipe, folder, resume=resume)
    llm.to(choose_device())
    task = LanguageTask(llm, recipe)
    progress = fit(task, recipe.train, folder, resume=resume, on_step=on_step)
    checkpoint.load_weights(folder / BEST, task.state())
    save_llm(llm.cpu().eval(), folder / "model")
    return progress


def _differences(old: str, new: str) -> str:
    """The keys in which two resolved recipes differ."""
    before, after = ({line.strip() for line in text.splitlines()} for text in (old, new))
    return f"it had {sorted(before - after)}, now {sorted(after - before)}"

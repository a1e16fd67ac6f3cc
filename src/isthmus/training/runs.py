"""Run folders, and the jobs that fill them."""

import json
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.files import read_json, write_atomic
from isthmus.model.conformer import ConformerCTC, letter_tokenizer
from isthmus.model.llm import CHAT_TEMPLATE, LLMSettings, character_tokenizer, save_llm
from isthmus.model.parts import resolve
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import (
    Corpus,
    CTCRecipe,
    DataSettings,
    Experiment,
    LanguageRecipe,
    Recipe,
    dump_recipe,
    load_recipe,
)
from isthmus.speech.corpora import read_corpus, usable
from isthmus.training import checkpoint
from isthmus.training.batches import SpeechData
from isthmus.training.checkpoint import Progress
from isthmus.training.ctc import CTCTask
from isthmus.training.language import LanguageTask
from isthmus.training.loop import BEST, OnStep, fit
from isthmus.training.projector import SpeechTask

RECIPE = "recipe.yaml"
PARTS = "parts.json"
VERSIONS = ("isthmus", "torch", "transformers", "tokenizers", "safetensors", "lhotse")


def open_run(recipe: Experiment, folder: Path, *, resume: bool, overwrite: bool = False) -> bool:
    """Make the run folder, or take up an existing one; returns whether a run is to go on.

    Raises IsthmusError when the folder holds another run, or one that was not to be resumed.
    """
    stored = folder / RECIPE
    text = dump_recipe(recipe)
    if stored.exists() and resume:
        if stored.read_text(encoding="utf-8") != text:
            changed = _differences(stored.read_text(encoding="utf-8"), text)
            raise IsthmusError(
                f"{folder} was trained with another recipe; {changed}. Resume with the recipe of "
                "the run, or train into a new folder."
            )
        return True
    if stored.exists() and not overwrite:
        raise IsthmusError(
            f"{folder} holds a run already. Add --resume to go on, --overwrite to replace "
            "it, or name another folder with --output-dir."
        )
    if folder.exists() and any(folder.iterdir()) and not stored.exists():
        raise IsthmusError(
            f"{folder} exists, is not empty and is no run folder. Name another folder."
        )
    if resume:
        raise IsthmusError(f"{folder} holds no run to resume.")
    if stored.exists():
        shutil.rmtree(folder)
    write_atomic(stored, text)
    environment = {name: version(name) for name in VERSIONS} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": sys.argv[1:],
    }
    write_atomic(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    return False


def load_data(
    corpora: Sequence[Corpus | str], data: DataSettings, max_seconds: float | None = None
) -> list[Cut]:
    """Usable utterances of corpora, as often as each is repeated."""
    limit = min(data.max_seconds, max_seconds or data.max_seconds)
    cuts: list[Cut] = []
    for entry in corpora:
        corpus = Corpus(path=entry, repeat=1) if isinstance(entry, str) else entry
        good, _ = usable(
            read_corpus(corpus.path), max_bad_fraction=data.max_bad_fraction, max_seconds=limit
        )
        cuts += list(good) * corpus.repeat
    return cuts


def speech_data(
    recipe: Experiment, max_seconds: float | None = None
) -> tuple[SpeechData, SpeechData | None]:
    """Training and validation data of a recipe."""
    data = recipe.data
    if not data.train:
        raise IsthmusError("data.train is empty. Name a manifest or folder to train on.")
    train = SpeechData(
        load_data(data.train, data, max_seconds),
        seed=recipe.seed,
        augmentation=data.augment,
        join=data.join,
    )
    dev = load_data(data.dev, data, max_seconds)
    return train, SpeechData(dev) if dev else None


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train what a recipe does not freeze; `folder` is then a run to decode with."""
    resumed = open_run(recipe, folder, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.seed)
    model = recipe.build()
    _record_sources(recipe, folder, resumed)
    train_data, dev = speech_data(recipe, model.encoder.max_seconds)
    task = SpeechTask(model, train_data, dev, recipe.train)
    return fit(task, recipe.train, folder, resume=resumed, on_step=on_step)


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
    return model.eval(), recipe


def _record_sources(recipe: Recipe, folder: Path, resumed: bool) -> None:
    if resumed:
        _compare_sources(recipe, folder)
    else:
        sources = {name: part.to_dict() for name, part in recipe.sources().items()}
        write_atomic(folder / PARTS, json.dumps(sources, indent=2) + "\n")


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
    resumed = open_run(recipe, folder, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.seed)
    train, dev = speech_data(recipe)
    if recipe.start_from:
        model = ConformerCTC.load(resolve(recipe.start_from))
    else:
        units = letter_tokenizer(recipe.letters)
        model = ConformerCTC.initial(recipe.architecture, units, recipe.front_end)
    task = CTCTask(model, train, dev, recipe.train, recipe.data.spec_augment)
    progress = fit(task, recipe.train, folder, resume=resumed, on_step=on_step)
    checkpoint.load_weights(folder / BEST, task.state())
    model.eval().save(folder / "model")
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
    resumed = open_run(recipe, folder, resume=resume, overwrite=overwrite)
    torch.manual_seed(recipe.seed)
    if recipe.start_from:
        llm = LLMSettings(path=recipe.start_from).build()
        if recipe.chat:
            llm.tokenizer.chat_template = CHAT_TEMPLATE
    else:
        llm = recipe.architecture.build(character_tokenizer(recipe.chat))
    task = LanguageTask(llm, recipe)
    progress = fit(task, recipe.train, folder, resume=resumed, on_step=on_step)
    checkpoint.load_weights(folder / BEST, task.state())
    save_llm(llm.eval(), folder / "model")
    return progress


def _differences(old: str, new: str) -> str:
    """The keys in which two resolved recipes differ."""
    before, after = ({line.strip() for line in text.splitlines()} for text in (old, new))
    return f"it had {sorted(before - after)}, now {sorted(after - before)}"

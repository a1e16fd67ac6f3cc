"""What a run has trained, in the form that others read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from isthmus.errors import IsthmusError
from isthmus.files import read_json, write_atomic, write_folder
from isthmus.model.adapters import save_adapter
from isthmus.model.fetch import name_of
from isthmus.model.parts import source, sources
from isthmus.recipe import Recipe, dump_recipe, named_models
from isthmus.recipe_files import parse_yaml
from isthmus.runs.checkpoint import STATE, Progress, save_checkpoint
from isthmus.runs.folder import BEST, ENVIRONMENT, PARTS, RECIPE
from isthmus.runs.loading import load_run, stored_recipe, trained_weights
from isthmus.speech.utterances import expand_path


def export_adapter(run: Path, folder: Path) -> str:
    """Write a run's LoRA adapters into a new folder that peft opens; the name of their model.

    What else was trained, the projector first of all, is not in it: without it the language model
    hears nothing.

    Raises IsthmusError when the folder exists or the run has no adapters.
    """
    _require_new(folder)
    tune = stored_recipe(run).llm.tune
    if tune != "lora":
        raise IsthmusError(f"{run} has no adapters: its llm.tune is {tune}, not lora.")
    model, recipe = load_run(run)
    base, revision = recipe.llm.path, recipe.llm.revision
    write_folder(folder, lambda path: save_adapter(model.llm, path, base, revision))
    return base


def export_run(run: Path, folder: Path) -> int:
    """Write a run into a new folder that can be read on any machine; its trained bytes.

    What was trained is stored in bfloat16. Parts that `isthmus fetch` knows get the names it knows
    them by; of corpora and of runs that it began with the names stay, not where they lie. The
    versions that it was trained with are kept, but not the command.

    Raises IsthmusError when the folder exists, or the run needs a file of this machine.
    """
    _require_new(folder)
    weights = trained_weights(run)
    model, recipe = load_run(run)
    shipped = _anywhere(recipe)
    state = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in model.trained_state().items()
    }
    parts = {name: part.to_dict() for name, part in sources(shipped).items()}
    for name, part in read_json(run / PARTS).items():
        if name.startswith("start_from"):
            parts[name] = part | {"name": Path(part["name"]).name}
    environment = read_json(run / ENVIRONMENT) if (run / ENVIRONMENT).is_file() else {}
    environment.pop("command", None)

    def write(path: Path) -> None:
        save_checkpoint(path / BEST, state, Progress(**read_json(weights / STATE)))
        for file, values in ((PARTS, parts), (ENVIRONMENT, environment)):
            write_atomic(path / file, json.dumps(values, indent=2) + "\n")
        write_atomic(path / RECIPE, dump_recipe(shipped))

    write_folder(folder, write)
    return sum(value.nbytes for value in state.values())


def _require_new(folder: Path) -> None:
    if folder.exists():
        raise IsthmusError(f"{folder} exists. Name another folder.")


def _anywhere(recipe: Recipe) -> Recipe:
    """The recipe without paths of this machine."""
    values = parse_yaml(dump_recipe(recipe))
    values["start_from"], values["data"]["feature_cache"] = [], "none"
    for part, key in named_models(values):
        if Path(part[key]).is_dir():
            part[key] = name_of(source(part[key]).sha256) or part[key]
    for role in ("train", "dev"):
        values["data"][role] = [
            {**entry, "path": _corpus(entry["path"])} if isinstance(entry, dict) else _corpus(entry)
            for entry in values["data"][role]
        ]
    for name, value in _strings(values):
        if re.match("[/~]", value):
            raise IsthmusError(
                f"{name} is {value}, which only this machine has. Train with a part of the hub, or "
                "of `isthmus fetch`, in its place."
            )
    return Recipe.model_validate(values)


def _corpus(path: str) -> str:
    """What a corpus is called: its path below the folder of speech, or the end of another one."""
    speech = "${ISTHMUS_SPEECH}"
    if Path(path).is_relative_to(expand_path(speech)):
        return f"{speech}/{Path(path).relative_to(expand_path(speech))}"
    return "/".join(Path(path).parts[-2:]) if re.match("[/~]", path) else path


def _strings(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The texts in nested settings, by dotted names."""
    if isinstance(values, str):
        yield name, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _strings(value, f"{name}.{key}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            yield from _strings(value, name)

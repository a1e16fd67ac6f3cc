"""What a run has trained, in the form that others read."""

from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.files import write_folder
from isthmus.model.adapters import save_adapter
from isthmus.training.run_loading import load_run, stored_recipe


def export_adapter(run: Path, folder: Path) -> str:
    """Write a run's LoRA adapters into a new folder that peft opens; the name of their model.

    What else was trained, the projector first of all, is not in it: without it the language model
    hears nothing.

    Raises IsthmusError when the folder exists or the run has no adapters.
    """
    if folder.exists():
        raise IsthmusError(f"{folder} exists. Name another folder.")
    tune = stored_recipe(run).llm.tune
    if tune != "lora":
        raise IsthmusError(f"{run} has no adapters: its llm.tune is {tune}, not lora.")
    model, recipe = load_run(run)
    base, revision = recipe.llm.path, recipe.llm.revision
    write_folder(folder, lambda path: save_adapter(model.llm, path, base, revision))
    return base

"""Checkpoints: a folder each, sealed by a manifest of checksums, holding only what was trained."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.files import read_json, verify_folder, write_folder

WEIGHTS = "trainable.safetensors"
OPTIMISER = "optimiser.safetensors"
STATE = "state.json"


@dataclass
class Progress:
    """Where a run stands; position counts the batches of the epoch already used."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    best_step: int = 0
    best_loss: float | None = None
    stale: int = 0
    audio_seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    progress: Progress,
    optimiser: Mapping[str, Tensor] | None = None,
) -> None:
    """Write trained tensors, progress and, for resuming, the optimiser's tensors to `folder`."""

    def fill(partial: Path) -> None:
        save_file(
            {name: value.detach().contiguous() for name, value in state.items()}, partial / WEIGHTS
        )
        (partial / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        if optimiser is not None:
            save_file(dict(optimiser), partial / OPTIMISER)

    write_folder(folder, fill)


def optimiser_state(
    optimiser: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's tensors by `parameter/key`, and the random states."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in trainable.items():
        for key, value in optimiser.state[parameter].items():
            tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors


def load_weights(folder: Path, state: Mapping[str, Tensor]) -> Progress:
    """Read a verified checkpoint's tensors into `state`; names and shapes must agree."""
    verify_folder(folder)
    stored = load_file(folder / WEIGHTS)
    if stored.keys() != state.keys():
        different = sorted(stored.keys() ^ state.keys())
        raise IsthmusError(
            f"{folder} belongs to another model: they differ in {', '.join(different[:5])}."
        )
    for name, value in state.items():
        if stored[name].shape != value.shape:
            raise IsthmusError(
                f"{folder}: {name} has shape {tuple(stored[name].shape)}, the model's is "
                f"{tuple(value.shape)}. The checkpoint belongs to another recipe."
            )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(stored[name])
    return Progress(**read_json(folder / STATE))


def restore(
    folder: Path,
    state: Mapping[str, Tensor],
    trainable: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> Progress:
    """Continue exactly: trained tensors, optimiser and random states of `folder`."""
    progress = load_weights(folder, state)
    tensors = load_file(folder / OPTIMISER)
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for name, parameter in trainable.items():
        entries = {key: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        optimiser.state[parameter] = {
            key.rpartition("/")[2]: value.to(parameter.device) if value.dim() else value
            for key, value in entries.items()
        }
    return progress


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    faults = []
    for path in reversed(checkpoints(folder)):
        try:
            verify_folder(path)
        except IsthmusError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def retire(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)

"""Checkpoints: a folder each, sealed by a manifest of checksums, holding only what was trained."""

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import (
    clear_leftovers,
    read_json,
    recover_folders,
    remove_folder,
    require_space,
    verify_folder,
    write_file,
    write_folder,
)
from isthmus.model.weights import require_finite

WEIGHTS = "trainable.safetensors"
OPTIMISER = "optimiser.safetensors"
STATE = "state.json"
log = logging.getLogger(__name__)


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
    rejected: int = 0  # utterances of the epoch that could not be loaded
    not_finite: int = 0  # steps that were skipped
    not_finite_in_a_row: int = 0
    pending: dict[str, Any] | None = None  # metrics of a step whose validation was interrupted


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    progress: Progress,
    optimiser: Mapping[str, Tensor] | None = None,
) -> None:
    """Write trained tensors, progress and, for resuming, the optimiser's tensors to `folder`.

    Raises RetryLater when the disk does not take it; what was saved before is untouched then.
    """
    tensors = {WEIGHTS: state} if optimiser is None else {WEIGHTS: state, OPTIMISER: optimiser}

    def fill(partial: Path) -> None:
        for name, values in tensors.items():
            content = to_bytes({key: value.detach().contiguous() for key, value in values.items()})
            write_file(partial / name, content)
        write_file(partial / STATE, (json.dumps(asdict(progress), indent=2) + "\n").encode())

    try:
        clear_leftovers(folder.parent, "step-*")
        require_space(
            folder.parent, sum(v.nbytes for part in tensors.values() for v in part.values())
        )
        write_folder(folder, fill)
    except (OSError, IsthmusError) as error:
        reason = f"{error.strerror or error}." if isinstance(error, OSError) else str(error)
        raise RetryLater(
            f"Checkpoint {folder} could not be written: {reason} {_last_intact(folder)} Resume "
            "when the disk can be written again."
        ) from error


def _last_intact(folder: Path) -> str:
    """What there is to go on from when `folder` could not be written."""
    for path in (newest_checkpoint(folder.parent)[0], folder):
        if path is not None:
            with contextlib.suppress(IsthmusError):
                verify_folder(path)
                return f"The last checkpoint {path.name} is intact."
    return "There is no earlier checkpoint beside it."


def optimiser_state(
    optimiser: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's tensors by `parameter/key`.

    There is no random state to keep: seeds are functions of the recipe's seed and the position.
    """
    tensors = {}
    for name, parameter in trainable.items():
        for key, value in optimiser.state[parameter].items():
            tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors


def load_shared(folder: Path, state: Mapping[str, Tensor]) -> set[str]:
    """Read what a verified checkpoint and `state` both have; the names that only one of them has.

    Raises IsthmusError for another shape, and where they share nothing.
    """
    verify_folder(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        names = set(stored.keys())
    shared = {name: value for name, value in state.items() if name in names}
    if not shared:
        raise IsthmusError(f"{folder} has no weight of this model. Start from another run.")
    _load(folder, shared)
    return names ^ state.keys()


def load_weights(folder: Path, state: Mapping[str, Tensor]) -> Progress:
    """Read a verified checkpoint's tensors into `state`; names and shapes must agree."""
    verify_folder(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as stored:
        different = sorted(stored.keys() ^ state.keys())
    if different:
        raise IsthmusError(
            f"{folder} belongs to another model: they differ in {', '.join(different[:5])}."
        )
    _load(folder, state)
    try:
        return Progress(**read_json(folder / STATE))
    except TypeError as error:
        raise IsthmusError(
            f"{folder} was written by another version of isthmus: {error}."
        ) from error


def _load(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Read tensors of a checkpoint, which has all of these, if their shapes agree."""
    stored = load_file(folder / WEIGHTS)
    for name, value in state.items():
        if stored[name].shape != value.shape:
            raise IsthmusError(
                f"{folder}: {name} has shape {tuple(stored[name].shape)}, the model's is "
                f"{tuple(value.shape)}. The checkpoint belongs to another recipe."
            )
    require_finite(stored.items(), str(folder))
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(stored[name])


def restore(
    folder: Path,
    state: Mapping[str, Tensor],
    trainable: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> Progress:
    """Continue exactly: trained tensors and optimiser of `folder`.

    Raises IsthmusError where the optimiser's tensors are not those of `trainable`.
    """
    progress = load_weights(folder, state)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / OPTIMISER).items():
        name, _, kind = key.rpartition("/")
        entries.setdefault(name, {})[kind] = value
    for name, values in entries.items():
        parameter = trainable.get(name)
        shapes = {tuple(value.shape) for value in values.values() if value.dim()}
        if parameter is None or shapes - {tuple(parameter.shape)}:
            shape = "not trained now" if parameter is None else f"of shape {tuple(parameter.shape)}"
            raise IsthmusError(
                f"{folder / OPTIMISER}: its tensors of {name} have shapes {sorted(shapes)}, the "
                f"parameter is {shape}. The checkpoint belongs to another recipe."
            )
        optimiser.state[parameter] = {
            kind: value.to(parameter.device) if value.dim() else value
            for kind, value in values.items()
        }
    return progress


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; one that was being replaced is brought back."""
    with contextlib.suppress(OSError):  # a disk that is read-only now can be read all the same
        recover_folders(folder, "step-*")
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
    """Delete all but the newest `keep` checkpoints, provided that the newest is sound.

    What cannot be deleted is a warning.
    """
    found = checkpoints(folder)
    old = found[:-keep]
    if not old:
        return
    try:
        verify_folder(found[-1])
    except IsthmusError as error:
        log.warning("%s Older checkpoints are kept.", error)
        return
    for path in old:
        remove_folder(path)

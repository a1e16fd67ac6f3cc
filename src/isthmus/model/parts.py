"""Where a model's files come from: a local folder, the Hugging Face hub, or this package.

Only configuration, tokenizer and weights are ever read: no remote code.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from isthmus.errors import IsthmusError, one_line, suggest
from isthmus.files import read_json
from isthmus.model.fetch import FETCHED, is_fetched, part_folder
from isthmus.model.hub import DESCRIBING, download, download_model
from isthmus.model.weights import (
    PICKLED,
    SAFE,
    arguments,
    copied_sums,
    require_finite,
    sha256,
    weight_files,
    weights_arguments,
)
from isthmus.settings.base import SHIPPED, PartSettings, PretrainedSettings

SPARE_WEIGHTS = {"masked_spec_embed"}  # of wav2vec 2.0 and its kin, for their own pretraining only


@dataclass(frozen=True)
class StandIns:
    """Models without weights, in the place of those that only sizes are asked of."""

    folder: Path
    write: Callable[[str, Path], None]  # of a model by its name, all but its weights


stand_ins: ContextVar[StandIns | None] = ContextVar("stand_ins", default=None)
"""Set while parts are on the meta device, and no weight is read or downloaded."""


@dataclass(frozen=True)
class Source:
    """The files a part was loaded from, as a run folder records them."""

    name: str
    commit: str | None
    sha256: dict[str, str]  # file -> checksum
    converted: dict[str, str] = field(default_factory=dict, compare=False)
    """Of the safetensors that pickled files were turned into, where they were."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "converted" or value}


@singledispatch
def sources(settings: PartSettings) -> dict[str, Source]:
    """Where what is pretrained comes from, with checksums, by the dotted name of the part.

    What these settings themselves name has an empty name.
    """
    parts = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {
        f"{name}.{below}".rstrip("."): found
        for name, part in parts.items()
        if isinstance(part, PartSettings)
        for below, found in sources(part).items()
    }


@sources.register
def _(settings: PretrainedSettings) -> dict[str, Source]:
    return {"": source(settings.path, settings.revision)}


def resolve(path: str, revision: str | None = None, gguf: str | None = None) -> Path:
    """Folder of model `path`, or its file `gguf`; downloaded if it is a Hugging Face name.

    `revision` is a branch, a tag or the commit of a Source; folders and shipped models have none.

    Raises IsthmusError when there is no such file, or no configuration or weights in the folder.
    """
    planned = stand_ins.get()
    if path in SHIPPED:
        folder = SHIPPED[path]
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    elif path.startswith("isthmus/") and path not in FETCHED:
        known = [*SHIPPED, *FETCHED]
        raise IsthmusError(
            f"Unknown model {path!r} of isthmus.{suggest(path, known)} Known: {', '.join(known)}."
        )
    elif planned and not is_fetched(path):
        return _stand_in(planned, path)
    elif path in FETCHED:
        folder = part_folder(FETCHED[path])
    elif gguf:
        folder = download(path, revision, [gguf])
    else:
        folder = download_model(path, revision)
    if gguf:
        if not (folder / gguf).is_file():
            raise IsthmusError(f"{path} has no file {gguf}. Correct the name.")
        return folder / gguf
    if not (folder / "config.json").is_file():
        raise IsthmusError(
            f"{path}: the model folder {folder} has no config.json. Give a folder written by "
            "save_pretrained(), or a Hugging Face name."
        )
    if not planned and not weight_files(folder, path):
        raise IsthmusError(
            f"{path}: the model folder {folder} has no weights: neither {SAFE} nor {PICKLED}, nor "
            "an index of several such files. Load it with what it was written by, and write it "
            "again with save_pretrained()."
        )
    return folder


def source(path: str, revision: str | None = None, gguf: str | None = None) -> Source:
    """Name, commit and checksums of all files of model `path` that can change what it does."""
    place = resolve(path, revision, gguf)
    weights, others = [place], []
    if place.is_dir():
        weights = weight_files(place, path)
        others = [file for kind in DESCRIBING for file in place.glob(kind) if file.is_file()]
    sums = {file.name: sha256(file) for file in sorted({*others, *weights})}
    commits = (part for part in place.parts if re.fullmatch(r"[0-9a-f]{40}", part))
    pickled = any(file.suffix == ".bin" for file in weights)
    return Source(
        f"{path}/{gguf}" if gguf else path,
        next(commits, None),
        sums,
        copied_sums(weights) if pickled else {},
    )


def _stand_in(found: StandIns, path: str) -> Path:
    """The folder of a model known by name, with all but its weights."""
    folder = found.folder / path.replace("/", "--")
    if not folder.is_dir():
        found.write(path, folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder, with what is read here of the right kind.

    Raises IsthmusError.
    """
    config = read_json(folder / "config.json")
    found = config if isinstance(config, dict) else {}
    if not isinstance(found.get("model_type"), str):
        fault = "model_type in it is no text, such as 'llama'"
    elif not isinstance(found.get("architectures"), list | None):
        fault = "architectures in it is no list, such as ['LlamaForCausalLM']"
    else:
        return found
    raise IsthmusError(f"{folder / 'config.json'} is damaged: {fault}. Download it again.")


def model_type(folder: Path) -> str:
    """The architecture a model folder declares, such as `whisper`."""
    return str(read_config(folder)["model_type"])


def load_config(place: Path, path: str) -> Any:
    """What transformers makes of the configuration in a folder or a GGUF file.

    Raises IsthmusError.
    """
    if place.is_dir():
        read_config(place)
    with loading(path, place):
        return AutoConfig.from_pretrained(**arguments(place), trust_remote_code=False)


def load_network(auto: Any, place: Path, path: str, dtype: str = "auto") -> Any:
    """The network in a folder or GGUF file by an Auto class of transformers, all its weights there.

    Raises IsthmusError, also for weights that the folder lacks or has in other shapes: transformers
    would go on with random numbers in their place.
    """
    if stand_ins.get():
        return _sized_network(auto, place, path, dtype)
    with weights_arguments(place, path) as weights, loading(path, place):
        network, info = auto.from_pretrained(
            **weights,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are told here, in one line
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise IsthmusError(
            f"{path}: {place} has {len(mismatched)} weights in other shapes than its configuration "
            f"says, such as {name}: {tuple(found)}, and not {tuple(wanted)}. Download or write it "
            "again."
        )
    missing = {name for name in info["missing_keys"] if name.split(".")[-1] not in SPARE_WEIGHTS}
    if missing:
        raise IsthmusError(
            f"{path}: {place} lacks {len(missing)} weights of a {type(network).__name__}, such as "
            f"{min(missing)}. Download or write it again."
        )
    require_finite(network.state_dict().items(), path)
    return network


def _sized_network(auto: Any, place: Path, path: str, dtype: str) -> Any:
    """What load_network gives, on the meta device: no weight is read or made up."""
    config = load_config(place, path)
    with loading(path, place), torch.device("meta"):
        number = config.dtype if dtype == "auto" else getattr(torch, dtype)
        return auto.from_config(config, dtype=number, trust_remote_code=False)


def load_tokenizer(place: Path, path: str) -> Any:
    """The tokenizer of a language model, or what stands in for it in a plan.

    Raises IsthmusError.
    """
    found = stand_ins.get()
    stands_in = found is not None and found.folder == place.parent
    auto: Any = PreTrainedTokenizerFast if stands_in else AutoTokenizer
    with loading(path, place):
        return auto.from_pretrained(**arguments(place), trust_remote_code=False)


def save_half(network: Any, folder: Path) -> None:
    """Write a network that was trained here: stored in fp16, to be loaded in its own precision."""
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    with quiet():
        network.save_pretrained(folder, state_dict=half)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers, and what it says to the one who calls it."""
    bars, verbosity = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading(path: str, place: Path | None = None) -> Iterator[None]:
    """Turns what libraries say of files that cannot be loaded into an IsthmusError.

    They are quiet meanwhile: downloading is done, reading takes seconds, and faults are told here.
    """
    try:
        with quiet():
            yield
    except IsthmusError:
        raise
    except Exception as error:  # what is damaged may raise anything
        gguf = place is not None and place.is_file()
        hint = " It is damaged, or of a kind that transformers does not read." if gguf else ""
        raise IsthmusError(f"{path} cannot be loaded: {one_line(error)}.{hint}") from error


def freeze(module: nn.Module) -> None:
    """No gradient, and evaluation mode."""
    module.requires_grad_(False).eval()

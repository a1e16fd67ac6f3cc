"""Where a model's files come from: a local folder, the Hugging Face hub, or this package.

Only configuration, tokenizer and safetensors files are ever read: no pickles, no remote code.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from isthmus.errors import IsthmusError, suggest
from isthmus.model.fetch import FETCHED, part_folder

Tune = Literal["frozen", "lora", "full"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {
    "isthmus/tiny-conformer": ASSETS / "tiny-conformer",
    "isthmus/tiny-llama": ASSETS / "tiny-llama",
    "isthmus/tiny-llama-chat": ASSETS / "tiny-llama-chat",
}
READ_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SPARE_WEIGHTS = {"masked_spec_embed"}  # of wav2vec 2.0 and its kin, for their own pretraining only


_planned: ContextVar[Path | None] = ContextVar("_planned", default=None)
"""Where models without weights lie while parts are planned with, not loaded."""


class PartSettings(BaseModel):
    """What every part of the model shares: strict, immutable settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def sources(self) -> dict[str, "Source"]:
        """Where what is pretrained comes from, with checksums, by the dotted name of the part.

        What these settings themselves name has an empty name.
        """
        parts = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            f"{name}.{below}".rstrip("."): found
            for name, part in parts.items()
            if isinstance(part, PartSettings)
            for below, found in part.sources().items()
        }


class PretrainedSettings(PartSettings):
    """A part that is loaded from a folder or a Hugging Face repository."""

    path: str
    """Hugging Face name, local folder, or a model shipped with isthmus (`isthmus/tiny-llama`) or
    fetched by it (`isthmus/whisper-base`)."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""

    def at(self, commit: str | None) -> Self:
        """These settings with the commit that a run recorded, if it did."""
        return self.model_copy(update={"revision": commit}) if commit else self

    def sources(self) -> dict[str, "Source"]:
        return {"": source(self.path, self.revision)}


@dataclass(frozen=True)
class Source:
    """The files a part was loaded from, as a run folder records them."""

    name: str
    commit: str | None
    sha256: dict[str, str]  # file -> checksum

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(path: str, revision: str | None = None) -> Path:
    """Folder with the files of model `path`, downloaded if it is a Hugging Face name.

    `revision` is a branch, a tag or the commit of a Source; folders and shipped models have none.

    Raises IsthmusError when the folder holds no configuration or no safetensors weights.
    """
    planned = _planned.get()
    if path in SHIPPED:
        folder = SHIPPED[path]
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    elif planned:
        return _planned_folder(planned, path)
    elif path in FETCHED:
        folder = part_folder(FETCHED[path])
    else:
        folder = download(path, revision, READ_FILES)
    if not (folder / "config.json").is_file():
        raise IsthmusError(
            f"{path}: the model folder {folder} has no config.json. Give a folder written by "
            "save_pretrained(), or a Hugging Face name."
        )
    if not planned and not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for kind in PICKLED for file in folder.glob(kind))
        found = (
            f" It has {pickled[0]}, but pickles can run code and are not read." if pickled else ""
        )
        raise IsthmusError(
            f"{path}: the model folder {folder} has no safetensors weights.{found} Load it with "
            "transformers and write it again with save_pretrained(), which makes safetensors; or "
            "set a revision that has them: on the hub, converters leave them in refs/pr/1 and on."
        )
    return folder


def download(path: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a Hugging Face repository that match `patterns`, in a folder of its cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", path) or path.startswith("."):
        raise IsthmusError(f"{path}: no such folder, and not a Hugging Face name.")
    if path.startswith("isthmus/"):
        known = [*SHIPPED, *FETCHED]
        raise IsthmusError(
            f"Unknown model {path!r} of isthmus.{suggest(path, known)} Known: {', '.join(known)}."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated kinds
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).partition("\n")[0].rstrip(".")
        raise IsthmusError(
            f"{path}{at}: neither a local folder nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). {_remedy(error, path)}"
        ) from error


def _remedy(error: Exception, path: str) -> str:
    """What to do when the hub does not give model `path`."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{path}"
            return f"It is gated: accept its terms at {page}, then {log_in}."
        case errors.RepositoryNotFoundError():
            return f"Correct the name; if the repository is private, {log_in}."
        case errors.RevisionNotFoundError():
            return "There is no such revision: correct it, or leave it out."
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and the cache lacks files of it: unset it, or give a folder."
    return "Check the name and the connection and try again, or download it to a folder."


def source(path: str, revision: str | None = None) -> Source:
    """Name, commit and checksums of all files of model `path` that can change what it does."""
    folder = resolve(path, revision)
    files = sorted({file for kind in READ_FILES for file in folder.glob(kind) if file.is_file()})
    commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
    return Source(path, commit, {file.name: sha256(file) for file in files})


def sha256(file: Path) -> str:
    """Checksum of a file; one of the hub's cache already bears it as the name of its blob."""
    blob = Path(os.path.realpath(file)).name
    if re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def on_meta() -> Iterator[None]:
    """Parts that are built within have their sizes and no weights: their networks are on torch's
    meta device. A Hugging Face name is looked up in isthmus.model.presets; nothing is downloaded.
    """
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        token = _planned.set(Path(folder))
        try:
            yield
        finally:
            _planned.reset(token)


def _planned_folder(planned: Path, path: str) -> Path:
    """The folder of a model known by name, with all but its weights."""
    from isthmus.model.presets import write_preset  # which knows the kinds of parts, as we do not

    folder = planned / path.replace("/", "--")
    if not folder.is_dir():
        write_preset(path, folder)
    return folder


def choose_device() -> torch.device:
    """The CUDA device this process should use if there is one, else the CPU; meta in a plan."""
    if _planned.get():
        return torch.device("meta")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_type(folder: Path) -> str:
    """The architecture a model folder declares, such as `whisper`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("model_type", ""))


def load_network(auto: Any, folder: Path, path: str, dtype: str = "auto") -> Any:
    """The network in `folder` by an Auto class of transformers, with all its weights from there.

    Raises IsthmusError, also for weights that the folder lacks: transformers would go on with
    random numbers in their place.
    """
    if _planned.get():
        return _sized_network(auto, folder, path, dtype)
    with loading(path):
        network, info = auto.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype,
            output_loading_info=True,
        )
    missing = {name for name in info["missing_keys"] if name.split(".")[-1] not in SPARE_WEIGHTS}
    if missing:
        raise IsthmusError(
            f"{path}: {folder} lacks {len(missing)} weights of a {type(network).__name__}, such as "
            f"{min(missing)}. Download or write it again."
        )
    return network


def _sized_network(auto: Any, folder: Path, path: str, dtype: str) -> Any:
    """What load_network gives, on the meta device: no weight is read or made up."""
    with loading(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        number = config.dtype if dtype == "auto" else getattr(torch, dtype)
        return auto.from_config(config, dtype=number, trust_remote_code=False)


def load_tokenizer(folder: Path, path: str) -> Any:
    """The tokenizer of a language model, or what stands in for it in a plan.

    Raises IsthmusError.
    """
    stands_in = _planned.get() == folder.parent
    auto: Any = PreTrainedTokenizerFast if stands_in else AutoTokenizer
    with loading(path):
        return auto.from_pretrained(folder, trust_remote_code=False)


def save_half(network: Any, folder: Path) -> None:
    """Write a network that was trained here: stored in fp16, to be loaded in its own precision."""
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    with no_bars():
        network.save_pretrained(folder, state_dict=half)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of transformers, for what takes seconds."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turns what transformers says of a folder that cannot be loaded into an IsthmusError.

    Its progress bars are off meanwhile: downloading is done, and reading takes seconds.
    """
    try:
        with no_bars():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise IsthmusError(f"{path} cannot be loaded: {error}") from error


def freeze(module: nn.Module) -> None:
    """No gradient, and evaluation mode."""
    module.requires_grad_(False).eval()

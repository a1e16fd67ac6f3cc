"""The files that hold a model's weights, as the world leaves them.

safetensors are read as they are. Pickles (`pytorch_model.bin`) give up their tensors and nothing
else, and are turned into safetensors once, in a cache; whatever wants more than that is refused.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import textwrap
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import (
    MANIFEST,
    FolderLock,
    read_json,
    require_space,
    user_cache,
    write_atomic,
    write_file,
    write_folder,
)

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # behind either name: which of several files holds which weight
CONFIGURATION = ("config.json", "generation_config.json")
LARGE = 10_000_000  # bytes of a file whose checksum is worth remembering
SETTLED = 2  # seconds after which a change of a file shows in its times
COPY_VERSION = 1  # raise it whenever a copy is made otherwise
GgufConfig: Any = getattr(transformers, "GgufConfig", None)  # of those that could keep it packed
log = logging.getLogger(__name__)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files with the weights of the model in `folder`: safetensors if it has any, else pickles.

    None if it has neither. Raises IsthmusError for an index of files that are not there.
    """
    for single in (SAFE, PICKLED):
        if (folder / single).is_file():
            return [folder / single]
        if shards := indexed(folder, single):
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise IsthmusError(
                    f"{name}: {folder / (single + INDEX)} names {len(shards)} files, of which "
                    f"{', '.join(missing[:3])} is not there. Download the model again."
                )
            return [folder / shard for shard in shards]
    return []


def indexed(folder: Path, single: str) -> list[str]:
    """The files in which the index of `folder` has what else were in `single`; none without one."""
    index = folder / (single + INDEX)
    if not index.is_file():
        return []
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if shards and all(Path(shard).name == shard for shard in shards):
            return shards
    except (KeyError, TypeError, AttributeError):
        pass
    raise IsthmusError(f"{index} is damaged: it does not say which file holds which weight.")


def arguments(place: Path) -> dict[str, Any]:
    """How transformers is told of a model's folder, or of its GGUF file."""
    if place.is_dir():
        return {"pretrained_model_name_or_path": place}
    if importlib.util.find_spec("gguf") is None:
        raise IsthmusError(
            f"{place} is a GGUF file, and what reads them is not installed. Install the extra: "
            "pip install 'isthmus[gguf]'."
        )
    return {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}


def weights_arguments(place: Path, name: str) -> dict[str, Any]:
    """How transformers is told to load the weights of model `name`, in a folder or a GGUF file."""
    if place.is_file():
        unpacked = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
        return arguments(place) | unpacked
    files = weight_files(place, name)
    copy = place if files[0].suffix == ".safetensors" else without_pickles(files, name)
    if copy is None:
        for file in files:
            read_pickle(file, name)  # says what is wrong with it
    return arguments(copy or place) | {"use_safetensors": copy is not None}


def copy_of(files: Sequence[Path]) -> Path:
    """The folder in the user's cache that holds, or will hold, pickled `files` as safetensors."""
    beside = [files[0].with_name(name) for name in CONFIGURATION]
    sums = {file.name: sha256(file) for file in (*files, *beside) if file.is_file()}
    return user_cache("weights") / _digest_of([COPY_VERSION, sums])[:32]


def copied_sums(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of the safetensors that pickled `files` were turned into, as far as they were."""
    manifest = copy_of(files) / MANIFEST
    sums = read_json(manifest)["sha256"] if manifest.is_file() else {}
    return {name: digest for name, digest in sums.items() if name.endswith(".safetensors")}


def without_pickles(files: Sequence[Path], name: str) -> Path | None:
    """The folder of a model whose pickled `files` were turned into safetensors, now or before.

    It is made once, by one process. None, with a warning, where the cache cannot take it. Raises
    IsthmusError for a pickle that is damaged or holds more than tensors.
    """
    copy = copy_of(files)
    if copy.is_dir():
        return copy
    try:
        with FolderLock(copy.parent, wait=True):
            if not copy.is_dir():
                log.info("%s: its pickled weights are turned into safetensors, once.", name)
                require_space(copy.parent, sum(file.stat().st_size for file in files), 1.1)
                write_folder(copy, partial(_convert, files, name))
    except (OSError, RetryLater) as error:
        reason = str(error) if isinstance(error, RetryLater) else f"{copy}: {error.strerror}."
        log.warning(
            "%s: its pickled weights are read each time, because the cache cannot take a copy in "
            "safetensors: %s ISTHMUS_CACHE names another place for it.",
            name,
            reason,
        )
        return None
    return copy


def _convert(files: Sequence[Path], name: str, folder: Path) -> None:
    """Fill `folder` with the weights of pickled `files`, a file each, and what loads them."""
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        tensors = _separate(read_pickle(file, name))
        target = SAFE if len(files) == 1 else f"{file.stem}.safetensors"
        try:
            save_file(tensors, folder / target, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(None, str(error)) from error
        weight_map |= dict.fromkeys(tensors, target)
        size += sum(value.nbytes for value in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_file(folder / (SAFE + INDEX), json.dumps(index, indent=2).encode())
    for beside in CONFIGURATION:
        if files[0].with_name(beside).is_file():
            write_file(folder / beside, files[0].with_name(beside).read_bytes())


def read_pickle(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, on the CPU; its own code is not run.

    They may lie one level down, under `state_dict`, as trainers leave them; what else there is is
    left. Raises IsthmusError for a file that is damaged or wants more than tensors.
    """
    try:
        found = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:  # what is damaged may raise anything
        said = str(error).rpartition("WeightsUnpickler error:")[2]
        wanted = re.search(r"GLOBAL (\S+)", said)
        fault = (
            f"is refused: it wants {wanted[1]}, and nothing but tensors is taken out of a pickle; "
            "nothing of it was run. Take a model that has safetensors."
            if wanted
            else f"cannot be read ({textwrap.shorten(said, 200)}). Download it again."
        )
        raise IsthmusError(f"{name}: {file} {fault}") from error
    nested = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    tensors = {key: value for key, value in nested.items() if isinstance(value, Tensor)}
    if not tensors:
        raise IsthmusError(f"{name}: {file} holds no weights by name.")
    return tensors


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors want it: tied weights are stored twice."""
    seen: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        storage = value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != value.nbytes
        separate[name] = value.clone().contiguous() if shared else value.contiguous()
        seen.add(storage.data_ptr())
    return separate


def require_finite(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise IsthmusError if any of the weights is no number, or none that is finite."""
    bad = [
        name
        for name, value in weights
        if value.is_floating_point()
        and value.element_size() > 1  # not float8, which torch does not sum
        and not value.is_meta
        and not value.sum(dtype=torch.float32).isfinite()
        and not value.isfinite().all()  # the sum of many may overflow
    ]
    if bad:
        raise IsthmusError(
            f"{where}: {len(bad)} of its weights hold NaN or infinite numbers, such as {bad[0]}. "
            "Nothing can be computed with them: take another file or checkpoint."
        )


def sha256(file: Path) -> str:
    """Checksum of a file's content; a large one is read once, until it changes.

    Raises IsthmusError where the hub's cache has the content under another sum.
    """
    content = Path(os.path.realpath(file))
    digest = _remembered(content)
    if re.fullmatch(r"[0-9a-f]{64}", content.name) and content.name != digest:
        raise IsthmusError(
            f"{file} is damaged: its SHA-256 is {digest}, on the hub it is {content.name}. Delete "
            f"{content}, and it is downloaded again."
        )
    return digest


def _remembered(file: Path) -> str:
    stat = file.stat()
    if stat.st_size < LARGE:
        return _content_digest(file)
    identity = [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = user_cache("sums") / _digest_of(identity)
    with suppress(OSError, ValueError):
        if re.fullmatch(r"[0-9a-f]{64}", digest := memory.read_text(encoding="ascii")):
            return digest
    digest = _content_digest(file)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with suppress(OSError):
            write_atomic(memory, digest)
    return digest


def _content_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """What a library says, in one line that is not too long."""
    return textwrap.shorten(str(error), 300).rstrip(".") or type(error).__name__

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import _SIZE, save_file
from torch import Tensor

from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import (
    FolderLock,
    file_sha256,
    read_json,
    remove_folder,
    require_space,
    user_cache,
    verify_folder,
    write_atomic,
    write_file,
    write_folder,
)

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # behind either name: which of several files holds which weight
CONFIGURATION = ("config.json", "generation_config.json")
LARGE = 10_000_000  # bytes of a file whose checksum is worth remembering
STORED = frozenset(_SIZE)  # the types of numbers that safetensors hold
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
    index, kind = folder / (single + INDEX), Path(single).suffix
    if not index.is_file():
        return []
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if shards and all(re.fullmatch(r"[^/\\]+" + re.escape(kind), shard) for shard in shards):
            return shards
    except (KeyError, TypeError, AttributeError):
        pass
    raise IsthmusError(f"{index} is damaged: it does not say which *{kind} holds which weight.")


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


@contextmanager
def weights_arguments(place: Path, name: str) -> Iterator[dict[str, Any]]:
    """How transformers is told to load the weights of model `name`, in a folder or a GGUF file.

    What it is told of is there while this is entered.
    """
    with ExitStack() as stack:
        if place.is_file():
            more = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
        else:
            files, more = weight_files(place, name), {"use_safetensors": True}
            if files[0].suffix != ".safetensors":
                place = without_pickles(files, name) or stack.enter_context(_spare(files, name))
        yield arguments(place) | more


def copy_of(files: Sequence[Path]) -> Path:
    """The folder in the user's cache that holds, or will hold, pickled `files` as safetensors."""
    beside = [files[0].with_name(name) for name in CONFIGURATION]
    sums = {file.name: sha256(file) for file in (*files, *beside) if file.is_file()}
    return user_cache("weights") / _digest_of([COPY_VERSION, sums])[:32]


def copied_sums(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of the safetensors that pickled `files` were turned into, if they are whole."""
    copy = copy_of(files)
    made = sorted(copy.glob("*.safetensors")) if _is_whole(copy) else []
    return {file.name: _remembered(file) for file in made}


def _is_whole(copy: Path) -> bool:
    with suppress(IsthmusError):
        verify_folder(copy, digest_of=_remembered)
        return True
    return False


def without_pickles(files: Sequence[Path], name: str) -> Path | None:
    """The folder of a model whose pickled `files` were turned into safetensors, now or before.

    It is made once, by one process, and again if it is damaged. None, with a warning, where the
    cache cannot take it. Raises IsthmusError for a pickle that is damaged or holds more than
    tensors.
    """
    copy = copy_of(files)
    if _is_whole(copy):
        return copy
    try:
        with FolderLock(copy.parent, wait=True):
            if not _is_whole(copy):
                if copy.exists():
                    log.warning("%s is damaged, and made again.", copy)
                    remove_folder(copy)
                log.info("%s: its pickled weights are turned into safetensors, once.", name)
                require_space(copy.parent, sum(file.stat().st_size for file in files), 1.1)
                write_folder(copy, partial(_convert, files, name))
    except (OSError, RetryLater) as error:
        reason = str(error) if isinstance(error, RetryLater) else f"{copy}: {error.strerror}."
        log.warning(
            "%s: its pickled weights are turned into safetensors each time, because the cache "
            "cannot take the copy: %s ISTHMUS_CACHE names another place for it.",
            name,
            reason,
        )
        return None
    return copy


@contextmanager
def _spare(files: Sequence[Path], name: str) -> Iterator[Path]:
    """Such a folder in a temporary place. Raises also RetryLater, where that has no room either."""
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="isthmus-")))
            _convert(files, name, folder)
        except OSError as error:
            raise RetryLater(
                f"{name}: its pickled weights cannot be turned into safetensors: neither the cache "
                f"nor {gettempdir()} takes them: {error.strerror}. Free some space, or set "
                "ISTHMUS_CACHE or TMPDIR."
            ) from error
        yield folder


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
    left. Raises IsthmusError for a file that is damaged or wants more than tensors, and for
    tensors that safetensors cannot hold.
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
    items = nested.items() if isinstance(nested, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise IsthmusError(f"{name}: {file} holds no weights by name.")
    for key, value in tensors.items():
        plain = value.layout == torch.strided and not value.is_meta and value.dtype in STORED
        if not (plain and isinstance(key, str)):
            kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
            raise IsthmusError(
                f"{name}: {file} holds {key!r} ({kind}), which is no weight by name that "
                "safetensors can hold. Take a model that has safetensors."
            )
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
        return file_sha256(file)
    identity = [str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = user_cache("sums") / _digest_of(identity)
    with suppress(OSError, ValueError):
        if re.fullmatch(r"[0-9a-f]{64}", digest := memory.read_text(encoding="ascii")):
            return digest
    digest = file_sha256(file)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with suppress(OSError):
            write_atomic(memory, digest)
    return digest


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""What a bug report should say. Each item is told, or what kept it from being told."""

import getpass
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from isthmus.errors import IsthmusError, one_line
from isthmus.files import user_cache, verify_folder
from isthmus.model.fetch import PARTS, known_sums, parts_folder

Items = Mapping[str, Callable[[], str]]
VARIABLES = (  # those that change what isthmus does and hold no secret
    "ISTHMUS_CACHE",
    "ISTHMUS_OFFLINE",
    "ISTHMUS_PARTS",
    "ISTHMUS_SPEECH",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)


def doctor(*, check_sums: bool = False) -> dict[str, dict[str, str]]:
    """Sections of items, by name. Of models nothing is loaded; `check_sums` reads all parts.

    Paths are without the user's name.
    """
    sections: dict[str, Callable[[], Items]] = {
        "versions": _versions,
        "extras": _extras,
        "device": _device,
        "parts": lambda: {name: partial(_part, name, check_sums) for name in PARTS},
        "caches": _caches,
        "environment": lambda: {name: partial(_variable, name) for name in VARIABLES},
    }
    found: dict[str, dict[str, str]] = {}
    for section, items in sections.items():
        try:
            found[section] = {name: _told(item) for name, item in items().items()}
        except Exception as error:  # all of it at once: no item has a name
            found[section] = {"fault": _anonymous(_fault(error))}
    return found


def _told(item: Callable[[], str]) -> str:
    try:
        return _anonymous(item())
    except Exception as error:  # a broken package may raise anything
        return _anonymous(_fault(error))


def _fault(error: Exception) -> str:
    kind = "" if isinstance(error, IsthmusError) else f"{type(error).__name__}: "
    return f"not known: {kind}{one_line(error)}"


def _anonymous(text: str) -> str:
    """Home folders are `~`, and so is the user's name where it is a part of a path."""
    homes = {str(Path.home()), str(Path.home().resolve()), os.path.expanduser("~")}
    for home in sorted(homes, key=len, reverse=True):
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return text
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", "~", text)


def _requirements(extra: str | None) -> list[str]:
    """Names of the packages that isthmus needs, always or with an extra."""
    found = []
    for line in requires("isthmus") or ():
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)", line)
        if (named[1] if named else None) == extra:
            found.append(re.split(r"[^\w.-]", line)[0])
    return found


def _versions() -> Items:
    return {
        "isthmus": partial(version, "isthmus"),
        "python": platform.python_version,
        "system": platform.platform,
        **{name: partial(version, name) for name in _requirements(None)},
    }


def _extras() -> Items:
    def packages(extra: str) -> str:
        return ", ".join(map(_installed, _requirements(extra)))

    lines = "\n".join(requires("isthmus") or ())
    extras = dict.fromkeys(re.findall(r"extra\s*==\s*['\"]([\w-]+)", lines))
    return {name: partial(packages, name) for name in extras if name != "dev"}


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def _variable(name: str) -> str:
    return os.environ.get(name, "not set")


def _device() -> Items:
    import torch

    def gpu(number: int) -> str:
        facts = torch.cuda.get_device_properties(number)
        return f"{facts.name}, {facts.total_memory / 1e9:.1f} GB"

    def half() -> str:
        if torch.cuda.is_available():
            own = torch.cuda.is_bf16_supported(including_emulation=False)
            return "on the GPU" if own else "emulated on the GPU"
        cpu = torch.cpu
        kinds = {"AMX": cpu._is_amx_tile_supported, "avx512_bf16": cpu._is_avx512_bf16_supported}
        return ", ".join(name for name, there in kinds.items() if there()) or "emulated on the CPU"

    def threads() -> str:
        return f"{torch.get_num_threads()} of {os.cpu_count()} cores"

    gpus = {f"cuda:{number}": partial(gpu, number) for number in range(torch.cuda.device_count())}
    return {
        "cpu": lambda: f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        **gpus,
        "cuda": lambda: torch.version.cuda or "not in this build of torch",
        "mps": lambda: "there" if torch.backends.mps.is_available() else "not there",
        "bfloat16": half,
        "threads": threads,
    }


def _part(name: str, check_sums: bool) -> str:
    folder = parts_folder() / name
    if not folder.is_dir():
        return "not there"
    if not check_sums:
        return "there, sums not checked"
    verify_folder(folder, known_sums(name))
    return "there, sums right"


def _caches() -> Items:
    def hub() -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        return _space(Path(HF_HUB_CACHE))

    return {
        "isthmus": lambda: _space(user_cache("")),
        "parts": lambda: _space(parts_folder()),
        "hub": hub,
    }


def _space(folder: Path) -> str:
    from rich.filesize import decimal

    existing = next(path for path in (folder, *folder.parents) if path.exists())
    files = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    used = decimal(sum(file.lstat().st_size for file in files)) if existing == folder else "none"
    return f"{folder}: {used}, {decimal(shutil.disk_usage(existing).free)} free"

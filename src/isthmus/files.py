"""Durable writes: whole or not at all, read again before anything older is deleted."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from isthmus.errors import IsthmusError, RetryLater

MANIFEST = "MANIFEST.json"
SCHEMA = 1
LOCK = ".lock"
CACHE_VARIABLE = "ISTHMUS_CACHE"
SPACE_FACTOR = 2.2  # a new copy beside the old one, and room for logs
OWNER_WAIT = 0.5  # seconds in which the owner of a lock has written its name
log = logging.getLogger(__name__)

# Called with name and path before each operation on the disk, so that tests can make each fail.
observers: list[Callable[[str, Path], None]] = []


def _operation(name: str, path: Path) -> None:
    for observe in observers:
        observe(name, path)


def write_file(path: Path, content: bytes) -> None:
    """Write and sync `path`: not atomic, meant for the files of a folder that write_folder fills.

    Raises OSError.
    """
    _operation("open", path)
    with path.open("wb") as stream:
        _operation("write", path)
        stream.write(content)
        _operation("flush", path)
        stream.flush()
        _operation("fsync", path)
        os.fsync(stream.fileno())


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`; a crash leaves the old file or the new one, never a part.

    Raises OSError.
    """
    partial = _beside(path, "partial")
    _make_folder(path.parent)
    try:
        # Half a pair, or a byte of a name that is no UTF-8, becomes an escape that JSON knows too.
        coded = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        write_file(partial, coded)
        _rename(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)  # which the system may not know
        discard(partial)
        raise


def write_folder(
    path: Path, fill: Callable[[Path], None], sums: Mapping[str, str] | None = None
) -> None:
    """Make folder `path` by `fill(temporary folder)`, seal, read again, and only then publish it.

    The manifest, a SHA-256 for each file, is written last: a folder without it is not complete.
    A folder whose `sums` are known beforehand gets none, and is published only if it has them.
    An existing folder of that name is replaced only after the new one was verified.
    Raises OSError, or IsthmusError when the disk does not give back what was written.
    """
    partial, replaced = _beside(path, "partial"), _beside(path, "replaced")
    recover_folder(path)
    try:
        _remove(partial)
        _make_folder(partial)
        fill(partial)
        _seal(partial, with_manifest=sums is None)
        verify_folder(partial, sums)
        _remove(replaced)
        if path.exists():
            _rename(path, replaced)
        _rename(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            recover_folder(path)
        discard(partial)
        raise
    discard(replaced)


def recover_folder(path: Path) -> None:
    """Bring back folder `path` if write_folder was stopped while replacing it."""
    replaced = _beside(path, "replaced")
    if not path.exists() and replaced.is_dir():
        _rename(replaced, path)


def remove_folder(path: Path) -> None:
    """Delete folder `path`: under its own name it is whole or gone. Failing is a warning."""
    removed = _beside(path, "removed")
    discard(removed)
    try:
        _rename(path, removed)
    except OSError as error:
        log.warning("%s could not be removed: %s.", path, error.strerror)
    else:
        discard(removed)


def recover_folders(folder: Path, pattern: str) -> None:
    """recover_folder for each folder in `folder` named like the glob `pattern`."""
    for path in folder.glob(_beside(folder / pattern, "replaced").name):
        recover_folder(folder / path.name.removeprefix(".").removesuffix(".replaced"))


def clear_leftovers(folder: Path, pattern: str) -> None:
    """Remove what killed writers of folders named like the glob `pattern` left in `folder`."""
    recover_folders(folder, pattern)
    for kind in ("partial", "replaced", "removed"):
        for path in folder.glob(_beside(folder / pattern, kind).name):
            discard(path)


def discard(path: Path) -> None:
    """Remove a temporary file or folder, if there; failing is a warning."""
    try:
        _remove(path)
    except OSError as error:
        log.warning("%s could not be removed: %s. Remove it by hand.", path, error.strerror)


def verify_folder(
    path: Path,
    sums: Mapping[str, str] | None = None,
    digest_of: Callable[[Path], str] | None = None,
) -> None:
    """Raise IsthmusError unless `path` holds the files of its manifest, unchanged, and no others.

    The manifest must be, byte by byte, as write_folder writes it. A folder that is known beforehand
    has `sums`, SHA-256 by file, in its place. `digest_of` may remember what it read before.
    """
    digest_of = digest_of or file_sha256
    try:
        recover_folder(path)
        sums = _read_manifest(path) if sums is None else sums
        found = _files(path)
        found.pop(MANIFEST, None)
        if missing := sorted(sums.keys() - found):
            raise IsthmusError(f"{path} is incomplete: it lacks {', '.join(missing[:5])}.")
        if extra := sorted(found.keys() - sums):
            raise IsthmusError(
                f"{path} is damaged: it holds {', '.join(extra[:5])} beside what belongs there. "
                "What you put there yourself, move away."
            )
        for name, file in found.items():
            if (digest := digest_of(file)) != sums[name]:
                raise IsthmusError(
                    f"{file} is damaged: its SHA-256 is {digest}, and should be {sums[name]}."
                )
    except OSError as error:
        raise IsthmusError(
            f"{path} is incomplete: {error.filename or path} cannot be read: {error.strerror}."
        ) from error


def _read_manifest(folder: Path) -> dict[str, str]:
    """SHA-256 by file of a manifest that is exactly as _manifest renders it."""
    try:
        written = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise IsthmusError(f"{folder} is incomplete: it has no {MANIFEST}.") from error
    try:
        content = json.loads(written)
        schema, sums = content["schema"], content["sha256"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise IsthmusError(
                f"{folder} was written by a newer isthmus: its {MANIFEST} has schema {schema}, "
                f"this version reads {SCHEMA}. Upgrade isthmus."
            )
        sound = written == _manifest(sums)
    except IsthmusError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IsthmusError(f"{folder} is damaged: its {MANIFEST} is no manifest.") from error
    if not sound:
        raise IsthmusError(f"{folder} is damaged: its {MANIFEST} was changed.")
    return {str(name): str(digest) for name, digest in sums.items()}


def _manifest(sums: dict[str, str]) -> bytes:
    content = {"schema": SCHEMA, "sha256": dict(sorted(sums.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _seal(folder: Path, *, with_manifest: bool) -> None:
    """Make what `folder` holds durable, and write its manifest, last."""
    sums = {}
    for name, file in _files(folder).items():
        _operation("fsync", file)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        sums[name] = file_sha256(file)
        _forget(file)
    if with_manifest:
        write_file(folder / MANIFEST, _manifest(sums))
        _forget(folder / MANIFEST)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        _sync_folder(inner)
    _sync_folder(folder)


def _files(folder: Path) -> dict[str, Path]:
    """What is no folder in `folder` and below, by its path in it, sorted."""
    paths = [path for path in folder.rglob("*") if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): path for path in sorted(paths)}


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _forget(file: Path) -> None:
    """Let the memory's copy of a synced file go: what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        _operation("mkdir", folder)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _rename(path: Path, target: Path) -> None:
    _operation("rename", path)
    path.replace(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():  # of a link, what it names stays
        _operation("rmtree", path)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        _operation("unlink", path)
        path.unlink()


def _sync_folder(folder: Path) -> None:
    _operation("sync", folder)
    if os.name == "nt":  # has no way to sync a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system has no way either
            raise
    finally:
        os.close(descriptor)


def user_cache(kind: str) -> Path:
    """Where what can be made again is kept, by its kind: $ISTHMUS_CACHE or the user's own cache."""
    root = os.environ.get(CACHE_VARIABLE)
    root = root or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/isthmus"
    return Path(root).expanduser().absolute() / kind


def require_space(folder: Path, num_bytes: int, factor: float = SPACE_FACTOR) -> None:
    """Raise RetryLater unless `folder` has room for `factor` times `num_bytes`."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, int(factor * num_bytes)
    if free < needed:
        raise RetryLater(
            f"{folder} has {free / 1e6:,.1f} MB free, and {needed / 1e6:,.1f} MB are needed, "
            f"{factor} times what is to be written. Free some space, then try again."
        )


class FolderLock:
    """While entered, no other process can enter the lock of `folder`.

    The kernel holds the lock and releases it however the process ends; the file stays, and tells
    pid, host and start time of the last owner. It must not be deleted while the lock is held.
    Entering raises RetryLater when the folder cannot be written, or another process owns the lock
    and we are not to `wait` for it; IsthmusError on a system without fcntl.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.file = folder / LOCK
        self.wait = wait
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            import fcntl
        except ImportError as error:
            raise IsthmusError(
                f"A run folder is locked with fcntl, which {sys.platform} does not have. Use "
                "Linux, macOS, or the Windows Subsystem for Linux."
            ) from error
        try:
            _make_folder(self.file.parent)
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RetryLater(f"{self.file} cannot be written: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if self.wait else fcntl.LOCK_NB))
            _write_owner(descriptor)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RetryLater(
                f"{self.file.parent} is in use by {self._owner()}. Wait until that ends, or name "
                "another folder."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                os.close(descriptor)
                raise RetryLater(f"{self.file} cannot be locked: {error.strerror}.") from error
            log.warning(
                "The file system of %s has no locks: see to it yourself that one process at a "
                "time writes there.",
                self.file.parent,
            )
        self._descriptor = descriptor
        _held.add(descriptor)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor in _held:  # no longer in a child
            _held.discard(self._descriptor)
            os.close(self._descriptor)

    def _owner(self) -> str:
        deadline = time.monotonic() + OWNER_WAIT
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                owner = json.loads(self.file.read_bytes())
                return f"process {owner['pid']} on {owner['host']} since {owner['started']}"
            time.sleep(0.02)
        return "another process"


_held: set[int] = set()


def _write_owner(descriptor: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (json.dumps(owner) + "\n").encode())


def _leave_to_parent() -> None:
    """A forked child, such as a data loader's worker, must not keep its killed parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IsthmusError(f"{path} is missing.") from error
    except ValueError as error:
        raise IsthmusError(f"{path} is not valid JSON: {error}.") from error

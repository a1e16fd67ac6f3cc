"""Durable writes: whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

MANIFEST = "MANIFEST.json"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`; a crash leaves the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make folder `path` by `fill(temporary folder)`, seal it with a manifest, then publish it.

    The manifest, a SHA-256 for each file, is written last: a folder without it is not complete.
    An existing folder of that name is replaced only after the new one is whole.
    """
    recover_folder(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        sums = {}
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                with file.open("rb+") as stream:
                    digest = hashlib.file_digest(stream, "sha256")
                    os.fsync(stream.fileno())
                sums[str(file.relative_to(partial))] = digest.hexdigest()
        write_atomic(partial / MANIFEST, json.dumps({"sha256": sums}, indent=2) + "\n")
        if path.exists():
            replaced = _replaced(path)
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
            partial.rename(path)
            shutil.rmtree(replaced)
        else:
            partial.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Bring back folder `path` if write_folder was killed while replacing it."""
    if not path.exists() and _replaced(path).is_dir():
        _replaced(path).rename(path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def verify_folder(path: Path) -> None:
    """Raise IsthmusError unless every file in the manifest of `path` is there, unchanged."""
    recover_folder(path)
    try:
        sums: dict[str, str] = json.loads((path / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IsthmusError(f"{path} is incomplete: it has no readable {MANIFEST}.") from error
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            raise IsthmusError(f"{path} is incomplete: {name} is missing.")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                raise IsthmusError(f"{file} is damaged: its SHA-256 differs from {MANIFEST}.")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IsthmusError(f"{path} is missing.") from error
    except ValueError as error:
        raise IsthmusError(f"{path} is not valid JSON: {error}.") from error


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

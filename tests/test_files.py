"""Durable writes: the old file or the new one; a folder that is not whole is known to be not."""

import os
import random
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from isthmus.files import MANIFEST, verify_folder, write_atomic, write_folder


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "b.json").write_text("{}\n")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    write_atomic(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)

    def die(partial: Path) -> None:
        fill(partial)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(folder, die)
    verify_folder(folder)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_folder_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)
    write_folder(folder, lambda partial: (partial / "c.bin").write_bytes(b"c") and None)
    verify_folder(folder)
    assert sorted(os.listdir(folder)) == [MANIFEST, "c.bin"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_killed_between_the_renames_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "best", Path.rename
    write_folder(folder, fill)

    def killed(path: Path, target: Path) -> Path:
        if path.name == ".best.partial":
            os._exit(9)
        return rename(path, target)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", killed)
        write_folder(folder, lambda partial: (partial / "c.bin").write_bytes(b"c") and None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not folder.exists()
    verify_folder(folder)
    assert (folder / "a.bin").exists()
    write_folder(folder, fill)
    assert os.listdir(tmp_path) == ["best"]


@pytest.mark.parametrize("seed", range(30))
def test_every_damage_is_seen(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)
    verify_folder(folder)
    rng = random.Random(seed)
    file = folder / rng.choice(["a.bin", "b.json"])
    content = bytearray(file.read_bytes())
    match rng.choice(["flip", "truncate", "remove", "no manifest", "broken manifest"]):
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[: rng.randrange(len(content))])
        case "remove":
            file.unlink()
        case "no manifest":
            (folder / MANIFEST).unlink()
        case _:
            (folder / MANIFEST).write_text("{")
    with pytest.raises(IsthmusError, match=r"damaged|incomplete"):
        verify_folder(folder)

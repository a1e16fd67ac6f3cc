"""Durable writes: the old or the new, whole; what is not whole is known to be not; one writer."""

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from isthmus import files
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import (
    LOCK,
    MANIFEST,
    FolderLock,
    clear_leftovers,
    observers,
    remove_folder,
    require_space,
    verify_folder,
    write_atomic,
    write_file,
    write_folder,
)


def fill(folder: Path) -> None:
    write_file(folder / "a.bin", bytes(range(256)))
    (folder / "inner").mkdir()
    (folder / "inner/b.json").write_text("{}\n")  # as other libraries write, past our hook


def fill_otherwise(folder: Path) -> None:
    write_file(folder / "c.bin", b"c")


@contextmanager
def watched(act: Callable[[int, str, Path], None]) -> Iterator[None]:
    """`act(count, operation, path)` before each operation on the disk, counted from 1."""
    seen: list[str] = []

    def observe(name: str, path: Path) -> None:
        seen.append(name)
        act(len(seen), name, path)

    observers.append(observe)
    try:
        yield
    finally:
        observers.remove(observe)


def full_at(number: int) -> Callable[[int, str, Path], None]:
    def act(count: int, name: str, path: Path) -> None:
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def operations(work: Callable[[], object]) -> list[str]:
    found: list[str] = []
    with watched(lambda count, name, path: found.append(f"{name} {path.name}")):
        work()
    return found


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a forked process that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_each_operation_on_the_disk_is_seen_in_the_order_that_survives_a_power_cut(
    tmp_path: Path,
) -> None:
    file = tmp_path / "new/a"
    write = ["open .a.partial", "write .a.partial", "flush .a.partial", "fsync .a.partial"]
    made = ["mkdir new", f"sync {tmp_path.name}"]
    assert operations(lambda: write_atomic(file, "")) == [
        *made,
        *write,
        "rename .a.partial",
        "sync new",
    ]
    folder = tmp_path / "best"
    write_folder(folder, fill)
    found = operations(lambda: write_folder(folder, fill))
    sealed = found.index("fsync MANIFEST.json")
    assert found.index("fsync a.bin") < found.index("fsync b.json") < sealed
    assert found[sealed + 1 :] == [
        "sync inner",
        "sync .best.partial",
        "rename best",
        "rename .best.partial",
        f"sync {tmp_path.name}",
        "rmtree .best.replaced",
    ]


def test_whatever_fails_in_a_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for number in range(1, 1 + len(operations(lambda: write_atomic(file, "old")))):
        write_atomic(file, "old")
        with watched(full_at(number)), pytest.raises(OSError, match="No space left"):
            write_atomic(file, "new")
        assert file.read_text() in {"old", "new"}
        assert os.listdir(tmp_path) == ["a.txt"]


def test_whatever_fails_in_a_folder_leaves_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)
    for number in range(1, 1 + len(operations(lambda: write_folder(folder, fill)))):
        with watched(full_at(number)), suppress(OSError):
            write_folder(folder, fill)
        verify_folder(folder)
        write_folder(folder, fill)
        assert os.listdir(tmp_path) == ["checkpoint"]


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    for name, target in (("run", "far"), ("broken", "nowhere")):
        (tmp_path / name).symlink_to(target)
        remove_folder(tmp_path / name)
    assert os.listdir(tmp_path) == ["far"]


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)

    def die(partial: Path) -> None:
        fill(partial)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, die)
    verify_folder(folder)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_folder_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)
    write_folder(folder, fill_otherwise)
    verify_folder(folder)
    assert sorted(os.listdir(folder)) == [MANIFEST, "c.bin"]
    assert os.listdir(tmp_path) == ["checkpoint"]


def spoil(count: int, name: str, path: Path) -> None:
    """A disk that damages a file after it was written."""
    if name == "sync" and path.name == ".best.partial":
        (path / "c.bin").write_bytes(b"d")


def test_what_the_disk_does_not_give_back_replaces_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    write_folder(folder, fill)
    with watched(spoil), pytest.raises(IsthmusError, match="damaged"):
        write_folder(folder, fill_otherwise)
    verify_folder(folder)
    assert (folder / "a.bin").exists()


def test_without_reading_again_the_only_copy_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "best"
    write_folder(folder, fill)
    with watched(spoil), monkeypatch.context() as patch:
        patch.setattr(files, "verify_folder", lambda path, sums: None)
        write_folder(folder, fill_otherwise)
    with pytest.raises(IsthmusError, match="damaged"):
        verify_folder(folder)


def test_killed_between_the_renames_the_old_folder_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    write_folder(folder, fill)

    def die(count: int, name: str, path: Path) -> None:
        if (name, path.name) == ("rename", ".best.partial"):
            os._exit(137)

    def replace() -> None:
        with watched(die):
            write_folder(folder, fill_otherwise)

    assert in_child(replace) == 137
    assert not folder.exists()
    verify_folder(folder)
    assert (folder / "a.bin").exists()
    write_folder(folder, fill)
    assert os.listdir(tmp_path) == ["best"]


def test_a_folder_is_removed_whole_or_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "step-1"
    for number in (1, 2):  # the rename, the rmtree
        write_folder(folder, fill)
        with watched(full_at(number)), caplog.at_level(logging.WARNING):
            remove_folder(folder)
        assert "could not be removed: No space left" in caplog.messages.pop()
        if folder.exists():
            verify_folder(folder)
    remove_folder(folder)
    clear_leftovers(tmp_path, "step-*")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_other_names_are_left_alone(tmp_path: Path) -> None:
    for name in (".step-1.partial", ".step-2.removed", ".results.partial", ".step-3.replaced"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path, "step-*")
    assert sorted(os.listdir(tmp_path)) == [".results.partial", "step-3"]


def change_manifest(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text()) | values
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

    return change


def swap(folder: Path) -> None:
    (folder / "a.bin").rename(folder / "x")
    (folder / "inner/b.json").rename(folder / "a.bin")
    (folder / "x").rename(folder / "inner/b.json")


def put(name: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


def become_a_folder(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "file missing": (lambda folder: (folder / "a.bin").unlink(), "it lacks a.bin"),
    "extra file": (put("x", ""), "holds x beside"),
    "extra inner file": (put("inner/x", ""), "holds inner/x beside"),
    "swapped": (swap, "a.bin is damaged"),
    "truncated": (lambda folder: os.truncate(folder / "a.bin", 255), "a.bin is damaged"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "has no MANIFEST"),
    "part of a manifest": (lambda folder: os.truncate(folder / MANIFEST, 60), "is no manifest"),
    "manifest of nothing": (put(MANIFEST, ""), "is no manifest"),
    "list": (put(MANIFEST, "[]"), "is no manifest"),
    "deep": (put(MANIFEST, "[" * 100_000), "is no manifest"),
    "no schema": (put(MANIFEST, '{"sha256": {}}'), "is no manifest"),
    "older schema": (change_manifest(schema=0), "was changed"),
    "newer schema": (change_manifest(schema=2), "written by a newer isthmus.*Upgrade"),
    "more keys": (change_manifest(more=1), "was changed"),
    "another folder's": (change_manifest(sha256={"c.bin": "0"}), "lacks c.bin"),
    "outside": (change_manifest(sha256={"../c.bin": "0"}), "lacks ../c.bin"),
    "sums of nothing": (change_manifest(sha256={}), "holds a.bin, inner/b.json beside"),
    "sums are a list": (change_manifest(sha256=[]), "is no manifest"),
    "folder missing": (shutil.rmtree, "has no MANIFEST"),
    "a folder for a file": (become_a_folder, "it lacks a.bin"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_seen(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill)
    verify_folder(folder)
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(IsthmusError, match=message):
        verify_folder(folder)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_folder(folder, fill_otherwise)
    manifest = folder / MANIFEST
    sound = manifest.read_bytes()
    for bit in range(8 * len(sound)):
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(content)
        with pytest.raises(IsthmusError, match=r"damaged|incomplete|newer"):
            verify_folder(folder)


def test_a_folder_that_is_known_beforehand_has_its_sums_or_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "known"
    sums = {
        "a.bin": hashlib.sha256(bytes(range(256))).hexdigest(),
        "inner/b.json": hashlib.sha256(b"{}\n").hexdigest(),
    }
    with pytest.raises(IsthmusError, match=r"a\.bin is damaged.*should be 0000"):
        write_folder(folder, fill, sums | {"a.bin": "0000"})
    assert os.listdir(tmp_path) == []
    write_folder(folder, fill, sums)
    assert sorted(os.listdir(folder)) == ["a.bin", "inner"]
    verify_folder(folder, sums)
    with pytest.raises(IsthmusError, match=r"incomplete.*lacks c\.bin"):
        verify_folder(folder, sums | {"c.bin": "0000"})


def test_a_file_that_cannot_be_read_is_a_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "checkpoint", fill)

    def broken(file: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr(files, "file_sha256", broken)
    with pytest.raises(IsthmusError, match=r"a\.bin cannot be read: Input/output error"):
        verify_folder(tmp_path / "checkpoint")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "not/yet/there", 1000)
    with pytest.raises(RetryLater, match=r"there has .* MB free, and .* are needed") as caught:
        require_space(tmp_path / "not/yet/there", free)  # enough for one, not for 2.2
    assert caught.value.exit_code == 75
    assert IsthmusError.exit_code == 1
    assert os.listdir(tmp_path) == []


@contextmanager
def owner(folder: Path, *, with_child: bool = False, forgetting: bool = False) -> Iterator[int]:
    """Pid of another process that holds the lock of `folder`, and maybe left a child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with FolderLock(folder):
                if forgetting:
                    files._held.clear()
                grandchild = os.fork() if with_child else 0
                if grandchild or not with_child:
                    os.write(writing, f"{grandchild}\n".encode())
                signal.pause()
        finally:
            os._exit(1)
    grandchild = int(os.read(reading, 20))
    try:
        yield child
    finally:
        for pid in filter(None, (child, grandchild)):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def end(pid: int) -> None:
    """kill -9, seen through: what it held is free when this returns."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_second_process_is_told_who_owns_the_folder(tmp_path: Path) -> None:
    with owner(tmp_path / "run") as pid:
        told = rf"run is in use by process {pid} on {os.uname().nodename} since 2\d\d\d-"
        with pytest.raises(RetryLater, match=told), FolderLock(tmp_path / "run"):
            pass
    with FolderLock(tmp_path / "run"):  # killed by now
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with FolderLock(tmp_path):
            assert in_child(FolderLock(tmp_path).__enter__) == 1
    assert in_child(FolderLock(tmp_path).__enter__) == 0


@pytest.mark.parametrize("forgetting", [False, True])
def test_workers_that_outlive_a_killed_owner_do_not_keep_its_lock(
    tmp_path: Path, forgetting: bool
) -> None:
    with owner(tmp_path, with_child=True, forgetting=forgetting) as pid:
        end(pid)
        if forgetting:  # the protection taken out
            with pytest.raises(RetryLater, match="in use"), FolderLock(tmp_path):
                pass
        else:
            with FolderLock(tmp_path):
                pass


def test_a_child_cannot_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        assert in_child(lambda: lock.__exit__(None, None, None)) == 0
        assert in_child(FolderLock(tmp_path).__enter__) == 1


def test_a_system_without_fcntl_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(IsthmusError, match="locked with fcntl"), FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    if number == errno.ENOLCK:
        with FolderLock(tmp_path):
            assert "has no locks" in caplog.text
    else:
        with pytest.raises(RetryLater, match="cannot be locked: Input"), FolderLock(tmp_path):
            pass

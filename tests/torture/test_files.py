"""Every fault of a disk and every kill, at every operation; every kind of damage; real full disks.

With ISTHMUS_TORTURE=1 all of them, otherwise a sample.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.errors import RetryLater
from isthmus.files import MANIFEST, FolderLock, observers, verify_folder
from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import (
    STATE,
    WEIGHTS,
    Progress,
    checkpoints,
    load_weights,
    newest_checkpoint,
    retire,
    save_checkpoint,
)

Count = Callable[[int, int], int]
KEEP = 2
KILLED = 137
SIZES = (0.3, 0.6, 0.9, 1.1, 1.4, 1.8, 2.1, 2.4, 2.8, 3.1, 3.3, 3.5)  # of one checkpoint


def sampled(cases: Sequence[int], number: int) -> list[int]:
    """`number` of the cases, evenly apart, first and last among them."""
    if number >= len(cases):
        return list(cases)
    return [cases[round(i * (len(cases) - 1) / (number - 1))] for i in range(number)]


def state(step: int, width: int = 8) -> dict[str, Tensor]:
    return {"weight": torch.full((width, 16), float(step)), "bias": torch.arange(16.0) * step}


def save(run: Path, step: int, width: int = 8) -> None:
    target = run / "checkpoints" / f"step-{step:06d}"
    moments = {f"{name}/moment": value for name, value in state(step, width).items()}
    save_checkpoint(target, state(step, width), Progress(step=step), moments)


def cycle(run: Path, step: int) -> None:
    """What a run writes at a step: the best weights, a checkpoint, and the oldest one deleted."""
    save_checkpoint(run / "best", state(step), Progress(step=step))
    save(run, step)
    retire(run / "checkpoints", KEEP)


def soundness(run: Path) -> int:
    """Step of the newest checkpoint, whose tensors are those of its step; the best's likewise."""
    newest, _ = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    for folder in (newest, run / "best"):
        loaded = state(0)
        step = load_weights(folder, loaded).step
        assert all(torch.equal(loaded[name], value) for name, value in state(step).items())
    return int(newest.name.removeprefix("step-"))


@contextmanager
def striking(
    at: int, strike: Callable[[], object], *, lasting: bool = False
) -> Iterator[list[str]]:
    """`strike` before operation `at`, counted from 1, and before all later ones if `lasting`."""
    seen: list[str] = []

    def observe(name: str, path: Path) -> None:
        seen.append(name)
        if len(seen) == at or (lasting and len(seen) > at):
            strike()

    observers.append(observe)
    try:
        yield seen
    finally:
        observers.remove(observe)


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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the best weights and two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        cycle(tmp_path / "run", step)
    return tmp_path / "run"


def number_of_operations(run: Path) -> int:
    shutil.copytree(run, run.with_name("trial"))
    with striking(0, lambda: None) as seen:
        cycle(run.with_name("trial"), 3)
    assert {"open", "write", "flush", "fsync", "rename", "sync", "mkdir", "rmtree"} == set(seen)
    return len(seen)


def goes_on(case: Path) -> None:
    """The next save works, removes what was left, and keeps as many as it is to keep."""
    cycle(case, 4)
    assert soundness(case) == 4
    assert sorted(os.listdir(case)) == ["best", "checkpoints"]
    found = [path.name for path in checkpoints(case / "checkpoints")]
    assert found[-1] == "step-000004"
    assert sorted(os.listdir(case / "checkpoints")) == found
    assert len(found) == KEEP


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_whatever_operation_fails_the_run_goes_on(
    run: Path, tmp_path: Path, count: Count, number: int, lasting: bool
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    total = number_of_operations(run)
    for at in sampled(range(1, total + 1), count(5, total)):
        case = tmp_path / f"case-{at}"
        shutil.copytree(run, case)
        done = False
        with striking(at, fail, lasting=lasting), suppress(RetryLater):
            cycle(case, 3)
            done = True
        assert soundness(case) >= (3 if done else 2), at
        goes_on(case)


def test_wherever_it_is_killed_the_run_goes_on(run: Path, tmp_path: Path, count: Count) -> None:
    total = number_of_operations(run)
    for at in sampled(range(1, total + 1), count(5, total)):
        case = tmp_path / f"case-{at}"
        shutil.copytree(run, case)

        def die(case: Path = case, at: int = at) -> None:
            with striking(at, lambda: os._exit(KILLED)):
                cycle(case, 3)

        assert in_child(die) == KILLED
        assert soundness(case) >= 2, at
        goes_on(case)


def test_killed_at_any_time_the_run_goes_on(run: Path, count: Count) -> None:
    """SIGKILL between any two instructions, not only where we look; on one folder, again and again.

    What the child says is durable must be there afterwards.
    """
    rng = random.Random(0)
    durable = 2
    for _ in range(count(5, 100)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in range(durable + 1, 10**6):
                    cycle(run, step)
                    os.write(writing, f"{step}\n".encode())
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading) as said:
            for _ in range(rng.randrange(1, 4)):
                said.readline()
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(["sleep", "1"], timeout=rng.uniform(0, 0.02), check=False)
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            steps = [int(line) for line in said]
        found = soundness(run)
        assert found >= max(steps, default=durable + 1)
        durable = found


def test_deleting_before_verifying_loses_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protection taken out: what wrote nothing usable deletes what there was."""

    def spoil(name: str, path: Path) -> None:
        if name == "rename":
            for file in path.glob("*.safetensors"):
                file.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr("isthmus.files.verify_folder", lambda path, sums: None)
        patch.setattr(checkpoint, "verify_folder", lambda path: None)
        observers.append(spoil)
        try:
            for step in (3, 4):
                cycle(run, step)
        finally:
            observers.remove(spoil)
    assert newest_checkpoint(run / "checkpoints")[0] is None


def swap(folder: Path, one: str, other: str) -> None:
    content = (folder / one).read_bytes()
    (folder / one).write_bytes((folder / other).read_bytes())
    (folder / other).write_bytes(content)


def structural_damages(older: Path) -> list[Callable[[Path], object]]:
    """20 ways in which a checkpoint is not what was written; `older` is a sound other one."""
    optimiser = checkpoint.OPTIMISER
    names = (WEIGHTS, optimiser, STATE, MANIFEST)
    text = (older / MANIFEST).read_text()
    sums = json.loads(text)["sha256"]

    def manifest(**values: object) -> Callable[[Path], object]:
        content = json.dumps({"schema": 1, "sha256": sums} | values, indent=2) + "\n"
        return lambda folder: (folder / MANIFEST).write_text(content)

    return [
        *[lambda folder, name=name: (folder / name).unlink() for name in names],
        *[
            lambda folder, name=name: shutil.copy(older / name, folder / name)
            for name in (WEIGHTS, optimiser, STATE, MANIFEST)
        ],
        lambda folder: swap(folder, WEIGHTS, optimiser),
        lambda folder: swap(folder, WEIGHTS, STATE),
        lambda folder: swap(folder, STATE, MANIFEST),
        lambda folder: (folder / "adapter_model.bin").write_bytes(b"pickle"),
        lambda folder: (folder / WEIGHTS).rename(folder / "weights.safetensors"),
        lambda folder: [file.unlink() for file in folder.iterdir()],
        lambda folder: [(folder / name).write_bytes(b"") for name in names],
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"),
        manifest(schema=2),
        manifest(sha256={}),
        lambda folder: (folder / MANIFEST).write_text(text.replace("  ", " ")),
        lambda folder: (folder / MANIFEST).write_bytes(b"\0" * len(text)),
    ]


def corruptions(
    older: Path, rng: random.Random, count: Count
) -> Iterator[Callable[[Path], object]]:
    def flip(folder: Path) -> None:
        file = rng.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)

    def truncate(folder: Path) -> None:
        file = rng.choice(sorted(folder.iterdir()))
        os.truncate(file, rng.randrange(file.stat().st_size))

    structural = structural_damages(older)
    assert len(structural) == 20
    yield from [flip] * count(20, 200)
    yield from [truncate] * count(10, 100)
    yield from structural


def test_every_corruption_is_seen_and_the_one_before_it_is_used(
    run: Path, tmp_path: Path, count: Count
) -> None:
    older, newer = checkpoints(run / "checkpoints")
    for number, damage in enumerate(corruptions(older, random.Random(0), count)):
        case = tmp_path / f"case-{number}"
        shutil.copytree(run / "checkpoints", case)
        damage(case / newer.name)
        found, faults = newest_checkpoint(case)
        assert found == case / older.name, number
        assert len(faults) == 1, number
        assert str(case / newer.name) in faults[0], number
        shutil.rmtree(case)


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of `size` bytes at `folder`; what it gives mounts it again with options."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    folder.mkdir()
    try:
        mount(f"size={size}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("preflight", [True, False])
def test_on_a_small_disk_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Count, preflight: bool
) -> None:
    width = 8000  # 0.5 MB of weights, and as much of the optimiser's
    size = 2 * sum(value.nbytes for value in state(1, width).values())
    if not preflight:  # the disk fills up in the midst of a file
        monkeypatch.setattr(checkpoint, "require_space", lambda folder, num_bytes: None)
    lines: list[str] = []
    for times in [SIZES[i] for i in sampled(range(len(SIZES)), count(4, len(SIZES)))]:
        folder = tmp_path / f"disk-{times}"
        with mounted(folder, int(times * size)) as remount:
            durable = None
            for step in range(1, 5):
                try:
                    save(folder, step, width)
                    retire(folder / "checkpoints", 1)
                    durable = folder / "checkpoints" / f"step-{step:06d}"
                except RetryLater as error:
                    lines.append(str(error))
                    last = "There is no earlier" if durable is None else f"{durable.name} is intact"
                    assert last in lines[-1]
                assert newest_checkpoint(folder / "checkpoints") == (durable, [])
                assert not list(folder.glob("checkpoints/.*"))
            remount(f"size={10 * size}")
            save(folder, 5, width)
            verify_folder(folder / "checkpoints/step-000005")
    assert lines
    assert not any("\n" in line for line in lines)


def test_on_a_disk_that_turned_read_only_the_last_checkpoint_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with mounted(folder, 1_000_000) as remount:
        save(folder, 1)
        remount("ro")
        with pytest.raises(RetryLater, match=r"Read-only file system\. .*step-000001 is intact"):
            save(folder, 2)
        assert newest_checkpoint(folder / "checkpoints")[0] is not None
        with pytest.raises(RetryLater, match="cannot be written"), FolderLock(folder):
            pass
        remount("rw")
        save(folder, 2)


def test_one_process_at_a_time_holds_a_folder_through_every_kill(
    tmp_path: Path, count: Count
) -> None:
    """Four processes fight for a lock; the owner is killed, and a next one has it at once."""
    for _ in range(count(2, 20)):
        reading, writing = os.pipe()
        children = set()
        for _ in range(4):
            child = os.fork()
            if child == 0:
                try:
                    while True:
                        with suppress(RetryLater), FolderLock(tmp_path):
                            os.write(writing, f"{os.getpid()}\n".encode())
                            signal.pause()
                finally:
                    os._exit(1)
            children.add(child)
        os.close(writing)
        with open(reading) as said:
            while children:
                owner = int(said.readline())
                assert json.loads((tmp_path / ".lock").read_text())["pid"] == owner
                with pytest.raises(RetryLater, match="in use"), FolderLock(tmp_path):
                    pass
                os.kill(owner, signal.SIGKILL)
                assert os.waitpid(owner, 0)[1] == signal.SIGKILL
                children.remove(owner)
        with FolderLock(tmp_path):
            pass

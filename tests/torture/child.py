"""Processes to be tortured: forked from one that has imported everything, otherwise real."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus import files
from isthmus.cli import main
from isthmus.errors import IsthmusError
from isthmus.files import verify_folder
from isthmus.runs.checkpoint import newest_checkpoint
from isthmus.settings.optimisation import TrainSettings
from isthmus.training.loop import CHECKPOINTS, METRICS, Loss, fit

Work = Callable[[Path], Callable[[], object]]  # run folder -> what a process does
Start = Callable[[Callable[[], object]], "Child"]
Whole = Callable[[Work], tuple[dict[str, Any], float]]
# A signal or an act, at the nth time (0: each) that a process passes "train", "dev", "step", "save"
Strike = tuple[str, int, signal.Signals | Callable[[], object]]
KILL, TERM = signal.SIGKILL, signal.SIGTERM
STEPS, EVAL_EVERY, SAVE_EVERY = 14, 4, 3
HANGS = 120.0  # seconds after which a process that should have ended is given up
MEASURED = {"step_seconds", "tflops", "mfu", "memory_gb"}  # differ from run to run


class Child:
    """A process of its own, forked from this one: what it imports is there, what it is is real.

    Its exit code is that of the command line: errors of the user by their own, others 1.
    """

    def __init__(self, work: Callable[[], object], log: Path):
        self.log = log
        self.began = time.monotonic()
        self.pid = os.fork()
        self.code: int | None = None
        if self.pid == 0:
            os._exit(self._run(work))

    def _run(self, work: Callable[[], object]) -> int:
        code = 1
        with suppress(BaseException):
            os.setpgid(0, 0)  # a signal to its group reaches its workers, and nobody else
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = self.log.open("w", buffering=1)
            try:
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except IsthmusError as error:
                sys.stderr.write(f"error: {error}\n")
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
        return code

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, -N where signal N ended it."""
        self.wait_for(lambda: False)
        assert self.code is not None
        return self.code

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, or the process has ended."""
        deadline = time.monotonic() + HANGS
        while not self.ended() and not condition():
            assert time.monotonic() < deadline, f"it hangs: {self.said()}"
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.send(number)
        return self.wait()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def workers_of(process: int) -> list[int]:
    """The processes that it started, on Linux."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in children.split()]


def command(*arguments: object) -> Callable[[], None]:
    """The command line, to be run in a child."""

    def run() -> None:
        sys.argv = ["isthmus", *map(str, arguments)]
        main()

    return run


def curve(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each step once, without what is measured; floats are exact."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{k: _exact(v) for k, v in line.items() if k not in MEASURED} for line in lines]


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def outcome(run: Path) -> dict[str, Any]:
    """All that a run ends with, to the bit: curve, weights, optimiser, progress."""
    newest, faults = newest_checkpoint(run / CHECKPOINTS)
    assert newest is not None
    assert not faults
    folders = {"best": run / "best", newest.name: newest}
    for folder in folders.values():
        verify_folder(folder)
    files = {
        f"{name}/{file.name}": file.read_bytes()
        for name, folder in folders.items()
        for file in sorted(folder.iterdir())
    }
    return {"curve": curve(run), **files}


def differences(run: Path, whole: dict[str, Any]) -> list[str]:
    """What of an outcome is not that of the uninterrupted run."""
    found = outcome(run)
    return [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]


def logged(run: Path) -> int:
    """The last step of metrics.jsonl; a line cut short does not count."""
    if not (run / METRICS).exists():
        return 0
    whole = (run / METRICS).read_bytes().rpartition(b"\n")[0].splitlines()
    return int(json.loads(whole[-1])["step"]) if whole else 0


def saved(run: Path) -> int:
    """The step of the newest sound checkpoint."""
    newest, _ = newest_checkpoint(run / CHECKPOINTS)
    return int(newest.name.removeprefix("step-")) if newest else 0


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at a new `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Write to `ballast` until the disk is full."""
    with ballast.open("ab", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass


class Points:
    """A small regression in which dropout, batch statistics and the order of epochs matter."""

    seed = 3
    bad_fraction = 0.0

    def __init__(self, strike: Strike | None = None):
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )
        self.inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        self.strike = strike
        self.seen = {"train": 0, "dev": 0, "step": 0, "save": 0}
        self.validate = True

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def state(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def plan(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[:3], order[3:8], order[8:10], order[10:14], order[14:]]

    def dev_plan(self) -> list[list[int]]:
        return [list(range(6)), list(range(6, 11)), list(range(11, 16))] if self.validate else []

    def load(self, batch: Sequence[int], epoch: int | None) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, *batch, 0 if epoch is None else epoch + 1])
        noise = torch.from_numpy(rng.standard_normal((len(batch), 4), dtype=np.float32))
        inputs = self.inputs[batch]
        return inputs + 0.1 * noise, inputs.sum(dim=1, keepdim=True)

    def loss(self, points: tuple[Tensor, Tensor]) -> Loss:
        self.passes("train" if self.module.training else "dev")
        inputs, targets = points
        total = (self.module(inputs) - targets).square().sum()
        return Loss(total, len(inputs), 0, seconds=float(len(inputs)))

    def describe(self, batch: Sequence[int]) -> str:
        return f"points {sorted(batch)}"

    def passes(self, place: str) -> None:
        """A place where a strike may be due."""
        self.seen[place] += 1
        if self.strike is None:
            return
        where, times, act = self.strike
        if where == place and times in (0, self.seen[place]):
            act() if callable(act) else os.kill(os.getpid(), act)


def settings(**changes: Any) -> TrainSettings:
    values = {"steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "schedule": "cosine"}
    values |= {"eval_every": EVAL_EVERY, "save_every": SAVE_EVERY, "patience": 100}
    return TrainSettings(**(values | changes))


def fit_points(folder: Path, strike: Strike | None = None, **changes: Any) -> Callable[[], object]:
    """A run on points, to be done in a child; the command that goes on with it is the same."""

    def work() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        task = Points(strike)
        task.validate = changes.pop("validate", True)

        def observe(name: str, path: Path) -> None:
            if name == "fsync":
                task.passes("save")

        files.observers.append(observe)
        torch.manual_seed(os.getpid())  # no process inherits a state
        fit(task, settings(**changes), folder, resume=True, on_step=lambda m: task.passes("step"))

    return work


def train_speech(recipe: Path, *changes: str) -> Work:
    """The command that a scheduler repeats."""
    return lambda run: command("train", recipe, *changes, "-o", run, "--resume")

"""Training that is killed, stopped, starved of disk and fed with NaN, in real processes.

Whatever comes, the same command goes on, and ends with the same bits as a run left in peace.
With ISTHMUS_TORTURE=1 all of it, otherwise a sample.
"""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from isthmus import files
from isthmus.errors import IsthmusError, RetryLater
from isthmus.recipe import TrainSettings, load_recipe
from isthmus.training import checkpoint, loop, runs
from isthmus.training.checkpoint import OPTIMISER, WEIGHTS, Progress, checkpoints
from isthmus.training.loop import BEST, CHECKPOINTS, METRICS, Loss, fit
from tests.torture.conftest import (
    FULL,
    Child,
    command,
    curve,
    differences,
    logged,
    outcome,
    saved,
)

Count = Callable[[int, int], int]
Start = Callable[[Callable[[], object]], Child]
Strike = tuple[str, int, signal.Signals]  # in the nth of "load", "train", "dev", "step" or "save"
KILL, TERM = signal.SIGKILL, signal.SIGTERM
STEPS, EVAL_EVERY, SAVE_EVERY = 14, 4, 3
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


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
        rng = np.random.default_rng([self.seed, *batch, -1 if epoch is None else epoch] if 0 else
                                    [self.seed, *batch, 0 if epoch is None else epoch + 1])
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
        if self.strike is not None and self.strike[:2] == (place, self.seen[place]):
            os.kill(os.getpid(), self.strike[2])


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
        fit(
            task, settings(**changes), folder, resume=True, on_step=lambda m: task.passes("step")
        )

    return work


Work = Callable[[Path], Callable[[], object]]


@pytest.fixture
def whole(start: Start, tmp_path: Path) -> Callable[[Work], dict[str, Any]]:
    """Outcome, and seconds, of work that nothing interrupts."""

    def measure(work: Work) -> dict[str, Any]:
        folder = tmp_path / f"whole-{len(list(tmp_path.iterdir()))}"
        child = start(work(folder))
        assert child.wait() == 0, child.said()
        return outcome(folder) | {"seconds": time.monotonic() - child.began}

    return measure


# --- TR1 and TR4: at any time


def strike_at_random(
    start: Start, work: Work, expected: dict[str, Any], folder: Path, number: int,
    strikes: int, rng: random.Random, check: Callable[[Child, Path], None],
) -> None:
    """Runs, in new folders, each struck until `strikes` have hit and it is done."""
    seconds, hits, runs = expected.pop("seconds"), 0, 0
    while hits < strikes:
        run, runs, done = folder / f"run-{runs}", runs + 1, False
        while not done:
            child = start(work(run))
            if hits < strikes:
                until = child.began + rng.uniform(0, seconds)
                child.wait_for(lambda until=until: time.monotonic() > until)  # type: ignore[misc]
                if not child.ended():
                    child.send(number)
                    child.wait()
                    hits += child.code != 0
                    check(child, run)
            done = child.wait() == 0
        assert differences(run, expected) == []
        shutil.rmtree(run)


def killed(child: Child, run: Path) -> None:
    assert child.code in (-KILL, 0), child.said()
    assert logged(run) - saved(run) <= SAVE_EVERY


LATENCIES: list[float] = []


def stopped(child: Child, run: Path) -> None:
    """By SIGTERM: before training it acts at once, then the step is finished and kept."""
    assert child.code in (-TERM, 143, 0), child.said()
    if run.exists() and child.code == 143:
        newest = checkpoints(run / CHECKPOINTS)[-1]
        progress = json.loads((newest / "state.json").read_text())
        assert logged(run) == progress["step"] - (progress["pending"] is not None)


MATRIX = [(workers, accumulate) for workers in (0, 2) for accumulate in (1, 3)]


@pytest.mark.parametrize(("workers", "accumulate"), MATRIX)
def test_killed_at_any_time_points_end_with_the_same_bits(
    start: Start, whole: Any, tmp_path: Path, rng: random.Random, count: Count,
    workers: int, accumulate: int,
) -> None:
    work = partial(fit_points, workers=workers, accumulate=accumulate)
    expected = whole(work)
    strike_at_random(start, work, expected, tmp_path, KILL, count(1, 50), rng, killed)

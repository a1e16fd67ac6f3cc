"""The loop on a small task: exact resume, early stop, accumulation, steps that are not finite."""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.runs.checkpoint import checkpoints
from isthmus.settings.optimisation import TrainSettings
from isthmus.training import loop
from isthmus.training.loop import (
    BEST,
    CHECKPOINTS,
    METRICS,
    Interrupted,
    Loss,
    fit,
    learning_rate,
)

Points = tuple[Tensor, Tensor]  # inputs and targets of a batch


class Regression:
    """Sixteen points, a random draw (dropout) in each loss, batches that change by epoch."""

    def __init__(self, broken: frozenset[int] = frozenset(), validate: bool = True):
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(0.2), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(16, 4, generator=generator)
        self.targets = self.inputs.sum(dim=1, keepdim=True)
        self.broken = broken
        self.validate = validate
        self.seed = 0
        self.bad_fraction = 0.0

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def state(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def plan(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[:3], order[3:8], order[8:10], order[10:14], order[14:]]

    def dev_plan(self) -> list[list[int]]:
        whole = [list(range(6)), list(range(6, 16))]
        return whole if self.validate and not self.broken else []

    def load(self, batch: Sequence[int], epoch: int | None) -> Points:
        inputs = self.inputs[batch]
        if self.broken & set(batch):
            inputs = inputs * math.nan
        return inputs, self.targets[batch]

    def loss(self, points: Points) -> Loss:
        inputs, targets = points
        total = (self.module(inputs) - targets).square().sum()
        return Loss(total, len(inputs), 0, seconds=float(len(inputs)))

    def describe(self, batch: Sequence[int]) -> str:
        return f"points {sorted(batch)}"


class Scripted(Regression):
    """One validation batch, whose losses are given."""

    def __init__(self, found: Sequence[float]):
        super().__init__()
        self.found = iter(found)

    def dev_plan(self) -> list[list[int]]:
        return [[0]]

    def loss(self, points: Points) -> Loss:
        if self.module.training:
            return super().loss(points)
        return Loss(torch.tensor(next(self.found)), 1, 0)


def settings(**changes: Any) -> TrainSettings:
    values = {"steps": 12, "learning_rate": 1e-2, "warmup_steps": 2, "eval_every": 4} | changes
    return TrainSettings(**({"save_every": 4, "patience": 100} | values))


def losses(folder: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of each line, exact to the bit."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [(m["step"], m["loss"].hex(), m["gradient_norm"].hex()) for m in lines]


def run(folder: Path, task: Regression | None = None, **changes: Any) -> Regression:
    folder.mkdir(exist_ok=True)
    task = task or Regression()
    fit(task, settings(**changes), folder)
    return task


@pytest.mark.parametrize(("steps", "told"), [(2, True), (3, False)])
def test_a_warm_up_that_never_ends_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, told: bool
) -> None:
    run(tmp_path / "run", steps=steps)
    said = [line for line in caplog.messages if "train.warmup_steps 2 is not less" in line]
    assert len(said) == told


class Killed(Exception):
    pass


def run_killed(folder: Path, at: int, **changes: Any) -> None:
    """Train until the end of step `at`, then die; resume until `steps`."""
    folder.mkdir(exist_ok=True)

    def die(metrics: dict[str, Any]) -> None:
        if metrics["step"] == at:
            raise Killed

    with pytest.raises(Killed):
        fit(Regression(), settings(**changes), folder, on_step=die)
    torch.manual_seed(99)  # a new process has another state
    fit(Regression(), settings(**changes), folder, resume=True)


@pytest.fixture
def listening() -> Iterator[None]:
    """SIGINT as on a terminal; a test run in the background would have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves_it(tmp_path: Path, number: signal.Signals) -> None:
    run(tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    before = signal.getsignal(number)

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 5:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stopped:
        fit(Regression(), settings(), tmp_path / "stopped", on_step=stop)
    assert (stopped.value.code, stopped.value.step) == (128 + number, 6)
    assert checkpoints(tmp_path / "stopped" / CHECKPOINTS)[-1].name == "step-000006"
    assert signal.getsignal(number) is before
    fit(Regression(), settings(), tmp_path / "stopped", resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.usefixtures("listening")
def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    class Stubborn(Regression):
        def loss(self, points: Points) -> Loss:
            if self.module.training:
                for _ in range(2):  # apart: two that wait for delivery would be one
                    signal.raise_signal(signal.SIGINT)
                    time.sleep(0.01)
            return super().loss(points)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", Stubborn())


@pytest.mark.usefixtures("listening")
def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Signalled(Regression):
        def loss(self, points: Points) -> Loss:
            signal.raise_signal(signal.SIGINT)
            return super().loss(points)

    run(tmp_path / "a", Signalled())
    assert len(losses(tmp_path / "a")) == 12


def test_two_runs_are_the_same(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for name, value in a.state().items():
        assert torch.equal(value, b.state()[name])


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7, 9, 11])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_and_resumed_run_is_bit_identical(
    tmp_path: Path, at: int, accumulate: int
) -> None:
    run(tmp_path / "whole", accumulate=accumulate)
    run_killed(tmp_path / "killed", at, accumulate=accumulate)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_without_seeds_of_the_position_resume_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.torch, "manual_seed", lambda seed: None)
    run(tmp_path / "whole")
    run_killed(tmp_path / "killed", 6)
    assert losses(tmp_path / "killed") != losses(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "run", steps=8)
    newest = checkpoints(tmp_path / "run" / CHECKPOINTS)[-1]
    weights = newest / "trainable.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        # its next checkpoint must not count the damaged one as one of the two to keep
        progress = fit(Regression(), settings(steps=6, save_every=6), tmp_path / "run", resume=True)
    assert "is damaged" in caplog.text
    assert "goes on from step-000004" in caplog.text
    names = [path.name for path in checkpoints(tmp_path / "run" / CHECKPOINTS)]
    assert names == ["step-000004", "step-000006"]
    progress = fit(Regression(), settings(), tmp_path / "run", resume=True)
    assert progress.step == 12
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_when_no_checkpoint_is_sound_nothing_starts_anew(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=8)
    for folder in checkpoints(tmp_path / "run" / CHECKPOINTS):
        (folder / "MANIFEST.json").unlink()
    with pytest.raises(IsthmusError, match="No checkpoint is sound"):
        fit(Regression(), settings(), tmp_path / "run", resume=True)


def test_accumulation_gives_the_gradient_of_one_batch(tmp_path: Path) -> None:
    class Whole(Regression):
        def plan(self, epoch: int) -> list[list[int]]:
            return [[i for batch in Regression.plan(self, epoch) for i in batch]]

    def weights(task: Regression, accumulate: int, name: str) -> list[Tensor]:
        # draws and statistics differ by batch
        task.module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        run(tmp_path / name, task, steps=3, accumulate=accumulate)
        return list(task.trainable().values())

    split, whole = weights(Regression(), 5, "split"), weights(Whole(), 1, "whole")
    for a, b in zip(split, whole, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_global_batch_says_how_much_is_accumulated(tmp_path: Path) -> None:
    run(tmp_path / "accumulated", accumulate=2)
    run(tmp_path / "global", batch_size=3, global_batch_size=6)
    run(tmp_path / "alone")
    assert losses(tmp_path / "global") == losses(tmp_path / "accumulated")
    assert losses(tmp_path / "global") != losses(tmp_path / "alone")


def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path: Path) -> None:
    task = Regression(broken=frozenset({7}))
    run(tmp_path / "a", task, steps=5)
    lines = [json.loads(line) for line in (tmp_path / "a" / METRICS).read_text().splitlines()]
    skipped = [line for line in lines if "skipped" in line]
    assert len(skipped) == 1
    assert "7" in skipped[0]["skipped"][0]
    assert all(torch.isfinite(value).all() for value in task.state().values())


def test_three_such_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    task = Regression(broken=frozenset(range(16)))
    before = {name: value.clone() for name, value in task.state().items()}
    with pytest.raises(IsthmusError, match="not finite 3 times in a row"):
        run(tmp_path / "a", task)
    assert all(torch.equal(before[name], value) for name, value in task.state().items())


def test_training_stops_when_validation_no_longer_falls(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    progress = fit(Scripted([1.0] * 99), settings(steps=100, patience=2), tmp_path / "a")
    assert progress.step == 12  # best at 4, stale at 8 and 12
    assert progress.best_step == 4
    assert checkpoints(tmp_path / "a" / CHECKPOINTS)[-1].name == "step-000012"


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    task = Scripted([9.0, math.nan, 2.0, math.nan, 3.0, 4.0])  # the first before any step
    progress = fit(task, settings(steps=100, patience=3), tmp_path / "a")
    assert (progress.best_loss, progress.best_step, progress.step) == (2.0, 8, 20)


def test_validation_is_in_the_precision_of_training(tmp_path: Path) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    class Watched(Regression):
        def loss(self, points: Points) -> Loss:
            seen.add((self.module.training, self.module[0](self.inputs).dtype))
            return super().loss(points)

    run(tmp_path / "a", Watched(), precision="bfloat16")
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_best_weights_are_kept_with_and_without_validation(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", Regression(validate=False))
    assert (tmp_path / "a" / BEST / "trainable.safetensors").exists()
    assert (tmp_path / "b" / BEST / "trainable.safetensors").exists()


def test_old_checkpoints_are_retired(tmp_path: Path) -> None:
    run(tmp_path / "a", save_every=2, keep=2)
    names = [path.name for path in checkpoints(tmp_path / "a" / CHECKPOINTS)]
    assert names == ["step-000010", "step-000012"]


def test_schedules() -> None:
    constant = settings(steps=1000, warmup_steps=10, schedule="constant", learning_rate=1.0)
    assert learning_rate(constant, 0) == pytest.approx(0.1)
    assert learning_rate(constant, 9) == learning_rate(constant, 999) == 1.0
    linear = constant.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 505) == pytest.approx(0.5)
    cosine = constant.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 505) == pytest.approx(0.5)
    assert learning_rate(cosine, 999) < 1e-4

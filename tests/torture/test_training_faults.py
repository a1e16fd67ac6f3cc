"""Training on full disks, on numbers that are not finite, with dead workers, rivals and changes.

With ISTHMUS_TORTURE=1 all of it, otherwise a sample.
"""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isthmus import files
from isthmus.errors import IsthmusError, RetryLater
from isthmus.recipe import load_recipe
from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import OPTIMISER, WEIGHTS, checkpoints
from isthmus.training import runs
from isthmus.training.loop import BEST, CHECKPOINTS, METRICS, Loss, fit
from tests.torture.child import (
    HANGS,
    KILL,
    SAVE_EVERY,
    TERM,
    Points,
    Start,
    Whole,
    curve,
    differences,
    disk,
    fill,
    fit_points,
    logged,
    saved,
    settings,
    train_speech,
    workers_of,
)

FULL = os.environ.get("ISTHMUS_TORTURE") == "1"
Count = Callable[[int, int], int]


# --- full disks: TR5


@pytest.mark.parametrize("preflight", [True, False])
def test_a_full_disk_ends_the_run_with_one_line_and_room_lets_it_go_on(
    start: Start, whole: Whole, tmp_path: Path, preflight: bool
) -> None:
    expected, _ = whole(fit_points)
    with disk(tmp_path / "disk", 2_000_000) as root:
        run, ballast = root / "run", root / "ballast"

        def work() -> None:
            if not preflight:  # the disk fills up in the midst of a file
                checkpoint.require_space = lambda folder, size: None
            fit_points(run, ("step", 4, lambda: fill(ballast)))()

        child = start(work)
        assert (child.wait(), saved(run)) == (75, 3), child.said()
        errors = [line for line in child.said().splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "No space left" in errors[0] or "MB are needed" in errors[0]
        ballast.unlink()
        assert start(fit_points(run)).wait() == 0
        assert differences(run, expected) == []


def test_the_command_says_retry_as_long_as_the_disk_is_full(
    start: Start, whole: Whole, tmp_path: Path, recipe: Path
) -> None:
    work = train_speech(recipe)
    expected, _ = whole(work)
    with disk(tmp_path / "disk", 4_000_000) as root:

        def fills() -> None:
            at = root / f"run/checkpoints/.step-{2 * SAVE_EVERY:06d}.partial"
            files.observers.append(lambda name, path: path.parent == at and fill(root / "ballast"))
            work(root / "run")()

        child = start(fills)
        assert child.wait() == 75, child.said()
        assert child.said().count("error:") == 1
        assert saved(root / "run") == SAVE_EVERY
        again = start(work(root / "run"))  # as a scheduler does
        assert again.wait() == 75, again.said()
        (root / "ballast").unlink()
        child = start(work(root / "run"))
        assert child.wait() == 0, child.said()
        assert differences(root / "run", expected) == []


def test_no_line_of_the_metrics_is_lost_on_a_disk_that_was_full_for_a_moment(
    start: Start, tmp_path: Path
) -> None:
    """A disk can take a part of a line: then the rest must follow, or the run must end."""
    with disk(tmp_path / "disk", 2_000_000) as root:
        run, ballast = root / "run", root / "ballast"
        changes = {"steps": 40, "save_every": 40, "validate": False}

        def room() -> None:
            """Full, but for the rest of the page that the metrics end in."""
            ballast.unlink(missing_ok=True)
            if 4096 - (run / METRICS).stat().st_size % 4096 < 200:
                fill(ballast)

        child = start(fit_points(run, ("step", 0, room), **changes))
        if child.wait() == 0:
            assert len(curve(run)) == 40
        else:
            assert child.code == 75, child.said()


# --- numbers that are not finite: TR7

AT = 4  # the step that is spoilt


class Spoilt(Points):
    """Points, with NaN or infinity in features, loss or gradient of step AT, or from then on."""

    def __init__(self, where: str, value: float, lasting: bool):
        super().__init__()
        self.where, self.value, self.lasting = where, value, lasting
        parameter = list(self.trainable().values())[1]
        parameter.register_hook(lambda gradient: gradient + self.spoil("gradient"))

    def due(self) -> bool:
        now = self.seen["train"]
        return self.module.training and (now == AT or (self.lasting and now > AT))

    def spoil(self, where: str) -> float:
        return self.value if self.due() and where == self.where else 0.0

    def loss(self, points: tuple[Tensor, Tensor]) -> Loss:
        self.seen["train"] += self.module.training
        inputs, targets = points
        inputs = inputs.clone()
        inputs[0, 0] += self.spoil("features")
        total = (self.module(inputs) - targets).square().sum() + self.spoil("loss")
        return Loss(total, len(inputs), 0)


BAD = [
    (where, value) for where in ("features", "loss", "gradient") for value in (math.nan, math.inf)
]


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, which must be finite."""
    tensors = load_file(folder / WEIGHTS) | load_file(folder / OPTIMISER)
    assert all(value.isfinite().all() for value in tensors.values())
    return tensors


@pytest.mark.parametrize(("where", "value"), BAD)
def test_a_step_that_is_not_finite_changes_no_bit_and_is_named(
    tmp_path: Path, where: str, value: float
) -> None:
    task = Spoilt(where, value, lasting=False)
    fit(task, settings(save_every=1, keep=99), tmp_path)
    folders = checkpoints(tmp_path / CHECKPOINTS)
    before, at, after = (stored(folder) for folder in folders[AT - 2 : AT + 1])
    assert all(torch.equal(before[name], tensor) for name, tensor in at.items())
    assert not all(torch.equal(at[name], tensor) for name, tensor in after.items())
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    skipped = {line["step"]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped == {AT: [task.describe(task.plan(0)[AT - 1])]}


@pytest.mark.parametrize(("where", "value"), BAD)
def test_three_in_a_row_end_the_run_and_are_stored_nowhere(
    tmp_path: Path, where: str, value: float
) -> None:
    task = Spoilt(where, value, lasting=True)
    with pytest.raises(IsthmusError, match="not finite 3 times in a row"):
        fit(task, settings(save_every=1, keep=99), tmp_path)
    assert [len(stored(folder)) for folder in checkpoints(tmp_path / CHECKPOINTS)]
    assert logged(tmp_path) == AT + 2
    assert all(value.isfinite().all() for value in task.state().values())


def test_the_utterances_of_the_real_model_are_named(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = runs.SpeechTask.loss

    def spoilt(task: Any, batch: Any) -> Loss:
        found = loss(task, batch)
        return Loss(found.total * math.nan, 1, 0) if "u3" in batch.ids else found

    monkeypatch.setattr(runs.SpeechTask, "loss", spoilt)
    runs.train(load_recipe(recipe, ["train.steps=4", "data.dev=[]"]), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    assert len(skipped) == 1
    assert "u3" in skipped[0][0].split(", ")


# --- workers and owners: TR9 and TR11


def kill_a_worker() -> None:
    os.kill(multiprocessing.active_children()[0].pid or 0, KILL)


def test_a_killed_worker_ends_the_run_with_a_clear_message_and_it_goes_on(
    start: Start, whole: Whole, tmp_path: Path
) -> None:
    expected, _ = whole(partial(fit_points, workers=2))
    child = start(fit_points(tmp_path / "run", ("step", 4, kill_a_worker), workers=2))
    assert child.wait() > 0
    said = child.said()
    assert start(fit_points(tmp_path / "run", workers=2)).wait() == 0
    assert differences(tmp_path / "run", expected) == []
    assert "worker" in said
    assert "Traceback" not in said


@pytest.mark.skipif(not FULL, reason="imports for half a minute; with ISTHMUS_TORTURE=1")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_interpreters_of_their_own_end_and_go_on_alike(
    whole: Whole, tmp_path: Path, recipe: Path
) -> None:
    """What is forked elsewhere skips an interpreter's beginning and end."""
    changes = ("train.workers=2", "train.steps=60", "train.save_every=20", "train.eval_every=20")
    expected, _ = whole(train_speech(recipe, *changes))
    run = tmp_path / "run"
    line = [sys.executable, "-c", "from isthmus.cli import main; main()", "train", str(recipe)]

    def process(until: int) -> subprocess.Popen[bytes]:
        started = subprocess.Popen([*line, *changes, "-o", str(run), "--resume"])
        while logged(run) < until and started.poll() is None:
            time.sleep(0.01)
        return started

    first = process(5)
    first.terminate()
    assert first.wait() == 143
    second = process(logged(run) + 5)
    os.kill(workers_of(second.pid)[0], KILL)
    assert second.wait(HANGS) > 0
    assert process(10**9).wait() == 0
    assert differences(run, expected) == []


def test_one_trainer_at_a_time_has_a_folder_and_a_killed_one_has_none(
    start: Start, tmp_path: Path, recipe: Path
) -> None:
    run = tmp_path / "run"
    work = train_speech(recipe, "train.steps=1000000", "train.workers=2")(run)
    first = start(work)
    first.wait_for(lambda: logged(run) > 0)
    second = start(work)
    assert second.wait() == 75
    assert f"in use by process {first.pid} " in second.said()
    assert first.kill() == -KILL  # its workers live on for a while
    third = start(work)
    step = logged(run)
    third.wait_for(lambda: logged(run) > step)
    assert third.kill(TERM) == 143, third.said()


def test_what_another_trainer_began_meanwhile_is_not_removed(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are started on a new folder; the slower one is ready when the other was just killed."""
    chosen, resume = load_recipe(recipe, ["train.steps=4"]), runs.Opening(resume=True)
    speech_data = runs.speech_data

    def slowly(*arguments: Any) -> Any:
        monkeypatch.setattr(runs, "speech_data", speech_data)
        with suppress(Died):
            runs.train(chosen, tmp_path / "run", resume, on_step=die)
        return speech_data(*arguments)

    class Died(Exception):
        pass

    def die(metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == 3:
            raise Died

    steps: list[int] = []
    monkeypatch.setattr(runs, "speech_data", slowly)
    with suppress(RetryLater):  # to leave, and let the next one go on, is as good
        runs.train(
            chosen, tmp_path / "run", resume, on_step=lambda metrics: steps.append(metrics["step"])
        )
    assert saved(tmp_path / "run") >= 3
    assert steps in ([], [4])


OVERWRITE, RESUME = runs.Opening(overwrite=True), runs.Opening(resume=True)
CHANGES = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def dying_at(number: int, folder: Path) -> list[str]:
    """Kill this process before operation `number` on what lies in `folder`; what came so far."""
    seen: list[str] = []

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in CHANGES and str(arguments[0]).startswith(str(folder)):
            seen.append(name)
            if len(seen) == number:
                os.kill(os.getpid(), KILL)

    sys.addaudithook(hook)
    return seen


@pytest.mark.parametrize("opening", [OVERWRITE, RESUME], ids=["overwrite", "resume"])
@pytest.mark.parametrize("began", [True, False], ids=["on a run", "on nothing"])
def test_killed_while_it_begins_the_same_command_begins_again(
    start: Start, tmp_path: Path, recipe: Path, count: Count, opening: runs.Opening, began: bool
) -> None:
    chosen, template = load_recipe(recipe), tmp_path / "template"

    def begin(folder: Path) -> None:
        with runs.RunFolder(chosen, folder, opening, runs.Ranks()) as run:
            run.begin({"train": "0"})

    template.mkdir()
    if began:
        begin(template)
        for name in (BEST, CHECKPOINTS):
            (template / name / "something").mkdir(parents=True)
        (template / METRICS).write_text("")
    refused: list[str] = []
    for at in itertools.count(1, count(3, 1)):
        case = tmp_path / f"case-{at}"
        shutil.copytree(template, case)
        child = start(lambda at=at, case=case: (dying_at(at, case), begin(case)))
        if child.wait() == 0:
            break
        assert child.code == -KILL, child.said()
        again = start(lambda case=case: begin(case))
        if again.wait() != 0:
            refused.append(f"operation {at}: {again.said()}")
        shutil.rmtree(case)
    assert at > 10
    assert refused == []


# --- what changed meanwhile: TR12


@pytest.fixture
def begun(isthmus: Callable[..., Any], tmp_path: Path, recipe: Path, sounds: Path) -> Any:
    """A run of 2 steps on data of its own, and the command that goes on with it."""
    data = tmp_path / "data"
    shutil.copytree(sounds, data)
    fixed = [f"data.train=[{data}]", "data.dev=[]"]
    run = ("train", recipe, *fixed)
    assert isthmus(*run, "train.steps=2", "-o", tmp_path / "run")[0] == 0

    def again(*arguments: str) -> tuple[int, str, str]:
        found: tuple[int, str, str] = isthmus(
            *run, "train.steps=2", *arguments, "-o", tmp_path / "run", "--resume"
        )
        return found

    return again


SETTINGS = {
    "seed": "seed=4",
    "train.steps": "train.steps=3",
    "train.learning_rate": "train.learning_rate=1e-3",
    "train.accumulate": "train.accumulate=2",
    "train.workers": "train.workers=1",
    "train.batch_size": "train.batch_size=3",
    "train.schedule": "train.schedule=linear",
    "llm.lora.dropout": "llm.lora.dropout=0.2",
    "data.augment": "data.augment=null",
    "data.max_bad_fraction": "data.max_bad_fraction=0.5",
}


def test_a_changed_recipe_is_refused_with_the_difference_and_allowed_by_its_key(
    begun: Any, count: Count
) -> None:
    for key in list(SETTINGS)[: count(3, len(SETTINGS))]:
        code, _, err = begun(SETTINGS[key])
        assert code == 1
        assert f"{key}" in err
        assert " then, " in err
        assert f"--allow-change {key}" in err
    code, _, err = begun("seed=4", "train.steps=3", "--allow-change", "seed")
    assert (code, "--allow-change seed" in err, "--allow-change train.steps" in err) == (1, 0, 1)
    assert begun("train.steps=3", "--allow-change", "train")[0] == 0


def test_changed_data_and_code_are_refused_and_allowed_by_their_keys(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/u0.txt").write_text("other")
    code, _, err = begun()
    assert (code, "--allow-change data" in err) == (1, True)
    assert begun("--allow-change", "data")[0] == 0
    assert begun()[0] == 0  # it is what the run is trained on now
    environment = runs._environment
    for key in ("code", "torch"):
        monkeypatch.setattr(runs, "_environment", lambda key=key: environment() | {key: "other"})
        code, _, err = begun()
        assert (code, f"--allow-change {key}" in err, "'other' now" in err) == (1, True, True)
        assert begun("--allow-change", key)[0] == 0
        monkeypatch.setattr(runs, "_environment", environment)
        assert begun("--allow-change", key)[0] == 0
    assert begun()[0] == 0


def test_fewer_bad_recordings_allowed_at_resume_is_no_crash(tmp_path: Path) -> None:
    class Rejecting(Points):
        bad_fraction = 0.5

        def loss(self, points: tuple[Tensor, Tensor]) -> Loss:
            found = super().loss(points)
            first = self.seen["train"] == 1 and self.module.training and self.bad_fraction
            return replace(found, rejected=("u0: gone.",)) if first else found

    fit(Rejecting(), settings(steps=2, save_every=1), tmp_path)
    strict = Rejecting()
    strict.bad_fraction = 0.0
    with pytest.raises(IsthmusError, match="could not be loaded"):
        fit(strict, settings(steps=4), tmp_path, resume=True)

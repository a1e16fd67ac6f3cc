"""Training that is killed and stopped, at any time and at chosen places, in real processes.

Whatever comes, the same command goes on, and ends with the same bits as a run left in peace.
With ISTHMUS_TORTURE=1 all of it, otherwise a sample.
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import WEIGHTS, Progress, checkpoints
from isthmus.training import loop
from isthmus.training.loop import CHECKPOINTS
from tests.torture.child import (
    KILL,
    SAVE_EVERY,
    TERM,
    Child,
    Start,
    Strike,
    Whole,
    Work,
    differences,
    fit_points,
    logged,
    saved,
    train_speech,
)

FULL = os.environ.get("ISTHMUS_TORTURE") == "1"
PAGE = os.sysconf("SC_PAGESIZE")
Count = Callable[[int, int], int]
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


# --- at any time: TR1 and TR4


Hit = Callable[[Child, Path], bool]  # whether there was something to hit


def killed(child: Child, run: Path) -> bool:
    code = child.kill(KILL)
    assert code in (-KILL, 0), child.said()
    assert logged(run) - saved(run) <= SAVE_EVERY
    return code != 0


def stopped(child: Child, run: Path) -> bool:
    """By SIGTERM: before training it acts at once, in it the step is finished and kept."""
    sent = time.monotonic()
    code = child.kill(TERM)
    assert code in (-TERM, 143, 0), child.said()
    if code == 143:
        LATENCIES.append(time.monotonic() - sent)
        newest = checkpoints(run / CHECKPOINTS)[-1]
        progress = json.loads((newest / "state.json").read_text())
        assert logged(run) == progress["step"] - (progress["pending"] is not None)
    return code == 143


def impatiently(second: signal.Signals, rng: random.Random) -> Hit:
    """SIGTERM, and `second` soon after it."""

    def hit(child: Child, run: Path) -> bool:
        child.send(TERM)
        time.sleep(rng.uniform(0, 0.03))
        code = child.kill(second)
        assert code in (-TERM, -KILL, 143, 0), child.said()
        return code != 0

    return hit


LATENCIES: list[float] = []  # seconds from SIGTERM in training to the end of the process


def strike_at_random(
    start: Start, work: Work, whole: Whole, folder: Path, hit: Hit, strikes: int
) -> None:
    """Runs in new folders, each hit and started again until it is done; `strikes` in all."""
    rng = random.Random(folder.name)
    (expected, seconds), hits, number = whole(work), 0, 0
    while hits < strikes:
        run, number, done = folder / f"run-{number}", number + 1, False
        while not done:
            child = start(work(run))
            if hits < strikes:
                until = child.began + rng.uniform(0, seconds)
                while time.monotonic() < until and not child.ended():
                    time.sleep(0.001)
                hits += not child.ended() and hit(child, run)
            done = child.wait() == 0
            assert done or child.code in (-KILL, -TERM, 143), child.said()
        assert differences(run, expected) == []
        shutil.rmtree(run)
    print(f"{folder.name}: {hits} hits in {number} runs of {seconds:.1f} s, all with the same bits")
    print(f"from SIGTERM to the end {max(LATENCIES, default=0):.2f} s at most")


CASES = list(itertools.product((killed, stopped), (0, 2), (1, 3)))  # workers, accumulated
NUMBERS = {killed: (50, 13), stopped: (20, 5)}  # of hits in a case: small run, real model


@pytest.mark.parametrize(("hit", "workers", "accumulate"), CASES if FULL else CASES[1::3])
def test_struck_at_any_time_a_small_run_ends_with_the_same_bits(
    start: Start, whole: Whole, tmp_path: Path, hit: Hit, workers: int, accumulate: int
) -> None:
    work = partial(fit_points, workers=workers, accumulate=accumulate)
    strike_at_random(start, work, whole, tmp_path, hit, NUMBERS[hit][0] if FULL else 1)


@pytest.mark.parametrize(("hit", "workers", "accumulate"), CASES if FULL else CASES[2::4])
def test_struck_at_any_time_the_real_model_ends_with_the_same_bits(
    start: Start,
    whole: Whole,
    tmp_path: Path,
    recipe: Path,
    hit: Hit,
    workers: int,
    accumulate: int,
) -> None:
    work = train_speech(recipe, f"train.workers={workers}", f"train.accumulate={accumulate}")
    strike_at_random(start, work, whole, tmp_path, hit, NUMBERS[hit][1] if FULL else 1)


@pytest.mark.parametrize("second", [TERM, KILL], ids=["second SIGTERM", "SIGKILL after grace"])
def test_a_second_signal_does_no_harm(
    start: Start, whole: Whole, tmp_path: Path, count: Count, second: signal.Signals
) -> None:
    hit = impatiently(second, random.Random(0))
    work = partial(fit_points, save_every=1, workers=0)
    strike_at_random(start, work, whole, tmp_path, hit, count(1, 20))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_while_the_feature_cache_fills_the_bits_are_the_same(
    start: Start,
    whole: Whole,
    tmp_path: Path,
    count: Count,
    recipe: Path,
    precision: str,
) -> None:
    changes = [f"data.feature_cache={precision}", "data.augment=null", "train.steps=5"]
    changes += ["train.save_every=1", "train.eval_every=5", "train.workers=2", "data.dev=[]"]

    def work(run: Path) -> Callable[[], object]:
        def fresh() -> None:
            os.environ["ISTHMUS_CACHE"] = f"{run}-cache"  # of this run, and its next processes
            train_speech(recipe, *changes)(run)()

        return fresh

    strike_at_random(start, work, whole, tmp_path, killed, count(1, 25))
    kept = list(tmp_path.glob("run-0-cache/features/*/*.jsonl"))
    assert sum(len(file.read_text().splitlines()) for file in kept) >= 8


# --- at chosen places: TR3

TWICE: list[Strike] = [("dev", 4, TERM), ("dev", 3, TERM), ("dev", 5, KILL)]
CELLS: dict[str, tuple[list[Strike], dict[str, Any]]] = {
    "last validation stopped": ([("dev", 13, TERM)], {}),
    "three times in an epoch": ([("step", 1, KILL)] * 3, {"save_every": 1}),
    "mid accumulation": ([("train", 8, KILL)], {"accumulate": 3}),
    "mid accumulation stopped": ([("train", 8, TERM)], {"accumulate": 3}),
    "end of an epoch": ([("step", 5, KILL)], {"save_every": 5}),
    "end of an epoch stopped": ([("train", 5, TERM)], {}),
    "start of an epoch": ([("train", 6, KILL)], {"save_every": 5}),
    "end of a short epoch": ([("step", 4, KILL)] * 2, {"accumulate": 3, "save_every": 4}),
    "validation": ([("dev", 4, KILL)], {}),
    "validation stopped": ([("dev", 4, TERM)], {}),
    "one validation three times": (TWICE, {}),
    "last validation": ([("dev", 13, KILL)], {}),
    "before the first step": ([("train", 1, KILL)], {}),
    "first look at validation": ([("dev", 1, KILL)], {}),
    "first look at validation stopped": ([("dev", 1, TERM)], {}),
    "before the first checkpoint": ([("step", 2, KILL)] * 3, {}),
    "last step": ([("train", 14, KILL)], {}),
    "last step stopped": ([("train", 14, TERM)], {}),
    "after the last step": ([("step", 14, KILL)], {"validate": False}),
    "after the last step stopped": ([("step", 14, TERM)], {"validate": False}),
    "saving": ([("save", n, KILL) for n in (2, 7, 15, 22)], {}),
    "saving stopped": ([("save", n, TERM) for n in (2, 7, 15, 22)], {}),
    "stopped three times in an epoch": ([("train", 1, TERM)] * 3, {}),
    "stopped and killed": ([("train", 3, TERM), ("train", 2, KILL), ("step", 2, TERM)], {}),
}


@pytest.mark.parametrize("workers", [0, 2] if FULL else [0])
@pytest.mark.parametrize("cell", CELLS if FULL else list(CELLS)[:10])
def test_wherever_it_is_struck_the_bits_are_the_same(
    start: Start, whole: Whole, tmp_path: Path, cell: str, workers: int
) -> None:
    strikes, changes = CELLS[cell]
    expected, _ = whole(lambda folder: fit_points(folder, **changes, workers=workers))
    run = tmp_path / "run"
    for strike in strikes:
        code = start(fit_points(run, strike, **changes, workers=workers)).wait()
        assert code in ((-KILL,) if strike[2] == KILL else (143, 0))  # 0: it was done already
    child = start(fit_points(run, **changes, workers=workers))
    assert child.wait() == 0, child.said()
    assert differences(run, expected) == []


# --- the protections taken out


def without_progress(run: Path) -> None:
    """Weights and optimiser come back, but not where the run stood in the data."""
    restore = checkpoint.restore

    def forgetful(*arguments: Any) -> Progress:
        return Progress(step=restore(*arguments).step)

    checkpoint.restore = forgetful


def without_optimiser(run: Path) -> None:
    restore = checkpoint.restore

    def forgetful(folder: Path, state: Any, trainable: Any, optimiser: Any) -> Progress:
        progress = restore(folder, state, trainable, optimiser)
        optimiser.state.clear()
        return progress

    checkpoint.restore = forgetful


def without_cut(run: Path) -> None:
    loop._cut_log = lambda path, step: None


def without_manifest(run: Path) -> None:
    """A damaged checkpoint is taken for a sound one."""
    damage(run)
    checkpoint.verify_folder = lambda path: None


def damage(run: Path) -> None:
    weights = checkpoints(run / CHECKPOINTS)[-1] / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-2] ^= 64
    weights.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "same"),
    [(without_progress, False), (without_optimiser, False), (without_cut, False),
     (without_manifest, False), (damage, True)],
)  # fmt: skip
def test_without_any_of_the_protections_the_bits_would_differ(
    start: Start, whole: Whole, tmp_path: Path, spoil: Callable[[Path], None], same: bool
) -> None:
    expected, _ = whole(fit_points)
    run = tmp_path / "run"
    assert start(fit_points(run, ("train", 9, KILL))).wait() == -KILL
    assert start(lambda: (spoil(run), fit_points(run)())).wait() == 0
    try:
        assert (differences(run, expected) == []) is same
    except AssertionError:
        assert not same  # a curve with a step twice is not even read


# --- for long: TR13


@needs_proc
@pytest.mark.skipif(not FULL, reason="takes minutes; with ISTHMUS_TORTURE=1")
def test_in_a_long_run_nothing_grows(start: Start, tmp_path: Path) -> None:
    run, minutes = tmp_path / "run", 3
    changes: dict[str, Any] = {"steps": 10**9, "save_every": 20, "eval_every": 50, "keep": 3}
    child = start(fit_points(run, **changes, workers=2))
    child.wait_for(lambda: logged(run) > 500)
    samples = []
    while time.monotonic() < child.began + 60 * minutes and not child.ended():
        size = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * PAGE
        opened = len(os.listdir(f"/proc/{child.pid}/fd"))
        samples.append((size, opened, len(checkpoints(run / CHECKPOINTS)), len(os.listdir(run))))
        time.sleep(0.5)
    assert child.kill(TERM) == 143, child.said()
    memory, handles, kept, entries = (list(column) for column in zip(*samples, strict=True))
    third = len(samples) // 3
    growth = (median(memory[-third:]) - median(memory[third:-third])) / 2**20
    print(f"{logged(run)} steps, {growth:+.2f} MiB, handles {max(handles)}, kept {max(kept)}")
    assert growth < 2
    assert median(handles[-third:]) <= median(handles[:third]) + 1
    assert max(kept) <= 4
    assert max(entries) <= 4  # a checkpoint folder, the best one and its partial, the metrics

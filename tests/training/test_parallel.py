"""Several real processes train what one trains, and leave together, whatever happens to one."""

import copy
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus import files
from isthmus.errors import IsthmusError
from isthmus.runs.checkpoint import checkpoints
from isthmus.settings.optimisation import TrainSettings
from isthmus.training.loop import CHECKPOINTS, METRICS, Loss, fit
from isthmus.training.parallel import Ranks
from isthmus.training.stream import dev_orders, orders

Job = Callable[[Ranks], Any]
SPLITS = [(1, 4), (4, 1), (2, 2)]  # processes, and batches that each accumulates
Launch = Callable[..., list[Any]]
Splits = dict[int, tuple[Path, list[Any]]]


@dataclass
class Points:
    """Seven batches an epoch, of 1 to 5 utterances with 1 to 4 units each, under dropout."""

    broken: frozenset[int] = frozenset()  # their inputs are not finite
    unreadable: frozenset[int] = frozenset()
    bad_fraction: float = 0.0
    seed: int = 0
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.module.unused = nn.Parameter(torch.ones(3))
        self.inputs = torch.randn(16, 4)
        self.units = [1 + i % 4 for i in range(16)]

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def state(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def plan(self, epoch: int) -> list[list[int]]:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch)).tolist()
        edges = [0, 3, 4, 9, 10, 12, 14, 16]
        return [order[start:end] for start, end in itertools.pairwise(edges)]

    def dev_plan(self) -> list[list[int]]:
        return [[0, 1], [2], [3, 4, 5]] if not self.broken else []

    def load(self, batch: Sequence[int], epoch: int | None) -> list[int]:
        return list(batch)

    def loss(self, batch: Sequence[int]) -> Loss:
        good = [i for i in batch if i not in self.unreadable]
        inputs = self.inputs[good] * (math.nan if self.broken & set(batch) else 1)
        units = torch.tensor([self.units[i] for i in good])
        errors = (self.module(inputs)[:, 0] - inputs.sum(dim=1)).square()
        rejected = tuple(f"u{i} is bad." for i in batch if i in self.unreadable)
        seconds = float(sum(8**i for i in batch))  # whose sum says which there were, exactly
        return Loss((errors * units).sum(), int(units.sum()), 0, seconds, rejected=rejected)

    def describe(self, batch: Sequence[int]) -> str:
        return " ".join(f"u{i}" for i in sorted(batch))


EACH_ONCE = float(sum(8**i for i in range(16)))


@dataclass
class Struck(Points):
    """Sends its own process a signal in a batch of one of the ranks."""

    rank: int = 1
    number: int = signal.SIGKILL
    at: int = 3

    def loss(self, batch: Sequence[int]) -> Loss:
        if self.module.training and os.environ["RANK"] == str(self.rank):
            self.at -= 1
            if self.at == 0:
                os.kill(os.getpid(), self.number)
        return super().loss(batch)


def settings(**changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 2}
    values |= {"eval_every": 2, "save_every": 2, "weight_decay": 0.1, "clip_norm": 5.0}
    return TrainSettings(**(values | {"patience": 100} | changes))


def training(folder: Path, task: Points, resume: bool = False, **changes: Any) -> Job:
    """A job that trains; its result is the end and the weights."""

    def job(ranks: Ranks) -> tuple[Any, dict[str, Tensor]]:
        end = fit(task, settings(**changes), folder, resume=resume, ranks=ranks)
        return end, dict(task.module.state_dict())

    return job


@pytest.fixture(scope="session")
def train(launch: Launch) -> Launch:
    """Trains in so many processes; gives how each ended."""

    def run(folder: Path, world: int, task: Points | None = None, **changes: Any) -> list[Any]:
        folder.mkdir(exist_ok=True)
        return launch(training(folder, task or Points(), **changes), world, folder / f"of-{world}")

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same_curve(folder: Path, other: Path) -> None:
    """But for the rounding of sums."""
    assert len(lines(folder)) == len(lines(other))
    for found, expected in zip(lines(folder), lines(other), strict=True):
        for name in ("step", "epoch", "units", "audio_seconds", "learning_rate"):
            assert found[name] == expected[name]
        for name in ("loss", "gradient_norm", "dev_loss"):
            assert found.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-5)


def assert_each_once(folder: Path) -> None:
    epochs = [(line["epoch"], line["audio_seconds"]) for line in lines(folder)]
    for epoch in range(epochs[-1][0]):  # the last may not be over
        assert sum(seconds for number, seconds in epochs if number == epoch) == EACH_ONCE


def assert_same_weights(one: Any, other: Any, rtol: float, atol: float) -> None:
    torch.testing.assert_close(one.result[1], other.result[1], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def splits(train: Launch, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    """The same training, its steps of four batches split differently; by number of processes."""
    found = {}
    for world, accumulate in SPLITS:
        folder = tmp_path_factory.mktemp(f"world-{world}")
        found[world] = folder, train(folder, world, accumulate=accumulate)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_any_split_of_a_step_trains_the_same(world: int, splits: Splits) -> None:
    (alone, (whole,)), (folder, outcomes) = splits[1], splits[world]
    assert [outcome.code for outcome in outcomes] == [0] * world
    assert_same_curve(folder, alone)
    assert_each_once(folder)
    assert len({line["epoch"] for line in lines(folder)}) == 3
    for outcome in outcomes:
        assert_same_weights(outcome, outcomes[0], rtol=0, atol=0)
        assert_same_weights(outcome, whole, rtol=1e-5, atol=1e-6)
        assert outcome.said == ""
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        CHECKPOINTS,
        METRICS,
        f"of-{world}",
    ]


def test_without_the_sum_of_gradients_it_would_not(
    train: Launch,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    splits: Splits,
) -> None:
    monkeypatch.setattr(Ranks, "sum_gradients", lambda *arguments: None)
    train(tmp_path, 2, accumulate=2)
    with pytest.raises(AssertionError):
        assert_same_curve(tmp_path, splits[1][0])


def steps_of(wanted: Iterator[Any], counts: Sequence[int], world: int) -> list[list[Any]]:
    """The orders of one rank, a list for each step of so many batches."""
    return [list(itertools.islice(wanted, -(-count // world))) for count in counts]


@given(
    sizes=st.lists(st.integers(4, 11), min_size=3, max_size=3),
    first=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    second=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    done=st.integers(0, 4),
)
def test_each_batch_once_whoever_goes_on(
    sizes: list[int], first: tuple[int, int], second: tuple[int, int], done: int
) -> None:
    """An epoch begun by some processes, and ended with the next one by others."""

    def plan(epoch: int) -> list[str]:
        return [f"{epoch}-{index}" for index in range(sizes[epoch])]

    def counts(epoch: int, position: int, width: int) -> list[int]:
        return [min(width, sizes[epoch] - at) for at in range(position, sizes[epoch], width)]

    def run(split: tuple[int, int], position: int, steps: int | None) -> list[list[str]]:
        world, accumulate = split
        width = world * accumulate
        wanted = counts(0, position, width)[:steps]
        wanted += counts(1, 0, width) if steps is None else []
        ranks = [orders(plan, 0, position, width, rank, world) for rank in range(world)]
        found = [steps_of(rank, wanted, world) for rank in ranks]
        for step in zip(*found, strict=True):
            assert len({len(own) for own in step}) == 1  # all ranks pass equally often
        return [
            sorted(order.batch for own in step for order in own if order.counts)
            for step in zip(*found, strict=True)
        ]

    before = run(first, 0, done)
    position = sum(map(len, before))
    after = run(second, position, None)
    seen = [batch for step in before + after for batch in step]
    assert sorted(seen) == sorted(plan(0) + plan(1))
    at = 0
    for step in before:  # a step has the batches that one process would take
        assert sorted(plan(0)[at : at + len(step)]) == step
        at += len(step)


@given(st.integers(0, 9), st.integers(1, 4))
def test_each_validation_batch_once(batches: int, world: int) -> None:
    ranks = [list(dev_orders(range(batches), rank, world)) for rank in range(world)]
    assert sorted(o.batch for own in ranks for o in own if o.counts) == list(range(batches))
    assert len({len(own) for own in ranks}) == 1


def test_more_and_fewer_processes_within_one_run(train: Launch, tmp_path: Path) -> None:
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    (expected,) = train(whole, 1, accumulate=2, steps=10, eval_every=1)
    train(changing, 2, steps=2, eval_every=1)
    train(changing, 1, accumulate=2, steps=3, eval_every=1, resume=True)  # in mid-epoch
    last = train(changing, 2, steps=10, eval_every=1, resume=True)
    assert_same_curve(changing, whole)
    assert_each_once(changing)
    for outcome in last:
        assert_same_weights(outcome, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_of_one_rank_that_is_not_finite_changes_no_rank(
    train: Launch, tmp_path: Path
) -> None:
    batch = Points().plan(0)[1]  # of rank 1
    task = Points(broken=frozenset(batch))
    before = copy.deepcopy(dict(task.module.state_dict()))
    outcomes = train(tmp_path, 2, task, steps=1)
    for outcome in outcomes:
        torch.testing.assert_close(outcome.result[1], before, rtol=0, atol=0)
        assert outcome.result[0].not_finite == 1
    assert lines(tmp_path)[0]["skipped"] == [task.describe(batch)]


def test_what_one_rank_cannot_load_all_count(train: Launch, tmp_path: Path) -> None:
    (bad, *_) = Points().plan(0)[1]
    task = Points(unreadable=frozenset({bad}), bad_fraction=0.1)
    outcomes = train(tmp_path / "some", 2, task, steps=3)
    assert [outcome.result[0].rejected for outcome in outcomes] == [1, 1]
    assert lines(tmp_path / "some")[0]["rejected"] == [f"u{bad} is bad."]
    task.bad_fraction = 0.01
    outcomes = train(tmp_path / "none", 2, task, steps=3)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert all("1 of the epoch's 16" in outcome.said for outcome in outcomes)


def test_all_stop_early_together(train: Launch, tmp_path: Path) -> None:
    outcomes = train(tmp_path, 2, steps=50, learning_rate=1e-30, weight_decay=0, patience=2)
    ends = [outcome.result[0] for outcome in outcomes]
    assert ends[0] == ends[1]
    assert (ends[0].step, ends[0].stale) == (6, 2)


def test_all_leave_when_the_first_cannot_write(launch: Launch, tmp_path: Path) -> None:
    def full(name: str, path: Path) -> None:
        if name == "write" and CHECKPOINTS in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")

    def job(ranks: Ranks) -> None:
        files.observers.append(full)
        training(tmp_path, Points())(ranks)

    first, second = launch(job, 2, tmp_path / "of-2")
    assert (first.code, second.code) == (75, 75)
    assert first.said.count("\n") == 1
    assert "No space left" in first.said
    assert second.said == ""


def test_only_the_first_writes(train: Launch, launch: Launch, tmp_path: Path) -> None:
    touched: list[str] = []

    def job(ranks: Ranks) -> list[str]:
        files.observers.append(lambda name, path: touched.append(f"{name} {path}"))
        training(tmp_path, Points(), resume=True)(ranks)
        return touched

    train(tmp_path, 1, steps=2)
    first, second = launch(job, 2, tmp_path / "of-2")
    assert any(CHECKPOINTS in line for line in first.result)
    assert second.result == []


def test_a_signal_to_one_stops_all_after_the_same_step(train: Launch, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole, 2)
    outcomes = train(stopped, 2, Struck(number=signal.SIGTERM))
    assert [outcome.code for outcome in outcomes] == [143, 143]
    assert checkpoints(stopped / CHECKPOINTS)[-1].name == "step-000003"
    assert lines(stopped)[-1]["step"] == 3
    train(stopped, 2, resume=True)
    assert_same_curve(stopped, whole)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_leave_when_one_is_lost(
    train: Launch,
    launch: Launch,
    rank: int,
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ISTHMUS_RANK_TIMEOUT", "2")
    job = training(tmp_path, Struck(number=number, rank=rank))
    outcomes = launch(job, 2, tmp_path / "of-2", lost=[rank])
    other = outcomes[1 - rank]
    assert other.code == 75
    assert other.said.count("\n") == 1, other.said
    assert "Another process of this run was killed, hangs" in other.said
    assert train(tmp_path, 1, accumulate=2, resume=True)[0].code == 0
    assert_each_once(tmp_path)


def test_loaders_of_a_lost_one_do_not_keep_its_place(launch: Launch, tmp_path: Path) -> None:
    """They inherit its connections; nothing but their end tells the others."""
    job = training(tmp_path, Struck(), workers=1)
    other, _ = launch(job, 2, tmp_path / "of-2", lost=[1])
    assert other.code == 75
    assert "was killed, hangs" in other.said


def test_a_process_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_RANK_TIMEOUT", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(IsthmusError, match="cannot be reached"):
        Ranks()


def test_own_faults_stay_what_they_are(launch: Launch, tmp_path: Path) -> None:
    def job(ranks: Ranks) -> None:
        ranks.any(False)  # both are there
        raise RuntimeError("a fault of ours")

    for outcome in launch(job, 2, tmp_path):
        assert outcome.code == 1
        assert "RuntimeError: a fault of ours" in outcome.said


def test_running_statistics_are_averaged(launch: Launch, tmp_path: Path) -> None:
    def job(ranks: Ranks) -> list[Tensor]:
        tensors = [torch.full((2, 2), float(ranks.rank)), torch.tensor(3 + ranks.rank)]
        ranks.average(tensors)
        return tensors

    for rank, outcome in enumerate(launch(job, 2, tmp_path)):
        assert outcome.result[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert outcome.result[1] == 3 + rank  # a count stays


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Callable[[str], Path]) -> Path:
    """A tiny recipe, with four sounds to train on beside it."""
    speech = tmp_path / "speech"
    speech.mkdir()
    for i, text in enumerate(("go left", "stop", "one two", "yes")):
        sound = 0.3 * np.sin(np.arange(8000 + 1600 * i) * (0.1 + 0.1 * i))
        soundfile.write(speech / f"u{i}.flac", sound, 16000)
        (speech / f"u{i}.txt").write_text(text)
    values = {
        "name": "several",
        "encoder": {"type": "whisper", "path": str(model_folder("whisper"))},
        "projector": {"downsample_rate": 5, "hidden": 16},
        "llm": {"path": str(model_folder("llama"))},
        "data": {"train": [str(speech)], "dev": [str(speech)]},
        "train": {
            "steps": 4,
            "batch_size": 1,
            "global_batch_size": 2,
            "eval_every": 2,
            "warmup_steps": 1,
        },
        "decode": {"tokens_per_second": 5, "extra_tokens": 5},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.slow
def test_torchrun(
    recipe: Path, tmp_path: Path, isthmus: Callable[..., tuple[int, str, str]]
) -> None:
    scripts, folder = Path(sysconfig.get_path("scripts")), tmp_path / "run"
    command: list[Any] = [
        scripts / "torchrun",
        "--nproc-per-node",
        "2",
        "--no-python",
        scripts / "isthmus",
    ]
    done = subprocess.run(
        [*command, "train", recipe, "train.shard=true", "-o", folder],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Trained to step 4: {folder}\n"
    assert done.stderr.count("step 4: validation loss") == 1, done.stderr
    whole = tmp_path / "whole"
    assert isthmus("train", recipe, "-o", whole)[0] == 0
    found, expected = lines(folder), lines(whole)
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], rel=1e-5)
    spoken = [isthmus("transcribe", tmp_path / "speech/u0.flac", "-m", r) for r in (folder, whole)]
    assert spoken[0] == spoken[1]
    assert spoken[0][0] == 0


PRODUCTS = """
import torch
from isthmus.training.parallel import Ranks
Ranks()
weight = torch.zeros(48, 32, dtype=torch.bfloat16)
for length in (7, *range(20, 120), 7):
    torch.nn.functional.linear(torch.zeros(length, 32, dtype=torch.bfloat16), weight)
"""


@pytest.mark.parametrize("kept", [None, "1000"])
def test_a_long_training_keeps_the_kernels_of_few_lengths(kept: str | None) -> None:
    """The first of a hundred lengths is made anew, unless the user wants more of them kept."""
    limits = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": kept, "LRU_CACHE_CAPACITY": kept} if kept else {}
    command = [sys.executable, "-c", PRODUCTS]
    environment = os.environ | {"ONEDNN_VERBOSE": "all"} | limits
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    made = [line for line in ran.stdout.splitlines() if ",create:cache_miss,cpu,matmul" in line]
    if not made:
        pytest.skip("this processor multiplies bfloat16 without oneDNN")
    assert sum(",7x32:32x48," in line for line in made) == (1 if kept else 2)

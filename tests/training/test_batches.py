"""An epoch is a plan: a pure function that gives every utterance once, within the budget."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.settings.datasets import JoinSettings
from isthmus.settings.optimisation import TrainSettings
from isthmus.speech.augment import Augmentation, Gain
from isthmus.speech.corpora import read_corpus
from isthmus.training.batches import Budget, SpeechData, collate, join_utterances, plan_epoch

durations = st.lists(st.floats(0.05, 30.0), min_size=1, max_size=300)


@given(durations, st.integers(0, 5), st.integers(0, 3), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_each_utterance_once_an_epoch(
    seconds: list[float], seed: int, epoch: int, batch_size: int
) -> None:
    plan = plan_epoch(seconds, Budget(batch_size), seed=seed, epoch=epoch)
    assert sorted(index for batch in plan for index in batch) == list(range(len(seconds)))
    assert all(0 < len(batch) <= batch_size for batch in plan)
    assert plan == plan_epoch(seconds, Budget(batch_size), seed=seed, epoch=epoch)


@given(durations, st.floats(1.0, 120.0))
@settings(max_examples=60, deadline=None)
def test_padded_seconds_stay_within_the_budget(seconds: list[float], budget: float) -> None:
    plan = plan_epoch(seconds, Budget(max_duration=budget), seed=0, epoch=0)
    for batch in plan:
        padded = max(seconds[index] for index in batch) * len(batch)
        assert padded <= budget or len(batch) == 1


def test_epochs_and_seeds_differ() -> None:
    seconds = list(np.linspace(1, 10, 200))
    plans = [plan_epoch(seconds, Budget(4), seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


def test_bucketing_saves_padding() -> None:
    seconds = np.random.default_rng(0).uniform(1, 20, 2000).tolist()
    plan = plan_epoch(seconds, Budget(8), seed=0, epoch=0)
    padded = sum(max(seconds[i] for i in batch) * len(batch) for batch in plan)
    order = np.random.default_rng(1).permutation(2000).reshape(-1, 8)
    unsorted = sum(max(seconds[i] for i in batch) * 8 for batch in order.tolist())
    assert sum(seconds) / padded > 0.9 > sum(seconds) / unsorted


@given(durations, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_joining_keeps_each_utterance_once_and_the_limit(seconds: list[float], epoch: int) -> None:
    join = JoinSettings(probability=0.7, max_seconds=12.0)
    groups = join_utterances(seconds, join, seed=0, epoch=epoch)
    assert sorted(index for group in groups for index in group) == list(range(len(seconds)))
    for group in groups:
        assert len(group) == 1 or sum(seconds[index] for index in group) <= 12.0 + 1e-6


def test_no_joining_unless_asked() -> None:
    assert join_utterances([1.0, 2.0], None, seed=0, epoch=0) == [(0,), (1,)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, seconds in (("a", 0.5), ("b", 1.0), ("c", 0.75)):
        samples = rng.normal(0, 0.1, int(16000 * seconds)).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="FLOAT")
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    return tmp_path


def test_batches_hold_what_the_files_hold(corpus: Path) -> None:
    data = SpeechData(list(read_corpus(corpus)))
    batch = data.batch([(0,), (1,)])
    assert batch.texts == ["text a", "text b"]
    assert batch.num_samples.tolist() == [8000, 16000]
    assert batch.seconds == pytest.approx(1.5)
    stored, _ = soundfile.read(corpus / "a.wav", dtype="float32")
    assert np.array_equal(batch.waveforms[0, :8000].numpy(), stored)
    assert not batch.waveforms[0, 8000:].any()


def test_joined_utterances_are_one(corpus: Path) -> None:
    batch = SpeechData(list(read_corpus(corpus))).batch([(0, 2)])
    assert batch.texts == ["text a text c"]
    assert batch.num_samples.tolist() == [20000]


def test_augmentation_is_a_function_of_seed_epoch_and_utterance(corpus: Path) -> None:
    effects = Augmentation(gain=Gain(), gain_probability=1.0)
    data = SpeechData(list(read_corpus(corpus)), seed=3, augmentation=effects)
    first = data.batch([(0,), (1,)], epoch=0).waveforms
    again = data.batch([(1,), (0,)], epoch=0).waveforms
    assert np.array_equal(first[0], again[1])
    assert not np.array_equal(first[0], data.batch([(0,), (1,)], epoch=1).waveforms[0])
    plain = data.batch([(0,)]).waveforms[0]
    assert not np.array_equal(plain, first[0, :8000])


def test_training_plan_follows_the_settings(corpus: Path) -> None:
    data = SpeechData(list(read_corpus(corpus)))
    plan = data.plan(TrainSettings(max_duration=1.6), epoch=0)
    assert sorted(group for batch in plan for group in batch) == [(0,), (1,), (2,)]
    assert max(map(len, plan)) <= 2


def test_padding_is_at_the_end() -> None:
    batch = collate(["x", "y"], [np.ones(3, np.float32), np.ones(5, np.float32)], ["", ""])
    assert batch.waveforms.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]

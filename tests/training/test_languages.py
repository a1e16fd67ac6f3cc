"""Languages: their shares come out, no utterance is favoured, and a plan needs no memory."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.settings.optimisation import TrainSettings
from isthmus.speech.augment import Augmentation, Gain
from isthmus.speech.corpora import read_corpus
from isthmus.training.batches import SpeechData
from isthmus.training.languages import allotment, check_named, chosen, draw

counts = st.lists(st.integers(1, 60), min_size=1, max_size=6)
temperatures = st.floats(1, 50)


def spread(sizes: list[int]) -> list[str]:
    """Languages of utterances, so many of each."""
    return [f"l{number}" for number, size in enumerate(sizes) for _ in range(size)]


def test_shares_by_hand() -> None:
    assert allotment({"en": 80, "pl": 20}, 1) == {"en": 80, "pl": 20}
    assert allotment({"en": 80, "pl": 20}, 2) == {"en": 67, "pl": 33}  # 2 to 1, as 4 to 1 roots
    assert allotment({"en": 98, "pl": 2}, 1e9) == {"en": 50, "pl": 50}


@given(counts, temperatures)
@settings(max_examples=80, deadline=None)
def test_shares_come_out(sizes: list[int], temperature: float) -> None:
    languages = spread(sizes)
    total = len(languages)
    drawn = draw(languages, temperature, seed=1, epoch=0)
    found = Counter(languages[index % total] for index in drawn)
    weights = {name: (n / total) ** (1 / temperature) for name, n in Counter(languages).items()}
    assert len(drawn) == total
    for name, weight in weights.items():
        assert abs(found[name] - total * weight / sum(weights.values())) < 1


@given(counts, temperatures, st.integers(0, 4), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_each_utterance_of_a_language_comes_as_often(
    sizes: list[int], temperature: float, seed: int, epochs: int
) -> None:
    languages = spread(sizes)
    times: Counter[int] = Counter()
    for epoch in range(epochs):
        drawn = draw(languages, temperature, seed=seed, epoch=epoch)
        assert len(set(drawn)) == len(drawn)  # a repetition has a number of its own
        times.update(index % len(languages) for index in drawn)
    for name in set(languages):
        own = [times[index] for index, other in enumerate(languages) if other == name]
        assert max(own) - min(own) <= 1


def test_epochs_and_seeds_differ_and_can_be_had_at_once() -> None:
    languages = spread([30, 5])
    first = draw(languages, 3, seed=0, epoch=7)
    assert first == draw(languages, 3, seed=0, epoch=7)
    assert first != draw(languages, 3, seed=0, epoch=8)
    assert first != draw(languages, 3, seed=1, epoch=7)


@pytest.fixture
def cuts(tmp_path: Path) -> list[Cut]:
    """Ten utterances of English, two of Polish."""
    lines = []
    for number in range(12):
        name, language = f"u{number}.wav", "en" if number < 10 else "pl"
        soundfile.write(tmp_path / name, np.full(1600 + 16 * number, 0.1), 16000)
        lines.append(f'{{"audio": "{name}", "text": "word", "language": "{language}"}}\n')
    (tmp_path / "train.jsonl").write_text("".join(lines))
    return list(read_corpus(tmp_path / "train.jsonl"))


def data_of(cuts: list[Cut], **options: Any) -> SpeechData:
    return SpeechData(cuts, seed=3, **options)


def test_an_epoch_keeps_its_length_and_repeats_what_is_rare(cuts: list[Cut]) -> None:
    data = data_of(cuts, temperature=1e9)
    settings = TrainSettings(batch_size=5)
    plan = data.plan(settings, 0)
    numbers = [index for batch in plan for group in batch for index in group]
    assert len(numbers) == 12
    batches = [data.batch(groups, 0) for groups in plan]
    assert sorted(name for batch in batches for name in batch.languages) == ["en"] * 6 + ["pl"] * 6
    assert plan == data_of(cuts, temperature=1e9).plan(settings, 0)
    assert "u11" in data.names([(11 + 12,)])


def test_without_a_temperature_the_plan_is_what_it_was(cuts: list[Cut]) -> None:
    plan = data_of(cuts).plan(TrainSettings(batch_size=5), 0)
    assert sorted(index for batch in plan for group in batch for index in group) == list(range(12))


def test_repetitions_are_augmented_otherwise(cuts: list[Cut]) -> None:
    effects = Augmentation(gain=Gain(decibels=(-20, 0)), gain_probability=1)
    data = data_of(cuts, temperature=1e9, augmentation=effects)
    once, again, same = (data.batch([(i,)], 0) for i in (11, 23, 11))
    assert once.waveforms.equal(same.waveforms)
    assert not once.waveforms.equal(again.waveforms)
    assert once.draws != again.draws


def test_joined_languages_are_no_single_one(cuts: list[Cut]) -> None:
    batch = data_of(cuts).batch([(0, 1), (0, 11), (11,)], 0)
    assert batch.languages == ("en", "", "pl")


def test_only_some_languages(cuts: list[Cut]) -> None:
    assert [cut.id for cut in chosen(cuts, ["pl"], "data.train")] == ["u10", "u11"]
    assert chosen(cuts, None, "data.train") == cuts
    with pytest.raises(
        IsthmusError, match=re.escape("data.languages names 'polish', but no utterance of")
    ):
        chosen(cuts, ["en", "polish"], "data.train")


def test_a_temperature_needs_languages(cuts: list[Cut]) -> None:
    check_named(cuts)
    cuts[3].supervisions[0].language = None
    with pytest.raises(IsthmusError, match="1 of 12 name none, such as 'u3'"):
        check_named(cuts)
    assert len(chosen(cuts, ["en"], "data.train")) == 9


def test_the_digest_knows_the_language(cuts: list[Cut]) -> None:
    before = data_of(cuts).digest()
    cuts[3].supervisions[0].language = "de"
    assert data_of(cuts).digest() != before

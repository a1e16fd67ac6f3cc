"""One way through all audio: a transcript or a fault for each, whatever the others are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from torch import Tensor

from isthmus.decoding.transcriber import Transcriber, Transcript
from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe

Waves = Callable[..., Tensor]
Build = Callable[..., Transcriber]


@pytest.fixture
def build(model_folder: Callable[[str], Path]) -> Build:
    """A transcriber of tiny parts; its projector is random."""

    def transcriber(llm: str = "llama", encoder: str = "conformer", batch: int = 3) -> Transcriber:
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "encoder": {"type": encoder, "path": str(model_folder(encoder))},
                "projector": {"downsample_rate": 2, "hidden": 16},
                "llm": {"path": str(model_folder(llm))},
                "decode": {"tokens_per_second": 4, "extra_tokens": 6, "batch_size": batch},
            }
        )
        return Transcriber(recipe.build(), recipe.decode)

    return transcriber


def test_each_has_a_transcript_or_a_fault(build: Build, waves: Waves, tmp_path: Path) -> None:
    transcriber = build()
    samples = waves(16_000).numpy()
    good, bad, long = (tmp_path / name for name in ("good.wav", "bad.wav", "long.wav"))
    soundfile.write(good, samples, 16_000, subtype="FLOAT")
    bad.write_bytes(b"RIFF nothing")
    soundfile.write(long, waves(60 * 16_000).numpy(), 16_000)
    audio = [long, bad, samples, str(good), tmp_path / "none.wav", good.read_bytes()]
    found = {result.index: result.found for result in transcriber.results(audio)}
    assert sorted(found) == list(range(len(audio)))
    for index, message in ((0, "long.wav (60.0 s) is too long"), (1, "bad.wav"), (4, "none.wav")):
        assert isinstance(found[index], IsthmusError)
        assert message in str(found[index])
    heard = found[2]
    assert isinstance(heard, Transcript)
    assert heard.duration == 1.0
    for index in (3, 5):
        other = found[index]
        assert isinstance(other, Transcript)
        assert other.text == heard.text
    with pytest.raises(IsthmusError, match=r"long\.wav"):
        transcriber.transcribe([samples, long])


def test_transcripts_stand_in_the_order_given(build: Build, waves: Waves) -> None:
    transcriber = build()
    audio = [waves(4000 * (1 + 5 * i % 7), seed=i).numpy() for i in range(7)]
    durations = [transcript.duration for transcript in transcriber.transcribe(list(audio))]
    assert durations == [len(waveform) / 16_000 for waveform in audio]


def test_nothing_is_loaded_before_its_batch(build: Build, waves: Waves) -> None:
    transcriber = build(batch=2)
    load, loaded = transcriber.load, []
    transcriber.load = lambda audio: loaded.append(1) or load(audio)  # type: ignore[method-assign,func-returns-value]
    next(transcriber.results([waves(8000).numpy()] * 5))
    assert len(loaded) == 2


def test_what_fits_leaves_room_for_the_longest_transcript(build: Build, waves: Waves) -> None:
    transcriber = build("gpt2")  # which fails at a position beyond its last
    transcriber.model.llm.end_tokens = lambda end: []  # type: ignore[method-assign]
    fitting = 0
    for num_samples in range(1600, 480_000, 1600):
        try:
            transcriber.load(np.zeros(num_samples, np.float32))
        except IsthmusError:
            break
        fitting = num_samples
    longest = transcriber.transcribe(waves(fitting).numpy())
    assert longest.finish_reason == "length"
    with pytest.raises(IsthmusError, match="the language model has 256"):
        transcriber.transcribe(waves(fitting + 1600).numpy())


def test_the_encoders_own_limit(build: Build) -> None:
    transcriber = build(encoder="whisper")
    with pytest.raises(IsthmusError, match=r"31.0 s\).*30 s that the encoder takes"):
        transcriber.transcribe(np.zeros(31 * 16_000, np.float32))

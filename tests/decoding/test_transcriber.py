"""One way through all audio: a transcript or a fault for each, whatever the others are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from isthmus.decoding.transcriber import Transcriber
from isthmus.decoding.transcript import Transcript
from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe

Waves = Callable[..., Tensor]
Build = Callable[..., Transcriber]


@pytest.fixture
def build(model_folder: Callable[[str], Path]) -> Build:
    """A transcriber of tiny parts; its projector is random."""

    def transcriber(
        llm: str = "llama", encoder: str = "conformer", batch: int = 3, **decode: Any
    ) -> Transcriber:
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "encoder": {"type": encoder, "path": str(model_folder(encoder))},
                "projector": {"downsample_rate": 2, "hidden": 16},
                "llm": {"path": str(model_folder(llm))},
                # what is heard here is noise
                "decode": {"tokens_per_second": 4, "extra_tokens": 6, "gate": "none"}
                | {"batch_size": batch, **decode},
            }
        )
        torch.manual_seed(0)
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
    for index, message in ((1, "bad.wav"), (4, "none.wav")):
        assert isinstance(found[index], IsthmusError)
        assert message in str(found[index])
    heard = found[2]
    assert isinstance(heard, Transcript)
    assert heard.duration == 1.0
    for index in (3, 5):
        other = found[index]
        assert isinstance(other, Transcript)
        assert other.text == heard.text
    whole = found[0]
    assert isinstance(whole, Transcript)
    assert whole.duration == pytest.approx(60)
    assert len(whole.segments) > 1
    assert list(transcriber.stream(long)) == list(whole.segments)
    with pytest.raises(IsthmusError, match=r"bad\.wav"):
        transcriber.transcribe([samples, bad])


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


def test_chunks_leave_room_for_the_longest_transcript(build: Build, waves: Waves) -> None:
    transcriber = build("gpt2")  # which fails at a position beyond its last
    transcriber.ends = []
    assert 2 < transcriber.longest < 30
    heard = transcriber.transcribe(waves(int(transcriber.longest * 16_000)).numpy())
    assert (heard.finish_reason, len(heard.segments)) == ("length", 1)
    longer = transcriber.transcribe(waves(int(transcriber.longest * 16_000) + 16_000).numpy())
    assert len(longer.segments) == 2


def test_a_model_without_room_says_so(build: Build) -> None:
    with pytest.raises(IsthmusError, match="cannot take 2"):
        build("gpt2", tokens_per_second=200).transcribe(np.zeros(16_000, np.float32))


def test_the_encoders_own_limit(build: Build, waves: Waves) -> None:
    transcriber = build(encoder="whisper", chunk_seconds=100.0)
    assert transcriber.longest <= 30
    assert len(transcriber.transcribe(waves(31 * 16_000).numpy()).segments) >= 2


def test_where_nobody_speaks_nothing_is_decoded(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = build(gate="energy")
    silence = np.zeros(32_000, np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    monkeypatch.setattr(gated, "_decode", lambda *arguments: pytest.fail("decoded"))
    for heard in gated.transcribe([silence, noise, silence[:100]]):
        assert (heard.text, heard.finish_reason) == ("", "no_speech")
    assert build().transcribe(noise).finish_reason != "no_speech"


@pytest.mark.parametrize("beam", [1, 4])
def test_strict_gives_the_same_bits_in_any_company(build: Build, waves: Waves, beam: int) -> None:
    audio = [waves(3000 + 2700 * i, seed=i).numpy() for i in range(6)]
    strict = {"beam_size": beam, "strict": True}
    alone = [build(**strict).transcribe(one) for one in audio]
    for batch in (2, 3, 6):
        together = build(batch=batch, **strict).transcribe(list(audio))
        for a, b in zip(alone, together, strict=True):
            assert a.segments == b.segments  # tokens, and scores to the last bit


def test_drafts_change_nothing(build: Build, waves: Waves) -> None:
    audio = [waves(3000 + 2700 * i, seed=i).numpy() for i in range(6)]
    plain, drafted = (build(beam_size=1, drafts=drafts) for drafts in (False, True))
    assert (plain.drafts, drafted.drafts) == (False, True)
    texts = [[t.text for t in one.transcribe(list(audio))] for one in (plain, drafted)]
    assert texts[0] == texts[1]


def test_special_tokens_are_never_written(build: Build, waves: Waves) -> None:
    transcriber = build()
    tokenizer = transcriber.model.llm.tokenizer
    assert set(transcriber.options.forbidden) | set(transcriber.ends) >= set(
        tokenizer.all_special_ids
    )
    for segment in transcriber.transcribe(waves(24_000).numpy()).segments:
        assert not set(segment.tokens) & set(tokenizer.all_special_ids)


def test_hypotheses_are_listed_best_first(build: Build, waves: Waves) -> None:
    (segment,) = build(nbest=3).transcribe(waves(16_000).numpy()).segments
    scores = [segment.score, *(one.score for one in segment.alternatives)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_words_have_times(build: Build, waves: Waves) -> None:
    transcript = build().transcribe(waves(32_000).numpy(), word_timestamps=True)
    assert [word.text for word in transcript.words] == transcript.text.split()
    times = [time for word in transcript.words for time in (word.start, word.end)]
    assert times == sorted(times)
    with pytest.raises(IsthmusError, match="Name one with --align-model"):
        build(encoder="whisper").transcribe(waves(16_000).numpy(), word_timestamps=True)

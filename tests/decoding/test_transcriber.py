"""One way through all audio: a transcript or a fault for each, whatever the others are."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from isthmus.build import build_model
from isthmus.decoding import inputs, recogniser
from isthmus.decoding import transcriber as transcribing
from isthmus.decoding.confidence import text_distance
from isthmus.decoding.formats import as_srt, as_tsv
from isthmus.decoding.pretrained import CTCRecogniser
from isthmus.decoding.recogniser import Speech
from isthmus.decoding.timestamps import load_ctc
from isthmus.decoding.transcriber import DecodeChanges, Transcriber, load
from isthmus.decoding.transcript import Transcript
from isthmus.errors import IsthmusError
from isthmus.lab.synthesis import Voice, speak
from isthmus.recipe import Recipe
from isthmus.settings.base import ASSETS
from isthmus.settings.search import DecodeSettings
from isthmus.speech.activity import Region
from isthmus.speech.audio import AudioInfo, audio_info, load_audio
from isthmus.speech.corpora import load_cut, read_corpus

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
        return Transcriber(build_model(recipe), recipe.decode)

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


def test_what_is_no_audio_is_its_own_fault(build: Build, waves: Waves, tmp_path: Path) -> None:
    good = waves(8000).numpy()
    faults: list[tuple[Any, str]] = [
        (torch.from_numpy(good), "type Tensor"),
        (7, "type int"),
        (bytearray(b"RIFF"), "type bytearray"),
        ((16_000 * good).astype(np.int16), r"int16\. Divide"),
        (np.where(good > 0, np.nan, good), "NaN"),
        (30_000 * good, "Divide the samples"),
        (good[None], r"\(1, 8000\)"),
    ]
    transcriber = build()
    alone = transcriber.transcribe(good)
    results = list(transcriber.results([good, *(fault for fault, _ in faults)]))
    found = {result.index: result.found for result in results}
    assert isinstance(found[0], Transcript)
    assert found[0].text == alone.text
    for index, (fault, message) in enumerate(faults, start=1):
        assert isinstance(found[index], IsthmusError)
        with pytest.raises(IsthmusError, match=message):
            transcriber.transcribe(fault)
        with pytest.raises(IsthmusError, match=message):
            list(transcriber.stream(fault))
    assert [one.text for one in transcriber.transcribe((good, good))] == [alone.text] * 2


def test_lengths_are_asked_once_and_a_torn_file_is_said_to_be_torn(
    build: Build, waves: Waves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcriber = build()
    torn, good = tmp_path / "torn.wav", tmp_path / "good.wav"
    soundfile.write(good, waves(16_000).numpy(), 16_000)
    soundfile.write(torn, waves(60 * 16_000).numpy(), 16_000)
    torn.write_bytes(torn.read_bytes()[:1_000_000])
    asked: list[Any] = []

    def asking(source: Any, exact: bool = True) -> AudioInfo:
        asked.append(source)
        return audio_info(source, exact=exact)

    monkeypatch.setattr(inputs, "audio_info", asking)
    monkeypatch.setattr(recogniser, "load_audio", lambda path: path == good and load_audio(path))
    found = {result.index: result.found for result in transcriber.results([torn, good])}
    assert asked == [torn, good]
    assert "torn.wav" in str(found[0])
    assert getattr(found[0], "code", None) == "truncated"
    assert isinstance(found[1], Transcript)


def test_only_what_is_too_long_is_cut_up(
    build: Build, waves: Waves, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcriber = build(chunk_seconds=2.0)
    audio = [waves(n, seed=n).numpy() for n in (16_000, 24_000, 40_000)]
    monkeypatch.setattr(recogniser, "_seconds", lambda one: 1.0)  # as damaged headers say
    heard: list[list[float]] = []
    decode = transcriber._decode

    def listen(speech: list[Speech], words: bool) -> Any:
        heard.append([round(one.seconds, 1) for one in speech])
        return decode(speech, words)

    monkeypatch.setattr(transcriber, "_decode", listen)
    found = transcriber.transcribe(list(audio))
    assert heard[0] == [1.0, 1.5]
    assert [len(transcript.segments) for transcript in found[:2]] == [1, 1]
    assert len(found[2].segments) > 1


def test_chunks_pass_the_gate_once(
    build: Build, waves: Waves, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcriber = build(gate="energy", chunk_seconds=4.0)
    seen: list[int] = []

    def everywhere(waveform: np.ndarray, gate: str) -> list[Region]:
        seen.append(len(waveform))
        return [(0.0, len(waveform) / 16_000)]

    monkeypatch.setattr(recogniser, "speech_regions", everywhere)
    monkeypatch.setattr(transcribing, "has_speech", lambda *arguments: pytest.fail("looked again"))
    (transcript,) = transcriber.transcribe([waves(10 * 16_000).numpy()])
    assert len(seen) == len(transcript.segments) > 2


def test_an_aligner_is_where_the_model_is(
    build: Build, model_folder: Callable[[str], Path]
) -> None:
    transcriber = build(encoder="whisper")
    transcriber.model.projector.to("meta")
    aligner = load_ctc(str(model_folder("conformer")))
    Transcriber(transcriber.model, transcriber.settings, aligner=aligner)
    assert {weights.device.type for weights in aligner.parameters()} == {"meta"}


def test_the_head_of_a_trained_encoder_is_left_alone(build: Build, waves: Waves) -> None:
    model = build().model
    model.tune["encoder"] = "full"
    transcriber = Transcriber(model, DecodeSettings(beam_size=1, gate="none"))
    assert not transcriber.drafts
    with pytest.raises(IsthmusError, match=r"trained its encoder.*--align-model"):
        transcriber.transcribe(waves(16_000).numpy(), word_timestamps=True)


@pytest.mark.parametrize("decode", [{"beam_size": 1}, {"ctc_weight": 0.3}, {}])
def test_how_far_a_text_is_from_what_ctc_heard(
    build: Build, waves: Waves, decode: dict[str, Any]
) -> None:
    transcriber, waveform = build(**decode), waves(16_000).numpy()
    [segment] = transcriber.transcribe(waveform).segments
    recogniser = CTCRecogniser(transcriber.encoder, DecodeSettings(gate="none"))
    assert segment.ctc_distance == text_distance(segment.text, recogniser.transcribe(waveform).text)
    assert build(encoder="whisper").transcribe(waveform).ctc_distance is None


def test_settings_to_change_are_those_there_are() -> None:
    assert DecodeChanges.__annotations__.keys() == DecodeSettings.model_fields.keys()
    assert load(beam_size=2, strict=True, nbest=None).settings.beam_size == 2
    with pytest.raises(IsthmusError, match="beam_sise"):
        load(beam_sise=2)  # type: ignore[call-arg] # what is tested


def test_long_speech_is_the_speech_of_its_parts() -> None:
    """Real digits with pauses between: none is lost, doubled or heard otherwise for the cuts."""
    folder = os.environ.get("ISTHMUS_SPEECH")
    if not folder:
        pytest.skip("ISTHMUS_SPEECH names no speech")
    cuts = list(read_corpus(str(Path(folder) / "en_digits/dev.jsonl")))[:16]
    pause = np.random.default_rng(0).normal(0, 1e-4, 9600).astype(np.float32)
    waveform = np.concatenate([piece for cut in cuts for piece in (load_cut(cut), pause)])
    transcriber = load(chunk_seconds=4.0, gate="energy", beam_size=1)
    whole = transcriber.transcribe(waveform)
    chunks = list(transcriber.chunks(waveform))
    parts = transcriber.transcribe([chunk.waveform for chunk in chunks])
    assert len(whole.segments) == len(chunks) >= 4
    assert [segment.text for segment in whole.segments] == [part.text for part in parts]


@pytest.mark.parametrize("chunk_seconds", [30.0, 3.0])
def test_segments_of_timed_words_last_from_the_first_to_the_last(chunk_seconds: float) -> None:
    """As in whisper: so subtitles, tables and JSON have the same times."""
    silence = np.zeros(16000, np.float32)
    said, _ = speak("one two three", Voice("en-us", rate=140))
    waveform = np.concatenate([silence, said, silence, said, silence])
    transcriber = load(chunk_seconds=chunk_seconds, gate="none")
    timed = transcriber.transcribe(waveform, word_timestamps=True)
    plain = transcriber.transcribe(waveform)
    assert plain.segments[0].start == 0.0
    assert plain.text == timed.text  # whether chunks overlap or not
    assert not plain.words
    assert timed.segments[0].text.startswith("one two three")
    for segment in filter(lambda one: one.text, timed.segments):
        assert segment.start == segment.words[0].start > 0
        assert segment.end == segment.words[-1].end < timed.duration
    rows = [line.split("\t")[:2] for line in as_tsv(timed.segments).splitlines()[1:]]
    times = [
        re.findall(r"\d+", line) for line in as_srt(timed.segments).splitlines() if ">" in line
    ]
    assert rows == [[str(int(s) * 1000 + int(m)) for s, m in (t[2:4], t[6:8])] for t in times]


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
    transcriber.options = replace(transcriber.options, repetition_guard=False)
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


def test_a_run_of_the_hub_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(ASSETS / "tiny")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load("someone/ears").settings.beam_size == load("tiny").settings.beam_size
    assert asked[0]["name"] == "someone/ears"
    assert not any("checkpoints" in pattern for pattern in asked[0]["allow_patterns"])


def test_what_settings_need_is_looked_for_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("isthmus.decoding.transcriber.load_run", pytest.fail)
    (tmp_path / "broken.arpa").write_text("no n-grams")
    with pytest.raises(IsthmusError, match=r"Cannot read n-gram model .*broken\.arpa"):
        load(ngram=str(tmp_path / "broken.arpa"))
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(IsthmusError, match=r"decode\.gate is silero, .*isthmus\[vad\]"):
        load(gate="silero")

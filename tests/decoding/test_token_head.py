"""A projector that says the LLM's tokens: drafts, joint decoding and word times by them."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from isthmus.build import build_model
from isthmus.decoding import transcriber as transcribing
from isthmus.decoding.beam import Hypothesis
from isthmus.decoding.confidence import text_distance
from isthmus.decoding.joint import TextSpelling, TokenSpelling
from isthmus.decoding.recogniser import Speech
from isthmus.decoding.timestamps import align_words, trellis
from isthmus.decoding.token_head import TokenHead
from isthmus.decoding.transcriber import Transcriber
from isthmus.decoding.transcript import words_of
from isthmus.errors import IsthmusError
from isthmus.model.spelling import WILDCARD
from isthmus.recipe import Recipe, change_settings

Build = Callable[..., Transcriber]
Waves = Callable[..., Tensor]
TEXTS = ["go left", "a bad cab", "see", "deaf"]
SOFT = {
    "type": "ctc-posterior",
    "inner": {"type": "linear", "downsample_rate": 2, "hidden": 64},
}


@pytest.fixture(scope="module")
def build(model_folder: Callable[[str], Path]) -> Build:
    """A transcriber of tiny parts, with a CTC head on its projector."""

    def transcriber(
        encoder: str = "whisper",
        tune: str = "frozen",
        projector: dict[str, Any] | None = None,
        llm: str = "llama",
        **decode: Any,
    ) -> Transcriber:
        kind = "conformer" if encoder == "parakeet" else encoder.partition("-")[0]
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "encoder": {"type": kind, "path": str(model_folder(encoder)), "tune": tune},
                "projector": projector or {"downsample_rate": 2, "hidden": 64},
                "llm": {"path": str(model_folder(llm))},
                "train": {"ctc_weight": 1.0},
                "decode": {"tokens_per_second": 12, "extra_tokens": 6, "gate": "none"} | decode,
            }
        )
        torch.manual_seed(0)
        return Transcriber(build_model(recipe), recipe.decode)

    return transcriber


@pytest.fixture(scope="module")
def speech(waves: Waves) -> list[Speech]:
    sizes = (16_000, 24_000, 9_000, 12_000)
    return [Speech(waves(size, seed=size).numpy()) for size in sizes]


@pytest.fixture(scope="module")
def taught(build: Build, speech: list[Speech]) -> Transcriber:
    """Its head says TEXTS of the speech; its language model knows nothing of that."""
    transcriber = build()
    model, head = transcriber.model, transcriber.model.projector.ctc
    assert head is not None
    frames = [own.clone() for own in transcriber._frames(speech)]
    labels = [model.transcript_tokens(text) for text in TEXTS]
    trained = [*model.projector.parameters()]
    optimiser = torch.optim.Adam(trained, lr=1e-2)
    model.projector.train()
    for _ in range(600):
        optimiser.zero_grad()
        head.loss(model.spoken(frames), labels)[0].backward()
        optimiser.step()
    model.eval()
    return transcriber


def with_settings(transcriber: Transcriber, **changes: Any) -> Transcriber:
    return Transcriber(transcriber.model, change_settings(transcriber.settings, changes))


@torch.inference_mode()
def said(transcriber: Transcriber, one: Speech) -> tuple[Tensor, str]:
    """What the head hears, its log-probabilities and its text, computed by itself."""
    head = transcriber.ctc
    assert head is not None
    read = transcriber._frames([one])
    if isinstance(head, TokenHead):
        read = transcriber.model.spoken(read)
    log_probs = head.log_probs(read[0][None])[0]
    return log_probs, head.text(head.best_path(log_probs))


def test_which_head_it_is(build: Build) -> None:
    """The encoder's own if it can spell and is as it was trained, else the projector's."""
    own = {"conformer": "frozen", "wav2vec2-ctc": "frozen", "hubert-ctc": "frozen"}
    for encoder, tune in own.items():
        transcriber = build(encoder, tune, ctc_weight=0.3)
        assert transcriber.ctc is transcriber.model.encoder.ctc is not None
        assert isinstance(transcriber.joint, TextSpelling)
    for encoder, tune in {"whisper": "frozen", "conformer": "full", "parakeet": "frozen"}.items():
        transcriber = build(encoder, tune, ctc_weight=0.3)
        assert isinstance(transcriber.ctc, TokenHead)
        assert isinstance(transcriber.joint, TokenSpelling)
        assert transcriber.ctc.blank == transcriber.model.llm.rows


def test_the_head_says_what_it_was_taught(taught: Transcriber, speech: list[Speech]) -> None:
    assert [said(taught, one)[1] for one in speech] == TEXTS
    heard = taught.transcribe([one.waveform for one in speech])
    assert [one.ctc_text for one in heard] == TEXTS
    for transcript, text in zip(heard, TEXTS, strict=True):
        assert transcript.ctc_distance == pytest.approx(text_distance(transcript.text, text))


ENCODERS = ["whisper", "wav2vec2-ctc", "wavlm-ctc", "conformer"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_head_times_words_and_is_scored_alone(
    build: Build, speech: list[Speech], encoder: str
) -> None:
    transcriber = build(encoder)
    texts = [said(transcriber, one)[1] for one in speech]
    heard = transcriber._hear(speech, words=True)
    assert [one.ctc_text for one in heard] == texts
    for segment, text, one in zip(heard, texts, speech, strict=True):
        assert segment.ctc_distance == pytest.approx(text_distance(segment.text, text))
        words = segment.words
        assert [word.text for word in words] == [word[0] for word in words_of(segment.text)]
        assert all(0 <= word.start <= word.end <= one.seconds for word in words)
        assert all(first.end <= second.start for first, second in pairwise(words))
    assert any(segment.words for segment in heard)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_drafts_of_any_head_change_no_text(
    build: Build, speech: list[Speech], encoder: str, llm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted, plain = (build(encoder, llm=llm, beam_size=1, drafts=own) for own in (True, False))
    assert drafted.drafts
    drafts: list[list[int]] = []
    search = transcribing.draft_search

    def watched(llm: Any, prompts: Any, own: list[list[int]], *rest: Any, **options: Any) -> Any:
        drafts.extend(own)
        return search(llm, prompts, own, *rest, **options)

    monkeypatch.setattr(transcribing, "draft_search", watched)
    together = [one.tokens for one in plain._hear(speech, words=False)]
    assert [one.tokens for one in drafted._hear(speech, words=False)] == together
    assert all(drafts)
    alone = [drafted._hear([one], words=False)[0].tokens for one in speech]
    assert alone == together


def test_a_draft_is_the_best_path_itself(taught: Transcriber, speech: list[Speech]) -> None:
    head = taught.ctc
    assert head is not None
    for one in speech:
        log_probs, text = said(taught, one)
        units = head.best_path(log_probs)
        assert taught._tokens(units) == units == taught.model.transcript_tokens(text)


def test_capitals_are_drafts_of_small_letters(build: Build) -> None:
    transcriber = build("wav2vec2-ctc")
    head = transcriber.ctc
    assert head is not None
    units = [head.tokenizer.get_vocab()[letter] for letter in "GO|LEFT"]
    assert head.text(units) == "GO LEFT"
    assert transcriber._tokens(units) == transcriber.model.transcript_tokens("go left")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_joint_texts_depend_on_nothing_but_the_utterance(
    build: Build, speech: list[Speech], encoder: str, strict: bool
) -> None:
    transcriber = build(encoder, ctc_weight=0.5, strict=strict)
    together = transcriber._hear([*speech, *speech], words=False)
    for place, one in enumerate(speech):
        [alone] = transcriber._hear([one], words=False)
        for copy in together[place :: len(speech)]:
            if strict:
                assert copy == alone
            assert copy.tokens == alone.tokens
            assert copy.score == pytest.approx(alone.score, abs=1e-5)


def test_the_best_path_stands_beside_the_beams(
    taught: Transcriber, speech: list[Speech], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model that knows nothing loses what CTC hears on the way, but not at the end."""
    joint = with_settings(taught, ctc_weight=3.0, beam_size=2, nbest=2)
    heard = joint._hear(speech, words=False)
    assert [one.text for one in heard] == TEXTS
    assert all(len(one.alternatives) == 1 for one in heard)
    assert all(one.score >= one.alternatives[0].score for one in heard)
    assert [one.ctc_distance for one in heard] == [0.0] * len(TEXTS)
    for one in heard:  # the end token's stands behind those of the text
        assert len(one.token_log_probs) == len(one.tokens) + 1

    def nothing_more(found: list[list[Hypothesis]], *rest: Any) -> list[list[Hypothesis]]:
        return found

    monkeypatch.setattr(joint, "_with_paths", nothing_more)
    without = joint._hear(speech, words=False)
    assert [one.text for one in without] != TEXTS
    pairs = zip(heard, without, strict=True)
    assert all(one.score >= other.score - 1e-5 for one, other in pairs)


def test_a_path_that_may_not_be_written_is_left_out(
    taught: Transcriber, speech: list[Speech]
) -> None:
    joint = with_settings(taught, ctc_weight=3.0, beam_size=2)
    joint.options = type(joint.options)(
        forbidden=(*joint.options.forbidden, *taught.model.transcript_tokens("e"))
    )
    texts = [one.text for one in joint._hear(speech, words=False)]
    assert not any("e" in text for text in texts)
    assert texts[1] == TEXTS[1]  # which has none


def test_shorter_limits_leave_long_paths_out(taught: Transcriber, speech: list[Speech]) -> None:
    joint = with_settings(taught, ctc_weight=3.0, tokens_per_second=0.5, extra_tokens=5)
    heard = joint._hear(speech, words=False)
    assert all(len(one.tokens) <= 6 for one in heard)
    assert heard[3].text == "deaf"


def test_words_have_their_times(taught: Transcriber, speech: list[Speech]) -> None:
    joint = with_settings(taught, ctc_weight=3.0)
    for segment, one in zip(joint._hear(speech, words=True), speech, strict=True):
        assert [word.text for word in segment.words] == segment.text.split()
        assert all(0 <= word.start < word.end <= one.seconds for word in segment.words)
        assert all(first.end <= second.start for first, second in pairwise(segment.words))


def test_a_delay_is_the_runs_own(taught: Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float | None] = []

    def watched(*arguments: Any) -> tuple[()]:
        found.append(arguments[4])
        return ()

    monkeypatch.setattr("isthmus.decoding.recogniser.align_words", watched)
    waveform = np.zeros(8000, np.float32)
    for delay in (None, 0.12):
        with_settings(taught, ctc_delay=delay).transcribe(waveform, word_timestamps=True)
    assert found == [None, None, 0.12, 0.12]  # of the text and of what CTC heard


def test_times_follow_the_labels(taught: Transcriber) -> None:
    """Each label lasts a tenth of a second or so; the delay moves all of them."""
    head = taught.ctc
    assert head is not None
    assert head.frame_rate == 25  # every other frame of Whisper's
    tokens = taught.model.transcript_tokens("ab cd")
    path = torch.full((50,), head.blank)
    path[torch.tensor([5, 17, 20, 21, 30])] = torch.tensor(tokens)
    log_probs = torch.log_softmax(10.0 * torch.nn.functional.one_hot(path, head.blank + 1), 1)
    noise = np.random.default_rng(0).normal(0, 0.1, 32_000).astype(np.float32)
    noise[13_500:14_000] *= 1e-3  # 0.84 to 0.88 s
    for delay in (0.0, -0.3):
        quiet = np.roll(noise, round(-delay * 16_000))
        first, second = align_words(log_probs, "ab cd", head, quiet, delay)
        assert first.end == pytest.approx(0.86 - delay, abs=0.03)
        assert second.start == pytest.approx(0.86 - delay, abs=0.03)
        assert first.confidence > 0.9


def test_the_trellis_is_of_the_columns_that_are_needed(taught: Transcriber) -> None:
    head = taught.ctc
    assert head is not None
    labels = np.array([7, 9, 7, WILDCARD, 9])
    log_probs = torch.randn(6, head.blank + 1).log_softmax(1)
    table, columns = trellis(log_probs, labels, np.array([0, 0, 1, 1, 2]), head)
    assert table.shape == (6, 5)  # the blank, a gap, any other, and two tokens
    expected = log_probs.numpy()
    np.testing.assert_allclose(table[:, columns[1]], expected[:, 7])
    np.testing.assert_allclose(table[:, columns[3]], expected[:, 9])
    np.testing.assert_allclose(table[:, columns[7]], expected[:, :-1].max(axis=1))
    np.testing.assert_allclose(table[:, columns[0::2]], expected[:, [-1] * 6])


@pytest.mark.parametrize("text", ["go left, now", " a  b", "日本語 ok", "naïve 5%", "x"])
def test_words_are_spelled_as_the_llm_tokenises_them(
    build: Build, parts: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """With their leading spaces, all tokens once and in order, at least one a word."""
    head = build().ctc
    assert isinstance(head, TokenHead)
    real = AutoTokenizer.from_pretrained(parts / "smollm2-135m-instruct")
    tokens = real.encode(text, add_special_tokens=False)
    head.tokenizer = real
    monkeypatch.setattr(head, "tokens", lambda text: real.encode(text, add_special_tokens=False))
    spans = [word.span() for word in words_of(text)]
    spelled = head.spell(text, spans)
    assert [token for own in spelled for token in own if token != WILDCARD] == tokens
    assert all(spelled)
    if " " in text.strip() and text.isascii():
        for own, (start, end) in zip(spelled[1:], spans[1:], strict=True):
            word = str(real.decode(own))
            assert word.startswith(" ")
            assert word.strip() == text[start:end]


def test_no_steady_rate_is_no_time(build: Build, waves: Waves) -> None:
    for projector in ({"type": "ctc", "hidden": 8}, {"type": "linear", "downsample_rate": 4}):
        transcriber = build("parakeet", projector=projector)
        assert isinstance(transcriber.ctc, TokenHead)
        steady = projector["type"] == "linear"
        assert transcriber.ctc.frame_rate == (3.125 if steady else None)
        if not steady:
            with pytest.raises(IsthmusError, match="--align-model"):
                transcriber.transcribe(waves(9000).numpy(), word_timestamps=True)


def test_soft_tokens_are_read_by_the_same_head(build: Build, speech: list[Speech]) -> None:
    transcriber = build(projector=SOFT, ctc_weight=0.5)
    assert isinstance(transcriber.ctc, TokenHead)
    assert transcriber.ctc.frame_rate == 25
    heard = transcriber._hear(speech, words=True)
    assert [one.ctc_distance for one in heard] == [
        text_distance(one.text, said(transcriber, own)[1])
        for one, own in zip(heard, speech, strict=True)
    ]


@pytest.mark.parametrize("projector", [None, SOFT])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_projector_and_head_run_once(
    build: Build,
    speech: list[Speech],
    projector: dict[str, Any] | None,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is read once is what they give for themselves."""
    transcriber = build(projector=projector, ctc_weight=0.5, posterior_temperature=temperature)
    model, runs = transcriber.model, list[str]()
    within = getattr(model.projector, "inner", model.projector)

    def count(part: Any, method: str) -> None:
        run = getattr(part, method)
        monkeypatch.setattr(part, method, lambda *given: runs.append(method) or run(*given))

    count(within, "forward")
    count(model.projector.ctc, "log_probs")
    audio, _, _ = transcriber._listen(transcriber._frames(speech), keep=True)
    assert runs == ["forward", "log_probs"] * len(speech)
    for own, one in zip(audio, speech, strict=True):
        torch.testing.assert_close([own], model.project(transcriber._frames([one])))


def test_columns_of_log_probs_are_those_of_the_whole_table(
    taught: Transcriber, speech: list[Speech], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is not kept: the search's texts and scores, and the words' times, are the same."""
    joint, head = with_settings(taught, ctc_weight=0.7), taught.ctc
    assert isinstance(head, TokenHead)
    [read] = taught.model.spoken(taught._frames(speech[:1]))
    whole = head.log_probs(read[None])[0]
    kept = head.kept(read, whole)
    for units in ([head.blank], [5], [7, head.blank, 5, 7], list(range(head.blank + 1)), []):
        torch.testing.assert_close(kept[:, torch.tensor(units).long()], whole[:, units])
    own = [value for value in vars(kept).values() if isinstance(value, Tensor)]
    size = sum(value.numel() for value in own if len(value) == len(whole))
    assert size <= len(whole) * (taught.model.llm.dim + 3)
    heard = joint._hear(speech, words=True)
    monkeypatch.setattr(TokenHead, "kept", lambda head, frames, log_probs: log_probs)
    for one, other in zip(heard, joint._hear(speech, words=True), strict=True):
        assert one.tokens == other.tokens
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert [(word.start, word.end) for word in one.words] == [
            (word.start, word.end) for word in other.words
        ]


def test_an_utterance_shorter_than_an_embedding(build: Build) -> None:
    """CTC has no path through no embeddings at all: the text is empty, and nothing fails."""
    for decode in ({"ctc_weight": 0.5}, {"beam_size": 1}):
        transcriber = build(projector={"type": "linear", "downsample_rate": 40}, **decode)
        [segment] = transcriber.transcribe(np.full(800, 0.1, np.float32)).segments
        assert said(transcriber, Speech(np.full(800, 0.1, np.float32)))[1] == ""
        assert segment.ctc_distance in (0.0, 1.0)

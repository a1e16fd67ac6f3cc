"""Words found where they were said: beside all paths, in hand-made frames, by a synthesiser."""

import itertools
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    PreTrainedTokenizerFast,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
)

from isthmus.decoding.timestamps import (
    align_words,
    best_path,
    heard,
    load_ctc,
    meetings,
    skippable,
)
from isthmus.decoding.transcript import Word
from isthmus.errors import IsthmusError
from isthmus.lab.synthesis import draw_texts, random_voice, speak
from isthmus.model.conformer import CONFORMER_DELAY, ConformerCTC
from isthmus.model.encoder import ConformerEncoder
from isthmus.model.spelling import WILDCARD, letter_tokenizer, spell
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings
from isthmus.speech.audio import SAMPLE_RATE

ModelFolder = Callable[[str], Path]
SMALL = ConformerArchitecture(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    conv_kernel_size=5,
    subsampling_factor=4,
    subsampling_conv_channels=4,
)
FRONT_END = LogMelSettings(num_mels=40, margin_seconds=0.12)
CTC = ConformerCTC.initial(SMALL, letter_tokenizer("abcdefgh' "), FRONT_END).eval()
UNITS = CTC.tokenizer.get_vocab()


@pytest.mark.parametrize("labels", [(1,), (1, 2), (1, 1), (1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5])
def test_the_best_path_is_the_best_of_all(labels: tuple[int, ...], num_frames: int) -> None:
    """Of all strings of units that say the labels once repeats are joined and blanks dropped."""
    table = np.random.default_rng(num_frames).standard_normal((num_frames, 3))
    frames = range(num_frames)
    said = {
        units: table[frames, list(units)].sum()
        for units in itertools.product(range(3), repeat=num_frames)
        if tuple(unit for unit, _ in itertools.groupby(units) if unit) == labels
    }
    columns = np.zeros(2 * len(labels) + 1, np.int64)
    columns[1::2] = labels
    path = best_path(table, columns, skippable(columns[1::2]))
    if not said:
        assert path is None
        return
    assert path is not None
    assert tuple(columns[path]) == max(said, key=lambda units: said[units])
    assert set(np.diff(path)) <= {0, 1, 2}


def frames_of(spelled: dict[int, str], num_frames: int, probability: float = 0.9) -> Tensor:
    """Log-probabilities (T, V) of a model that is sure of the blank but for the frames named."""
    table = torch.full((num_frames, len(UNITS)), (1 - probability) / (len(UNITS) - 1))
    for frame in range(num_frames):
        table[frame, UNITS[spelled.get(frame, "<blank>")]] = probability
    return table.log()


def bursts(*spans: tuple[float, float], duration: float) -> np.ndarray:
    """Noise in each span (seconds), and near silence elsewhere."""
    noise = np.random.default_rng(0).standard_normal(round(duration * SAMPLE_RATE))
    level = np.full(len(noise), 1e-4)
    for start, end in spans:
        level[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] = 0.1
    return (noise * level).astype(np.float32)


def late(seconds: float) -> int:
    """The frame in which a Conformer spells what was said at a time."""
    return round((seconds + CONFORMER_DELAY + 0.12) * CTC.frame_rate)


def assert_in_order(words: tuple[Word, ...], text: str, duration: float) -> None:
    assert [word.text for word in words] == text.split()
    assert all(0 <= word.start <= word.end <= duration for word in words)
    assert all(one.end <= two.start for one, two in pairwise(words))
    assert all(0 <= word.confidence <= 1 for word in words)


def test_words_are_bounded_by_their_sound() -> None:
    """The first letter is spelled far too early and the last too late, as Conformers do."""
    waveform = bursts((0.3, 0.6), (0.65, 1.0), (1.5, 1.8), duration=2.2)
    spelled = {0: "b", late(0.6): "a", late(0.66): "d", late(0.95): "e", late(1.5): "f", 60: "a"}
    words = align_words(frames_of(spelled, 62), "ba de fa", CTC, waveform)
    assert_in_order(words, "ba de fa", 2.2)
    found = [time for word in words for time in (word.start, word.end)]
    assert found == pytest.approx([0.3, 0.625, 0.625, 1.0, 1.5, 1.8], abs=0.03)


def test_sound_far_from_the_letters_is_not_theirs() -> None:
    waveform = bursts((0.1, 0.2), (2.0, 2.4), (4.5, 4.7), duration=5)
    [word] = align_words(frames_of({late(2.1): "a"}, 130), "a", CTC, waveform)
    assert (word.start, word.end) == pytest.approx((2.0, 2.4), abs=0.03)


def test_confidence_is_the_mean_probability_of_the_letters() -> None:
    log_probs = frames_of({10: "a", 12: "b", 20: " ", 30: "c", 31: "c"}, 40, 0.9)
    log_probs[12] = frames_of({12: "b"}, 40, 0.5)[12]
    words = align_words(log_probs, "ab c", CTC, bursts((0.1, 1.3), duration=1.5))
    assert [word.confidence for word in words] == pytest.approx([0.7, 0.9])


def test_the_word_separator_counts_as_a_gap() -> None:
    spelled = {10: "a", **dict.fromkeys(range(11, 30), " "), 30: "b"}
    words = align_words(frames_of(spelled, 40), "a b", CTC, bursts((0.1, 1.3), duration=1.5))
    assert [word.confidence for word in words] == pytest.approx([0.9, 0.9])


def test_letters_the_model_cannot_spell_have_a_place() -> None:
    spelled = {5: "a", 15: "f", 16: "e", 17: "g", 30: "b"}
    waveform = bursts((0.0, 0.3), (0.35, 0.75), (0.8, 1.2), duration=1.3)
    for number in ("5", "42", "אבג", "ßß", "—"):
        words = align_words(frames_of(spelled, 40), f"a {number} b", CTC, waveform)
        assert_in_order(words, f"a {number} b", 1.3)
        assert words[2].confidence == pytest.approx(0.9)
    assert words[1].confidence == pytest.approx(0.9)


def test_letters_without_spaces_are_timed_one_by_one() -> None:
    waveform = bursts((0.0, 1.2), duration=1.3)
    spelled = {5: "a", 12: "f", 18: "e", 24: "g", 30: "b"}
    words = align_words(frames_of(spelled, 40), "「東京」は bad กิน、", CTC, waveform)
    assert [word.text for word in words] == ["「東", "京」", "は", "bad", "กิ", "น、"]
    assert all(0 <= one.start <= one.end <= two.start for one, two in pairwise(words))


def test_spellings() -> None:
    tokenizer = CTC.tokenizer
    assert spell("Bad,", tokenizer) == [UNITS[letter] for letter in "bad"]
    assert spell("b-a", tokenizer) == [UNITS[letter] for letter in "ba"]
    assert spell("d'é", tokenizer) == [UNITS[letter] for letter in "d'e"]
    assert spell("a42bb", tokenizer) == [UNITS["a"], WILDCARD, UNITS["b"], UNITS["b"]]
    assert spell("…", tokenizer) == spell("日本", tokenizer) == [WILDCARD]
    assert spell("<blank>", tokenizer) == [UNITS["b"], WILDCARD, UNITS["a"], WILDCARD]


def test_more_letters_than_frames_are_spread() -> None:
    waveform = bursts((0.0, 1.0), duration=1.0)
    text = "aaaa bb aaaa"
    words = align_words(frames_of({}, 4), text, CTC, waveform)
    assert_in_order(words, text, 1.0)
    assert [word.confidence for word in words] == [0, 0, 0]
    assert words[1].start == pytest.approx(0.4, abs=0.2)
    assert align_words(frames_of({}, 4)[:0], text, CTC, waveform[:1])[0].text == "aaaa"


def test_no_words_and_impossible_letters() -> None:
    waveform = bursts((0.2, 0.8), duration=1.0)
    assert align_words(frames_of({}, 25), " \n", CTC, waveform) == ()
    for value in (-torch.inf, torch.nan):
        log_probs = frames_of({8: "a", 16: "b"}, 25)
        log_probs[:, UNITS["c"]] = value
        words = align_words(log_probs, "a c b", CTC, waveform)
        assert_in_order(words, "a c b", 1.0)
        assert words[1].confidence == 0


@settings(deadline=None, max_examples=60)
@given(
    text=st.text("aab c' 5é—\n", max_size=30),
    num_frames=st.integers(0, 40),
    num_samples=st.integers(0, 16_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_words_are_in_order_and_within_whatever_comes(
    text: str, num_frames: int, num_samples: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(num_frames, len(UNITS), generator=generator).mul(4).log_softmax(-1)
    envelope = torch.rand(num_samples // 800 + 1, generator=generator).repeat_interleave(800) ** 8
    noise = torch.randn(num_samples, generator=generator) * envelope[:num_samples]
    words = align_words(log_probs, text, CTC, noise.numpy())
    assert_in_order(words, text, num_samples / SAMPLE_RATE)


def test_half_the_words_start_within_40_milliseconds() -> None:
    """With the shipped Conformer, of voices that neither it nor its delay was fitted to."""
    pytest.importorskip("espeakng_loader", reason="needs the synth extra")
    encoder = load_ctc("isthmus/tiny-conformer")
    ctc = encoder.ctc
    assert ctc is not None
    heard: list[tuple[Tensor, str, np.ndarray]] = []
    true: list[np.ndarray] = []
    for index, text in enumerate(draw_texts(16, seed=72)):
        rng = np.random.default_rng((72, index))
        speech, spoken = speak(text, random_voice(rng, held_out=True))
        lead, tail = (int(SAMPLE_RATE * rng.uniform(0.05, 0.5)) for _ in range(2))
        waveform = np.pad(speech, (lead, tail))
        with torch.inference_mode():
            frames, _ = encoder(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
            heard.append((ctc.log_probs(frames)[0], text, waveform))
        true.append(np.array([word.start for word in spoken]) + lead / SAMPLE_RATE)

    def median_error(delay: float | None = None) -> float:
        words = [
            word
            for log_probs, text, waveform in heard
            for word in align_words(log_probs, text, ctc, waveform, delay)
        ]
        starts = np.array([word.start for word in words])
        return float(np.median(np.abs(starts - np.concatenate(true))))

    assert median_error() <= 0.04
    assert median_error(ctc.delay - CONFORMER_DELAY) > 0.04
    pairs = zip(heard, true, strict=True)
    late = [meetings(own, text, ctc) - starts[1:] for (own, text, _), starts in pairs]
    assert np.median(np.concatenate(late)) == pytest.approx(ctc.delay, abs=0.03)


def write_wav2vec2(folder: Path, **values: Any) -> Any:
    """A tiny wav2vec 2.0 with CTC over capital letters, laid out as on the hub."""
    units = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGH'"]
    (folder / "vocab.json").write_text(json.dumps({unit: i for i, unit in enumerate(units)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "wav2vec2",
        **sizes,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        vocab_size=len(units),
        pad_token_id=0,
        **values,
    )
    network = AutoModelForCTC.from_config(config).eval()
    network.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return network


def test_wav2vec2_may_align(tmp_path: Path) -> None:
    network = write_wav2vec2(tmp_path)
    encoder = load_ctc(str(tmp_path))
    ctc = encoder.ctc
    assert ctc is not None
    assert (ctc.blank, ctc.frame_rate, ctc.delay) == (0, 50, 0)
    assert spell("bad", ctc.tokenizer) == spell("BAD!", ctc.tokenizer) == [6, 5, 8]
    waveform = bursts((0.2, 0.8), duration=1.0)
    with torch.inference_mode():
        samples = torch.from_numpy(waveform)[None]
        frames, lengths = encoder(samples, torch.tensor([len(waveform)]))
        found = ctc.log_probs(frames)
        torch.testing.assert_close(found, network(samples).logits.log_softmax(-1))
    assert lengths.tolist() == [found.shape[1]]
    log_probs = torch.full(found.shape[1:], -9.0)
    log_probs[:, 4] = -1.0  # the model's own separator, preferred to a blank
    for frame, unit in ((12, 5), (25, 6)):
        log_probs[frame, unit] = 0.0
    words = align_words(log_probs, "a b", ctc, waveform)
    assert_in_order(words, "a b", 1.0)
    assert [word.confidence for word in words] == [1, 1]


def test_parakeet_may_align_by_pieces(model_folder: ModelFolder, tmp_path: Path) -> None:
    for file in model_folder("parakeet").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pieces = ["<unk>", "▁", "▁ab", *"abcdefgh'"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    encoder = load_ctc(str(tmp_path))
    ctc = encoder.ctc
    assert ctc is not None
    assert (ctc.blank, ctc.frame_rate) == (19, 12.5)
    assert spell("Abc", ctc.tokenizer) == [pieces.index("▁ab"), pieces.index("c")]
    waveform = bursts((0.2, 1.8), duration=2.0)
    with torch.inference_mode():
        frames, lengths = encoder(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
        log_probs = ctc.log_probs(frames)[0, : int(lengths[0])]
    assert_in_order(align_words(log_probs, "Abc 5 bad", ctc, waveform), "Abc 5 bad", 2.0)


def test_what_cannot_align_is_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="'whisper' model"):
        load_ctc(str(model_folder("whisper")))
    write_wav2vec2(tmp_path, add_adapter=True, output_hidden_size=16)
    with pytest.raises(IsthmusError, match="adapter"):
        load_ctc(str(tmp_path))
    assert isinstance(load_ctc(str(model_folder("conformer"))), ConformerEncoder)


def test_every_word_has_a_length_also_beside_digital_silence() -> None:
    rng = np.random.default_rng(0)
    sound = np.zeros(24_000, np.float32)
    sound[6_400:17_600] = rng.normal(0, 0.1, 11_200)  # 0.4 to 1.1 s
    first, last = np.array([0.0, 0.35, 0.42, 1.2]), np.array([0.3, 0.4, 0.6, 1.4])
    starts, ends = heard(first, last, sound)
    assert (ends - starts >= 0.04 - 1e-9).all()
    assert (starts[1:] >= ends[:-1] - 1e-9).all()
    assert starts[0] >= 0.35
    assert ends[-1] <= 1.15

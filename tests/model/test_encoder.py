"""The contract of encoders, over all of them."""

import random
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC

from isthmus.errors import IsthmusError
from isthmus.model.encoder import (
    ConformerEncoder,
    Encoder,
    FBankEncoder,
    PairEncoder,
    ParakeetEncoder,
    SelfSupervisedEncoder,
    WhisperEncoder,
    build_encoder,
    load_extractor,
    parameters,
)
from isthmus.model.parts import sources
from isthmus.settings.encoders import EncoderSettings, PairSettings, WhisperSettings
from isthmus.speech.audio import SAMPLE_RATE

Waves = Callable[..., Tensor]
FRAME_RATES = {"fbank": 100.0, "conformer": 25.0, "parakeet": 12.5, "pair": 25.0}  # others have 50
WIDTHS = {"fbank": 80, "pair": 32}  # the others have 16
LENGTHS = [
    1,
    2,
    159,
    160,
    161,
    319,
    320,
    321,
    399,
    400,
    401,
    479,
    480,
    481,
    639,
    640,
    641,
    719,
    720,
    721,
    100_001,
]


def encode(encoder: Encoder, *waveforms: Tensor, padding: float = 0.0) -> list[Tensor]:
    """Frames (T, D) of each waveform, in one batch; `padding` is the scale of what is behind."""
    num_samples = torch.tensor([len(waveform) for waveform in waveforms])
    batch = padding * torch.randn(len(waveforms), int(num_samples.max()))
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    with torch.no_grad():
        frames, num_frames = encoder(batch, num_samples)
    return [row[:length] for row, length in zip(frames, num_frames.tolist(), strict=True)]


def test_every_encoder_is_tested(
    encoder_names: list[str], encoder_settings: Callable[[str], Any]
) -> None:
    tested = {encoder_settings(name).type for name in encoder_names}
    known = set()
    for settings in typing.get_args(EncoderSettings):
        known |= set(typing.get_args(settings.model_fields["type"].annotation))
    assert tested == known


def test_states_its_frames(encoder: Encoder, encoder_name: str, waves: Waves) -> None:
    assert encoder.dim == WIDTHS.get(encoder_name, 16)
    assert encoder.frame_rate == FRAME_RATES.get(encoder_name, 50.0)
    (frames,) = encode(encoder, waves(SAMPLE_RATE * 2))
    assert frames.shape[1] == encoder.dim
    seconds = 30 if encoder_name == "whisper-kept" else 2
    assert len(frames) == pytest.approx(seconds * encoder.frame_rate, abs=0.25 * encoder.frame_rate)


def test_output_length_is_the_real_one(encoder: Encoder, waves: Waves) -> None:
    draw = random.Random(0)
    lengths = LENGTHS + [draw.randint(1600, 3 * SAMPLE_RATE) for _ in range(20)]
    for num_samples in lengths:
        with torch.no_grad():
            frames, num_frames = encoder(waves(num_samples)[None], torch.tensor([num_samples]))
        assert num_frames.tolist() == [encoder.output_length(num_samples)]
        assert frames.shape[1] - int(num_frames) in (0, 1)  # Parakeet: a frame of its FFT's padding
        assert frames[:, :num_frames].isfinite().all()


@pytest.mark.parametrize("padding", [0.0, 10.0])
def test_padding_is_invisible(encoder: Encoder, waves: Waves, padding: float) -> None:
    torch.manual_seed(1)
    utterances = [waves(n, seed=n) for n in (1, 300, 1600, 7777, 12000, 26001, 48000)]
    together = encode(encoder, *utterances, padding=padding)
    for utterance, frames in zip(utterances, together, strict=True):
        (alone,) = encode(encoder, utterance)
        assert len(frames) == len(alone)
        torch.testing.assert_close(frames, alone, atol=1e-4, rtol=0)


def test_encodes_what_is_said(encoder: Encoder, waves: Waves) -> None:
    one, other = encode(encoder, waves(16000, seed=1), waves(16000, seed=2))
    assert (one - other).abs().mean() > 0.01


def test_autocast_leaves_frames_about_the_same(encoder: Encoder, waves: Waves) -> None:
    utterance = waves(16000)
    (exact,) = encode(encoder, utterance)
    with torch.autocast("cpu", torch.bfloat16):
        (rough,) = encode(encoder, utterance)
    difference = (rough.float() - exact).square().mean().sqrt()
    assert difference < (0.05 if encoder.frame_rate < 100 else 1e-6) * exact.square().mean().sqrt()


def reference(encoder: Encoder, folder: Path, waveform: Tensor) -> Tensor:
    """Frames (T, D) the way transformers makes them from `folder`."""
    match encoder:
        case WhisperEncoder():
            mel = AutoFeatureExtractor.from_pretrained(folder)(
                waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"
            )
            network = AutoModel.from_pretrained(folder).encoder
            frames = network(mel["input_features"]).last_hidden_state[0]
            return frames[: encoder.output_length(len(waveform))]
        case SelfSupervisedEncoder():
            values = AutoFeatureExtractor.from_pretrained(folder)(
                waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"
            )
            return AutoModel.from_pretrained(folder)(values["input_values"]).last_hidden_state[0]
        case ParakeetEncoder():
            inputs = AutoFeatureExtractor.from_pretrained(folder)(
                waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"
            )
            output = AutoModelForCTC.from_pretrained(folder).encoder(**inputs)
            return output.last_hidden_state[0, : output.attention_mask.sum()]
        case ConformerEncoder():
            features, _ = encoder.ctc.log_mel(waveform[None], torch.tensor([len(waveform)]))
            network = AutoModelForCTC.from_pretrained(folder).encoder
            return network(features).last_hidden_state[0]
        case _:
            raise AssertionError(encoder)


@torch.no_grad()
def test_frames_are_those_of_transformers(
    encoder: Encoder, encoder_name: str, model_folder: Callable[[str], Path], waves: Waves
) -> None:
    if isinstance(encoder, FBankEncoder | PairEncoder):
        pytest.skip("no network of its own")
    unpadded = encoder_name == "whisper-unpadded"  # transformers only takes 30 s
    waveform = waves(30 * SAMPLE_RATE if unpadded else 30_000)
    expected = reference(encoder, model_folder(encoder_name), waveform)
    (frames,) = encode(encoder, waveform)
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


UTTERANCES = (7777, 16_001, 16_160, 16_480, 48_000)  # samples: odd and even mel frames


@pytest.mark.filterwarnings("ignore:encoder.pad_to_30s")
@pytest.mark.parametrize("without", [None, "attention mask", "zeros between convolutions"])
def test_unpadded_whisper_takes_a_batch_at_once(
    encoder_settings: Callable[[str], Any],
    waves: Waves,
    monkeypatch: pytest.MonkeyPatch,
    without: str | None,
) -> None:
    """Frames are those of each alone; without one of the two protections they are not."""
    whisper = build_encoder(encoder_settings("whisper-unpadded")).eval()
    utterances = [waves(n, seed=n) for n in UTTERANCES]
    alone = [encode(whisper, utterance)[0] for utterance in utterances]
    batches: list[int] = []
    whisper.network.conv1.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    if without == "attention mask":
        monkeypatch.setattr("isthmus.model.encoder.create_bidirectional_mask", lambda *_: None)
    if without == "zeros between convolutions":
        monkeypatch.setattr(Tensor, "masked_fill", lambda hidden, mask, value: hidden)
    together = encode(whisper, *utterances, padding=10.0)
    assert batches == [len(utterances)]
    errors = [float((a - b).abs().max()) for a, b in zip(together, alone, strict=True)]
    assert (max(errors) < 1e-5) == (without is None), errors


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:encoder.pad_to_30s")
@pytest.mark.parametrize("pad_to_30s", [True, False])
@pytest.mark.parametrize("name", ["whisper-base", "whisper-tiny.en"])
def test_real_whisper_frames_are_those_of_transformers(
    parts: Path, waves: Waves, name: str, pad_to_30s: bool
) -> None:
    """In float32. Unpadded too: it takes other lengths when its table of positions is cut.

    A few of Whisper's activations are so large that another order of sums moves some frames of a
    batch by 1e-4, as far as either is from float64; the mean says whether they are the same.
    """
    whisper = build_encoder(WhisperSettings(path=str(parts / name), pad_to_30s=pad_to_30s)).eval()
    whisper.store(torch.float32)
    extractor = AutoFeatureExtractor.from_pretrained(parts / name)
    utterances = [waves(320 * places, seed=places) for places in (150, 90)]
    for waveform, batched in zip(utterances, encode(whisper, *utterances), strict=True):
        mel = extractor(
            waveform.numpy(),
            sampling_rate=SAMPLE_RATE,
            padding="max_length" if pad_to_30s else "do_not_pad",
            return_tensors="pt",
        )["input_features"]
        network = AutoModel.from_pretrained(parts / name, dtype=torch.float32).encoder.eval()
        network.config.max_source_positions = places = mel.shape[2] // 2
        table = network.embed_positions
        network.embed_positions = table.from_pretrained(table.weight[:places])
        expected = network(mel).last_hidden_state[0, : len(batched)]
        torch.testing.assert_close(encode(whisper, waveform)[0], expected, atol=1e-5, rtol=0)
        assert (batched - expected).abs().mean() < 1e-5


@pytest.mark.filterwarnings("ignore:encoder.pad_to_30s")
@pytest.mark.parametrize("pad_to_30s", [True, False])
def test_whisper_takes_30_seconds(
    model_folder: Callable[[str], Path], waves: Waves, pad_to_30s: bool
) -> None:
    whisper = build_encoder(
        WhisperSettings(path=str(model_folder("whisper")), pad_to_30s=pad_to_30s)
    )
    assert whisper.max_seconds == 30.0
    longest = 30 * SAMPLE_RATE
    (frames,) = encode(whisper, waves(longest))
    assert len(frames) == 1500
    with pytest.raises(IsthmusError, match=r"30\.00 s is longer than the 30 s .* Cut it"):
        encode(whisper, waves(1600), waves(longest + 1))


def test_padding_is_kept(encoder_settings: Callable[[str], Any], waves: Waves) -> None:
    """1500 frames of any audio: its own, and behind them those of the padding."""
    kept, dropped = (
        build_encoder(encoder_settings(name)).eval() for name in ("whisper-kept", "whisper")
    )
    for num_samples in (1, 30_000, 30 * SAMPLE_RATE):
        (frames,), (own,) = (encode(one, waves(num_samples)) for one in (kept, dropped))
        assert len(frames) == kept.output_length(num_samples) == 1500
        torch.testing.assert_close(frames[: len(own)], own, atol=0, rtol=0)
        assert frames[len(own) :].isfinite().all()


def test_padding_that_is_not_there_cannot_be_kept() -> None:
    with pytest.raises(ValidationError, match="pad_to_30s"):
        WhisperSettings(path="x", keep_padding=True, pad_to_30s=False)


def test_whisper_without_padding_warns(model_folder: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="pad_to_30s"):
        build_encoder(WhisperSettings(path=str(model_folder("whisper")), pad_to_30s=False))


@pytest.mark.filterwarnings("ignore:encoder.pad_to_30s")
def test_what_is_worked_on(encoder: Encoder, encoder_name: str) -> None:
    padded = 30.0 if encoder_name in ("whisper", "whisper-kept") else 12.0
    assert [encoder.encoded_seconds(one) for one in (12.0, 30.0)] == [padded, 30.0]
    if encoder_name != "pair":
        weights = sum(value.numel() for value in encoder.parameters())
        expected = 2 * weights * encoder.frame_rate * (padded + 30)
        assert encoder.flops([12.0, 30.0]) == pytest.approx(expected)


def test_a_pair_works_on_what_each_does(encoder_settings: Callable[[str], Any]) -> None:
    """At its own frame rate, and with its own padding."""
    names = ("conformer", "whisper")
    pair = PairSettings(**dict(zip(("first", "second"), map(encoder_settings, names), strict=True)))
    alone = [build_encoder(encoder_settings(name)).flops([2.0, 31.0]) for name in names]
    assert build_encoder(pair).flops([2.0, 31.0]) == sum(alone)
    assert build_encoder(pair).encoded_seconds(2.0) == 30.0


@pytest.mark.parametrize("name", ["parakeet", "wav2vec2-ctc"])
def test_a_head_is_no_part_but_goes_along(
    encoder_settings: Callable[[str], Any], name: str
) -> None:
    """No gradient reaches it: it is neither trained, nor stored, nor counted."""
    encoder = build_encoder(encoder_settings(name))
    own = encoder.network.state_dict()
    assert encoder.state_dict().keys() == {f"network.{name}" for name in own}
    assert parameters(encoder)[0] == sum(value.numel() for value in encoder.network.parameters())
    whole = torch.nn.Sequential(encoder).requires_grad_(True)

    def weights() -> list[Tensor]:
        return list(encoder.ctc.parameters())

    assert len(weights()) == 2
    assert not any(value.requires_grad for value in weights())
    whole.double()
    assert {value.dtype for value in weights()} == {torch.float64}
    encoder.store(torch.bfloat16)
    assert {value.dtype for value in weights()} == {torch.bfloat16}
    whole.to("meta")
    assert {value.device.type for value in weights()} == {"meta"}


def test_what_was_trained_with_ctc_has_a_head(encoder: Encoder, encoder_name: str) -> None:
    spells = encoder_name == "conformer" or encoder_name.endswith("-ctc")
    assert (encoder.ctc is not None) == (spells or encoder_name == "parakeet")
    if encoder.ctc is not None:
        assert (encoder.ctc.tokenizer is not None) == spells


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("conformer", "hubert-layer"),
        ("fbank", "parakeet"),
        ("wavlm-group", "fbank"),
        ("whisper-kept", "fbank"),
    ],
)
def test_a_pair_is_both_side_by_side(
    encoder_settings: Callable[[str], Any], waves: Waves, first: str, second: str
) -> None:
    """Each of the first's frames beside that of the second which is heard at the same time."""
    settings = PairSettings(first=encoder_settings(first), second=encoder_settings(second))
    pair = build_encoder(settings).eval()
    for length in (1, 500, 16_123, 30_001):
        own, others = (encode(one, waves(length))[0] for one in (pair.first, pair.second))
        (frames,) = encode(pair, waves(length))
        for place, frame in enumerate(frames):
            second = int((place + 0.5) * pair.second.frame_rate / pair.first.frame_rate)
            there = min(second, len(others) - 1)
            torch.testing.assert_close(frame, torch.cat([own[place], others[there]]))
        assert len(frames) == len(own)


def test_a_pair_takes_what_both_take(encoder_settings: Callable[[str], Any]) -> None:
    settings = PairSettings(first=encoder_settings("conformer"), second=encoder_settings("whisper"))
    pair = build_encoder(settings)
    assert pair.max_seconds == 30.0
    pair.store(torch.bfloat16)
    assert {value.dtype for value in pair.parameters()} == {torch.bfloat16}
    assert {name: source.name for name, source in sources(settings).items()} == {
        "first": settings.first.path,
        "second": settings.second.path,
    }


def test_pairs_that_cannot_be(encoder_settings: Callable[[str], Any]) -> None:
    one, pair = encoder_settings("conformer"), encoder_settings("pair").model_dump()
    tuned = one.model_copy(update={"tune": "full"})
    with pytest.raises(ValidationError, match=r"first\.tune is frozen, second\.tune full"):
        PairSettings(first=one, second=tuned)
    with pytest.raises(ValidationError, match=r"'pair' .*does not match any of the expected tags"):
        PairSettings.model_validate({"first": pair, "second": pair["second"]})


def test_the_folder_must_hold_the_type(
    model_folder: Callable[[str], Path], encoder_settings: Callable[[str], Any]
) -> None:
    for name, folder in (("whisper", "wavlm-group"), ("hubert-group", "wavlm-group")):
        settings = encoder_settings(name).model_copy(update={"path": str(model_folder(folder))})
        with pytest.raises(IsthmusError, match=r"'wavlm' model.*Correct encoder.type"):
            build_encoder(settings)


def test_folder_without_front_end(
    model_folder: Callable[[str], Path], encoder_settings: Callable[[str], Any], tmp_path: Path
) -> None:
    """Whisper's follows from its config; of others the missing file is named."""
    for name in ("whisper", "wavlm-group"):
        shutil.copytree(model_folder(name), tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").unlink()
    stored = AutoFeatureExtractor.from_pretrained(model_folder("whisper"))
    found = load_extractor(tmp_path / "whisper", "whisper")
    assert np.array_equal(found.mel_filters, stored.mel_filters)
    assert build_encoder(WhisperSettings(path=str(tmp_path / "whisper"))).dim
    settings = encoder_settings("wavlm-group").model_copy(update={"path": str(tmp_path / name)})
    with pytest.raises(IsthmusError, match=r"no preprocessor_config\.json"):
        build_encoder(settings)


@pytest.mark.filterwarnings("ignore:encoder.pad_to_30s")
def test_missing_weights_are_not_made_up(
    encoder_name: str, encoder_settings: Callable[[str], Any], tmp_path: Path
) -> None:
    settings = encoder_settings(encoder_name)
    if not hasattr(settings, "path"):
        pytest.skip("no weights")
    folder = tmp_path / "model"
    shutil.copytree(settings.path, folder)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(weights) if "layers.1" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = settings.model_copy(update={"path": str(folder)})
    with pytest.raises(IsthmusError, match=r"lacks 1 weights of .*layers\.1"):
        build_encoder(changed)


def test_damaged_weights(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("whisper"), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IsthmusError, match="cannot be loaded"):
        build_encoder(WhisperSettings(path=str(folder)))

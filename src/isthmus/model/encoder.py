"""Speech encoders behind one contract: 16 kHz waveforms with lengths in, frames with lengths out.

Shapes: B batch, S samples, T encoder frames, D encoder width.

To add one: a class here with the members of Encoder, its settings class that builds it, and its
name in EncoderSettings at the end of this file.
"""

import warnings
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC

from isthmus.errors import IsthmusError
from isthmus.model.conformer import FRONT_END_FILE, ConformerCTC
from isthmus.model.features import HOP_SAMPLES, LogMel, LogMelSettings
from isthmus.model.parts import PartSettings, PretrainedSettings, Tune, model_type, resolve
from isthmus.speech.audio import SAMPLE_RATE


class Encoder(nn.Module):
    """Waveforms (B, S) float32 and num_samples (B,) to frames (B, T, D) and num_frames (B,).

    The front end belongs to the encoder. Samples behind an utterance's length are never looked
    at, and frames behind its num_frames mean nothing.
    """

    dim: int  # D
    frame_rate: float  # frames a second
    max_seconds: float | None = None  # longest utterance, None if there is no limit
    ctc: ConformerCTC | None = None  # set where the encoder can spell by itself

    def output_length(self, num_samples: int) -> int:
        """Frames of an utterance of `num_samples`, exactly as forward gives."""
        raise AssertionError("each encoder defines it")

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("each encoder defines it")


class WhisperEncoder(Encoder):
    """Whisper's encoder, 50 frames a second.

    Audio is padded to 30 s, as Whisper was trained (SLAM-ASR found results worse without), and the
    frames of padding are dropped again. Unpadded, each utterance passes alone at its own length.
    """

    max_seconds = 30.0

    def __init__(self, network: nn.Module, extractor: object, pad_to_30s: bool = True):
        super().__init__()
        self.network = network
        self.extractor = extractor
        self.pad_to_30s = pad_to_30s
        self.dim = int(network.config.d_model)
        self.frame_rate = SAMPLE_RATE / HOP_SAMPLES / 2

    def output_length(self, num_samples: int) -> int:
        return max(1, -(-(num_samples // HOP_SAMPLES) // 2))  # a stride of 2 after the mel hop

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        lengths = num_samples.tolist()
        num_frames = torch.tensor([self.output_length(n) for n in lengths], device=waveforms.device)
        mels = [
            self._mel(waveform[:n]) for waveform, n in zip(waveforms, lengths, strict=True)
        ]  # (mels, 3000) each, or (mels, S / 160)
        if self.pad_to_30s:
            frames = self.network(torch.stack(mels)).last_hidden_state
            return frames[:, : int(num_frames.max())], num_frames
        encoded = [self._unpadded(mel) for mel in mels]
        return nn.utils.rnn.pad_sequence(encoded, batch_first=True), num_frames

    def _mel(self, waveform: Tensor) -> Tensor:
        whole = self.extractor.n_samples if self.pad_to_30s else max(2 * HOP_SAMPLES, len(waveform))
        padded = nn.functional.pad(waveform.float(), (0, int(whole) - len(waveform)))
        features = self.extractor._torch_extract_fbank_features(
            padded[None].cpu().numpy(), device=str(waveform.device)
        )
        dtype = next(self.network.parameters()).dtype
        return torch.as_tensor(features[0], dtype=dtype, device=waveform.device)

    def _unpadded(self, mel: Tensor) -> Tensor:
        """One utterance (mels, T) through the encoder without padding; frames (T / 2, D)."""
        network = self.network
        hidden = nn.functional.gelu(network.conv1(mel[None]))
        hidden = nn.functional.gelu(network.conv2(hidden)).transpose(1, 2)
        hidden = hidden + network.embed_positions.weight[: hidden.shape[1]]
        for layer in network.layers:
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return network.layer_norm(hidden)[0]


class SelfSupervisedEncoder(Encoder):
    """wav2vec 2.0, HuBERT and WavLM: raw waveforms in, 50 frames a second.

    The base sizes have a group norm over time in their convolutional front end. Its statistics
    would see padding, so that front end runs an utterance at a time.
    """

    def __init__(self, network: nn.Module, normalise: bool):
        super().__init__()
        self.network = network
        self.normalise = normalise
        config = network.config
        self.dim = int(config.hidden_size)
        self.strides = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        hop = 1
        for _, stride in self.strides:
            hop *= stride
        self.frame_rate = SAMPLE_RATE / hop
        self.shortest = 1  # samples that give one frame
        for kernel, stride in reversed(self.strides):
            self.shortest = (self.shortest - 1) * stride + kernel

    def output_length(self, num_samples: int) -> int:
        length = max(num_samples, self.shortest)
        for kernel, stride in self.strides:
            length = (length - kernel) // stride + 1
        return length

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        lengths = num_samples.tolist()
        num_frames = torch.tensor([self.output_length(n) for n in lengths], device=waveforms.device)
        rows = [self._prepare(row[:n]) for row, n in zip(waveforms, lengths, strict=True)]
        if self.network.config.feat_extract_norm == "group":
            local = [self.network.feature_extractor(row[None])[0].T for row in rows]  # (T, C) each
            features = nn.utils.rnn.pad_sequence(local, batch_first=True)
        else:
            batch = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            features = self.network.feature_extractor(batch).transpose(1, 2)
        projected = self.network.feature_projection(features)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        valid = torch.arange(hidden.shape[1], device=hidden.device) < num_frames[:, None]
        encoded = self.network.encoder(hidden, attention_mask=valid.long())
        return encoded.last_hidden_state, num_frames

    def _prepare(self, waveform: Tensor) -> Tensor:
        """Zero mean and unit variance over the utterance, where the model was trained so."""
        if self.normalise:
            mean, variance = waveform.mean(), waveform.var(unbiased=False)
            waveform = (waveform - mean) / torch.sqrt(variance + 1e-7)
        waveform = nn.functional.pad(waveform, (0, max(0, self.shortest - len(waveform))))
        return waveform.to(next(self.network.parameters()).dtype)


class ConformerEncoder(Encoder):
    """A Conformer pretrained with CTC (`isthmus pretrain-ctc`); the CTC head stays at hand."""

    def __init__(self, model: ConformerCTC):
        super().__init__()
        self.ctc = model
        self.dim = model.dim
        self.frame_rate = model.frame_rate

    def output_length(self, num_samples: int) -> int:
        assert self.ctc is not None
        return self.ctc.output_length(num_samples)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        assert self.ctc is not None
        frames: tuple[Tensor, Tensor] = self.ctc(waveforms, num_samples)
        return frames


class ParakeetEncoder(Encoder):
    """NVIDIA's Parakeet (FastConformer) with the front end of its feature extractor."""

    def __init__(self, network: nn.Module, extractor: object):
        super().__init__()
        self.network = network
        self.extractor = extractor
        self.dim = int(network.config.hidden_size)
        self.frame_rate = SAMPLE_RATE / extractor.hop_length / network.config.subsampling_factor

    def output_length(self, num_samples: int) -> int:
        config = self.network.config
        length = max(1, num_samples // self.extractor.hop_length)
        for _ in range(config.subsampling_factor.bit_length() - 1):
            padding = 2 * ((config.subsampling_conv_kernel_size - 1) // 2)
            kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
            length = (length + padding - kernel) // stride + 1
        return length

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        shortest = 2 * self.extractor.hop_length  # statistics need two feature frames
        rows = [
            nn.functional.pad(row[:n], (0, max(0, shortest - n))).cpu().numpy()
            for row, n in zip(waveforms, num_samples.tolist(), strict=True)
        ]
        inputs = self.extractor(
            rows, sampling_rate=SAMPLE_RATE, return_tensors="pt", return_attention_mask=True
        )
        dtype = next(self.network.parameters()).dtype
        features = inputs["input_features"].to(waveforms.device, dtype)
        mask = inputs["attention_mask"].to(waveforms.device)
        output = self.network(features, attention_mask=mask)
        num_frames = torch.tensor([self.output_length(n) for n in num_samples.tolist()])
        return output.last_hidden_state, num_frames.to(waveforms.device)


class FBankEncoder(Encoder):
    """No encoder: 80 log-mel features at 100 Hz (SLAM-ASR, table 4)."""

    def __init__(self, num_mels: int):
        super().__init__()
        self.log_mel = LogMel(LogMelSettings(num_mels=num_mels, normalise="peak"))
        self.dim = num_mels
        self.frame_rate = 100.0

    def output_length(self, num_samples: int) -> int:
        return self.log_mel.output_length(num_samples)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        features: tuple[Tensor, Tensor] = self.log_mel(waveforms, num_samples)
        return features


class WhisperSettings(PretrainedSettings):
    """Whisper's encoder, any size."""

    type: Literal["whisper"] = "whisper"
    tune: Tune = "frozen"
    pad_to_30s: bool = True
    """False: utterances at their own length, which Whisper was not trained on."""

    def build(self) -> WhisperEncoder:
        if not self.pad_to_30s:
            warnings.warn("Whisper without padding to 30 s: it was trained on padded audio.", stacklevel=2)
        folder = _checked_folder(self.path, self.revision, {"whisper"})
        network = AutoModel.from_pretrained(folder, use_safetensors=True, dtype="auto").encoder
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        return WhisperEncoder(network, extractor, self.pad_to_30s)


class SelfSupervisedSettings(PretrainedSettings):
    """wav2vec 2.0, HuBERT or WavLM, any size."""

    type: Literal["wav2vec2", "hubert", "wavlm"]
    tune: Tune = "frozen"

    def build(self) -> SelfSupervisedEncoder:
        folder = _checked_folder(self.path, self.revision, {self.type})
        network = AutoModel.from_pretrained(folder, use_safetensors=True, dtype="auto")
        network.config.apply_spec_augment = False
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        return SelfSupervisedEncoder(network, bool(extractor.do_normalize))


class ConformerSettings(PretrainedSettings):
    """A Conformer of `isthmus pretrain-ctc`, or a Parakeet CTC model of the hub."""

    type: Literal["conformer"] = "conformer"
    tune: Tune = "frozen"

    def build(self) -> ConformerEncoder | ParakeetEncoder:
        folder = _checked_folder(self.path, self.revision, {"parakeet_ctc", "parakeet_encoder"})
        if (folder / FRONT_END_FILE).is_file():
            return ConformerEncoder(ConformerCTC.load(folder))
        auto = AutoModelForCTC if model_type(folder) == "parakeet_ctc" else AutoModel
        network = auto.from_pretrained(folder, use_safetensors=True, dtype="auto")
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        return ParakeetEncoder(getattr(network, "encoder", network), extractor)


class FBankSettings(PartSettings):
    """Log-mel features without an encoder."""

    type: Literal["fbank"] = "fbank"
    tune: Literal["frozen"] = "frozen"
    num_mels: int = Field(80, ge=1)

    def build(self) -> FBankEncoder:
        return FBankEncoder(self.num_mels)


EncoderSettings = WhisperSettings | SelfSupervisedSettings | ConformerSettings | FBankSettings


def _checked_folder(path: str, revision: str | None, types: set[str]) -> Path:
    """The model's folder, if it declares one of the architectures `types`."""
    folder = resolve(path, revision)
    declared = model_type(folder)
    if declared not in types:
        raise IsthmusError(
            f"encoder: {path} is a {declared!r} model, the recipe says type {' or '.join(sorted(types))}."
        )
    return folder

"""Speech encoders behind one contract: 16 kHz waveforms with lengths in, frames with lengths out.

Shapes: B batch, S samples, T encoder frames, D encoder width.

To add one: a class here with the members of Encoder, its builder at the end of this file, and its
settings class in isthmus.settings.encoders.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    WhisperFeatureExtractor,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME

from isthmus.errors import IsthmusError
from isthmus.model.conformer import FRONT_END_FILE, ConformerCTC, subsampled_length
from isthmus.model.ctc_head import CTCHead, transformers_head
from isthmus.model.features import HOP_SAMPLES, LogMel, without_autocast
from isthmus.model.parts import (
    freeze,
    load_network,
    loading,
    model_type,
    read_config,
    resolve,
)
from isthmus.settings.base import PartSettings, PretrainedSettings
from isthmus.settings.conformers import LogMelSettings
from isthmus.settings.encoders import (
    ConformerSettings,
    FBankSettings,
    PairSettings,
    SelfSupervisedSettings,
    WhisperSettings,
)
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.augment import SpecAugment


class Encoder(nn.Module):
    """Waveforms (B, S) float32 and num_samples (B,) to frames (B, T, D) and num_frames (B,).

    The front end belongs to the encoder. Samples behind an utterance's length are never looked
    at, and frames behind its num_frames mean nothing.
    """

    dim: int  # D
    frame_rate: float  # frames a second

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network: Any = network  # of transformers, behind the front end
        self.max_seconds: float | None = None  # longest utterance, None if there is no limit
        self.ctc: CTCHead | None = None  # what labels its frames, if it was trained with CTC
        self.spec_augment: SpecAugment | None = None  # in training, where features are its input

    def keep_head(self, head: CTCHead) -> None:
        """Have a head that goes where the encoder goes: no gradient reaches it."""
        freeze(head)
        self.__dict__["ctc"] = head  # past torch, for which it would be a part

    def _kept_head(self) -> CTCHead | None:
        found: CTCHead | None = self.__dict__.get("ctc")
        return found

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """What `to` and `float` call."""
        if (head := self._kept_head()) is not None:
            head._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it bare
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # likewise
        return moved

    @abstractmethod
    def output_length(self, num_samples: int) -> int:
        """Frames of an utterance of `num_samples`, exactly as forward gives."""

    def encoded_seconds(self, seconds: float) -> float:
        """What it works on for an utterance that long: more, where it pads to a fixed length."""
        return seconds

    def flops(self, seconds: Sequence[float]) -> float:
        """Floating-point operations of a forward pass over utterances: 2 a weight and frame."""
        weights = sum(value.numel() for value in self.parameters())
        return 2 * weights * self.frame_rate * sum(map(self.encoded_seconds, seconds))

    @abstractmethod
    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]: ...

    def masked(self, features: Tensor, num_features: Tensor) -> Tensor:
        """Features (B, T, F) of given lengths (B,) with random masks, if they are to have some.

        The masks come from torch's generator on the CPU.
        """
        if self.spec_augment is None or not self.training:
            return features
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return self.spec_augment(features, num_features, rng)

    def store(self, dtype: torch.dtype) -> None:
        """Hold the weights in another precision; the front end stays in float32."""
        for part in (self.network, self._kept_head()):
            if part is not None:
                part.to(dtype)


class WhisperEncoder(Encoder):
    """Whisper's encoder, 50 frames a second.

    Audio is padded to 30 s, as Whisper was trained (SLAM-ASR found results worse without), and the
    frames of padding are dropped again, unless `keep_padding`: then every utterance has those of
    30 s. Unpadded, each utterance has its own length.
    """

    def __init__(
        self, network: Any, extractor: Any, pad_to_30s: bool = True, keep_padding: bool = False
    ):
        super().__init__(network)
        self.extractor = extractor
        self.pad_to_30s = pad_to_30s
        self.keep_padding = keep_padding
        self.dim = int(network.config.d_model)
        self.frame_rate = SAMPLE_RATE / HOP_SAMPLES / 2
        self.max_seconds = float(extractor.chunk_length)

    def output_length(self, num_samples: int) -> int:
        kept = self.extractor.n_samples if self.keep_padding else num_samples
        return max(1, math.ceil(kept // HOP_SAMPLES / 2))  # a stride of 2 after the mel hop

    def encoded_seconds(self, seconds: float) -> float:
        return max(seconds, float(self.extractor.chunk_length)) if self.pad_to_30s else seconds

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Raises IsthmusError for an utterance longer than 30 s."""
        longest = int(num_samples.max())
        if longest > self.extractor.n_samples:
            raise IsthmusError(
                f"encoder: an utterance of {longest / SAMPLE_RATE:.2f} s is longer than the "
                f"{self.max_seconds:g} s that Whisper takes. Cut it into shorter ones."
            )
        lengths = num_samples.tolist()
        frames = self._encode(
            [self._mel(row[:n]) for row, n in zip(waveforms, lengths, strict=True)]
        )
        num_frames = torch.tensor([self.output_length(n) for n in lengths], device=frames.device)
        return frames[:, : int(num_frames.max())], num_frames

    def _mel(self, waveform: Tensor) -> Tensor:
        """Log-mel features of an utterance (S,): (mels, 3000), or (mels, S / 160) unpadded."""
        short = max(0, 2 * HOP_SAMPLES - len(waveform))  # one frame
        with without_autocast(waveform.device):
            features = self.extractor(
                nn.functional.pad(waveform, (0, short)).cpu().numpy(),
                sampling_rate=SAMPLE_RATE,
                padding="max_length" if self.pad_to_30s else "do_not_pad",
                device=str(waveform.device),
                return_tensors="pt",
            )
        mel: Tensor = features["input_features"][0].to(waveform.device, self.network.dtype)
        return mel

    def _encode(self, mels: list[Tensor]) -> Tensor:
        """What the network does, for any lengths: B of (mels, T) to frames (B, T / 2, D).

        Behind an utterance each convolution finds zeros, and no frame attends to what is there, as
        if it were alone.
        """
        network = self.network
        lengths = torch.tensor([mel.shape[1] for mel in mels], device=mels[0].device)
        batch = nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True)
        valid = torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]  # (B, T)
        hidden = nn.functional.gelu(network.conv1(batch.transpose(1, 2)))
        hidden = hidden.masked_fill(~valid[:, None], 0.0)  # it saw a neighbour, and has a bias
        hidden = nn.functional.gelu(network.conv2(hidden)).transpose(1, 2)
        hidden = hidden + network.embed_positions.weight[: hidden.shape[1]]
        mask = create_bidirectional_mask(network.config, hidden, valid[:, ::2])
        for layer in network.layers:
            hidden = layer(hidden, mask)
        frames: Tensor = network.layer_norm(hidden)
        return frames


class SelfSupervisedEncoder(Encoder):
    """wav2vec 2.0, HuBERT and WavLM: raw waveforms in, 50 frames a second.

    The base sizes have a group norm over time in their convolutional front end. Its statistics
    would see padding, so the front end runs an utterance at a time.
    """

    def __init__(self, network: Any, normalise: bool):
        super().__init__(network)
        self.normalise = normalise
        config = network.config
        self.dim = int(config.hidden_size)
        self.strides = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.frame_rate = SAMPLE_RATE / math.prod(config.conv_stride)
        self.shortest = 1  # samples that give one frame
        for kernel, stride in reversed(self.strides):
            self.shortest = (self.shortest - 1) * stride + kernel
        # some HuBERTs have a batch norm that makes padding count in the layers behind it
        self.alone = bool(getattr(config, "conv_pos_batch_norm", False))

    def output_length(self, num_samples: int) -> int:
        length = max(num_samples, self.shortest)
        for kernel, stride in self.strides:
            length = (length - kernel) // stride + 1
        return length

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(waveforms, num_samples.tolist(), strict=True)
        features = [self._features(row[:n]) for row, n in rows]  # (T, C) each
        if self.alone:
            frames = [self._encode([row])[0] for row in features]
            hidden = nn.utils.rnn.pad_sequence(frames, batch_first=True)
        else:
            hidden = self._encode(features)
        return hidden, torch.tensor([len(row) for row in features], device=waveforms.device)

    def _features(self, waveform: Tensor) -> Tensor:
        """An utterance (S,) through the convolutions: (T, C)."""
        if self.normalise:  # to zero mean and unit variance, where the model was trained so
            mean, variance = waveform.mean(), waveform.var(unbiased=False)
            waveform = (waveform - mean) / torch.sqrt(variance + 1e-7)
        waveform = nn.functional.pad(waveform, (0, max(0, self.shortest - len(waveform))))
        features: Tensor = self.network.feature_extractor(waveform[None].to(self.network.dtype))
        return features[0].T

    def _encode(self, features: list[Tensor]) -> Tensor:
        """Convolutional features (T, C) of B utterances to frames (B, T, D)."""
        lengths = torch.tensor([len(row) for row in features], device=features[0].device)
        batch = nn.utils.rnn.pad_sequence(features, batch_first=True)
        projected = self.network.feature_projection(batch)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        valid = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        frames: Tensor = self.network.encoder(hidden, attention_mask=valid).last_hidden_state
        return frames


class ConformerEncoder(Encoder):
    """A Conformer pretrained with CTC (`isthmus pretrain-ctc`); the CTC head stays at hand."""

    ctc: ConformerCTC

    def __init__(self, model: ConformerCTC):
        super().__init__()
        self.ctc = model
        self.dim = model.dim
        self.frame_rate = model.frame_rate

    def output_length(self, num_samples: int) -> int:
        return self.ctc.output_length(num_samples)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        features, num_features = self.ctc.features(waveforms, num_samples)
        return self.ctc.encode(self.masked(features, num_features), num_features)

    def store(self, dtype: torch.dtype) -> None:
        self.ctc.network.to(dtype)


class ParakeetEncoder(Encoder):
    """NVIDIA's Parakeet (FastConformer) with the front end of its feature extractor."""

    def __init__(self, network: Any, extractor: Any):
        super().__init__(network)
        self.extractor = extractor
        self.dim = int(network.config.hidden_size)
        self.frame_rate = SAMPLE_RATE / extractor.hop_length / network.config.subsampling_factor
        self.shortest = 2 * extractor.hop_length  # its statistics need two feature frames

    def output_length(self, num_samples: int) -> int:
        num_features = max(num_samples, self.shortest) // self.extractor.hop_length
        return subsampled_length(self.network.config, num_features)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        rows = [
            nn.functional.pad(row[:n], (0, max(0, self.shortest - n))).cpu().numpy()
            for row, n in zip(waveforms, num_samples.tolist(), strict=True)
        ]
        with without_autocast(torch.device("cpu")):
            inputs = self.extractor(rows, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = inputs["input_features"].to(waveforms.device, self.network.dtype)
        mask = inputs["attention_mask"].to(waveforms.device)
        features = self.masked(features, mask.sum(dim=1))
        output = self.network(features, attention_mask=mask)
        return output.last_hidden_state, output.attention_mask.sum(dim=1)


class FBankEncoder(Encoder):
    """No encoder: 80 log-mel features at 100 Hz (SLAM-ASR, table 4)."""

    def __init__(self, num_mels: int):
        super().__init__()
        self.log_mel = LogMel(LogMelSettings(num_mels=num_mels, normalise="peak"))
        self.dim = num_mels
        self.frame_rate = SAMPLE_RATE / HOP_SAMPLES

    def output_length(self, num_samples: int) -> int:
        return self.log_mel.output_length(num_samples)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        features: tuple[Tensor, Tensor] = self.log_mel(waveforms, num_samples)
        return features


class PairEncoder(Encoder):
    """Two encoders side by side, as in SALMONN (arXiv 2310.13289): (B, T, D + D').

    Frames are the first's; each has the second's frame that is nearest to it in time behind it.
    """

    def __init__(self, first: Encoder, second: Encoder):
        super().__init__()
        self.first, self.second = first, second
        self.dim = first.dim + second.dim
        self.frame_rate = first.frame_rate
        limits = [one.max_seconds for one in (first, second) if one.max_seconds is not None]
        self.max_seconds = min(limits, default=None)

    def output_length(self, num_samples: int) -> int:
        return self.first.output_length(num_samples)

    def encoded_seconds(self, seconds: float) -> float:
        """Of the one that works on more."""
        return max(one.encoded_seconds(seconds) for one in (self.first, self.second))

    def flops(self, seconds: Sequence[float]) -> float:
        return self.first.flops(seconds) + self.second.flops(seconds)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        frames, num_frames = self.first(waveforms, num_samples)
        others, num_others = self.second(waveforms, num_samples)
        centres = torch.arange(frames.shape[1], device=frames.device) + 0.5  # in frames
        places = (centres * (self.second.frame_rate / self.frame_rate)).long()  # (T,)
        places = torch.minimum(places, num_others[:, None] - 1)  # (B, T)
        nearest = others.gather(1, places[..., None].expand(-1, -1, others.shape[2]))
        return torch.cat([frames, nearest], dim=2), num_frames

    def store(self, dtype: torch.dtype) -> None:
        self.first.store(dtype)
        self.second.store(dtype)


@singledispatch
def build_encoder(settings: PartSettings) -> Encoder:
    """The encoder of these settings, its weights loaded. Raises IsthmusError."""
    raise TypeError(f"{type(settings).__name__} has no builder here")


@build_encoder.register
def _(settings: WhisperSettings) -> WhisperEncoder:
    if not settings.pad_to_30s:
        warnings.warn(
            "encoder.pad_to_30s is false: Whisper was trained on padded audio and is worse "
            "without.",
            stacklevel=2,
        )
    folder = _checked_folder(settings, {settings.type})
    network = load_network(AutoModel, folder, settings.path)
    extractor = load_extractor(folder, settings.path)
    return WhisperEncoder(network.encoder, extractor, settings.pad_to_30s, settings.keep_padding)


@build_encoder.register
def _(settings: SelfSupervisedSettings) -> SelfSupervisedEncoder:
    folder = _checked_folder(settings, {settings.type})
    normalise = bool(load_extractor(folder, settings.path).do_normalize)
    if not _labels_frames(folder):
        return SelfSupervisedEncoder(load_network(AutoModel, folder, settings.path), normalise)
    whole = load_network(AutoModelForCTC, folder, settings.path)
    encoder = SelfSupervisedEncoder(whole.base_model, normalise)
    encoder.keep_head(transformers_head(folder, settings.path, whole, encoder.frame_rate))
    return encoder


@build_encoder.register
def _(settings: ConformerSettings) -> ConformerEncoder | ParakeetEncoder:
    folder = _checked_folder(settings, {"parakeet_ctc", "parakeet_encoder"})
    if (folder / FRONT_END_FILE).is_file():
        return ConformerEncoder(ConformerCTC.load(folder))
    extractor = load_extractor(folder, settings.path)
    if model_type(folder) != "parakeet_ctc":
        return ParakeetEncoder(load_network(AutoModel, folder, settings.path), extractor)
    whole = load_network(AutoModelForCTC, folder, settings.path)
    encoder = ParakeetEncoder(whole.encoder, extractor)
    encoder.keep_head(transformers_head(folder, settings.path, whole, encoder.frame_rate))
    return encoder


@build_encoder.register
def _(settings: FBankSettings) -> FBankEncoder:
    return FBankEncoder(settings.num_mels)


@build_encoder.register
def _(settings: PairSettings) -> PairEncoder:
    return PairEncoder(build_encoder(settings.first), build_encoder(settings.second))


def parameters(module: nn.Module) -> tuple[int, int]:
    """Parameters of a part and how many of them are trained, without Whisper's fixed sinusoids."""
    fixed = {
        id(part.network.embed_positions.weight)
        for part in module.modules()
        if isinstance(part, WhisperEncoder)
    }
    values = [value for value in module.parameters() if id(value) not in fixed]
    trained = sum(value.numel() for value in values if value.requires_grad)
    return sum(value.numel() for value in values), trained


def _checked_folder(settings: PretrainedSettings, types: set[str]) -> Path:
    """The model's folder, if it declares one of the architectures `types`."""
    folder = resolve(settings.path, settings.revision)
    declared = model_type(folder)
    if declared not in types:
        raise IsthmusError(
            f"encoder: {settings.path} is a {declared!r} model, but the recipe's type wants "
            f"{' or '.join(sorted(types))}. Correct encoder.type or encoder.path."
        )
    return folder


def _labels_frames(folder: Path) -> bool:
    """Whether the self-supervised model in a folder has a CTC head right behind its encoder."""
    config = read_config(folder)
    architectures = config.get("architectures") or ()
    return any(name.endswith("ForCTC") for name in architectures) and not config.get("add_adapter")


def load_extractor(folder: Path, path: str) -> Any:
    """The front end of the model in a folder, as transformers has it; `path` is its name.

    Whisper's is known without a file: only the number of its mel bands is a choice. Raises
    IsthmusError.
    """
    with loading(path):
        if any((folder / name).is_file() for name in (FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME)):
            return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == "whisper":
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    raise IsthmusError(
        f"{path} cannot be loaded: {folder} has no {FEATURE_EXTRACTOR_NAME}, which says how audio "
        "becomes the model's input. Put the file of the model's publisher there."
    )

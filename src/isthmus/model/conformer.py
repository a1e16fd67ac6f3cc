"""Conformer with a CTC head: transformers' Parakeet with isthmus' own log-mel front end.

Shapes: B batch, S samples, F mel bins, T encoder frames, D encoder width, V units.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCTC, PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.model.ctc_head import CTCHead, label_log_probs
from isthmus.model.features import HOP_SAMPLES, LogMel
from isthmus.model.parts import load_network, loading, save_half
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings
from isthmus.speech.audio import SAMPLE_RATE

FRONT_END_FILE = "front_end.json"
# How much later than a word ends its last letter and the next word's first meet in the shipped
# Conformer: the median over 245 boundaries of 84 synthetic voices. Taken for every Conformer.
CONFORMER_DELAY = 0.16  # seconds


class ConformerCTC(CTCHead):
    """Waveforms to frames, and the head that spells from them.

    One folder holds it all: `config.json` and `model.safetensors` (a ParakeetForCTC), the
    tokenizer of the units, and the settings of the front end.
    """

    frame_rate: float

    def __init__(self, network: Any, tokenizer: PreTrainedTokenizerFast, front_end: LogMelSettings):
        super().__init__()
        self.encoder_config: Any = network.config.encoder_config
        if self.encoder_config.num_mel_bins != front_end.num_mels:
            raise IsthmusError(
                f"The Conformer takes {self.encoder_config.num_mel_bins} mel bins, its front end "
                f"gives {front_end.num_mels}. Set front_end.num_mels to the former."
            )
        self.network: Any = network  # transformers' ParakeetForCTC
        self.tokenizer = tokenizer
        self.log_mel = LogMel(front_end)
        self.blank = int(network.config.pad_token_id)
        self.frame_rate = SAMPLE_RATE / HOP_SAMPLES / int(self.encoder_config.subsampling_factor)
        # its front end begins with silence of its own
        self.delay = self.log_mel.margin / SAMPLE_RATE + CONFORMER_DELAY

    @property
    def dim(self) -> int:
        return int(self.encoder_config.hidden_size)

    def output_length(self, num_samples: int) -> int:
        """Frames of an utterance."""
        return subsampled_length(self.encoder_config, self.log_mel.output_length(num_samples))

    def features(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel features (B, T, F) and their lengths."""
        features: tuple[Tensor, Tensor] = self.log_mel(waveforms, num_samples)
        return features

    def encode(self, features: Tensor, num_features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, F) to frames (B, T', D)."""
        valid = torch.arange(features.shape[1], device=features.device) < num_features[:, None]
        features = features.masked_fill(~valid[..., None], 0.0).to(self.network.dtype)
        output = self.network.encoder(features, attention_mask=valid)
        return output.last_hidden_state, output.attention_mask.sum(dim=1)

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode(*self.features(waveforms, num_samples))

    def log_probs(self, frames: Tensor) -> Tensor:
        return label_log_probs(self.network.ctc_head, frames)

    def save(self, folder: Path) -> None:
        """Write the folder that `load` reads; weights in half precision, loaded as fp32 again."""
        save_half(self.network, folder)
        self.tokenizer.save_pretrained(folder)
        front_end = self.log_mel.settings.model_dump(mode="json")
        (folder / FRONT_END_FILE).write_text(json.dumps(front_end, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ConformerCTC":
        """A model written by `save`, in the precision it was written in."""
        if not (folder / FRONT_END_FILE).is_file():
            raise IsthmusError(
                f"{folder} has no {FRONT_END_FILE}: not a Conformer that `isthmus pretrain-ctc` "
                "wrote."
            )
        try:
            front_end = LogMelSettings.model_validate_json((folder / FRONT_END_FILE).read_text())
        except ValidationError as error:
            raise IsthmusError(f"{folder / FRONT_END_FILE} is damaged: {error}") from error
        network = load_network(AutoModelForCTC, folder, str(folder))
        with loading(str(folder)):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        return cls(network, tokenizer, front_end)

    @classmethod
    def initial(
        cls,
        architecture: ConformerArchitecture,
        tokenizer: PreTrainedTokenizerFast,
        front_end: LogMelSettings,
    ) -> "ConformerCTC":
        """A model with random weights."""
        config = initial_config(architecture, tokenizer, front_end)
        network = AutoModelForCTC.from_config(config, trust_remote_code=False)
        return cls(network, tokenizer, front_end)


def initial_config(
    architecture: ConformerArchitecture,
    tokenizer: PreTrainedTokenizerFast,
    front_end: LogMelSettings,
) -> Any:
    """The configuration of a new model (transformers' ParakeetCTCConfig)."""
    encoder = AutoConfig.for_model(
        "parakeet_encoder",
        num_mel_bins=front_end.num_mels,
        # transformers' 0.02 is for widths about 1024; in a narrow model it starves the signal
        initializer_range=architecture.hidden_size**-0.5,
        **architecture.model_dump(),
    )
    return AutoConfig.for_model(
        "parakeet_ctc",
        encoder_config=encoder,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        ctc_loss_reduction="sum",
    )


def subsampled_length(encoder_config: Any, num_features: int) -> int:
    """Frames of `num_features` feature frames: each of the network's convolutions halves them."""
    kernel = int(encoder_config.subsampling_conv_kernel_size)
    stride = int(encoder_config.subsampling_conv_stride)
    padding = 2 * ((kernel - 1) // 2)
    for _ in range(int(math.log2(encoder_config.subsampling_factor))):
        num_features = (num_features + padding - kernel) // stride + 1
    return num_features

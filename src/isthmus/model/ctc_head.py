"""Heads that label an encoder's frames by CTC, and spell texts in their units.

Shapes: B batch, T encoder frames, A labels of an utterance, D encoder width, V units.
"""

import itertools
import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from isthmus.errors import IsthmusError
from isthmus.model.parts import loading
from isthmus.model.spelling import spell

log = logging.getLogger(__name__)


class LogProbs(Protocol):
    """Log-probabilities (A, V) of an utterance's labels: a tensor, or what gives its columns."""

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, places: tuple[slice, Tensor], /) -> Tensor: ...


class CTCHead(nn.Module):
    """What frames say by themselves: all that drafts, joint decoding and word times ask for."""

    blank: int
    frame_rate: float | None  # labels a second; None where they come at no steady rate
    delay: float = 0.0  # seconds that labels come behind the sound, as it was measured
    tokenizer: Any  # of the units; None where they are labels and no letters are known for them

    @abstractmethod
    def log_probs(self, frames: Tensor) -> Tensor:
        """Frames (B, T, D) to log-probabilities (B, A, V) of units, the blank among them.

        In float32. Labels may be fewer than frames (`frame_rate`); all frames count as speech.
        """

    def kept(self, frames: Tensor, log_probs: Tensor) -> LogProbs:
        """What is kept, on the CPU, of an utterance's log-probabilities (A, V), read off (T, D)."""
        return log_probs.cpu()

    def best_path(self, log_probs: Tensor) -> list[int]:
        """The units of an utterance (A, V) by best path: repeats joined, blanks dropped."""
        return collapsed(log_probs.argmax(dim=-1).tolist(), self.blank)

    def text(self, units: Sequence[int]) -> str:
        """What units spell."""
        return " ".join(str(self.tokenizer.decode(units)).split())

    def greedy(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """The texts of utterances (B, A, V) of these lengths (B,) by best path."""
        rows = zip(log_probs, lengths.tolist(), strict=True)
        return [self.text(self.best_path(row[:length])) for row, length in rows]

    def spell(self, text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The units of each word of a text, from its first letter's place to behind its last one's.

        At least one, WILDCARD where a run of letters has none.
        """
        return [spell(text[start:end], self.tokenizer) for start, end in spans]

    @property
    def separator(self) -> int | None:
        """The unit between two words, if there is one."""
        delimiter = getattr(self.tokenizer, "word_delimiter_token", None) or " "
        found: int | None = self.tokenizer.get_vocab().get(delimiter)
        return found


def collapsed(path: Sequence[int], blank: int) -> list[int]:
    """The units that a path of labels says: repeats joined, blanks dropped."""
    return [unit for unit, _ in itertools.groupby(path) if unit != blank]


class TransformersHead(CTCHead):
    """The head of a CTC model of transformers: wav2vec 2.0, HuBERT, WavLM, Parakeet."""

    def __init__(self, layer: nn.Module, blank: int, frame_rate: float, tokenizer: Any):
        super().__init__()
        self.layer = layer
        self.blank = blank
        self.frame_rate = frame_rate
        self.tokenizer = tokenizer

    def log_probs(self, frames: Tensor) -> Tensor:
        return label_log_probs(self.layer, frames)

    def text(self, units: Sequence[int]) -> str:
        # whose own joining would take the second of two letters, now that no blank parts them
        return str(self.tokenizer.decode(units, group_tokens=False)).strip()


def label_log_probs(layer: nn.Module, frames: Tensor) -> Tensor:
    """Log-probabilities (B, T, V) of labels by the last layer on frames (B, T, D), in float32.

    Parakeet's is a bare convolution, over time, in the oldest transformers that we take.
    """
    frames = frames.to(next(layer.parameters()).dtype)
    bare = type(layer) is nn.Conv1d
    logits: Tensor = layer(frames.transpose(1, 2)).transpose(1, 2) if bare else layer(frames)
    return logits.float().log_softmax(dim=-1)


def transformers_head(folder: Path, path: str, network: Any, frame_rate: float) -> TransformersHead:
    """The head of a CTC model in a folder; without a tokenizer where its files are not there."""
    layer = getattr(network, "ctc_head", None) or network.lm_head
    try:
        tokenizer = own_tokenizer(folder, path, int(network.config.vocab_size))
    except IsthmusError as error:
        tokenizer = None
        log.info("the CTC head of %s labels frames and spells nothing: %s", path, error)
    return TransformersHead(layer, int(network.config.pad_token_id), frame_rate, tokenizer)


def own_tokenizer(folder: Path, path: str, written: int) -> Any:
    """The tokenizer of a recogniser that writes so many tokens; raises IsthmusError."""
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    known = len(tokenizer)
    if 2 * known < written:  # transformers makes an empty one where there are no files
        raise IsthmusError(
            f"{path}: its tokenizer knows {known} of the {written} tokens that the model writes. "
            f"The files of the tokenizer are missing in {folder}: download it again."
        )
    return tokenizer

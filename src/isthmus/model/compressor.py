"""The CTC compressor: what the encoder's own CTC head hears as one becomes one embedding.

Shapes: B batch, T encoder frames, A audio embeddings, D encoder width, E LLM width.
"""

import warnings

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.model.ctc_head import CTCHead
from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.projector_base import Projector, build_projector, check_projector
from isthmus.settings.encoders import EncoderSettings
from isthmus.settings.projectors import CTCMode, CTCProjectorSettings


class CTCProjector(Projector):
    """The mean of frames of one label, or the frames without blanks; then Linear, ReLU, Linear.

    SpeechLLaMA (arXiv 2307.03917), section 3.1. Labels are the best path of the encoder's CTC head.
    Each utterance is read alone, so that no company rounds its path to another. Nothing but
    blanks gives one embedding, their mean.
    """

    exact = False

    def __init__(self, head: CTCHead, dims: tuple[int, int], hidden: int, mode: CTCMode):
        super().__init__()
        encoder_dim, llm_dim = dims
        self._head = (head,)  # in a tuple: it stays the encoder's and is no part of this
        self.mode = mode
        self.linear1 = nn.Linear(encoder_dim, hidden)
        self.linear2 = nn.Linear(hidden, llm_dim)

    def output_length(self, num_frames: int) -> int:
        """At most: one for every frame."""
        return num_frames

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(frames, num_frames.tolist(), strict=True)
        found = [self._compress(row[:length]) for row, length in rows]
        lengths = torch.tensor([len(row) for row in found], device=frames.device)
        heard = nn.utils.rnn.pad_sequence(found, batch_first=True)  # (B, A, D)
        return self.linear2(torch.relu(self.linear1(heard))), lengths

    def _compress(self, frames: Tensor) -> Tensor:
        """An utterance's frames (T, D) to fewer (A, D)."""
        if len(frames) == 0:
            return frames
        (head,) = self._head
        path = self._best_path(frames)
        spoken = path != head.blank
        if self.mode == "drop" and bool(spoken.any()):
            return frames[spoken]
        counts = path.unique_consecutive(return_counts=True)[1]
        return torch.segment_reduce(frames, "mean", lengths=counts)

    @torch.no_grad()
    def _best_path(self, frames: Tensor) -> Tensor:
        """The likeliest label of each frame (T, D): (T,)."""
        (head,) = self._head
        with torch.autocast(frames.device.type, enabled=False):
            return head.log_probs(frames[None])[0].argmax(dim=1)


@check_projector.register
def _(settings: CTCProjectorSettings, encoder: Encoder, heard: EncoderSettings) -> None:
    _head(encoder)
    if heard.tune != "frozen":
        warnings.warn(
            f"encoder.tune is {heard.tune}: its CTC head, which projector.type ctc listens "
            "to, is not trained with it and will understand its frames less and less.",
            stacklevel=2,
        )


@build_projector.register
def _(settings: CTCProjectorSettings, encoder: Encoder, llm: LLM) -> CTCProjector:
    dims = encoder.dim, llm.dim
    return CTCProjector(_head(encoder), dims, settings.hidden, settings.mode)


def _head(encoder: Encoder) -> CTCHead:
    head = encoder.ctc
    if head is None:
        raise IsthmusError(
            "projector.type is 'ctc', but this encoder has no CTC head to listen to. Take an "
            "encoder of `isthmus pretrain-ctc` or a CTC model of the hub (Parakeet, or wav2vec "
            "2.0 and its kin, fine-tuned), or another projector.type."
        )
    return head

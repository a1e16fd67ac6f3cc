"""The projector that says the language model's own tokens: soft tokens in the place of audio.

Shapes: B batch, T encoder frames, A audio embeddings of the projector within, S soft tokens,
P of them that are spoken, D encoder width, E LLM width, V tokens, C tokens that a soft one is
mixed of.
"""

import torch
from torch import Tensor, nn

from isthmus.model.projector_base import Projector
from isthmus.model.token_ctc import TokenCTC

SILENCE = 0.9  # probability of the blank from which an embedding says nothing
MIXED = 32  # likeliest tokens that a soft token is made of


class PosteriorProjector(Projector):
    """CTC over the LLM's tokens behind another projector; what it says, softly, is the audio.

    Embeddings that are sure to say nothing are dropped. Those in a row whose likeliest token is
    the same become one: the mean of token embeddings, weighted by their probabilities
    (LegoSLM, arXiv 2505.11352; the joining is ours: what no text has, blanks and tokens again and
    again, a language model cannot read). In evaluation each utterance is read alone, so that no
    company rounds its path to another. `temperature` above 1 leaves more of the choice to the LLM.
    """

    exact = False
    ctc: TokenCTC

    def __init__(self, inner: Projector, ctc: TokenCTC):
        super().__init__()
        self.inner = inner
        self.ctc = ctc
        self.temperature = 1.0

    def output_length(self, num_frames: int) -> int:
        """At most: one for each embedding of the projector within."""
        return self.inner.output_length(num_frames)

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        return self.audio(*self.spoken(frames, num_frames))

    def spoken(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            found: tuple[Tensor, Tensor] = self.inner(frames, num_frames)
            return found
        rows = [
            self.inner(row[None, :length], num_frames[place : place + 1])[0][0]
            for place, (row, length) in enumerate(zip(frames, num_frames.tolist(), strict=True))
        ]
        lengths = torch.tensor([len(row) for row in rows], device=frames.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def spoken_length(self, num_frames: int) -> int | None:
        return self.inner.spoken_length(num_frames)

    def audio(
        self, spoken: Tensor, lengths: Tensor, log_probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        read = [None] * len(spoken) if log_probs is None else log_probs
        rows = zip(spoken, read, lengths.tolist(), strict=True)
        soft = [
            self._soft_tokens(row[:length], None if own is None else own[:length])
            for row, own, length in rows
        ]
        lengths = torch.tensor([len(row) for row in soft], device=spoken.device)
        return nn.utils.rnn.pad_sequence(soft, batch_first=True), lengths

    def _soft_tokens(self, embeddings: Tensor, log_probs: Tensor | None) -> Tensor:
        """Embeddings (A, E) of an utterance, read as (A, V + 1), to its soft tokens (S, E)."""
        if len(embeddings) == 0:
            return embeddings
        with torch.no_grad():
            log_probs = self.ctc.log_probs(embeddings) if log_probs is None else log_probs
            if self.temperature != 1:
                log_probs = (log_probs / self.temperature).log_softmax(dim=-1)
            likely, tokens = log_probs[:, :-1].topk(min(MIXED, self.ctc.blank), dim=-1)  # (A, C)
            blank = log_probs[:, -1].exp()
        # at least one; what is no number too, for the loss to show it
        spoken = ~(blank >= max(SILENCE, float(blank.min()) + 1e-6))
        runs = _runs(spoken, tokens[:, 0])
        tokens = tokens[spoken]  # (P, C)
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = self.ctc.scores(embeddings[spoken], tokens) / self.temperature
            # the values of log_probs; all that they are normalised by has no gradient
            weights = (likely[spoken] + scores - scores.detach()).exp()
            mixed = torch.einsum("pc,pce->pe", weights, self.ctc.llm.embed(tokens).to(weights))
            # in order, run by run: sums that are scattered are another each time on a GPU
            sums = torch.segment_reduce(mixed, "sum", lengths=runs)
            shares = torch.segment_reduce(weights.sum(dim=1), "sum", lengths=runs)
            return sums / shares[:, None]


def _runs(spoken: Tensor, best: Tensor) -> Tensor:
    """How many of those that are spoken (A,) are in each run (S,): neighbours of one best (A,)."""
    begins = torch.ones_like(spoken)
    begins[1:] = ~spoken[:-1] | (best[1:] != best[:-1])
    numbers = (begins & spoken).cumsum(dim=0)[spoken]
    lengths: Tensor = numbers.unique_consecutive(return_counts=True)[1]
    return lengths

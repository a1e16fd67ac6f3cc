"""A loss by which the audio embeddings come to say, one after another, what the transcript says.

Fathullah et al. (arXiv 2307.11795) find that a trained projector's embeddings are like those of the
transcript's tokens, nearly in order, and leave an explicit loss for it to others. Here it is CTC:
an audio embedding says a token by its cosine similarity to that token's embedding in the language
model, or nothing at all. It chooses among the tokens of its own transcript and some of all others,
the same for every utterance: neighbours in the batch have no say.

Shapes: A audio embeddings, E LLM width, L text tokens, K tokens to choose among.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from isthmus.model.llm import LLM

TEMPERATURE = 0.1  # that similarities are divided by: 1.0 to the right token, 0.0 to others is sure
BLANK = 0.5  # similarity at which a token is as likely as none
OTHERS = 1000  # tokens to choose among, beside the transcript's own; all of a small vocabulary


def alignment_loss(
    llm: LLM, audio: Sequence[Tensor], transcripts: Sequence[Sequence[int]]
) -> Tensor:
    """CTC loss () of transcripts in tokens, in nats, summed; differentiable by their audio
    embeddings (A, E).

    The tokens' embeddings are taken as they are: it is the audio that moves. A transcript with more
    tokens than audio embeddings has no such reading, and no part in it.
    """
    device = audio[0].device
    others = _others(llm.network.get_input_embeddings().num_embeddings)
    total = torch.zeros((), device=device)
    with torch.autocast(device.type, enabled=False):  # close to 1, half precision is coarse
        common = _directions(llm, others, device)  # shared: as large as many utterances
        for heard, tokens in zip(audio, transcripts, strict=True):
            own = sorted({*tokens} - {*others})
            place = {token: number for number, token in enumerate([*others, *own], start=1)}
            if len(heard):
                tables = [common, _directions(llm, own, device)]
                total = total + _ctc(heard, tables, [place[token] for token in tokens])
    return total


def _ctc(heard: Tensor, tables: Sequence[Tensor], labels: list[int]) -> Tensor:
    """Loss () of labels (L), places in the tables from 1 on, for audio embeddings (A, E)."""
    spoken = nn.functional.normalize(heard.float(), dim=-1)
    blank = spoken.new_full((len(heard), 1), BLANK)
    similarity = torch.cat([blank, *(spoken @ table.T for table in tables)], dim=-1)  # (A, 1 + K)
    log_probs = (similarity / TEMPERATURE).log_softmax(dim=-1)
    if not labels:
        return -log_probs[:, 0].sum()
    return nn.functional.ctc_loss(
        log_probs[:, None],
        torch.tensor([labels], dtype=torch.long, device=heard.device),
        torch.tensor([len(heard)]),
        torch.tensor([len(labels)]),
        reduction="sum",
        zero_infinity=True,
    )


def _directions(llm: LLM, tokens: Sequence[int], device: torch.device) -> Tensor:
    """Embeddings of tokens (K), each of length 1 (K, E)."""
    ids = torch.tensor(tokens, dtype=torch.long, device=device)
    return nn.functional.normalize(llm.embed(ids).detach().float(), dim=-1)


@cache
def _others(vocabulary: int) -> tuple[int, ...]:
    """Tokens drawn from a vocabulary of that size, always the same."""
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    return tuple(order[:OTHERS].tolist())

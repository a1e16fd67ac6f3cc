"""A loss by which the audio embeddings come to say, one after another, what the transcript says.

Fathullah et al. (arXiv 2307.11795) find that a trained projector's embeddings are like those of the
transcript's tokens, nearly in order, and leave an explicit loss for it to others. Here it is CTC:
an audio embedding says a token of the batch by its cosine similarity to that token's embedding in
the language model, or nothing at all.

Shapes: B batch, A audio embeddings, E LLM width, K different tokens of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from isthmus.model.llm import LLM
from isthmus.model.prompt import plain_tokens

TEMPERATURE = 0.1  # that similarities are divided by: 1.0 to the right token, 0.0 to others is sure
BLANK = 0.5  # similarity at which a token is as likely as none


def alignment_loss(llm: LLM, audio: Sequence[Tensor], transcripts: Sequence[str]) -> Tensor:
    """CTC loss () of transcripts, in nats, summed; differentiable by their audio embeddings (A, E).

    The tokens' embeddings are taken as they are: it is the audio that moves. A transcript with more
    tokens than audio embeddings has no such reading, and no part in it.
    """
    labels = [plain_tokens(llm.tokenizer, text) for text in transcripts]
    distinct = sorted({token for label in labels for token in label})
    device = audio[0].device
    if not distinct:
        return torch.zeros((), device=device)
    place = {token: number for number, token in enumerate(distinct, start=1)}  # 0 is the blank
    lengths = torch.tensor([len(row) for row in audio], device=device)
    with torch.autocast(device.type, enabled=False):  # close to 1, half precision is coarse
        table = llm.embed(torch.tensor(distinct, device=device)).detach().float()
        heard = nn.utils.rnn.pad_sequence([row.float() for row in audio], batch_first=True)
        normalise = nn.functional.normalize
        similarity = normalise(heard, dim=-1) @ normalise(table, dim=-1).T  # (B, A, K)
        blank = similarity.new_full((*similarity.shape[:2], 1), BLANK)
        log_probs = (torch.cat([blank, similarity], dim=-1) / TEMPERATURE).log_softmax(dim=-1)
        return nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([place[token] for label in labels for token in label], device=device),
            lengths,
            torch.tensor([len(label) for label in labels], device=device),
            reduction="sum",
            zero_infinity=True,
        )

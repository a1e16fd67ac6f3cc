"""Which audio embedding resembles which token: is recognition near to copying?

Fathullah et al. (arXiv 2307.11795) found the cosine similarity between audio embeddings behind the
projector and the embeddings of the transcript's tokens to be close to monotonic. `align` gives that
matrix for one utterance, `monotonicity` a number for it.

Shapes: A audio embeddings, L text tokens, E LLM width, P permutations.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import IsthmusError
from isthmus.speech.audio import SAMPLE_RATE

if TYPE_CHECKING:
    from isthmus.model.speech_llm import SpeechLLM  # torch: too heavy for those who only draw

Matrix = NDArray[np.floating]

ENOUGH = 1e-9  # a gain below it is rounding


@dataclass(frozen=True)
class Alignment:
    """Cosine similarities of one utterance."""

    text: str
    tokens: tuple[str, ...]  # L, each as the tokenizer writes it alone
    similarity: Matrix  # (A, L)
    seconds: float  # of audio, over which the A embeddings are spread evenly


def align(model: "SpeechLLM", waveform: NDArray[np.float32], text: str) -> Alignment:
    """Similarity of an utterance's audio embeddings to the embeddings of its transcript's tokens.

    Args:
        model: left in the mode (training or evaluation) in which it is found.
        waveform: 16 kHz mono samples (S,).
        text: the transcript, as in training; its end token is left out.

    Raises:
        IsthmusError: the text has no tokens, or the audio gives no embedding.
    """
    said = token_directions(model, text)
    return compare(audio_directions(model, waveform), said, text, len(waveform) / SAMPLE_RATE)


def token_directions(model: "SpeechLLM", text: str) -> tuple[tuple[str, ...], Matrix]:
    """The tokens (L) of a text, and their embeddings (L, E), all of length 1.

    Raises IsthmusError for a text without tokens.
    """
    import torch

    tokenizer = model.llm.tokenizer
    ids = model.transcript_tokens(text)
    if not ids:
        raise IsthmusError(f"The transcript {text!r} has no tokens to align. Give what is said.")
    device = next(model.projector.parameters()).device
    with torch.inference_mode():
        embedded = model.llm.embed(torch.tensor(ids, device=device)).float()
        unit = torch.nn.functional.normalize(embedded, dim=-1).cpu().numpy()
    return tuple(str(tokenizer.decode([token])) for token in ids), unit


def audio_directions(model: "SpeechLLM", waveform: NDArray[np.float32]) -> Matrix:
    """The audio embeddings (A, E) of a waveform (S,), all of length 1.

    Raises IsthmusError where there are none.
    """
    import torch

    device = next(model.projector.parameters()).device
    samples = torch.tensor(waveform, dtype=torch.float32, device=device)[None]  # (1, S)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            audio = model.embed_audio(samples, torch.tensor([len(waveform)], device=device))[0]
            unit: Matrix = torch.nn.functional.normalize(audio.float(), dim=-1).cpu().numpy()
    finally:
        model.train(training)
    if not len(unit):
        raise IsthmusError(
            f"{len(waveform)} samples of audio are too short for one audio embedding. Give more."
        )
    return unit


def compare(
    heard: Matrix, said: tuple[tuple[str, ...], Matrix], text: str, seconds: float
) -> Alignment:
    """The alignment of audio to tokens, as the two functions above give them."""
    return Alignment(text, said[0], heard @ said[1].T, seconds)


def monotonicity(similarity: Matrix, *, permutations: int = 200, seed: int = 0) -> float:
    """How far tokens find their audio in the order in which they stand; 1 perfectly, 0 by chance.

    Give every token one audio position, never before that of the token ahead of it, such that the
    summed similarity is largest: `ordered`. Without the rule each token takes its best position:
    `free`. With the columns shuffled the rule yields `chance`, a mean over `permutations`. The
    result is (ordered - chance) / (free - chance): 1 where the order costs nothing, about 0 for
    columns in random order, below 0 for an order worse than random (time running backwards). It is
    0 also where no order can be seen: a single token, or tokens that are all alike.

    Beforehand the mean of each row is taken off, since some audio resembles all tokens. Tokens that
    come several times are no trouble, as any of their places will do. For one matrix the spread of
    chance is wide: average over utterances before concluding.

    Args:
        similarity: (A, L).
        permutations: random orders that make `chance`.
        seed: of these orders.
    """
    values = np.asarray(similarity, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(
            f"similarity must be a finite matrix (A, L) of at least one row and column; "
            f"got shape {values.shape}."
        )
    values = values - values.mean(axis=1, keepdims=True)
    free = float(values.max(axis=0).sum())
    generator = np.random.default_rng(seed)
    length = values.shape[1]
    orders = np.stack([generator.permutation(length) for _ in range(permutations)])  # (P, L)
    chance = float(_ordered(values, orders).mean())
    ordered = float(_ordered(values, np.arange(length)[None])[0])
    return (ordered - chance) / (free - chance) if free - chance > ENOUGH * length else 0.0


def _ordered(values: NDArray[np.float64], orders: NDArray[np.intp]) -> NDArray[np.float64]:
    """Largest sum (P,) of positions that never go back, tokens in each of `orders` (P, L)."""
    best = np.zeros((len(orders), len(values)))  # (P, A) up to this token, it being at most there
    for column in orders.T:
        best = np.maximum.accumulate(best + values[:, column].T, axis=1)
    last: NDArray[np.float64] = best[:, -1]
    return last

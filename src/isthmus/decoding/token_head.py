"""The CTC head of a run's projector as decoding asks for it: its units are the LLM's own tokens.

Shapes: B batch, A audio embeddings, E LLM width, V tokens.
"""

from collections.abc import Sequence

from torch import Tensor

from isthmus.decoding.confidence import token_spans
from isthmus.model.ctc_head import CTCHead, LogProbs
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.spelling import WILDCARD
from isthmus.model.token_ctc import TokenLogProbs

RATE_FRAMES = 5040  # over so many frames a projector's steady rate is a whole number of embeddings


class TokenHead(CTCHead):
    """The tokens that a projector's embeddings say: its frames are what `SpeechLLM.spoken` gives.

    It is trained with the projector, so that it knows the frames of an encoder that is trained too.
    """

    def __init__(self, model: SpeechLLM):
        super().__init__()
        self._model = (model,)  # in a tuple: it is no part of this
        ctc = model.projector.ctc
        assert ctc is not None
        self._ctc = (ctc,)
        self.blank = ctc.blank
        self.tokenizer = model.llm.tokenizer
        self.frame_rate = _rate(model)

    def log_probs(self, frames: Tensor) -> Tensor:
        (ctc,) = self._ctc
        return ctc.log_probs(frames)

    def kept(self, frames: Tensor, log_probs: Tensor) -> LogProbs:
        (ctc,) = self._ctc
        return TokenLogProbs(ctc, frames, log_probs)

    def text(self, units: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(units), skip_special_tokens=True)).strip()

    def tokens(self, text: str) -> list[int]:
        """Those of a transcript behind its prompt, as the head was taught them."""
        (model,) = self._model
        return model.transcript_tokens(text)

    def spell(self, text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        tokens = self.tokens(text)
        whole, places = token_spans(self.tokenizer, tokens)
        lead = len(whole) - len(whole.lstrip())  # a space that is part of the first token
        if places is None or whole.strip() != text.strip():
            return [self.tokens(text[start:end]) or [WILDCARD] for start, end in spans]
        lead -= len(text) - len(text.lstrip())
        found: list[list[int]] = [[] for _ in spans]
        word = 0
        for token, (start, _) in zip(tokens, places, strict=True):
            while word < len(spans) and spans[word][1] + lead <= start:
                word += 1
            if word < len(spans):  # the space before a word is its own
                found[word].append(token)
        return [units or [WILDCARD] for units in found]

    @property
    def separator(self) -> None:
        return None  # spaces are part of words


def _rate(model: SpeechLLM) -> float | None:
    """Embeddings a second; None where their number depends on what is heard."""
    once, twice = map(model.projector.spoken_length, (RATE_FRAMES, 2 * RATE_FRAMES))
    if once is None or twice is None or once == twice:
        return None
    return model.encoder.frame_rate * (twice - once) / RATE_FRAMES

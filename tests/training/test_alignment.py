"""The alignment loss: by hand, blind to padding, and it makes audio follow the text."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from isthmus.training.alignment import BLANK, TEMPERATURE
from torch import Tensor, nn

from isthmus.model.encoder import FBankSettings
from isthmus.model.llm import LLM
from isthmus.model.projector import LinearProjectorSettings
from isthmus.model.prompt import BarePrompt
from isthmus.model.speech_llm import SpeechLLM
from isthmus.training import alignment

LoadLLM = Callable[..., LLM]


@pytest.fixture
def join(load_llm: LoadLLM) -> Callable[[], SpeechLLM]:
    def build() -> SpeechLLM:
        torch.manual_seed(3)
        encoder, llm = FBankSettings(num_mels=20).build(), load_llm("llama")
        projector = LinearProjectorSettings(downsample_rate=2, hidden=64).build(encoder, llm)
        return SpeechLLM(encoder, projector, llm, BarePrompt())

    return build


@pytest.fixture
def llm(load_llm: LoadLLM) -> LLM:
    return load_llm("llama")


def tokens(llm: LLM, text: str) -> Tensor:
    return torch.tensor(llm.tokenizer.encode(text, add_special_tokens=False))


def alignment_loss(llm: LLM, audio: list[Tensor], texts: list[str]) -> Tensor:
    return alignment.alignment_loss(llm, audio, [tokens(llm, text).tolist() for text in texts])


def test_by_hand(llm: LLM) -> None:
    """Two embeddings, one token of all there are: said in the first, in the second, or in both."""
    direction = torch.randn(llm.dim, generator=torch.Generator().manual_seed(0))
    audio = torch.stack([llm.embed(tokens(llm, "a"))[0] * 5, direction]).detach()
    table = llm.embed(torch.arange(len(llm.tokenizer))).detach()
    likeness = nn.functional.cosine_similarity(audio[:, None], table[None], dim=-1)
    weights = torch.exp(torch.cat([torch.full((2, 1), BLANK), likeness], dim=1) / TEMPERATURE)
    shares = weights / weights.sum(dim=1, keepdim=True)
    silent, said = shares[:, 0].tolist(), shares[:, 1 + int(tokens(llm, "a"))].tolist()
    probability = said[0] * said[1] + said[0] * silent[1] + silent[0] * said[1]
    found = alignment_loss(llm, [audio], ["a"])
    torch.testing.assert_close(found, torch.tensor(-math.log(probability)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("others", [3, alignment.OTHERS])  # of all tokens: a few, or each
@pytest.mark.parametrize("neighbour", ["abba", "the quick brown fox", ""])
def test_neighbours_have_no_say(
    llm: LLM, neighbour: str, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "OTHERS", others)
    alignment._others.cache_clear()
    generator = torch.Generator().manual_seed(1)
    own, other = (torch.randn(length, llm.dim, generator=generator) for length in (9, 30))
    own.requires_grad_()
    alone = alignment_loss(llm, [own], ["abba"])
    (gradient,) = torch.autograd.grad(alone, own)
    together = alignment_loss(llm, [own, other], ["abba", neighbour])
    assert torch.equal(torch.autograd.grad(together, own)[0], gradient)
    assert together == alone + alignment_loss(llm, [other], [neighbour])
    alignment._others.cache_clear()


def test_a_large_vocabulary_is_drawn_from() -> None:
    drawn = alignment._others(32_000)
    alignment._others.cache_clear()
    assert drawn == alignment._others(32_000)
    assert len(set(drawn)) == alignment.OTHERS
    assert max(drawn) > 30_000
    assert sorted(alignment._others(50)) == list(range(50))


@pytest.mark.parametrize(("length", "text"), [(3, "abcd"), (3, ""), (0, "a"), (2, "aa")], ids=str)
def test_what_cannot_be_aligned_has_no_part(llm: LLM, length: int, text: str) -> None:
    audio = torch.randn(length, llm.dim).requires_grad_()
    loss = alignment_loss(llm, [audio, torch.ones(2, llm.dim)], [text, ""])
    alone = alignment_loss(llm, [torch.ones(2, llm.dim)], [""])
    if loss.requires_grad:
        loss.backward()
        assert audio.grad is not None
        assert audio.grad.isfinite().all()
    assert loss.isfinite()
    assert alone > 0  # silence is to be learnt, too
    assert (loss == alone) == bool(text)


def test_the_tokens_stay_where_they_are(llm: LLM) -> None:
    for value in llm.parameters():
        value.requires_grad_()
    audio = torch.randn(6, llm.dim).requires_grad_()
    alignment_loss(llm, [audio], ["abc"]).backward()
    assert audio.grad is not None
    assert all(value.grad is None for value in llm.parameters())


def order(llm: LLM, audio: Tensor, text: str) -> list[int]:
    """The embedding most like each token."""
    table = llm.embed(tokens(llm, text)).detach()
    return nn.functional.cosine_similarity(audio[:, None], table[None], dim=-1).argmax(0).tolist()


def test_it_puts_audio_in_the_order_of_the_text(llm: LLM) -> None:
    generator = torch.Generator().manual_seed(2)
    audio = torch.randn(12, llm.dim, generator=generator).requires_grad_()
    text = "abcdefg"
    before = order(llm, audio, text)
    optimiser = torch.optim.Adam([audio], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        alignment_loss(llm, [audio], [text]).backward()
        optimiser.step()
    after = order(llm, audio, text)
    assert any(a >= b for a, b in itertools.pairwise(before))
    assert all(a < b for a, b in itertools.pairwise(after))


def in_order(llm: LLM, audio: list[Tensor], texts: list[str]) -> float:
    """Share of neighbouring tokens whose likest embeddings come one after the other."""
    pairs = [
        pair
        for row, text in zip(audio, texts, strict=True)
        for pair in itertools.pairwise(order(llm, row, text))
    ]
    return sum(a < b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize(("weight", "low", "high"), [(0.0, 0.0, 0.8), (1.0, 0.95, 1.0)])
def test_a_projector_that_is_overfit_with_it_copies(
    weight: float, low: float, high: float, join: Callable[[], SpeechLLM]
) -> None:
    """Beside the cross-entropy, which alone does not ask for order."""
    model = join()
    texts = ["abcdef", "fadbec", "cebfda"]
    generator = torch.Generator().manual_seed(5)
    frames = [torch.randn(20, model.encoder.dim, generator=generator) for _ in texts]
    optimiser = torch.optim.AdamW(model.projector.parameters(), lr=1e-2)
    for _ in range(120):
        optimiser.zero_grad()
        audio = model.project(frames)
        loss = model.transcript_loss(audio, texts).total
        (loss + weight * alignment_loss(model.llm, audio, texts)).backward()
        optimiser.step()
    assert low <= in_order(model.llm, model.project(frames), texts) <= high

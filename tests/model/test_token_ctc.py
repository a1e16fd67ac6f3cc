"""CTC over the LLM's own tokens: its loss and gradients, and the soft tokens it makes."""

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import IsthmusError
from isthmus.model import token_ctc
from isthmus.model.ctc_head import collapsed
from isthmus.model.llm import LLM
from isthmus.model.posterior import MIXED, PosteriorProjector
from isthmus.model.projector_base import Projector
from isthmus.model.token_ctc import TokenCTC, needed_embeddings

LABELS = [[5, 9, 9, 20], [33], [], [7, 8, 7]]
LENGTHS = [12, 3, 4, 3]


class Given(Projector):
    """Embeddings as they are given."""

    def output_length(self, num_frames: int) -> int:
        return num_frames

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        return frames, num_frames


@pytest.fixture(params=["llama", "gemma"])
def llm(request: pytest.FixtureRequest, load_llm: Callable[..., LLM]) -> LLM:
    """Gemma's embeddings are scaled when they are looked up."""
    return load_llm(request.param, dtype="float32")


@pytest.fixture
def ctc(llm: LLM) -> TokenCTC:
    torch.manual_seed(0)
    found = TokenCTC(llm)
    nn.init.normal_(found.blank_direction)
    return found


def rows(llm: LLM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, llm.dim, generator=generator).requires_grad_() for n in LENGTHS]


def by_torch(ctc: TokenCTC, audio: list[Tensor], labels: list[list[int]]) -> Tensor:
    """torch's own loss, from the log-probabilities of all labels."""
    losses = [
        nn.functional.ctc_loss(
            ctc.log_probs(own)[:, None],
            torch.tensor([tokens], dtype=torch.long),
            torch.tensor([len(own)]),
            torch.tensor([len(tokens)]),
            blank=ctc.blank,
            reduction="sum",
        )
        for own, tokens in zip(audio, labels, strict=True)
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("rows_a_chunk", [1, 5, 1000])
def test_loss_and_gradients_are_those_of_all_labels(
    llm: LLM, ctc: TokenCTC, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_ctc, "CHUNK_BYTES", 4 * ctc.blank * rows_a_chunk)
    audio = rows(llm)
    wanted = [*audio, ctc.blank_direction, ctc.blank_bias]
    (found, said), expected = ctc.loss(audio, LABELS), by_torch(ctc, audio, LABELS)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(3 * found, wanted)
    for one, other in zip(gradients, torch.autograd.grad(3 * expected, wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ctc.loss(audio, LABELS)[0], expected)
    paths = [ctc.log_probs(own).argmax(dim=-1).tolist() for own in audio]
    assert said == [collapsed(path, ctc.blank) for path in paths]


def test_a_sample_stands_for_all_tokens(
    llm: LLM, ctc: TokenCTC, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On average, and in training alone; the batch's own tokens are always among them."""
    audio = [own.detach() / 10 for own in rows(llm)]
    exact, _ = ctc.loss(audio, LABELS)
    monkeypatch.setattr(token_ctc, "SAMPLED", 16)
    assert ctc.blank > 16 + len({token for own in LABELS for token in own})
    ctc.train()
    torch.manual_seed(0)
    found = torch.stack([ctc.loss(audio, LABELS)[0] for _ in range(300)]).detach()
    assert found.std() > 0
    torch.testing.assert_close(found.mean(), exact.detach(), rtol=5e-3, atol=0.0)
    assert torch.equal(ctc.eval().loss(audio, LABELS)[0], exact)


def test_labels_and_their_sum_are_rounded_alike(load_llm: Callable[..., LLM]) -> None:
    """In bfloat16, embeddings that are sure of their tokens have no loss, and push nowhere."""
    llm = load_llm("llama", dtype="bfloat16")
    ctc = TokenCTC(llm)
    table = cast(nn.Embedding, llm.network.get_input_embeddings()).weight.detach().float()
    tokens = list(range(5, 25))
    sure = (table[tokens] * 40).requires_grad_()
    loss, said = ctc.loss([sure], [tokens])
    assert said == [tokens]
    (gradient,) = torch.autograd.grad(loss, sure)
    plain = by_torch(ctc, [sure], [tokens])
    torch.testing.assert_close(loss, plain, atol=1e-3, rtol=0.0)
    assert loss >= 0
    assert gradient.norm() <= torch.autograd.grad(plain, sure)[0].norm() + 1e-3


def test_gradient_by_hand(llm: LLM, ctc: TokenCTC) -> None:
    """One embedding, one token: minus its score, plus the mean of all by their probabilities."""
    audio = rows(llm)[0][:1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ctc.loss([audio], [[5]])[0], audio)
    table = cast(nn.Embedding, llm.network.get_input_embeddings()).weight
    directions = torch.cat([table, ctc.blank_direction[None]]) * ctc.scale
    probs = ctc.log_probs(audio.detach())[0].exp()
    torch.testing.assert_close(gradient[0], probs @ directions - directions[5])


def test_what_is_learnt_says_the_tokens(llm: LLM, ctc: TokenCTC) -> None:
    audio = rows(llm)
    optimiser = torch.optim.Adam([*audio, *ctc.parameters()], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss, said = ctc.loss(audio, LABELS)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.5
    assert said == LABELS


def test_room_that_tokens_need() -> None:
    assert [needed_embeddings(tokens) for tokens in LABELS] == [5, 1, 0, 3]


def said(llm: LLM, ctc: TokenCTC, tokens: list[int | None]) -> Tensor:
    """Embeddings that are sure of these tokens, None of the blank."""
    with torch.no_grad():
        ctc.blank_direction.copy_(torch.randn(llm.dim, generator=torch.Generator().manual_seed(2)))
        table = cast(nn.Embedding, llm.network.get_input_embeddings()).weight
        directions = torch.cat([table, ctc.blank_direction[None]])
        directions = directions - directions.mean(dim=0)
        places = [ctc.blank if token is None else token for token in tokens]
        return (torch.linalg.pinv(directions.T @ directions) @ directions[places].T).T * 1e4


def test_soft_tokens_are_the_tokens_where_they_are_sure(llm: LLM, ctc: TokenCTC) -> None:
    """Blanks fall out, the same again is one, and a blank between makes it two."""
    spoken = [None, 5, 5, None, 5, 9, None, None, 20, 20]
    embeddings = said(llm, ctc, spoken)
    assert ctc.log_probs(embeddings).argmax(dim=1).tolist() == [
        ctc.blank if token is None else token for token in spoken
    ]
    (found,), count = PosteriorProjector(Given(), ctc)(embeddings[None], torch.tensor([10]))
    assert count.tolist() == [4]
    expected = llm.embed(torch.tensor([5, 5, 9, 20])).float()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


class Operations(TorchDispatchMode):
    """Which operations of torch run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, own: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.names.add(own.overloadpacket.__name__)
        return own(*given, **(named or {}))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_soft_tokens_and_their_gradient_by_hand(
    llm: LLM, ctc: TokenCTC, temperature: float
) -> None:
    """Means over runs, summed in order: what is scattered on a GPU is another sum each time."""
    projector = PosteriorProjector(Given(), ctc)
    projector.temperature = temperature
    runs = torch.tensor([0, 0, 1, 2, 2, 2])
    embeddings = (said(llm, ctc, [5, 5, 9, 20, 20, 20]) / 800).requires_grad_()
    with Operations() as ran:
        [found], count = projector(embeddings[None], torch.tensor([6]))
        slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
        (gradient,) = torch.autograd.grad((found * slope).sum(), embeddings)
    assert count.tolist() == [3]
    assert "segment_reduce" in ran.names
    assert not {name for name in ran.names if re.match("index_add|scatter", name)}
    table = cast(nn.Embedding, llm.network.get_input_embeddings()).weight.detach()
    probs = (ctc.log_probs(embeddings.detach()).detach() / temperature).softmax(dim=1)
    weights, tokens = probs[:, :-1].topk(MIXED, dim=1)
    own = llm.embed(tokens).detach()  # (A, C, E), which some LLMs scale
    total = torch.zeros(3).index_add(0, runs, weights.sum(dim=1))[:, None]
    expected = torch.zeros(3, llm.dim).index_add(0, runs, (weights[..., None] * own).sum(1)) / total
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    away = (own - expected[runs][:, None]) @ slope[runs][:, :, None]  # (A, C, 1)
    pulls = (weights[..., None] * away * table[tokens]).sum(1)
    by_hand = pulls / total[runs] * ctc.scale / temperature
    assert by_hand.norm() > 1e-3
    torch.testing.assert_close(gradient, by_hand, atol=1e-6, rtol=1e-4)


def test_silence_is_one_soft_token(llm: LLM, ctc: TokenCTC) -> None:
    embeddings = said(llm, ctc, [None, None, None])
    _, count = PosteriorProjector(Given(), ctc)(embeddings[None], torch.tensor([3]))
    assert count.tolist() == [1]


def test_temperature_spreads_a_soft_token(llm: LLM, ctc: TokenCTC) -> None:
    projector = PosteriorProjector(Given(), ctc)
    embeddings = said(llm, ctc, [5]) / 20
    nearest = []
    for temperature in (1.0, 100.0):
        projector.temperature = temperature
        (found,), _ = projector(embeddings[None], torch.tensor([1]))
        nearest.append(float((found - llm.embed(torch.tensor([5]))).norm()))
    assert nearest[0] < nearest[1]


def test_an_llm_without_a_table_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = llm.network
    monkeypatch.setattr(network, "get_input_embeddings", lambda: None)
    with pytest.raises(IsthmusError, match="no table of token embeddings"):
        TokenCTC(llm)

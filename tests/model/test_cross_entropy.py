"""The loss in chunks is the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.model.cross_entropy import summed_cross_entropy

ROWS, WIDTH, VOCABULARY = 23, 8, 50
ROW_BYTES = 4 * VOCABULARY


class NotingHead(nn.Linear):
    """A head that remembers how many rows of logits it was asked for."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(WIDTH, VOCABULARY, bias=bias)
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return super().forward(hidden)


@pytest.fixture
def head() -> NotingHead:
    torch.manual_seed(0)
    return NotingHead()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def targets(hidden: Tensor, head: NotingHead) -> Tensor:
    """Some of them the likeliest token, one without loss."""
    targets = torch.arange(ROWS) % VOCABULARY
    targets[:9] = nn.functional.linear(hidden, head.weight, head.bias)[:9].argmax(-1)
    targets[4] = -100
    return targets


def whole(hidden: Tensor, targets: Tensor, head: Any) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.argmax(-1) == targets).sum()


@pytest.mark.parametrize("rows", [1, 5, ROWS, 1000])
@pytest.mark.parametrize("trained", [False, True])
def test_equal_to_the_loss_of_all_logits(
    head: NotingHead, hidden: Tensor, targets: Tensor, rows: int, trained: bool
) -> None:
    head.requires_grad_(trained)
    inputs = [hidden, *(head.parameters() if trained else [])]
    loss, correct = whole(hidden, targets, head)
    expected = torch.autograd.grad(3 * loss, inputs)
    found, hits = summed_cross_entropy(hidden, targets, head, rows * ROW_BYTES)
    torch.testing.assert_close(found, loss)
    assert int(hits) == int(correct) >= 8
    torch.testing.assert_close(torch.autograd.grad(3 * found, inputs), expected)


def test_only_the_head_is_trained(head: NotingHead, hidden: Tensor, targets: Tensor) -> None:
    hidden = hidden.detach()
    whole(hidden, targets, head)[0].backward()
    expected = [value.grad for value in head.parameters()]
    head.zero_grad()
    summed_cross_entropy(hidden, targets, head, 5 * ROW_BYTES)[0].backward()
    torch.testing.assert_close([value.grad for value in head.parameters()], expected)


def test_logits_of_a_chunk_at_a_time(head: NotingHead, hidden: Tensor, targets: Tensor) -> None:
    summed_cross_entropy(hidden, targets, head, 5 * ROW_BYTES)[0].backward()
    assert max(head.rows) == 5
    assert sum(head.rows) == ROWS  # each once: the backward pass makes none
    head.rows.clear()
    whole(hidden, targets, head)
    assert max(head.rows) == ROWS  # inverse


def test_a_large_vocabulary_takes_32_megabytes() -> None:
    class Wide(NotingHead):
        def forward(self, hidden: Tensor) -> Tensor:
            self.rows.append(len(hidden))
            return hidden[:, :1].expand(-1, 2**20)

    head = Wide().requires_grad_(False)
    with torch.no_grad():
        summed_cross_entropy(torch.zeros(20, WIDTH), torch.zeros(20, dtype=torch.long), head)
    assert max(head.rows) * 4 * 2**20 == 32 * 2**20


def test_validation_computes_no_gradient(
    head: NotingHead, hidden: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(hidden, targets, head)

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a gradient was computed")

    monkeypatch.setattr(torch.autograd, "grad", fail)
    with torch.no_grad():
        found = summed_cross_entropy(hidden, targets, head, 5 * ROW_BYTES)
    assert not found[0].requires_grad
    torch.testing.assert_close(found, tuple(value.detach() for value in expected))
    head.requires_grad_(False)
    summed_cross_entropy(hidden.detach(), targets, head)  # nothing wants one


@pytest.mark.parametrize("trained", [False, True])
def test_no_rows(head: NotingHead, trained: bool) -> None:
    head.requires_grad_(trained)
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    loss, correct = summed_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), head)
    loss.backward()
    assert (loss.item(), int(correct)) == (0, 0)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [False, True])
def test_half_precision(
    head: NotingHead, hidden: Tensor, targets: Tensor, weights: torch.dtype, trained: bool
) -> None:
    head.to(weights).requires_grad_(trained)
    autocast = weights == torch.float32
    given = hidden if autocast else hidden.to(weights)
    inputs = [hidden, *(head.parameters() if trained else [])]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = summed_cross_entropy(given, targets, head, 5 * ROW_BYTES)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found, inputs)
    expected = torch.autograd.grad(whole(hidden, targets, head.float())[0], inputs)
    for one, other in zip(gradients, expected, strict=True):
        assert (one.float() - other).norm() < 0.02 * other.norm()


def test_once_more(head: NotingHead, hidden: Tensor, targets: Tensor) -> None:
    """A gradient twice from one forward pass is the same gradient."""
    loss, _ = summed_cross_entropy(hidden, targets, head, 5 * ROW_BYTES)
    (first,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(first, 2 * second)


def test_a_mean_is_not_rounded_to_half_precision(
    head: NotingHead, hidden: Tensor, targets: Tensor
) -> None:
    given = hidden.bfloat16()
    loss, _ = summed_cross_entropy(given, targets, head.bfloat16())
    (total,) = torch.autograd.grad(loss, given, retain_graph=True)
    (mean,) = torch.autograd.grad(loss / 3, given)
    assert float(3 * mean.float().norm() / total.float().norm()) == pytest.approx(1, abs=5e-4)
    (scaled,) = torch.autograd.grad(*scaled_half(hidden, targets, head))
    assert scaled.isfinite().all()


def scaled_half(hidden: Tensor, targets: Tensor, head: NotingHead) -> tuple[Tensor, Tensor]:
    given = hidden.half()
    loss, _ = summed_cross_entropy(given, targets, head.half())
    return loss * 2**16, given

"""Masked steps give the numbers of copied ones, and are taken only where they do."""

import random
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

from isthmus.decoding import steps
from isthmus.decoding.steps import (
    CopiedSteps,
    MaskedSteps,
    Steps,
    alike,
    open_steps,
    quick_head,
    takes_masks,
)
from isthmus.model.llm import LLM
from isthmus.model.packing import choose_attention

MASKED = ("llama", "qwen2", "gpt-neox", "gpt2", "phi", "gemma")


def walk(found: Steps, count: int, seed: int, length: int = 30) -> list[Tensor]:
    """Logits along a random tree of two to four hypotheses; utterances leave on the way."""
    choose = random.Random(seed)
    logits = [found.prefill()]
    width = 1
    for step in range(length):
        rows = list(range(count))
        if count > 1 and step % 7 == 6:
            rows.remove(choose.randrange(count))
        count, after = len(rows), choose.randint(2, 4)
        parents = [[choose.randrange(width) for _ in range(after)] for _ in rows]
        tokens = [[choose.randrange(50) for _ in range(after)] for _ in rows]
        logits.append(found.next(rows, parents, tokens))
        width = after
    return logits


def prompts_of(llm: LLM, lengths: tuple[int, ...] = (9, 4, 17)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, llm.dim, generator=generator) for length in lengths]


@torch.inference_mode()
def distance(llm: LLM, seed: int = 0) -> float:
    """Greatest difference of the logits of both ways."""
    network, prompts = llm.network, prompts_of(llm)
    ways = [walk(way(network, prompts), len(prompts), seed) for way in (MaskedSteps, CopiedSteps)]
    return max(float((one - other).abs().max()) for one, other in zip(*ways, strict=True))


@pytest.mark.parametrize("name", MASKED)
def test_masks_and_copies_give_the_same_numbers(name: str, load_llm: Callable[..., LLM]) -> None:
    llm = load_llm(name)
    assert isinstance(open_steps(llm, prompts_of(llm), 30), MaskedSteps)
    assert distance(llm) < 2e-4


def test_every_family_is_decoded_one_way_or_the_other(
    llm_name: str, load_llm: Callable[..., LLM]
) -> None:
    llm = load_llm(llm_name)
    assert takes_masks(llm.network) == (llm_name != "bloom")  # its positions come from the mask
    found = open_steps(llm, prompts_of(llm), 30)
    assert isinstance(found, CopiedSteps if llm_name == "bloom" else MaskedSteps)


def test_hypotheses_that_saw_each_other_would_be_found_out(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MaskedSteps.forward

    def unmasked(self: MaskedSteps, tokens: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        return forward(self, tokens, torch.zeros_like(seen), positions)

    monkeypatch.setattr(MaskedSteps, "forward", unmasked)
    llm = load_llm("llama")
    assert distance(llm) > 0.01
    assert not takes_masks(llm.network)
    assert isinstance(open_steps(llm, prompts_of(llm), 30), CopiedSteps)


def test_a_network_is_tried_once(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    original = steps._try_masks

    def counted(*given: Any) -> bool:
        tried.append(given)
        return original(*given)

    monkeypatch.setattr(steps, "_try_masks", counted)
    llm = load_llm("llama")
    assert all(takes_masks(llm.network) for _ in range(3))
    assert len(tried) == 1


def test_a_network_that_refuses_the_mask_is_decoded_by_copying(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> Tensor:
        raise ValueError("no such mask")

    monkeypatch.setattr(MaskedSteps, "forward", refuse)
    assert not takes_masks(load_llm("llama").network)


def test_beyond_a_sliding_window_the_cache_is_copied(load_llm: Callable[..., LLM]) -> None:
    llm = load_llm("llama")
    llm.network.config.sliding_window = 47
    longest = 17
    assert isinstance(open_steps(llm, prompts_of(llm), 47 - longest), MaskedSteps)
    assert isinstance(open_steps(llm, prompts_of(llm), 48 - longest), CopiedSteps)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_networks_switched_to_packed_attention(kind: str, load_llm: Callable[..., LLM]) -> None:
    llm = load_llm("qwen2")
    llm.network.set_attn_implementation(kind)
    assert choose_attention(llm.network).backend is not None
    assert llm.network.config._attn_implementation == f"isthmus_packed_{kind}"
    assert takes_masks(llm.network)
    assert distance(llm) < 2e-4


def test_prompts_of_other_lengths_are_read_apart(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alike([10, 30, 9, 29, 24, 23]) == [[1, 3, 4], [5], [0, 2]]
    assert alike([9, 10, 9]) == [[0, 1, 2]]
    llm, lengths = load_llm("llama"), (4, 20, 5, 19, 12)
    calls: list[int] = []
    llm.network.register_forward_pre_hook(
        lambda _, __, given: calls.append(given["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.inference_mode():
        apart = MaskedSteps(llm.network, prompts_of(llm, lengths)).prefill()
        monkeypatch.setattr(steps, "ALIKE", 0.0)
        together = MaskedSteps(llm.network, prompts_of(llm, lengths)).prefill()
    assert calls == [20, 12, 5, 20]
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)


def test_half_precision(load_llm: Callable[..., LLM]) -> None:
    llm = load_llm("llama", dtype="bfloat16")
    assert takes_masks(llm.network)
    assert distance(llm) < 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt2"])
def test_logits_in_blocks_are_the_networks_own(
    name: str, dtype: str, load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load_llm(name, dtype=dtype)
    assert quick_head(llm.network) is None  # too few tokens to be worth it
    with torch.inference_mode():
        whole = walk(MaskedSteps(llm.network, prompts_of(llm)), 3, seed=1)
        monkeypatch.setattr(steps, "COLUMNS", 32)  # the last block is shorter
        found = MaskedSteps(llm.network, prompts_of(llm))
        assert found.head is not None
        blocks = walk(found, 3, seed=1)
    for one, other in zip(whole, blocks, strict=True):
        tolerance = 1e-4 if dtype == "float32" else 0.02
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_logits_that_are_more_than_a_product_are_left_to_the_network(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "COLUMNS", 32)
    network: Any = load_llm("llama").network
    head = quick_head(network)
    assert head is not None
    assert quick_head(network) is head  # tried once
    handle = network.register_forward_hook(lambda *_: None)
    assert quick_head(network) is None  # it would not be called
    handle.remove()
    network.lm_head = nn.Linear(network.lm_head.in_features, network.lm_head.out_features)
    assert quick_head(network) is None  # a bias
    network.lm_head = nn.Linear(network.lm_head.in_features, 70, bias=False)
    other = quick_head(network)
    assert other is not None
    assert other is not head
    monkeypatch.setattr(steps, "_heads", WeakKeyDictionary())
    original = type(network).forward

    def doubled(self: Any, *given: Any, **named: Any) -> Any:
        output = original(self, *given, **named)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(type(network), "forward", doubled)
    assert quick_head(network) is None


def test_the_cache_keeps_the_prompt_once(load_llm: Callable[..., LLM]) -> None:
    llm = load_llm("llama")
    found = MaskedSteps(llm.network, prompts_of(llm))
    with torch.inference_mode():
        walk(found, 3, seed=1, length=5)
    assert {layer.keys.shape[0] for layer in found.cache.layers} == {3}

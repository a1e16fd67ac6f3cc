"""Drafts change how fast greedy search is, and nothing else."""

import itertools
import random
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from isthmus.decoding import draft
from isthmus.decoding.beam import Hypothesis, SearchOptions, beam_search
from isthmus.decoding.draft import draft_search, realigned
from isthmus.decoding.steps import MaskedSteps, Steps, open_steps
from isthmus.model.llm import LLM

END = 2
FAMILIES = ("llama", "qwen2", "gpt-neox", "gpt2", "bloom", "gemma")
FREE = SearchOptions(repetition_guard=False)


@pytest.fixture(params=FAMILIES)
def llm(request: pytest.FixtureRequest, load_llm: Callable[..., LLM]) -> LLM:
    return sharp(load_llm(request.param))


@pytest.fixture
def llama(load_llm: Callable[..., LLM]) -> LLM:
    return sharp(load_llm("llama"))


def sharp(model: LLM) -> LLM:
    """With distributions that hardly ever tie."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def prompts_of(model: LLM, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist()
    return [torch.randn(length, model.dim, generator=generator) for length in lengths]


def with_errors(tokens: Sequence[int], rate: float, choose: random.Random) -> list[int]:
    found: list[int] = []
    for token in tokens:
        kind = choose.choice(("other", "none", "more")) if choose.random() < rate else "same"
        if kind in ("other", "more"):
            found.append(choose.randrange(90))
        if kind in ("same", "more"):
            found.append(token)
    return found


def greedy(
    model: LLM, prompts: list[Tensor], limits: list[int], options: SearchOptions = FREE
) -> list[Hypothesis]:
    found = beam_search(model, prompts, limits, [END], beam_size=1, options=options)
    return [hypotheses[0] for hypotheses in found]


def drafted(
    model: LLM,
    prompts: list[Tensor],
    drafts: list[list[int]],
    limits: list[int],
    options: SearchOptions = FREE,
) -> list[Hypothesis]:
    found = draft_search(model, prompts, drafts, limits, [END], options=options)
    assert all(len(hypotheses) == 1 for hypotheses in found)
    return [hypotheses[0] for hypotheses in found]


def assert_same(
    model: LLM, prompts: list[Tensor], found: list[Hypothesis], expected: list[Hypothesis]
) -> int:
    """Same tokens, scores and ends; a difference must begin at a tie. Returns the ties."""
    ties = 0
    for prompt, one, other in zip(prompts, found, expected, strict=True):
        if one.tokens != other.tokens:
            ties += 1
            pairs = zip([*one.tokens, END], [*other.tokens, END], strict=False)
            place = next(i for i, (a, b) in enumerate(pairs) if a != b)
            assert gap(model, prompt, one.tokens[:place]) < 1e-4
            continue
        assert one.finish_reason == other.finish_reason
        assert one.score == pytest.approx(other.score, abs=1e-3)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)
    return ties


@torch.inference_mode()
def gap(model: LLM, prompt: Tensor, tokens: list[int]) -> float:
    """Between the two likeliest next tokens."""
    text = model.embed(torch.tensor(tokens, dtype=torch.long))
    logits = model.network(inputs_embeds=torch.cat([prompt, text])[None]).logits[0, -1]
    first, second = logits.log_softmax(-1).topk(2).values.tolist()
    return float(first - second)


def test_the_same_tokens_whatever_the_draft(llm: LLM) -> None:
    prompts = prompts_of(llm, 60)
    limits = [1 + index % 23 for index in range(60)]
    expected = greedy(llm, prompts, limits)
    assert len({tuple(one.tokens) for one in expected}) > 30
    choose = random.Random(0)
    rates = [choose.choice((0.0, 0.05, 0.2, 0.5, 1.0)) for _ in prompts]
    drafts = [
        with_errors(one.tokens, rate, choose) for one, rate in zip(expected, rates, strict=True)
    ]
    ties = 0
    for start in range(0, 60, 10):
        rows = slice(start, start + 10)
        found = drafted(llm, prompts[rows], drafts[rows], limits[rows])
        ties += assert_same(llm, prompts[rows], found, expected[rows])
    for place in range(10):
        found = drafted(llm, [prompts[place]], [drafts[place]], [limits[place]])
        ties += assert_same(llm, [prompts[place]], found, [expected[place]])
    assert ties <= 2


@pytest.mark.parametrize("kind", ["empty", "noise", "longer", "ends", "doubled"])
def test_strange_drafts(llama: LLM, kind: str) -> None:
    prompts = prompts_of(llama, 12)
    expected = greedy(llama, prompts, [15] * 12)
    choose = random.Random(1)
    drafts: dict[str, list[list[int]]] = {
        "empty": [[] for _ in expected],
        "noise": [[choose.randrange(90) for _ in range(40)] for _ in expected],
        "longer": [one.tokens + [5] * 30 for one in expected],
        "ends": [[*one.tokens[:4], END, *one.tokens[4:], END] for one in expected],
        "doubled": [[token for token in one.tokens for _ in range(2)] for one in expected],
    }
    assert_same(llama, prompts, drafted(llama, prompts, drafts[kind], [15] * 12), expected)


def test_rejected_tokens_must_not_be_seen(llama: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(llama, 12)
    expected = greedy(llama, prompts, [15] * 12)
    drafts = [with_errors(one.tokens, 0.3, random.Random(2)) for one in expected]
    keep = draft._keep

    def keep_all(steps: MaskedSteps, accepted: Sequence[int], length: int) -> None:
        keep(steps, accepted, length)
        steps.seen = torch.zeros_like(steps.seen)

    monkeypatch.setattr(draft, "_keep", keep_all)
    found = drafted(llama, prompts, drafts, [15] * 12)
    assert [one.tokens for one in found] != [one.tokens for one in expected]


def passes(model: LLM, prompt: Tensor, text: list[int], limit: int) -> int:
    """How often the network is asked with this draft."""
    calls: list[None] = []
    handle = model.network.register_forward_pre_hook(lambda *_: calls.append(None))
    drafted(model, [prompt], [text], [limit])
    handle.remove()
    return len(calls)


def test_a_right_draft_takes_one_pass_and_an_error_one_more(llama: LLM) -> None:
    prompts = prompts_of(llama, 24)
    texts = [one.tokens for one in greedy(llama, prompts, [20] * 24)]
    prompt, tokens, place = next(
        (prompt, text, place)
        for prompt, text in zip(prompts, texts, strict=True)
        for place in range(5, 14)
        if len(text) == 20 and len(set(text[place - 5 : place + 6])) == 11
    )
    drafted(llama, [prompt], [tokens], [20])  # tries the network
    assert passes(llama, prompt, tokens, 20) == 1
    before, after = tokens[:place], tokens[place + 1 :]
    wrong = next(token for token in range(90) if token not in tokens)
    assert passes(llama, prompt, [*before, wrong, *after], 20) == 2
    assert passes(llama, prompt, [*before, *after], 20) <= 3
    assert passes(llama, prompt, [*before, wrong, *tokens[place:]], 20) <= 3
    assert passes(llama, prompt, [], 20) == 20


def test_a_bad_draft_is_given_up_and_leaves_nothing_behind(
    llama: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts_of(llama, 1)
    choose = random.Random(4)
    never = 91  # a token that the model may not write
    options = SearchOptions(forbidden=(never, END), repetition_guard=False)
    (expected,) = greedy(llama, [prompt], [120], options)
    drafts = {
        "nothing right": [never] * 200,
        "one in two": [one if i % 2 else never for i, one in enumerate(expected.tokens)],
        "one in ten": [never if choose.random() < 0.1 else one for one in expected.tokens],
    }
    forward, slots, read = MaskedSteps.forward, list[int](), list[int]()

    def watched(self: MaskedSteps, tokens: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        slots.append(seen.shape[2] - tokens.shape[1])
        read.append(tokens.shape[1])
        return forward(self, tokens, seen, positions)

    drafted(llama, [prompt], [[]], [2])  # tries the network
    monkeypatch.setattr(MaskedSteps, "forward", watched)
    for kind, text in drafts.items():
        slots.clear()
        read.clear()
        found = drafted(llama, [prompt], [text], [120], options)
        assert_same(llama, [prompt], found, [expected])
        assert max(slots) < len(prompt) + 120  # what it has written, and no more
        assert sum(read) < {"nothing right": 120 + 32, "one in two": 600}.get(kind, 900)
        if kind == "nothing right":
            assert read[:6] == [17, 9, 5, 3, 2, 1]
            assert set(read[6:]) == {1}


def test_the_cache_of_a_batch_holds_no_more_than_the_batch_has_written(
    llama: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(llama, 8)
    expected = greedy(llama, prompts, [40] * 8)
    choose = random.Random(5)
    drafts = [with_errors(one.tokens, 0.3, choose) + [7] * 300 for one in expected]
    forward, slots = MaskedSteps.forward, list[int]()

    def watched(self: MaskedSteps, tokens: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        slots.append(seen.shape[2] - tokens.shape[1])
        return forward(self, tokens, seen, positions)

    monkeypatch.setattr(MaskedSteps, "forward", watched)
    assert_same(llama, prompts, drafted(llama, prompts, drafts, [40] * 8), expected)
    written = sum(len(one.tokens) for one in expected)
    assert max(slots) <= max(map(len, prompts)) + written


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_strict_is_the_same_to_the_bit_in_any_company(
    family: str, load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may be within the window of the network, where its neighbour's limit is beyond."""
    model = sharp(load_llm(family))
    prompts, limits = prompts_of(model, 6), [4, 30, 9, 15, 60, 7]
    if family == "llama":
        model.network.config.sliding_window = 50
    strict = SearchOptions(strict=True, repetition_guard=False)
    drafts = [[*one.tokens[:-1], 5] for one in greedy(model, prompts, limits)]
    opened: list[tuple[str, int]] = []

    def watched(llm: LLM, own: Sequence[Tensor], limit: int) -> Steps:
        found = open_steps(llm, own, limit)
        opened.append((type(found).__name__, limit))
        return found

    monkeypatch.setattr(draft, "open_steps", watched)
    together = drafted(model, prompts, drafts, limits, strict)
    assert [limit for _, limit in opened] == limits
    ways = {name for name, _ in opened}
    assert ways == ({"CopiedSteps"} if family == "bloom" else {"CopiedSteps", "MaskedSteps"})
    for place, one in enumerate(together):
        rows = slice(place, place + 1)
        assert drafted(model, prompts[rows], drafts[rows], limits[rows], strict) == [one]


def test_a_network_that_takes_no_drafts_keeps_the_deadline(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sharp(load_llm("bloom"))
    prompts = prompts_of(model, 3)
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))  # a second a look
    options = SearchOptions(deadline=12.0, repetition_guard=False, strict=True, forbidden=(END,))
    found = drafted(model, prompts, [[1]] * 3, [40] * 3, options)
    assert [one.finish_reason for one in found] == ["deadline"] * 3
    assert len(found[0].tokens) > len(found[1].tokens) == len(found[2].tokens) == 1


def test_where_the_draft_goes_on() -> None:
    text = [10, 11, 12, 13, 14, 15, 16, 17, 18]
    assert realigned(text, 3, 13) == 4  # as it is
    assert realigned(text, 3, 99) == 4  # another token in its place
    assert realigned(text, 3, 15) == 6  # the draft had two more
    assert realigned(text, 3, 18) == 4  # too far away to be the same
    assert realigned(text, 5, 12) == 3  # the draft had left one out
    assert realigned([7, 8, 7], 1, 7) == 3  # forward rather than back
    assert realigned([], 0, 7) == 1


def test_options(llama: LLM) -> None:
    prompts = prompts_of(llama, 12)
    common = greedy(llama, prompts, [15] * 12)[0].tokens[0]
    for options in (
        SearchOptions(forbidden=(common, 7, 30), repetition_guard=False),
        SearchOptions(strict=True),
        SearchOptions(),
    ):
        expected = greedy(llama, prompts, [40] * 12, options)
        drafts = [with_errors(one.tokens, 0.1, random.Random(3)) for one in expected]
        found = drafted(llama, prompts, drafts, [40] * 12, options)
        assert_same(llama, prompts, found, expected)
    late = drafted(llama, prompts, [[1]] * 12, [40] * 12, SearchOptions(deadline=0.0))
    assert {one.finish_reason for one in late} == {"deadline"}
    assert draft_search(llama, [], [], [], [END]) == []

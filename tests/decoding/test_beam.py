"""Beam search: transformers' results, whatever the batch."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.decoding import beam, steps
from isthmus.decoding.beam import Hypothesis, SearchOptions, beam_search, likeliest, repetition
from isthmus.decoding.steps import Steps
from isthmus.errors import IsthmusError
from isthmus.model.llm import LLM, character_tokenizer, new_llm
from isthmus.settings.llms import LLMArchitecture

END = 2
FREE = SearchOptions(repetition_guard=False)  # as generate is


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A random Llama whose distributions are sharp enough to have no ties."""
    torch.manual_seed(0)
    sizes = LLMArchitecture(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return sharp(new_llm(sizes, character_tokenizer()).eval(), 4.0)


def sharp(model: LLM, factor: float = 3.0) -> LLM:
    network: Any = model.network
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
        network.get_output_embeddings().weight[END] *= 2.0  # the end comes now and then
    return model


def noise(count: int, width: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
    return [torch.randn(length, width, generator=generator) for length in lengths]


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    return noise(24, 32)


def search(
    llm: LLM,
    prompts: Sequence[Tensor],
    limit: int = 12,
    options: SearchOptions = FREE,
    **others: Any,
) -> list[Hypothesis]:
    limits = [limit] * len(prompts)
    found = beam_search(llm, prompts, limits, [END], options=options, **others)
    return [hypotheses[0] for hypotheses in found]


def generate(
    llm: LLM, prompts: Sequence[Tensor], ends: Sequence[int] = (END,), **options: Any
) -> list[list[int]]:
    """What transformers finds, an end token included, in one padded batch."""
    longest = max(len(prompt) for prompt in prompts)
    pad = torch.nn.functional.pad
    rows = [pad(p, (0, 0, longest - len(p), 0)) for p in prompts]
    masks = [pad(torch.ones(len(p)).long(), (longest - len(p), 0)) for p in prompts]
    network: Any = llm.network
    found = network.generate(
        inputs_embeds=torch.stack(rows),
        attention_mask=torch.stack(masks),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=3,
        **options,
    )
    texts = []
    for row in found.tolist():
        place = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(row[: place + 1])
    return texts


def assert_as_generate(
    llm: LLM,
    prompts: Sequence[Tensor],
    ours: Sequence[Hypothesis],
    theirs: Sequence[list[int]],
    length_penalty: float = 1.0,
) -> int:
    """The same tokens, or by a tie others of the same score; returns how many ended."""
    ended = 0
    for prompt, one, text in zip(prompts, ours, theirs, strict=True):
        own = [*one.tokens, END] if one.finish_reason == "stop" else one.tokens
        ended += one.finish_reason == "stop"
        if own != text:
            assert score(llm, prompt, text, length_penalty) == pytest.approx(one.score, abs=1e-4)
            assert score(llm, prompt, own, length_penalty) == pytest.approx(one.score, abs=1e-4)
    return ended


@torch.inference_mode()
def token_scores(llm: LLM, prompt: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities by one pass without a cache."""
    text = torch.tensor(tokens)
    logits = llm.network(inputs_embeds=torch.cat([prompt, llm.embed(text)])[None]).logits[0]
    log_probs: Tensor = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(1, text[:, None])[:, 0]


def score(llm: LLM, prompt: Tensor, tokens: Sequence[int], length_penalty: float) -> float:
    return float(token_scores(llm, prompt, tokens).sum() / len(tokens) ** length_penalty)


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize(
    ("beam_size", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.0), (4, 2.0), (7, -1.0)]
)
def test_same_as_generate(
    llm: LLM, beam_size: int, length_penalty: float, early_stopping: bool
) -> None:
    prompts = noise(48, 32, seed=3)
    options = SearchOptions(early_stopping=early_stopping, repetition_guard=False)
    ours = search(llm, prompts, beam_size=beam_size, length_penalty=length_penalty, options=options)
    beams: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    theirs = generate(llm, prompts, num_beams=beam_size, **(beams if beam_size > 1 else {}))
    ended = assert_as_generate(llm, prompts, ours, theirs, length_penalty)
    if length_penalty == 1.0:
        assert 0 < ended < len(prompts)  # both ways of ending were seen


def test_same_as_generate_in_any_family(llm_name: str, load_llm: Callable[..., LLM]) -> None:
    model = sharp(load_llm(llm_name))
    prompts = noise(48, model.dim, seed=4)
    assert_as_generate(
        model, prompts, search(model, prompts), generate(model, prompts, num_beams=4)
    )


def test_several_end_tokens_and_forbidden_ones(llm: LLM) -> None:
    prompts = noise(48, 32, seed=5)
    ends, forbidden = [END, 40, 41], (18, 24, 30, 31, 32)
    options = SearchOptions(forbidden=forbidden, repetition_guard=False)
    found = beam_search(llm, prompts, [12] * 48, ends, options=options)
    theirs = generate(llm, prompts, ends, num_beams=4, suppress_tokens=list(forbidden))
    for hypotheses, text in zip(found, theirs, strict=True):
        assert hypotheses[0].tokens == [token for token in text if token not in ends]
        assert not {*ends, *forbidden} & {token for one in hypotheses for token in one.tokens}
    free = [hypotheses[0] for hypotheses in beam_search(llm, prompts, [12] * 48, ends)]
    assert any({*forbidden} & {*one.tokens} for one in free)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_text_does_not_depend_on_neighbours(
    llm: LLM, prompts: list[Tensor], beam_size: int
) -> None:
    assert_same_alone(llm, prompts, beam_size, sizes=(5, 24))


def test_nor_in_any_family_of_models(llm_name: str, load_llm: Callable[..., LLM]) -> None:
    model = sharp(load_llm(llm_name))
    assert_same_alone(model, noise(8, model.dim), 4, sizes=(4,))


def assert_same_alone(
    llm: LLM, prompts: list[Tensor], beam_size: int, sizes: Sequence[int]
) -> None:
    """Each prompt's tokens are the same in random batches; other prompts have others."""
    alone = [search(llm, [prompt], beam_size=beam_size)[0] for prompt in prompts]
    assert len({tuple(hypothesis.tokens) for hypothesis in alone}) > len(prompts) // 2
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    for size in sizes:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = search(llm, [prompts[i] for i in rows], beam_size=beam_size)
            assert [h.tokens for h in batch] == [alone[i].tokens for i in rows]


def test_without_the_padding_mask_neighbours_would_matter(
    llm: LLM, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [search(llm, [prompt])[0].tokens for prompt in prompts[:8]]
    pad_left = steps.pad_left

    def unmasked(*given: Any) -> tuple[Tensor, Tensor]:
        embeddings, mask = pad_left(*given)
        return embeddings, torch.ones_like(mask)

    monkeypatch.setattr(steps, "pad_left", unmasked)
    assert [h.tokens for h in search(llm, prompts[:8])] != alone


def test_strict_is_the_same_to_the_bit_in_any_company(llm: LLM, prompts: list[Tensor]) -> None:
    strict, prompts = SearchOptions(strict=True), prompts[:12]

    def differing(options: SearchOptions) -> int:
        alone = [search(llm, [prompt], options=options)[0] for prompt in prompts]
        order = list(range(len(prompts)))
        count = 0
        for seed, size in enumerate((3, 12)):
            random.Random(seed).shuffle(order)
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                found = search(llm, [prompts[i] for i in rows], options=options)
                count += sum(one != alone[i] for one, i in zip(found, rows, strict=True))
        return count

    assert differing(strict) == 0
    assert differing(FREE) > 0  # the last bits of the scores


def test_each_utterance_has_its_own_limit(llm: LLM, prompts: list[Tensor]) -> None:
    limits = [1 + i % 5 for i in range(20)]
    found = beam_search(llm, prompts[:20], limits, [END])
    for prompt, limit, hypotheses in zip(prompts, limits, found, strict=False):
        assert len(hypotheses[0].tokens) <= limit
        alone = beam_search(llm, [prompt], [limit], [END])[0]
        assert [h.tokens for h in hypotheses] == [h.tokens for h in alone]


@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
def test_scores_are_normalised_log_probabilities_best_first(
    llm: LLM, prompts: list[Tensor], length_penalty: float
) -> None:
    found = beam_search(llm, prompts, [12] * 24, [END], length_penalty=length_penalty, options=FREE)
    reasons = set()
    for prompt, hypotheses in zip(prompts, found, strict=True):
        assert len(hypotheses) == 4
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        for one in hypotheses:
            reasons.add(one.finish_reason)
            tokens = one.tokens + ([END] if one.finish_reason == "stop" else [])
            expected = token_scores(llm, prompt, tokens)
            assert one.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
            mean = float(expected.sum()) / len(tokens) ** length_penalty
            assert one.score == pytest.approx(mean, abs=1e-4)
    assert reasons == {"stop", "length"}


def test_half_precision(load_llm: Callable[..., LLM]) -> None:
    model = sharp(load_llm("llama", dtype="bfloat16"))
    found = search(model, noise(8, model.dim))
    assert all(len(one.log_probs) in (len(one.tokens), len(one.tokens) + 1) for one in found)
    assert all(abs(one.score * len(one.log_probs) - sum(one.log_probs)) < 1e-3 for one in found)


@pytest.mark.parametrize("size", [60, 64 * 200, 1000])
def test_likeliest(size: int) -> None:
    logits = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    found, tokens = likeliest(logits, 9, forbidden=[7, 11, 10**6])
    expected[..., [7, 11]] = -torch.inf
    values, places = expected.topk(9)
    assert torch.equal(tokens, places)
    torch.testing.assert_close(found, values)


class Script(Steps):
    """A language model that says what `follow` does of the text so far, and little else."""

    def __init__(self, follow: Callable[[list[int]], int], count: int):
        self.follow = follow
        self.texts: list[list[list[int]]] = [[[]] for _ in range(count)]

    def prefill(self) -> Tensor:
        logits = torch.zeros(len(self.texts), len(self.texts[0]), 50)
        for row, texts in zip(logits, self.texts, strict=True):
            for values, text in zip(row, texts, strict=True):
                values[self.follow(text)] = 9.0
        return logits

    def next(
        self, rows: Sequence[int], parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        self.texts = [
            [[*self.texts[row][p], t] for p, t in zip(own, new, strict=True)]
            for row, own, new in zip(rows, parents, tokens, strict=True)
        ]
        return self.prefill()


@pytest.fixture
def scripted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Hypothesis]]:
    def run(follow: Callable[[list[int]], int], limit: int, **options: Any) -> list[Hypothesis]:
        monkeypatch.setattr(beam, "open_steps", lambda llm, own, _: Script(follow, len(own)))
        return search(llm, [torch.zeros(1, 32)] * 2, limit, SearchOptions(), **options)

    return run


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 20])
def test_loops_are_closed_after_one_round(
    scripted: Callable[..., list[Hypothesis]], cycle: int, beam_size: int
) -> None:
    for one in scripted(lambda text: 10 + len(text) % cycle, 400, beam_size=beam_size):
        assert one.finish_reason == "repetition"
        assert one.tokens == list(range(10, 10 + cycle))
        assert len(one.log_probs) == cycle


class Loops(Script):
    """Says one word for ever, surely; less surely, and only at first, another that ends."""

    def prefill(self) -> Tensor:
        logits = torch.full((len(self.texts), len(self.texts[0]), 50), -30.0)
        for row, texts in zip(logits, self.texts, strict=True):
            for values, text in zip(row, texts, strict=True):
                ended = text[-1:] == [20]
                values[END if ended else 10] = 9.0
                values[20] = 6.0 if not text else -30.0
        return logits


def test_a_loop_is_ranked_by_its_whole_text_and_behind_an_end(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beam, "open_steps", lambda llm, own, _: Loops(lambda text: 10, len(own)))
    (found,) = beam_search(llm, [torch.zeros(1, 32)], [30], [END], beam_size=2)
    best, loop = found
    assert (best.finish_reason, best.tokens) == ("stop", [20])
    assert (loop.finish_reason, loop.tokens) == ("repetition", [10])
    first = torch.tensor([9.0, 6.0]).log_softmax(-1)
    assert best.score == pytest.approx(float(first[1]) / 2, abs=1e-3)
    assert loop.score == pytest.approx(float(first[0]) / 8, abs=1e-3)  # not that of one word
    assert loop.score > best.score


def test_an_end_comes_before_what_the_deadline_broke_off() -> None:
    rules = beam.Rules(frozenset([END]), 2, 1.0, SearchOptions())
    search = beam.Search(0, 30, rules, [beam.Open([], [], 0.0)])
    search.advance([(-0.1, -0.1, 0, 10), (-2.0, -2.0, 0, END), (-3.0, -3.0, 0, 11)])
    search.close("deadline")
    assert [one.finish_reason for one in search.finished] == ["stop", "deadline"]
    assert search.finished[0].score < search.finished[1].score


def test_longer_cycles_and_fewer_repeats_are_no_loops(
    scripted: Callable[..., list[Hypothesis]],
) -> None:
    (one, _) = scripted(lambda text: 10 + len(text) % 21, 300, beam_size=1)
    assert (one.finish_reason, len(one.tokens)) == ("length", 300)
    (one, _) = scripted(lambda text: 10 if len(text) < 7 else END, 300, beam_size=1)
    assert (one.finish_reason, one.tokens) == ("stop", [10] * 7)


def test_the_end_first(scripted: Callable[..., list[Hypothesis]]) -> None:
    for one in scripted(lambda text: END, 30):
        assert (one.finish_reason, one.tokens, len(one.log_probs)) == ("stop", [], 1)


def test_logits_that_are_no_numbers(llm: LLM, prompts: list[Tensor]) -> None:
    with pytest.raises(IsthmusError, match=r"NaN.*llm\.dtype"):
        beam_search(llm, [prompts[0] * torch.nan], [5], [END])


def test_no_way_to_go_on(llm: LLM, prompts: list[Tensor]) -> None:
    nothing = SearchOptions(forbidden=tuple(range(100)))
    for one in search(llm, prompts[:3], options=nothing):
        assert (one.tokens, one.finish_reason) == ([], "length")


def test_repetition() -> None:
    assert repetition([]) == 0
    assert repetition([5] * 7) == 0
    assert repetition([1, *[5] * 8]) == 1
    assert repetition([*[5, 6] * 8, 5]) == 2
    assert repetition([*[5] * 8, 6]) == 0
    assert repetition([*range(20)] * 8) == 20
    assert repetition([*range(21)] * 9) == 0


def test_past_the_deadline_open_hypotheses_come_back(llm: LLM, prompts: list[Tensor]) -> None:
    late = search(llm, prompts, options=SearchOptions(deadline=0.0))
    assert "deadline" in {one.finish_reason for one in late}
    assert all(len(one.log_probs) == 1 for one in late)
    assert search(llm, prompts, options=SearchOptions(deadline=600.0)) == search(
        llm, prompts, options=SearchOptions()
    )


class Spelling:
    """A scorer that wants a text of its own for each utterance, and its end after it."""

    def __init__(self, texts: Sequence[Sequence[int]], weight: float):
        self.texts, self.weight = texts, weight
        self.seen: set[tuple[int, ...]] = set()

    def start(self, utterance: int) -> Any:
        return (utterance, ())

    def score(self, states: Sequence[Any], tokens: Tensor) -> Tensor:
        wanted = [[self._next(state)] for state in states]
        return self.weight * (tokens == torch.tensor(wanted)).float()

    def extend(self, states: Sequence[Any], tokens: Sequence[int]) -> Sequence[Any]:
        found = [(place, (*text, t)) for (place, text), t in zip(states, tokens, strict=True)]
        self.seen |= {text for _, text in found}
        return found

    def finish(self, states: Sequence[Any]) -> Tensor:
        return self.weight * torch.tensor([self._next(state) == END for state in states]).float()

    def _next(self, state: Any) -> int:
        utterance, text = state
        wanted = [*self.texts[utterance], END]
        return wanted[len(text)] if [*text] == wanted[: len(text)] else -1


@pytest.mark.parametrize("beam_size", [1, 4])
def test_scorers_have_a_say(llm: LLM, prompts: list[Tensor], beam_size: int) -> None:
    texts = [[10 + i, 40, 50 + i, 60][: 1 + i % 4] for i in range(8)]
    everything = SearchOptions(candidates=100, repetition_guard=False)
    spelling = Spelling(texts, 100.0)
    found = search(llm, prompts[:8], 12, everything, scorers=[spelling], beam_size=beam_size)
    assert [one.tokens for one in found] == texts
    for prompt, one in zip(prompts, found, strict=False):
        expected = token_scores(llm, prompt, [*one.tokens, END])
        assert one.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
        total = float(expected.sum()) + 100.0 * len(expected)
        assert one.score == pytest.approx(total / len(expected), abs=1e-3)
    assert {tuple(text[:1]) for text in texts if len(text) > 1} <= spelling.seen


def test_scorers_with_nothing_to_say_change_nothing(llm: LLM, prompts: list[Tensor]) -> None:
    free = search(llm, prompts)
    silent = search(llm, prompts, scorers=[Spelling([[]] * 24, 0.0), Spelling([[]] * 24, 0.0)])
    assert [one.tokens for one in silent] == [one.tokens for one in free]
    assert [one.score for one in silent] == pytest.approx([one.score for one in free], abs=1e-5)


def test_no_prompts(llm: LLM) -> None:
    assert beam_search(llm, [], [], [END]) == []
    assert list(itertools.chain(*beam_search(llm, [], [], [END], options=SearchOptions()))) == []

"""Beam search: transformers' results, whatever the batch."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from isthmus.decoding.beam import Hypothesis, beam_search
from isthmus.model.llm import LLM, LLMArchitecture, character_tokenizer

END = 2


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A random Llama whose distributions are sharp enough to have no ties."""
    torch.manual_seed(0)
    sizes = LLMArchitecture(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = sizes.build(character_tokenizer()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        model.network.get_output_embeddings().weight[END] *= 2.0  # the end comes now and then
    return model


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (24,), generator=generator).tolist()
    return [torch.randn(length, 32, generator=generator) for length in lengths]


def search(llm: LLM, prompts: list[Tensor], limit: int = 12, **options: float) -> list[Hypothesis]:
    found = beam_search(llm, prompts, [limit] * len(prompts), [END], **options)  # type: ignore[arg-type]
    return [hypotheses[0] for hypotheses in found]


@pytest.mark.parametrize(
    ("beam_size", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.0), (4, 2.0)]
)
def test_same_as_generate(
    llm: LLM, prompts: list[Tensor], beam_size: int, length_penalty: float
) -> None:
    ours = search(llm, prompts, beam_size=beam_size, length_penalty=length_penalty)
    ended = 0
    for prompt, hypothesis in zip(prompts, ours, strict=True):
        options = {"num_beams": beam_size} | (
            {} if beam_size == 1 else {"length_penalty": length_penalty}
        )
        theirs = llm.network.generate(
            inputs_embeds=prompt[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=3,
            **options,
        )[0].tolist()
        tokens = list(itertools.takewhile(lambda token: token != END, theirs))
        assert hypothesis.tokens == tokens
        assert (hypothesis.finish_reason == "stop") == (END in theirs)
        ended += END in theirs
    if length_penalty == 1.0:
        assert 0 < ended < len(prompts)  # both ways of ending were seen


@pytest.mark.parametrize("beam_size", [1, 4])
def test_text_does_not_depend_on_neighbours(
    llm: LLM, prompts: list[Tensor], beam_size: int
) -> None:
    assert_same_alone(llm, prompts, beam_size, sizes=(3, 8, 24))


@pytest.mark.parametrize("beam_size", [1, 4])
def test_nor_in_any_family_of_models(
    llm_name: str, load_llm: Callable[..., LLM], prompts: list[Tensor], beam_size: int
) -> None:
    model = load_llm(llm_name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)  # sharp enough not to tie
    assert_same_alone(model, [row[:, : model.dim] for row in prompts[:8]], beam_size, sizes=(4,))


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
    from isthmus.decoding import beam

    alone = [search(llm, [prompt])[0].tokens for prompt in prompts[:8]]
    prefill = beam._Steps.prefill

    def unmasked(self: beam._Steps) -> Tensor:
        self.mask = torch.ones_like(self.mask)
        return prefill(self)

    monkeypatch.setattr(beam._Steps, "prefill", unmasked)
    assert [h.tokens for h in search(llm, prompts[:8])] != alone


def test_each_utterance_has_its_own_limit(llm: LLM, prompts: list[Tensor]) -> None:
    limits = [1 + i % 5 for i in range(20)]
    found = beam_search(llm, prompts[:20], limits, [END])
    for prompt, limit, hypotheses in zip(prompts, limits, found, strict=False):
        assert len(hypotheses[0].tokens) <= limit
        alone = beam_search(llm, [prompt], [limit], [END])[0]
        assert [h.tokens for h in hypotheses] == [h.tokens for h in alone]


def test_scores_are_normalised_log_probabilities_best_first(
    llm: LLM, prompts: list[Tensor]
) -> None:
    hypotheses = beam_search(llm, prompts[:1], [12], [END])[0]
    assert len(hypotheses) == 4
    assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
    for hypothesis in hypotheses:
        tokens = hypothesis.tokens + ([END] if hypothesis.finish_reason == "stop" else [])
        with torch.no_grad():
            embeddings = torch.cat([prompts[0], llm.embed(torch.tensor(tokens))])
            logits = llm.network(inputs_embeds=embeddings[None]).logits[0]
        log_probs = logits.log_softmax(-1)[len(prompts[0]) - 1 : -1]
        total = log_probs.gather(1, torch.tensor(tokens)[:, None]).sum()
        assert hypothesis.score == pytest.approx(float(total) / len(tokens), abs=1e-4)


def test_several_end_tokens(llm: LLM, prompts: list[Tensor]) -> None:
    found = beam_search(llm, prompts, [12] * len(prompts), [END, 40, 41])
    for hypotheses in found:
        assert not {END, 40, 41} & set(hypotheses[0].tokens)

"""A frozen language model that is spread over processes gives the numbers of a whole one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from isthmus.decoding.beam import beam_search
from isthmus.errors import IsthmusError
from isthmus.model.encoder import build_encoder
from isthmus.model.layers import checkpoint_layers, decoder_layers
from isthmus.model.llm import LLM
from isthmus.model.projector import build_projector
from isthmus.model.prompt import PaperPrompt
from isthmus.model.quantise import quantise
from isthmus.model.speech_llm import SpeechLLM
from isthmus.settings.base import Tune
from isthmus.settings.projectors import LinearProjectorSettings
from isthmus.training import parallel
from isthmus.training.parallel import Ranks

Build = Callable[..., SpeechLLM]
Launch = Callable[..., list[Any]]


@pytest.fixture
def speech_llm(encoder_settings: Callable[[str], Any], load_llm: Callable[..., LLM]) -> Build:
    """A model of tiny parts, its language model frozen, with adapters, or trained whole."""

    def build(tune: Tune, int8: bool = False) -> SpeechLLM:
        torch.manual_seed(3)
        encoder, llm = build_encoder(encoder_settings("conformer")), load_llm("llama", tune=tune)
        for name, value in llm.named_parameters():
            if "lora_B" in name:  # zero at first, and then the other has no gradient
                nn.init.normal_(value, std=0.3)
        if int8:
            quantise(llm.network.requires_grad_(False), "int8")
        projector = build_projector(
            LinearProjectorSettings(downsample_rate=2, hidden=32), encoder, llm
        )
        return SpeechLLM(encoder, projector, llm, PaperPrompt(), {"llm": tune}).eval()

    return build


def shard_and_compare(
    model: SpeechLLM, waveforms: Tensor, packed: bool, recomputed: bool, ranks: Ranks
) -> dict[str, Any]:
    """What a rank finds for utterances of its own, with whole blocks and with its share of them."""
    samples = torch.tensor([9_000 + 4_000 * ranks.rank, 16_000])

    def passes() -> list[Any]:
        found = []
        for _ in range(2):
            model.zero_grad()
            total, *counts = model.loss(waveforms, samples, ["one", f"number {ranks.rank}"])
            total.backward()
            gradients = {n: p.grad for n, p in model.trainable().items()}
            with torch.no_grad():
                again = model.loss(waveforms, samples, ["one", f"number {ranks.rank}"])[0]
            found.append(([total.detach(), again, *counts], gradients))
        return found

    def decode() -> Any:
        with torch.no_grad():
            prompts = [model.sequence(row)[0] for row in model.embed_audio(waveforms, samples)]
        return beam_search(model.llm, prompts, [9, 9], [model.end_token], beam_size=2)

    if packed:
        assert "packed" in model.pack()
    whole = passes(), decode()
    if recomputed:
        checkpoint_layers(model.llm.network)
    ranks.shard(model.llm.network)
    spread = passes(), decode(), passes()  # training goes on after decoding
    blocks = [value for b in decoder_layers(model.llm.network) for value in b.parameters()]
    shares = [value for value in blocks if isinstance(value, DTensor)]
    return {
        "whole": whole,
        "spread": spread,
        "own": sum(value.to_local().numel() for value in shares) / sum(v.numel() for v in shares),
        "shared": all(isinstance(v, DTensor) != v.requires_grad for v in blocks),
        "outside": sum(isinstance(v, DTensor) for v in model.parameters()) - len(shares),
    }


VARIANTS: dict[str, tuple[Tune, bool, bool, bool]] = {  # tune, int8, packed, blocks recomputed
    "padded": ("frozen", False, False, False),
    "packed": ("frozen", False, True, False),
    "recomputed": ("frozen", False, True, True),
    "int8": ("frozen", True, True, False),
    "lora": ("lora", False, False, False),
    "lora packed": ("lora", False, True, False),
    "lora recomputed": ("lora", False, True, True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_spread_llm_gives_the_numbers_of_a_whole_one(
    launch: Launch,
    variant: str,
    speech_llm: Build,
    waves: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    tune, int8, packed, recomputed = VARIANTS[variant]
    waveforms = torch.stack([waves(16_000, seed=1), waves(16_000, seed=2)])
    job = partial(shard_and_compare, speech_llm(tune, int8), waveforms, packed, recomputed)
    outcomes = launch(job, 2, tmp_path)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.said
        found = outcome.result
        (expected, hypotheses), (before, spoken, after) = found["whole"], found["spread"]
        for losses, gradients in before + after:
            torch.testing.assert_close(losses, expected[0][0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gradients, expected[0][1], rtol=1e-6, atol=1e-6)
        assert [[h.tokens for h in one] for one in spoken] == [
            [h.tokens for h in one] for one in hypotheses
        ]
        assert found["own"] == pytest.approx(0.5, abs=0.05)
        assert found["shared"]
        assert found["outside"] == 0
    losses = [outcome.result["whole"][0][0][0][0] for outcome in outcomes]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("root", [True, False])
def test_blocks_of_a_spread_llm_are_freed_in_time_by_its_root(
    launch: Launch,
    root: bool,
    speech_llm: Build,
    waves: Callable[..., Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, waveforms = speech_llm("frozen"), waves(16_000)[None]
    blocks = decoder_layers(model.llm.network)
    whole: list[int] = []

    def count(*arguments: Any) -> None:
        values = [next(block.parameters()) for block in blocks]
        whole.append(sum(not isinstance(value, DTensor) for value in values))

    def some(module: nn.Module, ignored_params: set[nn.Parameter]) -> None:
        if root or module in blocks:
            fully_shard(module, ignored_params=ignored_params)

    def job(ranks: Ranks) -> list[int]:
        ranks.shard(model.llm.network)
        for block in blocks:
            block.register_forward_hook(count)  # after the one by which a block is freed
        with torch.no_grad():
            model.loss(waveforms, torch.tensor([16_000]), ["one"])
        return whole

    monkeypatch.setattr(parallel, "fully_shard", some)
    for outcome in launch(job, 2, tmp_path):
        assert outcome.result == ([0, 0] if root else [1, 2]), outcome.said


def test_what_cannot_be_spread_is_refused(
    launch: Launch, speech_llm: Build, tmp_path: Path
) -> None:
    model = speech_llm("full")
    with pytest.raises(IsthmusError, match="there is one"):
        Ranks().shard(model.llm.network)
    outcomes = launch(lambda ranks: ranks.shard(model.llm.network), 2, tmp_path)
    codes = {outcome.code for outcome in outcomes}
    assert codes <= {1, 75}  # one may find the other gone before it comes so far itself
    assert 1 in codes
    for outcome in (one for one in outcomes if one.code == 1):
        assert "train.shard spreads what is frozen" in outcome.said


class WithState(nn.Parameter):
    """As the 4-bit weights of bitsandbytes are."""


def test_weights_that_are_more_than_numbers_are_not_spread(
    launch: Launch, speech_llm: Build, tmp_path: Path
) -> None:
    model = speech_llm("frozen")
    (block, *_) = decoder_layers(model.llm.network)
    for part in block.modules():
        if isinstance(part, nn.Linear):
            part.weight = WithState(part.weight.data, requires_grad=False)
    outcomes = launch(lambda ranks: ranks.shard(model.llm.network), 2, tmp_path)
    codes = {outcome.code for outcome in outcomes}
    assert codes <= {1, 75}  # one may find the other gone before it comes so far itself
    assert 1 in codes
    for outcome in (one for one in outcomes if one.code == 1):
        assert "cannot spread weights of type WithState" in outcome.said

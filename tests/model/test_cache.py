"""Whether hypotheses can go on from what a network remembers: known before it is trained with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus.errors import IsthmusError
from isthmus.model import cache
from isthmus.model.cache import CopiedSteps, require_cache
from isthmus.model.llm import LLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
RECURRENT: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA_HEADS},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
WITHOUT: dict[str, dict[str, Any]] = {
    "rwkv": {"attention_hidden_size": 32},
    "mamba": {"state_size": 8},  # since transformers 5.24 it has one, which padding spoils
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def network_of(kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | sizes)))
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
    return network.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes(
    llm_name: str, load_llm: Callable[..., LLM], dtype: torch.dtype
) -> None:
    llm = load_llm(llm_name)
    llm.store(dtype)
    require_cache(llm.network, "a model")


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_network_whose_state_can_be_moved(kind: str) -> None:
    require_cache(network_of(kind, RECURRENT[kind]), "a model")


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_network_that_cannot_be_decoded_with(kind: str) -> None:
    network = network_of(kind, WITHOUT[kind])
    with pytest.raises(IsthmusError, match=rf"llm\.path: a model .* {type(network).__name__}") as e:
        require_cache(network, "a model")
    assert "\n" not in str(e.value)


def test_a_cache_that_mixes_hypotheses_is_seen(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.Cache, "reorder_cache", lambda self, beams: None)
    with pytest.raises(IsthmusError, match="not what it computes from the whole"):
        require_cache(load_llm("llama").network, "a model")


def test_padding_that_is_seen_is_noticed(
    load_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    pad_left = cache.pad_left

    def unmasked(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, mask = pad_left(*given)
        return embeddings, torch.ones_like(mask)

    monkeypatch.setattr(cache, "pad_left", unmasked)
    with pytest.raises(IsthmusError, match="not what it computes from the whole"):
        require_cache(load_llm("llama").network, "a model")


def test_the_name_is_the_one_that_transformers_takes(
    load_llm: Callable[..., LLM], recwarn: pytest.WarningsRecorder
) -> None:
    llm = load_llm("llama")
    steps = CopiedSteps(llm.network, [llm.embed(torch.tensor([5, 6, 7]))])
    steps.prefill()
    steps.next([0], [[0]], [[9]])
    assert steps.cache.get_seq_length() == 4
    assert not [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)]

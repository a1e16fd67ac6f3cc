"""Every layer of a network found, recomputed in the backward pass, compiled."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from isthmus.errors import IsthmusError
from isthmus.model import layers as layers_module
from isthmus.model import packing
from isthmus.model.layers import checkpoint_layers, compile_layers, decoder_layers, recompute_gates
from isthmus.model.llm import LLM
from isthmus.settings.llms import LoraSettings

LoadLLM = Callable[..., LLM]
WIDTH = 32


def llama(layers: int = 3, attention_dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=40,
        attention_dropout=attention_dropout,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def step(network: Any, batch: int = 2, length: int = 9) -> list[Tensor]:
    """Loss, gradient to the embeddings, and those of what is trained."""
    torch.manual_seed(1)  # for dropout
    network.zero_grad()
    embeddings = noise(batch, length, WIDTH).requires_grad_()
    loss = network(inputs_embeds=embeddings, use_cache=False).logits.square().mean()
    loss.backward()
    trained = [value.grad for value in network.parameters() if value.grad is not None]
    return [loss.detach(), embeddings.grad, *trained]  # type: ignore[list-item]  # it has one


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def saved_bytes(run: Callable[[], Any], network: nn.Module) -> int:
    """What the forward pass `run` keeps for the backward pass, besides the weights."""
    weights = {value.data_ptr() for value in network.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        result = run()  # alive, so that no storage is used twice
    assert result is not None
    return sum(kept.values())


def test_layers_of_language_models(llm_name: str, load_llm: LoadLLM) -> None:
    network = load_llm(llm_name).network
    found = decoder_layers(network)
    assert len(found) == 2
    assert len({type(layer) for layer in found}) == 1


def test_layers_are_the_same_with_adapters(load_llm: LoadLLM) -> None:
    plain = [type(layer) for layer in decoder_layers(load_llm("llama").network)]
    settings = LoraSettings(dropout=0.1)
    adapted = load_llm("llama", tune="lora", lora=settings).network
    assert [type(layer) for layer in decoder_layers(adapted)] == plain


@pytest.mark.parametrize("name", ["whisper", "hubert-layer", "wavlm-group", "parakeet"])
def test_layers_of_encoders(name: str, model_folder: Callable[[str], Path]) -> None:
    network = AutoModel.from_pretrained(model_folder(name))
    encoder = getattr(network, "encoder", network)
    found = {id(layer) for layer in decoder_layers(network)}
    assert {id(layer) for layer in encoder.layers} <= found


def test_layers_without_marks_and_without_layers() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.ReLU()])
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    network = Plain()
    assert decoder_layers(network) == list(network.blocks)
    with pytest.raises(IsthmusError, match="Linear has no repeated layers"):
        decoder_layers(nn.Linear(2, 2))


def test_recomputed_layers_give_the_same_gradients_from_less_memory() -> None:
    network = llama()
    embeddings = noise(2, 50, WIDTH).requires_grad_()
    run = partial(network, inputs_embeds=embeddings, use_cache=False)
    expected, before = step(network), saved_bytes(run, network)
    checkpoint_layers(network)
    assert not network.training
    assert_equal(step(network), expected)
    assert saved_bytes(run, network) < before / 4


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_recomputed_layers_drop_the_same(tune: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = llama(attention_dropout=0.3).train()
    if tune == "full":
        network.requires_grad_(True)
    else:
        config = LoraConfig(
            r=4, lora_dropout=0.3, target_modules=["q_proj"], init_lora_weights=False
        )
        inject_adapter_in_model(config, network)
    expected = step(network)
    assert len(expected) > 2
    assert not torch.equal(expected[0], step(network.eval())[0])  # dropout there was
    checkpoint_layers(network.train())
    assert_equal(step(network), expected)

    def forgetful(*inputs: Any, preserve_rng_state: bool, **options: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(*inputs, preserve_rng_state=False, **options)

    monkeypatch.setattr(layers_module, "checkpoint", forgetful)
    assert not torch.equal(step(network)[1], expected[1])


def test_recomputed_layers_of_an_encoder(model_folder: Callable[[str], Path]) -> None:
    network: Any = AutoModel.from_pretrained(model_folder("wavlm-layer"), layerdrop=0.0)
    network.config.apply_spec_augment = False

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        network.zero_grad()
        network(noise(2, 4000)).last_hidden_state.square().mean().backward()
        return [value.grad for value in network.parameters() if value.grad is not None]

    network.train()
    expected = step()
    checkpoint_layers(network)
    assert_equal(step(), expected)


def test_layers_are_not_recomputed_without_gradient_or_with_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*inputs: Any, **options: Any) -> Any:
        raise AssertionError("recomputed")

    network = llama()
    embeddings = noise(1, 5, WIDTH).requires_grad_()
    expected = network(inputs_embeds=embeddings, use_cache=True).logits
    checkpoint_layers(network)
    monkeypatch.setattr(layers_module, "checkpoint", forbidden)
    with torch.no_grad():
        assert torch.equal(network(inputs_embeds=embeddings, use_cache=False).logits, expected)
    assert torch.equal(network(inputs_embeds=embeddings, use_cache=True).logits, expected)
    with pytest.raises(AssertionError, match="recomputed"):
        network(inputs_embeds=embeddings, use_cache=False)


class Counter:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def test_layers_compiled_and_recomputed_give_the_same() -> None:
    network = llama(1)
    expected = step(network)
    torch._dynamo.reset()
    compile_layers(network, "aot_eager")
    checkpoint_layers(network)
    for one, other in zip(step(network), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_layers_are_compiled_once_for_all_layers_sizes_and_caches() -> None:
    graphs = []
    for layers in (3, 10):  # more than the compiler's limit for one function
        network, counter = llama(layers), Counter()
        compile_layers(network, counter)
        for batch, length in ((2, 9), (3, 7), (5, 20), (2, 31)):
            step(network, batch, length)
        network.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        graphs.append(counter.graphs)
    assert graphs[0] == graphs[1] <= 2


@pytest.mark.parametrize("opaque", [True, False])
def test_compiled_layers_take_any_number_of_packed_utterances(
    opaque: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the compiler does not look into the attention, which loops over utterances."""
    attention: Callable[..., Any] = packing._attention
    attention = (
        torch.compiler.disable(attention)
        if opaque
        else getattr(attention, "_torchdynamo_orig_callable", attention)
    )
    name = packing.PACKED + "sdpa"
    before = AttentionInterface()[name]
    network, plain, counter = llama(1), llama(1), Counter()
    packing.choose_attention(network)
    packing.choose_attention(plain)
    graphs = []
    compile_layers(network, counter)
    AttentionInterface.register(name, partial(attention, ordinary="sdpa"))
    try:
        for lengths in ((5, 7), (9, 4, 6), (8,)):
            embeddings = noise(sum(lengths), WIDTH).requires_grad_()
            found, expected = (
                packing.packed_hidden(one, embeddings, lengths) for one in (network, plain)
            )
            assert torch.equal(found, expected)
            graphs.append(counter.graphs)
    finally:
        AttentionInterface.register(name, before)
    assert (graphs[0] == graphs[-1]) == opaque


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral"])
def test_gates_are_made_again_instead_of_kept(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=16,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=20,
    )
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    embeddings = torch.randn(1, 30, 16, requires_grad=True)

    def loss_and_memory() -> tuple[Tensor, Tensor, int]:
        kept: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            kept[value.untyped_storage().data_ptr()] = value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = network.base_model(inputs_embeds=embeddings).last_hidden_state.square().sum()
        return loss, torch.autograd.grad(loss, embeddings)[0], sum(kept.values())

    before = loss_and_memory()
    assert recompute_gates(network) == 2
    after = loss_and_memory()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] - after[2] >= 2 * 30 * 96 * 4 * 0.9  # a wide tensor a layer


def test_a_gated_layer_that_does_more_is_left_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
            self.down_proj, self.act_fn = nn.Linear(8, 4), nn.SiLU()

        def forward(self, hidden: Tensor) -> Tensor:
            inner = self.act_fn(self.gate_proj(hidden) * 0.5) * self.up_proj(hidden)
            return self.down_proj(inner)

    assert recompute_gates(nn.Sequential(Scaled())) == 0

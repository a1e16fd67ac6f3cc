"""Frozen language models of fewer bits: how much smaller, how near, and what the gradient says."""

import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from isthmus.errors import IsthmusError
from isthmus.model import quantise as quantise_module
from isthmus.model.llm import LLM
from isthmus.model.quantise import FP8, Kind, RowScaledLinear, quantise

WIDTH = 128
KINDS = get_args(Kind)
# Cosine to full precision, of hidden states and of the gradient to the embeddings. Measured on this
# network: int8 0.9999, fp8 0.996 and 0.994, int4 0.960 and 0.914.
NEAR = {"int8": (0.9995, 0.9995), "fp8": (0.99, 0.985), "int4": (0.94, 0.88)}
BITS = {"int8": 8, "fp8": 8, "int4": 4}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "int4":
        pytest.importorskip("bitsandbytes", reason="needs the extra `quant`")
    chosen: Kind = request.param
    return chosen


def llama(dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
    }
    config = AutoConfig.for_model("llama", **sizes | values)
    network = AutoModelForCausalLM.from_config(config)
    for value in network.parameters():
        if value.ndim > 1:
            value.data.normal_(std=value.shape[1] ** -0.5)
    return network.eval().requires_grad_(False).to(dtype)


def run(network: Any) -> tuple[Tensor, Tensor]:
    """Last hidden states, and the gradient of a loss to the embeddings."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 9, WIDTH, generator=generator).to(network.dtype).requires_grad_()
    output = network(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
    targets = torch.arange(18) % 40
    nn.functional.cross_entropy(output.logits.float().flatten(0, 1), targets).backward()
    assert embeddings.grad is not None
    return output.hidden_states[-1].detach(), embeddings.grad


def cosine(one: Tensor, other: Tensor) -> float:
    return nn.functional.cosine_similarity(
        one.flatten().double(), other.flatten().double(), 0
    ).item()


def near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], kind: str) -> None:
    for one, other, bound in zip(found, expected, NEAR[kind], strict=True):
        assert cosine(one, other) > bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_near_full_precision(kind: Kind, dtype: torch.dtype) -> None:
    network = llama(dtype)
    quantise(network, kind)
    found = run(network)
    assert found[0].dtype == found[1].dtype == dtype
    near(found, run(llama()), kind)
    assert not any(value.requires_grad for value in network.parameters())


def test_fewer_bits_are_worse() -> None:
    """The bounds above can fail: each kind is further from full precision than the better one."""
    pytest.importorskip("bitsandbytes", reason="needs the extra `quant`")
    expected, cosines = run(llama()), []
    for kind in ("int8", "fp8", "int4"):
        network = llama()
        quantise(network, kind)
        cosines.append([cosine(*pair) for pair in zip(run(network), expected, strict=True)])
    for part in range(2):
        assert cosines[0][part] > cosines[1][part] > cosines[2][part]
        assert cosines[2][part] < NEAR["fp8"][part] < cosines[1][part] < NEAR["int8"][part]


def test_memory(kind: Kind) -> None:
    network, plain = llama(torch.bfloat16), llama(torch.bfloat16)
    quantise(network, kind)

    def size(layers: nn.Module) -> int:
        return sum(value.nbytes for value in layers.parameters())

    linear = sum(m.weight.numel() for m in plain.model.layers.modules() if type(m) is nn.Linear)
    # int4 also keeps a 32-bit scale for each 64 weights, beside its parameters
    assert size(network.model.layers) == pytest.approx(linear * BITS[kind] / 8, rel=0.02)
    assert torch.equal(network.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(network.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_layers_are_given_up_one_by_one(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is the model as it was loaded, and not that and the quantised one beside it."""
    network, alive = llama(), []
    weights = [
        weakref.ref(module.weight) for module in network.modules() if type(module) is nn.Linear
    ]
    move = nn.Module.__setattr__

    def observed(module: nn.Module, name: str, value: Any) -> None:
        if name in ("q_proj", "down_proj"):
            alive.append(sum(weight() is not None for weight in weights))
        move(module, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", observed)
    quantise(network, kind)
    assert alive == [22, 16, 15, 9, 8, 2]  # of 3 layers with 7 each, and the head


def test_kept_for_the_backward_pass_are_the_small_weights(kind: Kind) -> None:
    network = llama(num_hidden_layers=1)
    quantise(network, kind)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer = network.model.layers[0].mlp.down_proj
        layer(torch.randn(2, layer.in_features, requires_grad=True))
    assert sum(value.nbytes for value in kept) < 1.1 * layer.in_features * layer.out_features


def test_gradient_after_passes_without(kind: Kind) -> None:
    """bitsandbytes would rearrange its weights for good, on some CPUs."""
    network = llama()
    quantise(network, kind)
    expected = run(network)
    with torch.no_grad():
        network(torch.tensor([[3, 4]]))
    network.train()
    network.eval()
    for one, other in zip(run(network.to("cpu")), expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(run(deepcopy(network)), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("number", [torch.int8, FP8])
def test_product_and_gradient_are_those_of_the_rounded_numbers(number: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).requires_grad_(False)
    linear.weight[5] = 0  # a row without a scale
    layer = RowScaledLinear(linear, number)
    inputs = (torch.randn(2, 7, 32) * torch.logspace(-3, 3, 7)[:, None]).requires_grad_()
    weight = layer.weight.double() * layer.scale.double()
    step = 0.5 / 127 if number == torch.int8 else 2.0**-4
    reach = (
        linear.weight.abs().amax(1, keepdim=True) if number == torch.int8 else linear.weight.abs()
    )
    assert ((weight - linear.weight).abs() <= step * reach + 1e-3).all()
    rounded = inputs.detach().double()
    if number == FP8:
        scale = inputs.detach().abs().amax(-1, keepdim=True) / 448
        rounded = (inputs.detach() / scale).to(FP8).double() * scale.double()
    expected = rounded @ weight.T + linear.bias
    outputs = layer(inputs)
    torch.testing.assert_close(outputs.double(), expected, rtol=0.005, atol=1e-3)
    gradient = torch.randn(2, 7, 48)
    outputs.backward(gradient)
    assert inputs.grad is not None
    torch.testing.assert_close(
        inputs.grad.double(), gradient.double() @ weight, rtol=1e-4, atol=1e-5
    )


def test_a_row_does_not_depend_on_the_others(kind: Kind) -> None:
    network = llama()
    quantise(network, kind)
    layer = network.model.layers[0].mlp.up_proj
    rows = torch.randn(5, WIDTH)
    rows[3] *= 1000
    torch.testing.assert_close(layer(rows)[:1], layer(rows[:1]), rtol=1e-5, atol=1e-5)


def test_autocast(kind: Kind) -> None:
    network = llama()
    quantise(network, kind)
    with torch.autocast("cpu", torch.bfloat16):
        near(run(network), run(llama()), kind)


def test_adapters_are_trained_beside_quantised_weights(kind: Kind) -> None:
    def adapted() -> Any:
        network = llama()
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, network)
        return network

    network, plain = adapted(), adapted()
    quantise(network, kind)
    near(run(network), run(plain), kind)
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert len(trained) == 12
    assert all("lora_" in name for name in trained)
    for name, value in trained.items():
        assert cosine(value.grad, plain.get_parameter(name).grad) > NEAR[kind][1] - 0.05


def test_frozen_adapters_keep_their_precision(kind: Kind) -> None:
    network = llama()
    inject_adapter_in_model(LoraConfig(r=16, target_modules=["q_proj"]), network)
    network.requires_grad_(False)
    quantise(network, kind)
    adapters = [value for name, value in network.named_parameters() if "lora_" in name]
    assert len(adapters) == 6
    assert all(value.dtype == torch.float32 for value in adapters)


def test_weights_to_be_trained_are_refused(kind: Kind) -> None:
    network = llama().requires_grad_(True)
    with pytest.raises(IsthmusError, match=rf"{kind} takes frozen weights, but self_attn\.q_proj"):
        quantise(network, kind)
    assert type(network.model.layers[0].self_attn.q_proj) is nn.Linear


def test_networks_without_linear_layers_are_refused(load_llm: Callable[..., LLM]) -> None:
    with pytest.raises(IsthmusError, match="GPT2LMHeadModel hold no linear layers"):
        quantise(load_llm("gpt2").network, "int8")


def test_sizes_that_fp8_does_not_take() -> None:
    with pytest.raises(IsthmusError, match=r"multiples of 16, but mlp\.gate_proj is 360 x 128"):
        quantise(llama(intermediate_size=360), "fp8")


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (9, 0)])
def test_gpus_that_fp8_does_not_take(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise_module, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A40")
    if capability >= (8, 9):
        quantise(llama(), "fp8")
    else:
        with pytest.raises(IsthmusError, match=r"8\.9 or later .*, but A40 has 8\.6"):
            quantise(llama(), "fp8")


def test_missing_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(IsthmusError, match=r"pip install 'isthmus\[quant\]'"):
        quantise(llama(), "int4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(kind: Kind) -> None:
    network, plain = llama(torch.bfloat16), llama(torch.bfloat16)
    quantise(network, kind)
    network.cuda()
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(1, 9, WIDTH, generator=generator).bfloat16()
    found = network(inputs_embeds=embeddings.cuda()).logits.cpu()
    assert cosine(found, plain(inputs_embeds=embeddings).logits) > NEAR[kind][0] - 0.02

"""Packed utterances give the numbers of utterances one at a time, or are not packed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from isthmus.model import packing
from isthmus.model.cross_entropy import summed_cross_entropy
from isthmus.model.packing import choose_attention, packed_hidden

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 5}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "gpt-neox": ("gpt_neox", SIZES),
    "phi": ("phi", SIZES),
    "gemma2": ("gemma2", GEMMA | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "mistral": ("mistral", GROUPED | {"sliding_window": 4}),
    "gpt2": (
        "gpt2",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 40},
    ),
    "opt": ("opt", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.3}),
    "granite": ("granite", GROUPED | {"logits_scaling": 3.0}),
}
PADDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": (
        "bloom",
        {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40},
        "does not let",
    ),
    "falcon": ("falcon", SIZES, "does not let"),
    "mamba": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40}, "linear_"),
    "lfm2": (
        "lfm2",
        GROUPED | {"layer_types": ["conv", "full_attention"], "pad_token_id": 0},
        "its conv cannot",
    ),
    "silent": ("llama", SIZES | {"sliding_window": 5}, "does not say how far"),
}
LENGTHS = (7, 1, 12)  # longer than the windows


def build(kind: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(1)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ends | sizes))
    for value in network.parameters():  # large enough that attention has a say
        nn.init.normal_(value, std=value[0].numel() ** -0.5 if value.ndim > 1 else 0.5)
    network.requires_grad_(False).eval()
    return network


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each architecture that can be packed, frozen."""
    return build(*NETWORKS[request.param])


@pytest.fixture
def llama() -> PreTrainedModel:
    return build(*NETWORKS["llama"])


def noise(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, 16, generator=torch.Generator().manual_seed(seed))


def alone(network: Any, rows: Tensor) -> Tensor:
    """The hidden states of the row's utterances, each run by itself."""
    outputs = [
        network.base_model(inputs_embeds=row[None], use_cache=False) for row in rows.split(LENGTHS)
    ]
    return torch.cat([output.last_hidden_state[0] for output in outputs])


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """But for the rounding of fp32."""
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 2e-6 * other.norm()


def with_gradient(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    embeddings = noise(sum(LENGTHS)).requires_grad_()
    hidden = run(embeddings)
    (hidden * noise(sum(LENGTHS), seed=1)).sum().backward()
    assert embeddings.grad is not None
    return hidden.detach(), embeddings.grad


def test_packed_equals_one_at_a_time(network: PreTrainedModel) -> None:
    expected = with_gradient(lambda rows: alone(network, rows))
    choice = choose_attention(network)
    assert choice.backend == "sdpa", choice.reason
    found = with_gradient(lambda rows: packed_hidden(network, rows, LENGTHS))
    assert_equal(found, expected)
    merged = (sum(LENGTHS),)  # inverse: as if it were one utterance
    wrong = with_gradient(lambda rows: packed_hidden(network, rows, merged))
    torch.testing.assert_close(wrong[0][: LENGTHS[0]], expected[0][: LENGTHS[0]])
    assert (wrong[0] - expected[0])[-LENGTHS[-1] :].abs().max() > 1e-2
    assert (wrong[1] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", PADDED)
def test_who_ignores_the_boundaries_is_padded(name: str) -> None:
    kind, sizes, reason = PADDED[name]
    network = build(kind, sizes)
    before = network.config._attn_implementation
    choice = choose_attention(network)
    assert choice.backend is None
    assert choice.reason.startswith("padded: ")
    assert reason in choice.reason
    assert choice.head is not None  # which is still good for the loss
    assert network.config._attn_implementation == before


def broken(**changes: Any) -> Callable[..., Any]:
    """Our attention with something of the packing changed."""
    right = packing._attention

    def attention(*arguments: Any, **options: Any) -> Any:
        if options.get("packing"):
            own = options["packing"]
            options["packing"] = packing.Packing(**({"lengths": own.lengths} | changes))
            options["packing"].kernels = own.kernels
        return right(*arguments, **options)

    return attention


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (broken(lengths=(17,)), "sees another"),
        (broken(lengths=(5, 8, 4)), "not all of itself"),
        (broken(lengths=(5, 8)), "Error: "),
    ],
)
def test_the_probe_sees_a_wrong_kernel(
    llama: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    attention: Any,
    reason: str,
    precision: torch.dtype,
) -> None:
    mapping = packing.AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, "isthmus_packed_sdpa", packing.partial(attention, ordinary="sdpa"))
    choice = choose_attention(llama.to(precision))
    assert choice.backend is None
    assert reason in choice.reason
    assert llama.config._attn_implementation == "sdpa"


def test_a_network_that_counts_by_itself_is_padded(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.model.rotary_emb.forward
    monkeypatch.setattr(
        llama.model.rotary_emb,
        "forward",
        lambda hidden, position_ids: whole(hidden, torch.arange(hidden.shape[1])[None]),
    )
    choice = choose_attention(llama)
    assert choice.backend is None
    assert "counts positions" in choice.reason


def test_an_irregular_network_is_padded(llama: PreTrainedModel) -> None:
    llama.base_model_prefix = "elsewhere"
    choice = choose_attention(llama)
    assert (choice.backend, choice.head) == (None, None)


def test_unknown_logits_are_left_to_the_network(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        output = whole(*arguments, **options)
        output.logits = output.logits + torch.arange(40)
        return output

    monkeypatch.setattr(llama, "forward", forward)
    choice = choose_attention(llama)
    assert (choice.backend, choice.head) == (None, None)
    assert "logits" in choice.reason


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("training", [False, True])
def test_the_probe_leaves_no_trace(name: str, training: bool) -> None:
    network = build(*NETWORKS[name])
    network.requires_grad_(training).train(training)
    network.base_model.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    state = torch.random.get_rng_state()
    with torch.no_grad():  # wherever the caller stands
        choice = choose_attention(network)
    assert choice.backend == "sdpa"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(value.grad is None for value in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert choose_attention(network) == choice  # once more is as good as once


def test_everything_else_is_as_before(network: PreTrainedModel, tmp_path: Path) -> None:
    def everything() -> list[Tensor]:
        ids = torch.arange(3, 15).view(2, 6)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        beams = network.generate(
            ids, attention_mask=mask, max_new_tokens=8, num_beams=2, do_sample=False
        )
        positions = torch.tensor([0, 1, 2, 0, 1, 2])[None]  # packed as transformers knows it
        return [
            network(ids, attention_mask=mask).logits,
            network(ids).logits,
            network(ids, position_ids=positions.expand(2, -1), use_cache=False).logits,
            beams,
        ]

    before = everything()
    assert choose_attention(network).backend == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    network.save_pretrained(tmp_path)
    assert "isthmus" not in (tmp_path / "config.json").read_text()


def test_checkpointing_sees_the_boundaries_again(llama: PreTrainedModel) -> None:
    llama.requires_grad_(True).train()
    choose_attention(llama)
    expected = with_gradient(lambda rows: packed_hidden(llama, rows, LENGTHS))
    weights = [value.grad for value in llama.base_model.layers.parameters()]
    llama.zero_grad()
    llama.activation_checkpointing_enable()
    calls = []
    first = llama.base_model.layers[0].self_attn.q_proj
    hook = first.register_forward_hook(lambda *_: calls.append(1))
    found = with_gradient(lambda rows: packed_hidden(llama, rows, LENGTHS))
    hook.remove()
    assert len(calls) == 2  # it did run again
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        [value.grad for value in llama.base_model.layers.parameters()], weights
    )


def test_adapters_and_their_dropout(llama: PreTrainedModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5), llama
    )
    llama.config.attention_dropout = 0.5
    for name, value in llama.named_parameters():
        if "lora" in name:
            value.data.normal_()
    llama.eval()
    expected = with_gradient(lambda rows: alone(llama, rows))
    choice = choose_attention(llama)
    assert choice.backend == "sdpa"
    found = with_gradient(lambda rows: packed_hidden(llama, rows, LENGTHS))
    assert_equal(found, expected)
    llama.train()
    with torch.no_grad():
        once, again = (packed_hidden(llama, noise(20), LENGTHS) for _ in range(2))
    assert not torch.equal(once, again)


def test_attention_drops_out_in_training(llama: PreTrainedModel) -> None:
    choose_attention(llama)
    for layer in llama.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        assert torch.equal(*(packed_hidden(llama, noise(20), LENGTHS) for _ in range(2)))
        llama.train()
        assert not torch.equal(*(packed_hidden(llama, noise(20), LENGTHS) for _ in range(2)))


def saved_bytes(network: PreTrainedModel) -> int:
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        owned = {value.data_ptr() for value in network.parameters()}
        if tensor.data_ptr() not in owned:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = packed_hidden(network, noise(sum(LENGTHS)).requires_grad_(), LENGTHS)
    hidden.sum().backward()
    return sum(sizes.values())


def test_a_frozen_network_keeps_no_inputs_of_its_layers(llama: PreTrainedModel) -> None:
    choose_attention(llama)
    frozen = saved_bytes(llama)
    assert all(value.grad is None for value in llama.parameters())
    llama.requires_grad_(True)
    assert frozen < 0.8 * saved_bytes(llama)
    assert all(value.grad is not None for value in llama.base_model.layers.parameters())


def test_no_mask_of_the_whole_row(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would make one from positions that begin again, quadratic in the row."""
    choose_attention(llama)
    shapes = []
    ordinary = packing._ordinary

    def noting(*arguments: Any) -> Any:
        attend = ordinary(*arguments)

        def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any):
            shapes.append((query.shape[2], None if mask is None else mask.shape[-1]))
            return attend(module, query, key, value, mask, **rest)

        return noted

    monkeypatch.setattr(packing, "_ordinary", noting)
    packed_hidden(llama, noise(20), LENGTHS)
    assert shapes == [(7, None), (1, None), (12, None)] * 2


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    max_query: int,
    max_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch's varlen_attn says it does, slowly and in full precision."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert max_query == query_ends.diff().max()
    assert max_key == key_ends.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    outputs = []
    bounds = zip(query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:], strict=True)
    for first, last, first_key, last_key in bounds:
        q, k, v = query[first:last], key[first_key:last_key], value[first_key:last_key]
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * scale
        offset = len(k) - len(q)  # aligned at the end
        ahead = torch.arange(len(k)) - torch.arange(offset, len(k))[:, None]
        hidden = ahead > window_size[1]
        if window_size[0] >= 0:
            hidden |= ahead < -window_size[0]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_varlen_is_asked_for_the_right_thing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen)
    network = build(*NETWORKS[name]).bfloat16()
    assert choose_attention(network).backend == "sdpa"  # on a CPU

    def run(backend: packing.Backend) -> tuple[Tensor, Tensor]:
        return with_gradient(
            lambda rows: packed_hidden(network, rows.bfloat16(), LENGTHS, backend).float()
        )

    for found, expected in zip(run("varlen"), run("sdpa"), strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_varlen_on_a_gpu(name: str) -> None:
    kind, sizes = NETWORKS[name]
    network = build(kind, sizes | {"hidden_size": 16, "head_dim": 16}).to("cuda", torch.bfloat16)
    choice = choose_attention(network)
    assert choice.backend == "varlen", choice.reason


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_close_as_one_at_a_time(
    network: PreTrainedModel, autocast: bool
) -> None:
    """Its own attention in products on a CPU; in a network without kernel errors of its own."""
    exact = with_gradient(lambda rows: alone(network, rows))
    choice = choose_attention(network)
    dtype = torch.float32 if autocast else torch.bfloat16
    network.to(dtype)

    def error(run: Callable[[Tensor], Tensor]) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = with_gradient(lambda rows: run(rows.to(dtype)).float())
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        choice = choose_attention(network)
    assert choice.backend == "sdpa", choice.reason
    ours = error(lambda rows: packed_hidden(network, rows, LENGTHS))
    plain = error(lambda rows: alone(network, rows))
    assert all(0 < own < 2 * other + 0.03 < 0.3 for own, other in zip(ours, plain, strict=True))


def test_loss_and_gradient_of_the_padded_path(network: PreTrainedModel) -> None:
    """Packed with the loss in chunks, against padded with all logits."""
    targets = torch.arange(sum(LENGTHS)) % 40

    def padded(rows: Tensor) -> Tensor:
        batch = nn.utils.rnn.pad_sequence(list(rows.split(LENGTHS)), batch_first=True)
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        logits = network(inputs_embeds=batch, attention_mask=mask.long(), use_cache=False).logits
        return nn.functional.cross_entropy(logits[mask], targets, reduction="sum")

    def packed(rows: Tensor) -> Tensor:
        hidden = packed_hidden(network, rows, LENGTHS)
        assert choice.head is not None
        return summed_cross_entropy(hidden, targets, choice.head, chunk_bytes=4 * 40 * 3)[0]

    rows = noise(sum(LENGTHS)).requires_grad_()
    expected = padded(rows)
    (gradient,) = torch.autograd.grad(expected, rows)
    choice = choose_attention(network)
    found = packed(rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    (own,) = torch.autograd.grad(found, rows)
    assert (own - gradient).norm() < 3e-6 * gradient.norm()


def bytes_kept(network: PreTrainedModel, lengths: tuple[int, ...]) -> int:
    """What a forward pass keeps for its gradient."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    embeddings = torch.randn(sum(lengths), 16, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_hidden(network, embeddings, lengths)
    return sum(kept.values())


def test_one_long_utterance_does_not_make_all_of_them_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = build("llama", GROUPED | {"max_position_embeddings": 512}).to(torch.bfloat16)
    assert choose_attention(network).backend == "sdpa"
    ragged, even = (400, *[10] * 15), (34, *[34] * 15)
    assert abs(sum(ragged) - sum(even)) < 10
    assert bytes_kept(network, ragged) < 2 * bytes_kept(network, even)
    for limit in ("MOST_SCORES", "SCORE_BYTES"):
        monkeypatch.setattr(packing, limit, float("inf"))
    assert bytes_kept(network, ragged) > 2 * bytes_kept(network, even)


def test_a_kernel_without_dropout_is_not_asked_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("llama", GROUPED | {"attention_dropout": 0.1}).to(torch.bfloat16)
    assert choose_attention(network).backend == "sdpa"
    asked: list[int] = []

    def kernel(query: Tensor, *others: Any) -> Tensor:
        asked.append(query.shape[2])
        return query.transpose(1, 2)

    monkeypatch.setattr(packing, "_varlen", kernel)
    embeddings = torch.randn(sum(LENGTHS), 16, dtype=torch.bfloat16)
    packed_hidden(network.train(), embeddings, LENGTHS, "varlen")
    assert not asked
    packed_hidden(network.eval(), embeddings, LENGTHS, "varlen")
    assert asked

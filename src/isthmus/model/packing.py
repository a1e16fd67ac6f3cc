"""Utterances without padding: a batch in one row, each attending to itself (and a shared prefix).

The networks stay those of transformers: their attention is looked up by name, and under the names
registered here the boundaries of the utterances reach it as the keyword `packing`. Being an
argument, they are also there when gradient checkpointing runs a layer a second time. A call
without it is the network's ordinary attention: padded batches and decoding are as before.

Shapes: L positions of all utterances together, P of the prefix, E width of the LLM, V tokens,
H attention heads (or heads of keys), D width of a head.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from isthmus.model.cache import CACHE

Backend = Literal["sdpa", "varlen"]
PACKED = "isthmus_packed_"  # and the name of the ordinary attention
ORDINARY = ("sdpa", "eager")


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the text that all utterances begin with, P positions."""

    length: int
    keys: tuple[Tensor, ...]  # a layer (1, H, P, D), less where a sliding window has moved on
    values: tuple[Tensor, ...]


@dataclass
class Packing:
    """Where the utterances of a row begin and end, and what they share."""

    lengths: tuple[int, ...]
    backend: Backend = "sdpa"
    prefix: Prefix | None = None
    kernels: set[Backend] = field(default_factory=set)  # that have run
    windows: set[int] = field(default_factory=set)  # that layers have asked for
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # the same in each layer
    ends: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def mask(self, queries: Tensor, past: int, window: int | None, additive: bool) -> Tensor:
        """Which keys the queries (1, H, length, D) see, (1, 1, length, past + length).

        Additive it is 0 or the lowest number, else True or False.
        """
        length = queries.shape[2]
        name = (length, past, window, additive, queries.dtype, queries.device)
        if name not in self.masks:
            keys = torch.arange(past + length, device=queries.device)
            distance = keys[past:, None] - keys
            seen = (distance >= 0) & (distance < (window or past + length))
            if additive:
                lowest = torch.finfo(queries.dtype).min
                seen = queries.new_zeros(seen.shape).masked_fill(~seen, lowest)
            self.masks[name] = seen[None, None]
        return self.masks[name]

    def cumulative(self, past: int, device: torch.device) -> Tensor:
        """Where each utterance begins, and the last ends, with `past` keys more before each."""
        if (past, device) not in self.ends:
            lengths = torch.tensor([0, *(past + length for length in self.lengths)])
            self.ends[past, device] = lengths.cumsum(0).to(device, torch.int32)
        return self.ends[past, device]

    def past(self, module: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the prefix in the layer of an attention module."""
        if self.prefix is None:
            return None
        layer = module.layer_idx
        return self.prefix.keys[layer].to(like), self.prefix.values[layer].to(like)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop over utterances, new each time
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ordinary: str,
    packing: Packing | None = None,
    **options: Any,  # the interface of transformers
) -> tuple[Tensor, Tensor | None]:
    """Attention (1, L, H, D) of queries (1, H, L, D); keys and values may have fewer heads."""
    attend = _ordinary(module, ordinary)
    if packing is None:
        return attend(module, query, key, value, attention_mask, **options)
    past = packing.past(module, key)
    window = options.get("sliding_window")
    if window:
        packing.windows.add(window)
    half = query.dtype in (torch.bfloat16, torch.float16)
    if packing.backend == "varlen" and half and not options.get("dropout"):
        packing.kernels.add("varlen")
        return _varlen(query, key, value, packing, past, options.get("scaling"), window), None
    packing.kernels.add("sdpa")
    outputs = []
    pieces = (part.split(packing.lengths, dim=2) for part in (query, key, value))
    for queries, keys, values in zip(*pieces, strict=True):
        before = 0
        if past is not None:
            before = past[0].shape[2]
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        mask, eager = None, ordinary == "eager"
        if eager or before or (window and queries.shape[2] > window):
            mask = packing.mask(queries, before, window, additive=eager)
        # without a mask sdpa is causal by itself, and fastest
        outputs.append(attend(module, queries, keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _ordinary(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    found: Any = AttentionInterface().get(name)
    if name == "eager":  # each architecture has its own, beside its layers
        found = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return cast(Callable[..., tuple[Tensor, Tensor | None]], found)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    past: tuple[Tensor, Tensor] | None,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """All utterances in one call of the flash kernel, which aligns queries to the last keys."""
    from torch.nn.attention.varlen import varlen_attn  # younger than the oldest torch we take

    before = 0
    if past is not None:
        before = past[0].shape[2]
        key, value = (
            torch.cat([part for row in own.split(packing.lengths, 2) for part in (shared, row)], 2)
            for shared, own in zip(past, (key, value), strict=True)
        )
    longest = max(packing.lengths)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.cumulative(0, query.device),
        packing.cumulative(before, query.device),
        longest,
        before + longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output)[None]


for _name in ORDINARY:
    AttentionInterface.register(PACKED + _name, partial(_attention, ordinary=_name))
    AttentionMaskInterface.register(PACKED + _name, AttentionMaskInterface()[_name])


def packed_hidden(
    network: PreTrainedModel,
    embeddings: Tensor,
    lengths: Sequence[int],
    prefix: Prefix | None = None,
    backend: Backend = "sdpa",
) -> Tensor:
    """Last hidden states (L, E) of utterances whose embeddings (L, E) stand one after another.

    `choose_attention` must have chosen the backend for this network.
    """
    return _hidden(network, embeddings, Packing(tuple(lengths), backend, prefix))


def _hidden(network: PreTrainedModel, embeddings: Tensor, packing: Packing) -> Tensor:
    lengths, start = packing.lengths, packing.prefix.length if packing.prefix else 0
    assert _config(network)._attn_implementation.startswith(PACKED), "choose_attention comes first"
    assert sum(lengths) == len(embeddings), (lengths, embeddings.shape)
    assert min(lengths) > 0, lengths
    positions = torch.cat([torch.arange(start, start + length) for length in lengths])
    output = cast(Any, network.base_model)(
        inputs_embeds=embeddings[None],
        attention_mask=embeddings.new_zeros(1, 1, 1, 1),  # so that transformers builds none
        position_ids=positions.to(embeddings.device)[None],
        use_cache=False,
        packing=packing,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


@torch.no_grad()
def shared_prefix(network: PreTrainedModel, embeddings: Tensor) -> Prefix:
    """The prefix of embeddings (P, E), P > 0. Good as long as the network's weights stay."""
    output = cast(Any, network.base_model)(inputs_embeds=embeddings[None], use_cache=True)
    layers = getattr(output, CACHE).layers
    keys, values = (tuple(getattr(layer, part) for layer in layers) for part in ("keys", "values"))
    return Prefix(len(embeddings), keys, values)


@dataclass(frozen=True)
class Head:
    """Hidden states (N, E) to the logits (N, V) of the network, without its layers before.

    No module: it holds weights that already have an owner.
    """

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.linear.parameters()


@dataclass(frozen=True)
class Choice:
    """How a network is best run."""

    backend: Backend | None  # None: padded, by the ordinary path
    reason: str
    prefix: bool  # whether utterances may share a prefix, computed once
    head: Head | None  # None: only the network itself makes its logits


LENGTHS = (5, 9, 3)  # of the utterances that decide, in positions
PREFIX = 4


def choose_attention(network: PreTrainedModel) -> Choice:
    """Try what the network can do, on a few short utterances of noise.

    Packed, it must give the hidden states and gradients of one utterance at a time. Where it does,
    its attention stays switched to ours, which without `packing` is the one it had. To be called
    under the autocast of training: precision decides which kernels there are.
    """
    with _undisturbed(network) as ordinary:
        choice = _choose(network, ordinary)
    if choice.backend is not None:
        _config(network)._attn_implementation = PACKED + ordinary
    return choice


def _choose(network: PreTrainedModel, ordinary: str) -> Choice:
    config = _config(network)
    noise = _noise(network)
    head = find_head(network, noise[:PREFIX])
    fault = _unsuitable(config, ordinary)
    if head is None:
        fault = fault or "its logits cannot be had from its hidden states and its last layer alone"
    if fault is not None:
        return Choice(None, f"padded: {fault}", False, head)
    flash = noise.is_cuda and ordinary == "sdpa"  # eager means: flash lacks something of it
    backends: tuple[Backend, ...] = ("varlen", "sdpa") if flash else ("sdpa",)
    frozen = not any(value.requires_grad for value in network.parameters())
    faults: list[str] = []
    for backend in backends:
        fault = _fault(network, ordinary, backend, noise[PREFIX:])
        if fault is None:
            shared = noise[:PREFIX] if frozen else None
            prefix = frozen and not _fault(network, ordinary, backend, noise[PREFIX:], shared)
            reason = "; ".join([f"packed: {KERNELS[backend]}", *faults])
            return Choice(backend, reason, prefix, head)
        faults.append(f"{backend} was left out: {fault}")
    return Choice(None, f"padded: {'; '.join(faults)}", False, head)


KERNELS = {
    "varlen": "one attention call for all utterances, by torch's varlen_attn",
    "sdpa": "an attention call an utterance",
}


@contextmanager
def _undisturbed(network: PreTrainedModel) -> Iterator[str]:
    """Evaluation mode, and the network as it was when the block ends; gives its own attention."""
    config = _config(network)
    attention = config._attn_implementation
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    config._attn_implementation = (attention or "eager").removeprefix(PACKED)
    try:
        yield config._attn_implementation
    finally:
        config._attn_implementation = attention
        for module, mode in modes:
            module.training = mode


def _config(network: PreTrainedModel) -> Any:
    return network.config.get_text_config()


def _noise(network: PreTrainedModel) -> Tensor:
    """Embeddings (L, E) of the size that those of the network have: prefix and utterances."""
    table = cast(nn.Embedding, network.get_input_embeddings()).weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(PREFIX + sum(LENGTHS), table.shape[1], generator=generator)
    return noise.to(table) * table[:1000].detach().std()


def _unsuitable(config: Any, ordinary: str) -> str | None:
    """What short utterances would not show."""
    if ordinary not in ORDINARY:
        return f"its attention is {ordinary}, which takes other masks"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"its {', '.join(sorted(others))} cannot be told where an utterance ends"
    return None


def find_head(network: PreTrainedModel, embeddings: Tensor) -> Head | None:
    """The last layer with what the configuration says is done to its logits, if that is all."""
    linear, config = network.get_output_embeddings(), _config(network)
    if linear is None or network.base_model is network:  # the latter where names are irregular
        return None
    scale = getattr(config, "logit_scale", None)  # Cohere; a name in MPT
    if not isinstance(scale, int | float):
        scale = 1 / getattr(config, "logits_scaling", 1)
    head = Head(linear, scale, getattr(config, "final_logit_softcapping", None))
    with torch.no_grad():
        hidden = _ordinary_hidden(network, embeddings)
        logits = network(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        # the same numbers in the same order: little room for a cap that is not in the configuration
        return head if _distance(head(hidden), logits) <= _tolerance(logits) / 10 else None


def _ordinary_hidden(network: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """Last hidden states (L, E) of a single utterance, by the ordinary path."""
    output = cast(Any, network.base_model)(inputs_embeds=embeddings[None], use_cache=False)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _fault(
    network: PreTrainedModel,
    ordinary: str,
    backend: Backend,
    noise: Tensor,
    shared: Tensor | None = None,
) -> str | None:
    """Why utterances (L, E), packed, are not what they are alone; None if they are.

    With `shared` (P, E) they all begin with that.
    """
    config = _config(network)
    start = 0 if shared is None else len(shared)
    embeddings = noise.detach().requires_grad_()
    direction = noise.roll(1, 0)  # any will do

    def with_gradient(hidden: Tensor) -> list[Tensor]:
        loss = (hidden * direction).sum()
        return [hidden.detach(), torch.autograd.grad(loss, embeddings)[0]]

    packing = Packing(LENGTHS, backend)
    with torch.enable_grad():
        rows = embeddings.split(LENGTHS)
        whole = rows if shared is None else [torch.cat([shared, row]) for row in rows]
        alone = [_ordinary_hidden(network, row)[start:] for row in whole]
        expected = with_gradient(torch.cat(alone))
        config._attn_implementation = PACKED + ordinary
        try:
            packing.prefix = None if shared is None else shared_prefix(network, shared)
            found = with_gradient(_hidden(network, embeddings, packing))
        except Exception as error:  # whatever a network or kernel makes of it: padded still works
            if packing.kernels:
                return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        finally:
            config._attn_implementation = ordinary
    if not packing.kernels:
        return "its code does not let its attention know where an utterance ends"
    if backend not in packing.kernels:
        return "it needs half precision"
    if _slides(config) and not packing.windows:
        return "its attention does not say how far it slides"
    worst = max(
        _distance(one, other)
        for results in zip(found, expected, strict=True)
        for one, other in zip(*(result.split(LENGTHS) for result in results), strict=True)
    )
    if worst <= _tolerance(expected[0]):  # false too where it is no number
        return None
    return f"its numbers differ from those of one utterance at a time by {worst:.0e}"


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative to the size of the other."""
    one, other = one.float(), other.float()
    return float((one - other).norm() / other.norm())


def _tolerance(like: Tensor) -> float:
    """What rounding alone may do in a deep network; another's words do tenfold that."""
    dtype = like.dtype
    if torch.is_autocast_enabled(like.device.type):
        dtype = torch.get_autocast_dtype(like.device.type)
    elif dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # about as coarse as TF32
    return {torch.bfloat16: 0.1, torch.float16: 0.03}.get(dtype, 1e-4)

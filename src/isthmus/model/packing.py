"""Utterances without padding: a batch in one row, in which each attends to itself alone.

The networks stay those of transformers: their attention is looked up by name, and under the names
registered here the boundaries of the utterances reach it as the keyword `packing`. Being an
argument, they are also there when gradient checkpointing runs a layer a second time. A call
without it is the network's ordinary attention: padded batches and decoding are as before.
(transformers itself knows packed rows by positions that begin again, but makes a mask of the whole
row for them, quadratic in its length.)

Shapes: L positions of all utterances together, N utterances, M positions of the longest, E width
of the LLM, V tokens, H attention heads, K heads of keys, D width of a head.
"""

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

Backend = Literal["sdpa", "varlen"]
PACKED = "isthmus_packed_"  # and the name of the ordinary attention
ORDINARY = ("sdpa", "eager")
MOST_SCORES = 2.0  # that a padded batch may have, to one that there would be without padding
SCORE_BYTES = 16 * 2**20  # of a layer


@dataclass
class Packing:
    """Where the utterances of a row begin and end."""

    lengths: tuple[int, ...]
    backend: Backend = "sdpa"
    kernels: set[Backend] = field(default_factory=set)  # that have run
    windows: set[int] = field(default_factory=set)  # that layers have asked for
    tensors: dict[Hashable, Tensor] = field(default_factory=dict)  # the same in each layer

    def once(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What the first layer makes and all use."""
        if name not in self.tensors:
            self.tensors[name] = make()
        return self.tensors[name]

    def mask(self, like: Tensor, length: int, window: int | None, additive: bool) -> Tensor:
        """Which keys the queries see, (length, length), on the device of `like`.

        Additive it is 0 or the lowest number of its type, else True or False.
        """

        def make() -> Tensor:
            place = torch.arange(length, device=like.device)
            distance = place[:, None] - place
            seen = (distance >= 0) & (distance < (window or length))
            if not additive:
                return seen
            return like.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(like.dtype).min)

        return self.once(("mask", length, window, additive, like.dtype, like.device), make)

    def ends(self, device: torch.device) -> Tensor:
        """Where each utterance begins, and the last ends (N + 1,)."""
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return self.once(("ends", device), lambda: ends.to(device, torch.int32))

    def places(self, device: torch.device) -> Tensor:
        """Where the positions of the row stand in a padded batch, (L,) numbers below N M."""
        longest = max(self.lengths)

        def make() -> Tensor:
            starts = range(0, longest * len(self.lengths), longest)
            pairs = zip(starts, self.lengths, strict=True)
            return torch.cat([torch.arange(start, start + own) for start, own in pairs]).to(device)

        return self.once(("places", device), make)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # other shapes for each batch
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
    window = options.get("sliding_window")
    if window:
        packing.windows.add(window)
    dropout = options.get("dropout")
    half = query.dtype in (torch.bfloat16, torch.float16)
    if packing.backend == "varlen" and half and not dropout:
        packing.kernels.add("varlen")
        return _varlen(query, key, value, packing, options.get("scaling"), window), None
    packing.kernels.add("sdpa")
    slides = window and window < max(packing.lengths)
    plain = ordinary == "sdpa" and not slides and not dropout
    if plain and _products_win(query, packing.lengths):
        return _products(query, key, value, packing, options.get("scaling")), None
    outputs = []
    pieces = (part.split(packing.lengths, dim=2) for part in (query, key, value))
    for queries, keys, values in zip(*pieces, strict=True):
        length, eager, mask = queries.shape[2], ordinary == "eager", None
        if eager or (window and length > window):
            mask = packing.mask(queries, length, window, additive=eager)[None, None]
        # without a mask sdpa is causal by itself, and fastest
        outputs.append(attend(module, queries, keys, values, mask, **options)[0])
    return torch.cat(outputs, dim=1), None


def _ordinary(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    found: Any = AttentionInterface().get(name)
    if name == "eager":  # each architecture has its own, beside its layers
        found = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return cast(Callable[..., tuple[Tensor, Tensor | None]], found)


def _products_win(query: Tensor, lengths: Sequence[int]) -> bool:
    """Whether torch's own kernel loses against plain products: by 5 to 1 in the backward pass, on
    a CPU in bfloat16.

    Products keep their scores in every layer, those of padding too, so these must be few.
    """
    scores = len(lengths) * max(lengths) ** 2  # of a head
    even = scores <= MOST_SCORES * sum(length * length for length in lengths)
    small = scores * query.shape[1] * query.element_size() <= SCORE_BYTES
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and even and small


def _products(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
) -> Tensor:
    """All utterances as a padded batch of products; padding is behind what a causal mask shows.

    The queries that share a head of keys are one matrix.
    """
    places, longest, count = (
        packing.places(query.device),
        max(packing.lengths),
        len(packing.lengths),
    )
    heads, key_heads = query.shape[1], key.shape[1]

    def padded(row: Tensor) -> Tensor:  # (1, H, L, D) to (N K, H/K M, D)
        own = row[0].transpose(0, 1)
        batch = own.new_zeros(count * longest, *own.shape[1:]).index_copy(0, places, own)
        split = batch.view(count, longest, own.shape[1], -1).transpose(1, 2)
        return split.reshape(count * key_heads, -1, own.shape[2])

    mask = packing.mask(query, longest, None, additive=True).repeat(heads // key_heads, 1)
    scale = scale or query.shape[-1] ** -0.5
    scores = torch.baddbmm(mask[None], padded(query), padded(key).transpose(1, 2), alpha=scale)
    output = torch.bmm(scores.softmax(dim=-1), padded(value))
    batch = output.view(count, heads, longest, -1).transpose(1, 2).flatten(0, 1)
    return batch.index_select(0, places)[None]


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """All utterances in one call of the flash kernel."""
    from torch.nn.attention.varlen import varlen_attn  # younger than the oldest torch we take

    ends, longest = packing.ends(query.device), max(packing.lengths)
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        ends,
        ends,
        longest,
        longest,
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
    backend: Backend = "sdpa",
) -> Tensor:
    """Last hidden states (L, E) of utterances whose embeddings (L, E) stand one after another.

    `choose_attention` must have chosen the backend for this network.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    return _hidden(network, embeddings, positions, Packing(tuple(lengths), backend))


def _hidden(
    network: PreTrainedModel, embeddings: Tensor, positions: Tensor, packing: Packing
) -> Tensor:
    lengths = packing.lengths
    assert _config(network)._attn_implementation.startswith(PACKED), "choose_attention comes first"
    assert sum(lengths) == len(embeddings), (lengths, embeddings.shape)
    assert min(lengths) > 0, lengths
    output = cast(Any, network.base_model)(
        inputs_embeds=embeddings[None],
        attention_mask=embeddings.new_zeros(1, 1, 1, 1),  # so that transformers builds none
        position_ids=positions.to(embeddings.device)[None],
        use_cache=False,
        packing=packing,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


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
    head: Head | None  # None: only the network itself makes its logits


LENGTHS = (5, 9, 3)  # of the utterances that decide, in positions
KERNELS = {"varlen": "one kernel for all utterances", "sdpa": "each utterance sees itself alone"}


def choose_attention(network: PreTrainedModel) -> Choice:
    """See whether the network can be packed, on a few short utterances of noise.

    The gradient of an utterance to its neighbours must be zero, not small: rounding decides
    nothing. Where it is, the network's attention stays switched to ours, which without `packing`
    is the one it had. To be called under the autocast of training: precision decides which kernels
    there are.
    """
    with _undisturbed(network) as ordinary:
        choice = _choose(network, ordinary)
    if choice.backend is not None:
        _config(network)._attn_implementation = PACKED + ordinary
    return choice


def _choose(network: PreTrainedModel, ordinary: str) -> Choice:
    noise = _noise(network)
    head = find_head(network, noise[: LENGTHS[0]])
    fault = _unsuitable(_config(network), ordinary)
    if head is None:
        fault = fault or "its logits cannot be had from its hidden states and its last layer alone"
    if fault is not None:
        return Choice(None, f"padded: {fault}", head)
    flash = noise.is_cuda and ordinary == "sdpa"  # eager means: flash lacks something of it
    backends: tuple[Backend, ...] = ("varlen", "sdpa") if flash else ("sdpa",)
    faults: list[str] = []
    for backend in backends:
        fault = _fault(network, ordinary, backend, noise)
        if fault is None:
            reason = "; ".join([f"packed: {KERNELS[backend]}", *faults])
            return Choice(backend, reason, head)
        faults.append(f"{backend} was left out: {fault}")
    return Choice(None, f"padded: {'; '.join(faults)}", head)


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
    """Embeddings (L, E) of the utterances that decide, as large as those of the network."""
    table = cast(nn.Embedding, network.get_input_embeddings()).weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sum(LENGTHS), table.shape[1], generator=generator)
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


def _fault(network: PreTrainedModel, ordinary: str, backend: Backend, noise: Tensor) -> str | None:
    """Why utterances (L, E), packed, would not be what they are alone; None if they are."""
    config, packing = _config(network), Packing(LENGTHS, backend)
    embeddings = noise.detach().requires_grad_()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    config._attn_implementation = PACKED + ordinary
    try:
        with torch.enable_grad():
            hidden = _hidden(network, embeddings, positions, packing)
            last = hidden.split(LENGTHS)[1][-1] @ noise[0].to(hidden)  # any direction will do
            (gradient,) = torch.autograd.grad(last, embeddings)
            moved = _hidden(network, embeddings, positions + (positions > 1), packing)
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
    before, own, after = gradient.split(LENGTHS)
    if before.any() or after.any() or not own[-2].any():
        return "an utterance sees another, or not all of itself"
    if torch.equal(hidden, moved):
        return "it counts positions by itself"
    return None


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

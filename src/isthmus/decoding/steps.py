"""The language model a token at a time: the prompt once, then the next tokens of all hypotheses.

The tokens of all hypotheses of an utterance stand in one row of the cache, the new ones of a step
side by side at the same position. A hypothesis is a row of the attention mask, which says which
of the earlier tokens are its own. So the prompt's keys and values are kept once, and nothing is
copied or moved when hypotheses branch and die. Networks that cannot be told all this are found
out by trying; for them the cache is copied and reordered.

Shapes: N utterances, K hypotheses of each, L prompt positions, S slots of the cache, M new tokens
of an utterance, H heads of keys, D width of a head, E width of the LLM, V tokens.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from isthmus.model.cache import CACHE, CopiedSteps, Steps, pad_left
from isthmus.model.llm import LLM
from isthmus.model.packing import Head, find_head

log = logging.getLogger(__name__)
GROWTH = 128  # slots that the cache is enlarged by
COLUMNS = 1024  # of the logits that are computed at once on a CPU
ALIKE = 0.8  # prompts shorter than that share of the longest are read apart from it


def open_steps(llm: LLM, prompts: Sequence[Tensor], limit: int) -> Steps:
    """The best way for prompts (L, E) with at most `limit` tokens after each."""
    network = llm.network
    longest = max(len(prompt) for prompt in prompts) + limit
    if longest <= window(network) and takes_masks(network):
        return MaskedSteps(network, prompts)
    return CopiedSteps(network, prompts)


class MaskedSteps(Steps):
    """All hypotheses of an utterance in one row of the cache."""

    def __init__(self, network: nn.Module, prompts: Sequence[Tensor]):
        self.network = network
        self.head = quick_head(network)
        self.embeddings, self.mask = pad_left(prompts, network)
        lowest = torch.finfo(self.embeddings.dtype).min
        self.unseen = self.embeddings.new_full((), lowest)
        self.seen = torch.where(self.mask.bool(), 0, self.unseen)[:, None]  # (N, K, S), 0 if it is
        self.lengths = self.mask.sum(dim=1)  # (N,) position of the next token
        self.cache: Any = Cache(layer_class_to_replicate=_Slots)

    def prefill(self) -> Tensor:
        lengths = self.lengths.tolist()
        on_cpu = self.mask.device.type == "cpu"  # elsewhere a call more costs more than padding
        groups = alike(lengths) if on_cpu else [list(range(len(lengths)))]
        if len(groups) == 1:
            return self.prefill_with(self.embeddings, self.mask)
        longest, caches, logits = self.mask.shape[1], [], []
        for rows in groups:
            start = longest - max(lengths[row] for row in rows)
            self.cache = Cache(layer_class_to_replicate=_Slots)
            logits.append(self.prefill_with(self.embeddings[rows, start:], self.mask[rows, start:]))
            caches.append(self.cache)
        order = torch.tensor([row for rows in groups for row in rows]).argsort()
        self.cache = _joined(caches, order, longest)
        return torch.cat(logits)[order.to(self.mask.device)]

    def prefill_with(self, embeddings: Tensor, mask: Tensor, keep: int = 1) -> Tensor:
        """Logits (N, keep, V) at the end of prompts (N, L, E) that may have more behind them."""
        return self._logits(
            keep,
            inputs_embeds=embeddings,
            attention_mask=None if bool(mask.all()) else mask,  # causal by itself is fastest
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
        )

    def next(
        self, rows: Sequence[int], parents: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> Tensor:
        self.select(rows)
        device = self.seen.device
        origins, found = torch.tensor(parents, device=device), torch.tensor(tokens, device=device)
        inherited = self.seen[torch.arange(len(rows), device=device)[:, None], origins]
        own = self.unseen.expand(found.shape[1], found.shape[1]).clone().fill_diagonal_(0)
        self.seen = torch.cat([inherited, own.expand(len(rows), -1, -1)], dim=2)
        logits = self.forward(found, self.seen, self.lengths[:, None].expand_as(found))
        self.lengths = self.lengths + 1
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Go on with the utterances at these places only."""
        if len(rows) < len(self.lengths):
            chosen = torch.tensor(rows, device=self.seen.device)
            self.cache.batch_select_indices(chosen)
            self.seen, self.lengths = self.seen[chosen], self.lengths[chosen]

    def forward(self, tokens: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Logits (N, M, V) after tokens (N, M) at positions (N, M), which see (N, M, S + M)."""
        return self._logits(
            tokens.shape[1],
            input_ids=tokens,
            attention_mask=seen[:, None],
            position_ids=positions,
        )

    def _logits(self, keep: int, **inputs: Tensor | None) -> Tensor:
        common: dict[str, Any] = {**inputs, CACHE: self.cache, "use_cache": True}
        if self.head is None:
            logits: Tensor = self.network(**common, logits_to_keep=keep).logits
            return logits
        hidden = cast(Any, self.network).base_model(**common).last_hidden_state
        return self.head(hidden[:, -keep:].contiguous())


class _Slots(DynamicLayer):
    """Keys and values (N, H, S, D) of a layer, with room for more."""

    length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, self.length = self.length, self.length + key_states.shape[2]
        assert self.keys is not None
        assert self.values is not None
        if self.length > self.keys.shape[2]:
            self.keys = _enlarged(self.keys[:, :, :start], self.length + GROWTH)
            self.values = _enlarged(self.values[:, :, :start], self.length + GROWTH)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        if start == 0:
            return key_states, value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the last slots; the number is negative, as in transformers."""
        self.length += tokens_to_remove


class _Blocks(nn.Module):
    """A linear layer for few rows: matrix products that fit into the cache of a CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        blocks = self.linear.weight.split(COLUMNS)
        return torch.cat([nn.functional.linear(hidden, block) for block in blocks], dim=-1)


_heads: WeakKeyDictionary[nn.Module, tuple[nn.Linear, Head | None]] = WeakKeyDictionary()


def quick_head(network: nn.Module) -> Head | None:
    """The network's last layer in blocks of columns; None where it is better left to itself.

    On a CPU a product of 2 to 64 rows with a matrix of 32,000 columns takes two thirds of the time
    so in single precision; and in half precision the network's own, of the last row of several
    prompts, copies the matrix for each. Whether it is all that makes logits is tried once for a
    network.
    """
    linear = cast(Any, network).get_output_embeddings()
    if type(linear) is not nn.Linear or linear.bias is not None or linear.out_features <= COLUMNS:
        return None
    weight = linear.weight
    if weight.device.type != "cpu":
        return None
    if _hooked(network) or _hooked(linear):
        return None  # somebody counts on being called
    if network not in _heads or _heads[network][0] is not linear:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(4, weight.shape[1], generator=generator)
        noise = (noise * float(weight[:1000].detach().float().std())).to(weight.dtype)
        found = find_head(cast(Any, network), noise)
        _heads[network] = (linear, found and replace(found, linear=_Blocks(linear)))
    return _heads[network][1]


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module)  # the latter by accelerate


def _joined(caches: Sequence[Any], order: Tensor, length: int) -> Any:
    """One cache of prompts, their ends in slot `length`, from several; `order` of their rows."""
    joined: Any = Cache(layer_class_to_replicate=_Slots)
    for index, parts in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        keys, values = (
            torch.cat(
                [
                    nn.functional.pad(states[:, :, : part.length], (0, 0, length - part.length, 0))
                    for part, states in zip(parts, layer, strict=True)
                ]
            )
            for layer in ([part.keys for part in parts], [part.values for part in parts])
        )
        joined.update(keys[order.to(keys.device)], values[order.to(values.device)], index)
    return joined


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places of prompts in groups of like lengths: none is shorter than ALIKE times the longest."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not groups or lengths[place] < ALIKE * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(place)
    return groups if len(groups) > 1 else [list(range(len(lengths)))]


def _enlarged(states: Tensor, room: int) -> Tensor:
    count, heads, length, width = states.shape
    larger = states.new_empty(count, heads, room, width)
    larger[:, :, :length] = states
    return larger


def window(network: nn.Module) -> float:
    """Positions that a sequence may have before some layer of the network no longer sees all.

    Up to there a mask of our own takes the place of the network's.
    """
    config = cast(Any, network).config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
        return float("inf")
    names = ("sliding_window", "attention_chunk_size", "attention_window_size")
    sizes = [getattr(config, name, None) for name in names]
    return min((size for size in sizes if isinstance(size, int)), default=float("inf"))


_verdicts: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def takes_masks(network: nn.Module) -> bool:
    """Whether hypotheses told apart by a mask give the network's usual numbers.

    Tried once for a network and kind of attention, on short prompts of noise.
    """
    config = cast(Any, network).config.get_text_config()
    table = cast(Any, network).get_input_embeddings().weight
    name = (config._attn_implementation, table.dtype, table.device)
    verdicts = _verdicts.setdefault(network, {})
    if name not in verdicts:
        verdicts[name] = _try_masks(network, config, table)
    return verdicts[name]


@torch.inference_mode()
def _try_masks(network: nn.Module, config: Any, table: Tensor) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return False  # it has layers that remember what no mask can hide
    if hasattr(config, "window_size"):
        return False  # it counts slots of the cache as positions
    if "position_ids" not in inspect.signature(network.forward).parameters:
        return False
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, table.shape[1], generator=generator) * float(table[:1000].float().std())
    prompts = list(noise.to(table).split([5, 3]))
    expected = _trial(CopiedSteps(network, prompts), len(table))
    try:
        found = _trial(MaskedSteps(network, prompts), len(table))
    except Exception as error:  # whatever a network makes of it: copying the cache still works
        log.info("Decoding copies the cache: masks of ours fail with %r.", error)
        return False
    distance = float((found - expected).norm() / expected.norm())
    return distance <= _tolerance(table.dtype)  # false too where it is no number


def _trial(steps: Steps, vocabulary: int) -> Tensor:
    """Logits of two utterances, of which one leaves, with branching hypotheses of two."""
    tokens = [(7919 * number) % vocabulary for number in range(1, 15)]
    logits = [
        steps.prefill(),
        steps.next([0, 1], [[0, 0], [0, 0]], [tokens[0:2], tokens[2:4]]),
        steps.next([0, 1], [[1, 0], [1, 1]], [tokens[4:6], tokens[6:8]]),
        steps.next([1], [[1, 0]], [tokens[8:10]]),
        steps.next([0], [[0, 0]], [tokens[10:12]]),
    ]
    return torch.cat([step.float().flatten(0, 1) for step in logits])


def _tolerance(dtype: torch.dtype) -> float:
    """What rounding alone may do; another hypothesis's words do tenfold that."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # about as coarse as TF32
    return {torch.bfloat16: 0.1, torch.float16: 0.03}.get(dtype, 1e-4)

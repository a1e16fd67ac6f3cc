"""What is done to every layer of a network alike: finding, recomputing and compiling them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from isthmus.errors import IsthmusError

Forward = Callable[..., Any]


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer, in order, with adapters in them or without.

    They are those that transformers marks, or else the longest list of modules of one type.

    Raises IsthmusError for a network without repeated blocks.
    """
    marked: list[nn.Module] = [
        module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if marked:
        inside = {id(part) for layer in marked for part in layer.modules() if part is not layer}
        return [layer for layer in marked if id(layer) not in inside]
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not alike:
        raise IsthmusError(
            f"{type(network).__name__} has no repeated layers, so it can be neither quantised, "
            "compiled nor recomputed layer by layer. Leave these settings out for this model."
        )
    return max(alike, key=len)


def checkpoint_layers(network: nn.Module) -> None:
    """Keep only the inputs of every layer, and compute the layer again in the backward pass.

    Less memory for a third more time (arXiv 1604.06174). Unlike that of transformers this acts in
    evaluation mode too, because the gradient goes through a frozen language model that is never in
    training mode. Nothing changes without gradient. Call it after `compile_layers`, if both are
    wanted.
    """
    for layer in decoder_layers(network):
        _replace_forward(layer, _recomputed(layer, layer.forward))


def _recomputed(layer: nn.Module, forward: Forward) -> Forward:
    def recomputed(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=layer.training,  # reading it stops the GPU; only dropout needs it
            **options,
        )

    return recomputed


def compile_layers(network: nn.Module, backend: str | Forward = "inductor") -> None:
    """Compile every layer on its own, for any batch size and length.

    Layers of one kind share their code, so the compiler does its work once, not once a layer.
    `backend` is what `torch.compile` takes.
    """
    for layer in decoder_layers(network):
        _replace_forward(layer, torch.compile(layer.forward, dynamic=True, backend=backend))


def _replace_forward(layer: nn.Module, changed: Forward) -> None:
    """Run `changed` instead of the layer's forward, except with a cache of keys and values.

    A second forward pass would fill the cache twice, and the compiler, seeing every layer write to
    a place of its own in it, would compile every one.
    """
    original = layer.forward

    @wraps(original)
    def forward(*inputs: Any, **options: Any) -> Any:
        cached = any(isinstance(value, Cache) for value in (*inputs, *options.values()))
        return (original if cached else changed)(*inputs, **options)

    layer.forward = forward


def recompute_gates(network: nn.Module) -> int:
    """Do without the activated gate in the memory of gated feed-forward layers; how many there are.

    A layer down(act(gate(x)) * up(x)) keeps three wide tensors for its gradient, though the
    activation is made again from the gate in no time: a third of the layer's memory. The numbers
    stay the same, which is tried out: a layer that does anything else is left as it is.
    """
    changed = 0
    same: dict[tuple[type, ...], bool] = {}
    for module in network.modules():
        parts: Any = module
        if not all(hasattr(parts, name) for name in GATED):
            continue
        kind = (type(parts), type(parts.act_fn), type(parts.gate_proj))
        thrifty = _thrifty(parts)
        if kind not in same:
            same[kind] = _alike(thrifty, parts)
        if same[kind]:
            parts.forward = thrifty
            changed += 1
    return changed


GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def _alike(thrifty: Forward, parts: Any) -> bool:
    weight = parts.gate_proj.weight
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False  # quantised: how wide it is, only the layer knows
    with torch.no_grad():
        probe = torch.linspace(-1, 1, weight.shape[1], device=weight.device).to(weight.dtype)
        return torch.equal(thrifty(probe[None, None]), parts.forward(probe[None, None]))


def _thrifty(layer: Any) -> Forward:
    def gated(gate: Tensor, up: Tensor) -> Any:
        return layer.act_fn(gate) * up

    def forward(hidden: Tensor) -> Any:
        parts = layer.gate_proj(hidden), layer.up_proj(hidden)
        if not torch.is_grad_enabled():
            return layer.down_proj(gated(*parts))
        inner = checkpoint(gated, *parts, use_reentrant=False, preserve_rng_state=False)
        return layer.down_proj(inner)

    return forward

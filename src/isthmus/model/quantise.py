"""A frozen language model in less memory, or with faster products: 8 bits, 4 bits, or float8.

Only the linear layers inside the repeated blocks are replaced; embeddings, norms and the head stay.
Every row is treated by itself, so that an utterance does not depend on its neighbours in the batch.
(LLM.int8(), arXiv 2208.07339, looks for outliers over the whole batch, so it is not used here.)

Shapes: N outputs, K inputs, M rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.model.device import choose_device
from isthmus.model.layers import decoder_layers

Kind = Literal["int8", "int4", "fp8"]

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # Ada; the first with float8 products
FP8_MULTIPLE = 16  # that its products ask of N and K


def quantise(network: nn.Module, kind: Kind) -> None:
    """Replace, layer by layer, the linear layers in the blocks of a frozen network.

    int8: a byte a weight and a scale a row. int4: NormalFloat of QLoRA (arXiv 2305.14314), by
    bitsandbytes. fp8: float8 (e4m3) weights and, scaled row by row, inputs, multiplied as such
    (arXiv 2209.05433). The gradient to the input flows through all three. LoRA matrices are left
    as they are, and may be trained.

    Raises IsthmusError for weights that are to be trained, a network without linear layers, a
    device without float8, sizes that it does not take, or a missing bitsandbytes.
    """
    found = [  # where, but not the layers themselves: each is to be given up once it is replaced
        (parent, name, f"{path}.{name}".lstrip("."))
        for layer in decoder_layers(network)
        for path, parent in layer.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and "lora_" not in path
    ]
    if not found:
        raise IsthmusError(
            f"llm.quantise: the layers of {type(network).__name__} hold no linear layers of torch, "
            "so there is nothing to quantise. Leave llm.quantise out for this model."
        )
    for parent, name, path in found:
        _check(getattr(parent, name), path, kind)
    if kind == "fp8":
        _check_device()
    for parent, name, _ in found:
        setattr(parent, name, SMALLER[kind](getattr(parent, name)))


def _check(linear: nn.Linear, path: str, kind: Kind) -> None:
    if linear.weight.requires_grad:
        raise IsthmusError(
            f"llm.quantise: {kind} takes frozen weights, but {path} is to be trained. Set llm.tune "
            "to frozen or lora, or leave llm.quantise out."
        )
    sizes = (linear.out_features, linear.in_features)
    if kind == "fp8" and any(size % FP8_MULTIPLE for size in sizes):
        raise IsthmusError(
            f"llm.quantise: fp8 takes layers whose sizes are multiples of {FP8_MULTIPLE}, but "
            f"{path} is {sizes[0]} x {sizes[1]}. Choose int8 for this model."
        )


def _check_device() -> None:
    device = choose_device()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise IsthmusError(
                "llm.quantise: fp8 takes a GPU of compute capability 8.9 or later (Ada, Hopper), "
                f"but {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}. "
                "Choose int8."
            )


def _nf4(linear: nn.Linear) -> nn.Module:
    """The layer in 4.5 bits a weight: a scale for every 64."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise IsthmusError(
            "llm.quantise: int4 needs the extra `quant`: pip install 'isthmus[quant]'"
        ) from error
    weight = linear.weight.data
    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        device="meta",
        **settings,
    )
    packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings)
    packed.bias = linear.bias
    # On some CPUs the first forward pass without gradient would rearrange the weights for good, for
    # a product that no gradient flows through.
    packed.support_avx512bf16_for_cpu = False
    return cast(nn.Module, packed.to(weight.device).train(linear.training))


class RowScaledLinear(nn.Module):
    """A frozen linear layer whose weight (N, K) is of few bits, with a scale for every row.

    With int8 the weight is widened and multiplied as usual. With float8 the product itself is of
    float8 numbers, each row of the input scaled to their range.
    """

    def __init__(self, linear: nn.Linear, number: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = _scaled_rows(linear.weight.data, number, linear.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # (N, 1)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs (..., K) to outputs (..., N) of the same dtype."""
        product = _Product.apply(inputs, self.weight, self.scale)  # type: ignore[no-untyped-call]  # torch leaves it bare
        outputs: Tensor = product
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.dtype}"


class _Product(torch.autograd.Function):
    """Keeps the small weight for the backward pass: a widened one would cost what was saved."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        if weight.dtype == FP8:
            return _fp8_product(inputs, weight, scale)
        return nn.functional.linear(inputs, _widened(weight, scale, inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ _widened(weight, scale, gradient.dtype), None, None


def _scaled_rows(
    rows: Tensor, number: torch.dtype, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as numbers of few bits, and the scale of each (M, 1).

    What is divided by is the scale as it is stored, so that rounding it does no harm.
    """
    largest = (torch.finfo if number.is_floating_point else torch.iinfo)(number).max
    tiny = torch.finfo(scale_dtype).tiny  # for rows of zeros
    scale = (rows.abs().amax(dim=-1, keepdim=True).float() / largest).to(scale_dtype)
    scale = scale.clamp_min(tiny)
    scaled = (rows / scale.float()).clamp(-largest, largest)
    return (scaled if number.is_floating_point else scaled.round()).to(number), scale


def _widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale.to(dtype))


def _fp8_product(inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows, row_scale = _scaled_rows(inputs.reshape(-1, inputs.shape[-1]), FP8, torch.float32)
    outputs = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=row_scale,
        scale_b=scale.float().t().contiguous(),
        out_dtype=torch.bfloat16,  # the only one that GPUs offer with a scale for every row
        use_fast_accum=True,
    )
    return outputs.view(*inputs.shape[:-1], -1).to(inputs.dtype)


SMALLER: dict[Kind, Callable[[nn.Linear], nn.Module]] = {
    "int8": partial(RowScaledLinear, number=torch.int8),
    "int4": _nf4,
    "fp8": partial(RowScaledLinear, number=FP8),
}

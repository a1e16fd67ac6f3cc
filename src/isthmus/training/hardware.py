"""What GPUs can do at best, to compare what they do with it."""

import re
from typing import TYPE_CHECKING

from isthmus.errors import IsthmusError, suggest

if TYPE_CHECKING:
    import torch

PEAKS = {  # TFLOP/s
    "B200": 2250.0,
    "GB200": 2500.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,  # SXM
    "H100 PCIE": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100 SXM4": 312.0,
    "A100 PCIE": 312.0,
    "A800 SXM4": 312.0,
    "A800 PCIE": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 ADA": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 TI": 80.0,
    "RTX 3090": 71.0,
    "V100 SXM2": 125.0,  # of V100 and T4 float16: they have no bfloat16 matrix units
    "V100 SXM3": 125.0,
    "V100 PCIE": 112.0,
    "V100S PCIE": 130.0,
    "T4": 65.0,
}
COMMON = {"A100": "A100 SXM4", "A800": "A800 SXM4", "V100": "V100 SXM2"}
MAKER_OR_MEMORY = re.compile(r"NVIDIA|TESLA|GEFORCE|GENERATION|\d+GB?|HBM\w+")


def named_peak(gpu: str) -> float:
    """That of a GPU by name, in FLOP/s; needs no torch. Raises IsthmusError for one not known."""
    name = COMMON.get(gpu.upper(), gpu.upper())
    if name not in PEAKS:
        raise IsthmusError(
            f"--gpu {gpu}: its peak is not known.{suggest(name, PEAKS)} Known: {', '.join(PEAKS)}."
        )
    return PEAKS[name] * 1e12


def peak_flops(device: "torch.device") -> float | None:
    """Most floating-point operations a second of a GPU in dense bfloat16 matrix products.

    They are NVIDIA's figures: of the data-centre GPUs in their datasheets, where those with
    structured sparsity are halved; of the GeForce cards with sums in float32, in the whitepapers
    of the Ampere GA102, Ada and Blackwell architectures. None for a CPU, for a part of a GPU
    (MIG), and for names not known here.
    """
    if device.type != "cuda":
        return None
    import torch

    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device).upper())
    peak = PEAKS.get(" ".join(word for word in words if not MAKER_OR_MEMORY.fullmatch(word)))
    return None if peak is None else peak * 1e12

"""Where models compute: on the device that was asked for, or else the best that there is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from isthmus.errors import IsthmusError

if TYPE_CHECKING:
    import torch

AUTO, META = "auto", "meta"  # on meta, torch's own, there are sizes and no numbers
_wanted: ContextVar[str] = ContextVar("_wanted", default=AUTO)


def check_device(name: str) -> None:
    """Raise IsthmusError for what names no device; needs no torch."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise IsthmusError(f"--device {name}: give auto, cpu, cuda, cuda:0 and so on, or mps.")


@contextmanager
def on_device(name: str | None) -> Iterator[None]:
    """What is built within computes on this device: auto, cpu, cuda, cuda:N, mps or meta.

    None leaves what was asked for further out. Raises IsthmusError for one that is not there.
    """
    if name is None:
        yield
        return
    if name != META:
        check_device(name)
        _require(name)
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def choose_device() -> "torch.device":
    """The device that was asked for; unless one was, CUDA if there is any, else the CPU."""
    import torch

    name = _wanted.get()
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _require(name: str) -> None:
    """Raise IsthmusError where there is none; a GPU that has a number becomes the current one."""
    import torch

    kind, _, number = name.partition(":")
    fault = None
    if kind == "mps" and not torch.backends.mps.is_available():
        fault = "torch sees no GPU of Apple's"
    elif kind == "cuda":
        gpus = torch.cuda.device_count()
        if torch.version.cuda is None and torch.version.hip is None:
            fault = f"torch {torch.__version__} was built without CUDA"
        elif int(number or 0) >= gpus:
            fault = f"torch sees {gpus} of them" if gpus else "torch sees no GPU"
        elif number:
            torch.cuda.set_device(int(number))  # for kernels that ask for no device
    if fault:
        raise IsthmusError(f"--device {name} is not there: {fault}. Choose auto or cpu.")

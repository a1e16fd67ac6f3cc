"""The processes of a run: one, or those that torchrun started on one machine or many.

The only file that knows of ranks. Trained parameters are on every rank and their gradients are
summed; frozen blocks may be spread over the ranks (FSDP2).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from isthmus.errors import IsthmusError, RetryLater
from isthmus.model.device import choose_device
from isthmus.model.layers import decoder_layers

SILENCE_SECONDS = "ISTHMUS_RANK_TIMEOUT"  # how long a rank may be silent before the others leave
DEFAULT_SILENCE = 600.0
KERNELS = "64"  # more than a step has shapes of products


def leading() -> bool:
    """Whether this is the process that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def _keep_few_kernels() -> None:
    """Let oneDNN keep the kernels of a few shapes, if nothing has been multiplied yet.

    It makes one for each shape of a bfloat16 product on a CPU, up to 0.6 MB in pieces between the
    tensors, and keeps 1,024. Batches hardly ever have the same length, so a long training would
    hold 0.6 GB that is of no use, and the free memory around it falls into thousands of pieces, in
    which glibc searches longer with every step. To make one anew takes a fraction of a millisecond.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # its own, and ideep's
        os.environ.setdefault(cache, KERNELS)


class Ranks:
    """This process among those of the run.

    As a context it leaves them at the end. RetryLater takes the place of torch's own error when
    another process cannot be reached (any more).
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device()
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        _keep_few_kernels()
        if self.world == 1:
            return
        if gpus:
            self.device = _own_gpu(self.device)
            torch.cuda.set_device(self.device)
        seconds = float(os.environ.get(SILENCE_SECONDS, DEFAULT_SILENCE))
        with _contact():
            torch.distributed.init_process_group(
                "nccl" if gpus else "gloo", timeout=timedelta(seconds=seconds)
            )
        self.rank = torch.distributed.get_rank()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raises RetryLater where `error` is that another process is gone."""
        if self.world == 1:
            return
        if error is None or isinstance(error, SystemExit):
            torch.distributed.destroy_process_group()
            return
        with _contact():  # no farewell: the others may wait elsewhere
            raise error

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of `values` summed over the ranks, the same on all."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it holds on one of the ranks."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, lines: list[str]) -> list[str]:
        """The lines of all ranks, the same on all."""
        if self.world == 1:
            return lines
        found: list[list[str]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(found, lines)
        return [line for own in found for line in own]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients summed over the ranks; a missing one counts as 0 where another rank has it."""
        if self.world == 1:
            return
        found = self.sum([float(parameter.grad is not None) for parameter in parameters])
        used = [one for one, count in zip(parameters, found, strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        _sum_in_place([one.grad for one in used if one.grad is not None])

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Running statistics, averaged over the ranks."""
        if self.world == 1:
            return
        means = [tensor for tensor in tensors if tensor.is_floating_point()]
        _sum_in_place(means)
        for tensor in means:
            tensor /= self.world

    def lead(self, work: Callable[[], None]) -> None:
        """Done by one rank while the others wait.

        Where it fails, all ranks leave: the first with its error, the others without a word more,
        with the same exit code.
        """
        fault: IsthmusError | None = None
        if self.leads:
            try:
                work()
            except IsthmusError as error:
                fault = error
            except OSError as error:
                where = error.filename or "A file of the run"
                fault = RetryLater(
                    f"{where} cannot be written: {error.strerror}. Mend that, then give the same "
                    "command again."
                )
        code = fault.exit_code if fault else 0
        (worst,) = self.sum([code])
        if worst:
            raise fault or SystemExit(int(worst))

    def shard(self, network: PreTrainedModel) -> None:
        """Spread the frozen weights of a network's blocks over the ranks (FSDP2).

        What is trained stays whole on each rank, and so do embedding, last norm and head, which
        are used outside the blocks. All ranks must then make the same passes.
        """
        if self.world == 1:
            raise IsthmusError(
                "train.shard spreads the frozen LLM over several processes, and there is one. "
                "Start them with torchrun --nproc-per-node, or leave train.shard out."
            )
        blocks = decoder_layers(network)
        inside = [value for block in blocks for value in block.parameters()]
        frozen = {value for value in inside if not value.requires_grad}
        if not frozen:
            raise IsthmusError(
                "train.shard spreads what is frozen, and with llm.tune: full no weight of the LLM "
                "is. Leave train.shard out, or set llm.tune to frozen or lora."
            )
        if others := {type(value).__name__ for value in frozen} - {"Parameter"}:
            raise IsthmusError(
                f"train.shard cannot spread weights of type {', '.join(sorted(others))}. Leave it "
                "out, or choose another llm.quantise."
            )
        whole = set(network.parameters()) - frozen
        # the last holds no weights itself: as the root it frees blocks in time, and fetches ahead
        for module in (*blocks, network.base_model):
            fully_shard(module, ignored_params=whole)


def _own_gpu(wanted: torch.device) -> torch.device:
    """The GPU of this process among those of its machine. Raises IsthmusError."""
    count = torch.cuda.device_count()
    if wanted.index is not None:
        raise IsthmusError(
            f"--device {wanted} is for one process, and each of several has its own GPU. Choose "
            "cuda, or auto."
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= count:
        raise IsthmusError(
            f"This machine has {count} GPUs, and process {local + 1} on it has none. Start "
            f"torchrun with --nproc-per-node {count}."
        )
    return torch.device("cuda", local)


def _sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Summed over the ranks, in one message a dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in alike])
        for tensor, part in zip(alike, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def _contact() -> Iterator[None]:
    """RetryLater instead of the errors by which torch says that a process cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error class of its own
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        line = str(error).partition("\n")[0].partition(". ")[0]
        reason = line.partition("] ")[2] or line  # without the place in the source
        raise RetryLater(
            f"Another process of this run was killed, hangs, or cannot be reached ({reason}). Go "
            "on with --resume from the last checkpoint."
        ) from error

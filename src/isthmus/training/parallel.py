"""The processes of a run: one, or those that torchrun started on one machine or many.

The only file that knows of ranks. Trained parameters are on every rank and their gradients are
summed; frozen blocks may be spread over the ranks (FSDP2).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cached_property

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from isthmus.errors import IsthmusError, RetryLater
from isthmus.model.layers import decoder_layers

SILENCE_SECONDS = "ISTHMUS_RANK_TIMEOUT"  # how long a rank may be silent before the others leave
DEFAULT_SILENCE = 600.0


def leading() -> bool:
    """Whether this is the process that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


class Ranks:
    """This process among those of the run."""

    def __init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            seconds = float(os.environ.get(SILENCE_SECONDS, DEFAULT_SILENCE))
            state = PartialState(
                cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=seconds)
            )
            self.rank, self.world = int(state.process_index), int(state.num_processes)
            self.device = torch.device(state.device)
        else:
            self.rank, self.world = 0, 1
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files and talks to the user."""
        return self.rank == 0

    @cached_property
    def _plain_device(self) -> torch.device:
        """gloo sums what is on the CPU, nccl what is on the GPU."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of `values` summed over the ranks, the same on all."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._plain_device)
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

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients summed over the ranks, in one message a dtype; a missing one counts as 0."""
        if self.world == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in kinds.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            for gradient, part in zip(
                gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Running statistics, averaged over the ranks."""
        if self.world == 1:
            return
        for tensor in tensors:
            if tensor.is_floating_point():
                torch.distributed.all_reduce(tensor)
                tensor /= self.world

    def lead(self, work: Callable[[], None]) -> None:
        """Done by one rank while the others wait. Where it fails, all ranks leave with an error."""
        fault: IsthmusError | OSError | None = None
        if self.leads:
            try:
                work()
            except (IsthmusError, OSError) as error:
                fault = error
        if self.any(fault is not None):
            raise fault or RetryLater("The first process could not write; its message says why.")

    def shard(self, network: nn.Module) -> None:
        """Spread the frozen blocks of a network over the ranks (FSDP2), what is trained on all.

        Embedding, last norm and head stay whole: they are used outside the blocks.
        """
        if self.world == 1:
            raise IsthmusError(
                "train.shard spreads the frozen LLM over several processes, and there is one. "
                "Start them with torchrun --nproc-per-node, or leave train.shard out."
            )
        for block in decoder_layers(network):
            trained = {value for value in block.parameters() if value.requires_grad}
            fully_shard(block, ignored_params=trained)

    def close(self) -> None:
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

"""Several processes on this machine, as torchrun would start them."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.training.parallel import Ranks

Job = Callable[[Ranks], Any]
DEADLINE = 60.0


@pytest.fixture(scope="session")
def launch() -> Callable[..., "list[Outcome]"]:
    """Runs a job (its argument: Ranks) in so many forked processes, their output in a folder.

    Gives how each ended. Those `lost` are not waited for.
    """
    return _launch


@dataclass
class Outcome:
    """How one of the processes ended."""

    code: int
    said: str
    result: Any = None


def _launch(job: Job, world: int, folder: Path, *, lost: Sequence[int] = ()) -> list[Outcome]:
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=_run, args=(job, r, place, folder)) for r in range(world)]
    for process in started:
        process.start()
    deadline = time.monotonic() + DEADLINE
    for rank, process in enumerate(started):
        if rank not in lost:
            process.join(max(0.0, deadline - time.monotonic()))
    hanging = [r for r, process in enumerate(started) if process.is_alive() and r not in lost]
    for process in started:
        process.kill()
        process.join()
    assert not hanging, f"{hanging} did not end"
    return [_outcome(process.exitcode, rank, folder) for rank, process in enumerate(started)]


def _run(job: Job, rank: int, place: Mapping[str, str], folder: Path) -> None:
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)  # what the parent's threads hold is lost in the fork
    said = (folder / f"said-{rank}").open("w", buffering=1)
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    sys.stdout = sys.stderr = said  # those of pytest were elsewhere
    try:
        with Ranks() as ranks:
            torch.save(job(ranks), folder / f"result-{rank}")
        assert not torch.distributed.is_initialized()
    except IsthmusError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


def _outcome(code: int | None, rank: int, folder: Path) -> Outcome:
    assert code is not None
    path = folder / f"result-{rank}"
    result = torch.load(path, weights_only=False) if path.exists() else None
    return Outcome(code, (folder / f"said-{rank}").read_text(), result)

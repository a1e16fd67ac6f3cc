"""The batches that a process works on, loaded ahead by worker processes where asked for.

Which batch comes when is a pure function of (plan, position, ranks): nothing is read to be skipped.
"""

import itertools
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from isthmus.errors import RetryLater

Plan = Callable[[int], Sequence[Any]]  # epoch -> its batches


class Loader(Protocol):
    """What knows how to load a batch of a plan."""

    @property
    def seed(self) -> int:
        """Of everything that is random."""

    def load(self, batch: Any, epoch: int | None) -> Any:
        """Read a batch, augmented if there is an epoch: the same for the same arguments."""


@dataclass(frozen=True)
class Order:
    """A batch to be loaded."""

    epoch: int | None  # None in validation
    index: int  # of the batch in the epoch
    batch: Any
    counts: bool = True  # False: a rank without a batch of its own repeats one, for nothing


@dataclass(frozen=True)
class Item:
    """A loaded batch."""

    order: Order
    loaded: Any
    seed: int  # for what is random in its loss: the same on any rank, and after any resume


def orders(
    plan: Plan, epoch: int, position: int, width: int, rank: int, world: int
) -> Iterator[Order]:
    """What rank `rank` of `world` has to load, step after step, from batch `position` on.

    A step takes the next `width` batches of the epoch, fewer at its end, and rank r every world-th
    of them from r on. All ranks get equally many.
    """
    while True:
        batches = plan(epoch)
        for start in range(position, len(batches), width):
            end = min(start + width, len(batches))
            for first in range(start, end, world):
                own = first + rank < end
                index = first + rank if own else first
                yield Order(epoch, index, batches[index], own)
        epoch, position = epoch + 1, 0


def dev_orders(batches: Sequence[Any], rank: int, world: int) -> Iterator[Order]:
    """The validation batches of a rank; all ranks get equally many."""
    for first in range(0, len(batches), world):
        own = first + rank < len(batches)
        index = first + rank if own else first
        yield Order(None, index, batches[index], own)


def load_ahead(
    loader: Loader, wanted: Iterable[Order], workers: int
) -> Generator[Item, None, None]:
    """The wanted batches in their order, read by `workers` processes (0: by this one)."""
    if workers == 0:
        yield from map(_Loads(loader).__getitem__, wanted)
        return
    batches = DataLoader(
        _Loads(loader),
        sampler=wanted,  # an endless one is as good
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # else it draws a number from the generator of the training
        multiprocessing_context="fork",
    )
    try:
        items = iter(batches)
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever the trainer is when a worker dies, even in a
            # save; waiting for the next batch it finds out anyway
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as error:
        gone = ("exited unexpectedly", "is killed by signal")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in gone):
            raise
        raise RetryLater(
            f"A worker that loads audio is gone ({str(error).partition('.')[0]}). Was memory "
            "short? --resume goes on from the last checkpoint; train.workers sets their number."
        ) from error


class _Loads(Dataset[Item]):
    def __init__(self, loader: Loader):
        self.loader = loader

    def __getitem__(self, order: Order) -> Item:
        key = [self.loader.seed, *([] if order.epoch is None else [order.epoch]), order.index]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return Item(order, self.loader.load(order.batch, order.epoch), seed)


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """A signal to the whole group is for the trainer, which saves and then lets its workers go."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def take(items: Iterator[Item], count: int) -> list[Item]:
    return list(itertools.islice(items, count))

"""How much of the torture is done, and processes to be tortured.

All of it is done with ISTHMUS_TORTURE=1, otherwise a sample.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.cli import main
from isthmus.errors import IsthmusError
from isthmus.files import verify_folder
from isthmus.training.checkpoint import newest_checkpoint
from isthmus.training.loop import CHECKPOINTS, METRICS

FULL = os.environ.get("ISTHMUS_TORTURE") == "1"
HANGS = 120.0  # seconds after which a process that should have ended is given up
MEASURED = {"step_seconds", "tflops", "memory_gb"}  # differ from run to run


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """`count(sample, full)`: how many cases to do."""
    return lambda sample, full: full if FULL else sample


class Child:
    """A process of its own, forked from this one: what it imports is there, what it is is real.

    Its exit code is that of the command line: errors of the user by their own, others 1.
    """

    def __init__(self, work: Callable[[], object], log: Path):
        self.log = log
        self.began = time.monotonic()
        self.pid = os.fork()
        self.code: int | None = None
        if self.pid == 0:
            os._exit(self._run(work))

    def _run(self, work: Callable[[], object]) -> int:
        code = 1
        with suppress(BaseException):
            os.setpgid(0, 0)  # a signal to its group reaches its workers, and nobody else
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = self.log.open("w", buffering=1)
            try:
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except IsthmusError as error:
                sys.stderr.write(f"error: {error}\n")
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
        return code

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, -N where signal N ended it."""
        self.wait_for(lambda: False)
        assert self.code is not None
        return self.code

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, or the process has ended."""
        deadline = time.monotonic() + HANGS
        while not self.ended() and not condition():
            assert time.monotonic() < deadline, f"it hangs: {self.said()}"
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.send(number)
        return self.wait()

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def workers(self) -> list[int]:
        """The processes that it started."""
        with suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
            return [int(number) for number in children.split()]
        return []


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Callable[[], object]], Child]]:
    """Starts a process; what is still there at the end is killed, its workers too."""
    children: list[Child] = []

    def begin(work: Callable[[], object]) -> Child:
        children.append(Child(work, tmp_path / f"log-{len(children)}"))
        return children[-1]

    yield begin
    for child in children:
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        if not child.ended():
            child.wait()


def command(*arguments: object) -> Callable[[], None]:
    """The command line, to be run in a child."""

    def run() -> None:
        sys.argv = ["isthmus", *map(str, arguments)]
        main()

    return run


def curve(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each step once, without what is measured; floats are exact."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{k: _exact(v) for k, v in line.items() if k not in MEASURED} for line in lines]


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def outcome(run: Path) -> dict[str, Any]:
    """All that a run ends with, to the bit: curve, weights, optimiser, progress."""
    newest, faults = newest_checkpoint(run / CHECKPOINTS)
    assert newest is not None
    assert not faults
    folders = {"best": run / "best", newest.name: newest}
    for folder in folders.values():
        verify_folder(folder)
    files = {
        f"{name}/{file.name}": file.read_bytes()
        for name, folder in folders.items()
        for file in sorted(folder.iterdir())
    }
    return {"curve": curve(run), **files}


def differences(run: Path, whole: dict[str, Any]) -> list[str]:
    """What of an outcome is not that of the uninterrupted run."""
    found = outcome(run)
    return [name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)]


def logged(run: Path) -> int:
    """The last step of metrics.jsonl; a line cut short does not count."""
    if not (run / METRICS).exists():
        return 0
    whole = (run / METRICS).read_bytes().rpartition(b"\n")[0].splitlines()
    return int(json.loads(whole[-1])["step"]) if whole else 0


def saved(run: Path) -> int:
    """The step of the newest sound checkpoint."""
    newest, _ = newest_checkpoint(run / CHECKPOINTS)
    return int(newest.name.removeprefix("step-")) if newest else 0


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Another stream in each test, the same every time."""
    return random.Random(request.node.nodeid)

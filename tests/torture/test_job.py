"""A job of several processes that are killed, start again, run side by side and out of disk."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from isthmus.decoding import job
from isthmus.decoding.job import Claims, transcribe_corpora
from isthmus.errors import RetryLater
from tests.decoding.test_job import StandIn, outputs, parts, rows, standing_in, write_manifest
from tests.torture.child import Start, disk, fill

Count = Callable[[int, int], int]
UTTERANCES, PARTS = 240, 30
BAD = range(7, UTTERANCES, 20)  # 5 %


def doing(manifest: str, out: Path, delay: float = 0.0) -> Callable[[], object]:
    """The command that is given again and again; what it hears it writes beside `out`."""
    heard = out.with_name(f"{out.name}-heard")
    return partial(transcribe_corpora, standing_in(stand_in=StandIn(heard, delay)), [manifest], out)


def heard(out: Path) -> Counter[str]:
    return Counter(out.with_name(f"{out.name}-heard").read_text().split())


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    return write_manifest(tmp_path / "m.jsonl", UTTERANCES, bad=BAD)


@pytest.fixture
def whole(manifest: str, tmp_path: Path) -> bytes:
    """What a process writes that nothing interrupts."""
    transcribe_corpora(standing_in(), [manifest], tmp_path / "whole")
    return outputs(tmp_path / "whole")


def check(out: Path, whole: bytes) -> None:
    assert outputs(out) == whole
    assert [row["id"] for row in rows(out)] == [f"u{i}" for i in range(UTTERANCES)]
    report = json.loads((out / "report.json").read_text())
    assert report["failed"] == len(BAD)
    assert [row["id"] for row in report["bad"]] == [f"u{i}" for i in BAD]


@pytest.mark.parametrize("processes", [1, 3])
def test_killed_at_any_time_it_ends_as_if_it_had_not_been(
    processes: int, manifest: str, whole: bytes, start: Start, count: Count, tmp_path: Path
) -> None:
    draw = random.Random(processes)
    struck = 0
    for attempt in itertools.count():
        out = tmp_path / f"out-{attempt}"
        work = doing(manifest, out, 0.001 * processes)
        children = [start(work) for _ in range(processes)]
        done, own = parts(out), 0
        while not (out / "report.json").exists():
            victim = draw.randrange(processes)
            end = time.monotonic() + draw.expovariate(1 / 0.05)
            children[victim].wait_for(lambda end=end: time.monotonic() > end)
            own += children[victim].kill() == -signal.SIGKILL
            children[victim] = start(work)
            assert done.items() <= parts(out).items(), "a part was done again"
            done = parts(out)
        for child in children:
            assert child.wait() == 0, child.said()
        check(out, whole)
        assert heard(out).total() <= UTTERANCES + 8 * own
        struck += own
        if struck >= count(3, 50):
            break


def test_processes_side_by_side_share_the_work(
    manifest: str, whole: bytes, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    children = [start(doing(manifest, out, 0.001)) for _ in range(3)]
    for child in children:
        assert child.wait() == 0, child.said()
    check(out, whole)
    assert set(heard(out).values()) == {1}


def test_without_claims_work_would_be_done_twice(
    manifest: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def always(self: Claims, number: int, *, wait: bool) -> Iterator[bool]:
        yield True

    monkeypatch.setattr(Claims, "hold", always)
    for child in [start(doing(manifest, tmp_path / "out", 0.001)) for _ in range(3)]:
        child.wait()
    assert max(heard(tmp_path / "out").values()) > 1


def test_what_a_killed_process_leaves_is_taken_over(
    manifest: str, whole: bytes, start: Start, tmp_path: Path
) -> None:
    """The living ones wait for a process that hangs, and do its part when it is gone."""
    out = tmp_path / "out"
    hangs = start(doing(manifest, out, 1000.0))
    hangs.wait_for(lambda: (out / "job.json").exists())
    time.sleep(0.2)
    lives = start(doing(manifest, out))
    lives.wait_for(lambda: len(parts(out)) == PARTS - 1)
    time.sleep(0.1)
    assert not lives.ended()
    hangs.kill()
    assert lives.wait() == 0, lives.said()
    check(out, whole)


def test_parts_that_are_not_written_as_a_whole_would_be_found_out(
    manifest: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halfway(path: Path, content: bytes | str) -> None:
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(content[: len(content) // 2] if path.name.startswith("part") else content)
        if path.name.startswith("part"):
            os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_atomic", halfway)
        assert start(doing(manifest, out)).wait() == -signal.SIGKILL
    child = start(doing(manifest, out))
    assert child.wait() == 1
    assert "part-000000.jsonl is damaged" in child.said()


def test_a_full_disk_ends_it_for_now(
    manifest: str, whole: bytes, start: Start, tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 1 << 20) as small:
        out, ballast = small / "out", small / "ballast"
        work = partial(doing, manifest, out)
        child = start(work(0.005))
        child.wait_for(lambda: len(parts(out)) > 3)
        fill(ballast)
        assert child.wait() == RetryLater.exit_code
        assert "No space left on device" in child.said()
        done = parts(out)
        assert 3 < len(done) < PARTS
        ballast.unlink()
        child = start(work(0.0))
        assert child.wait() == 0, child.said()
        assert done.items() <= parts(out).items()
        check(out, whole)
        for name in ("report.json", "transcripts.jsonl"):
            (out / name).unlink()
        fill(ballast)
        child = start(work(0.0))
        assert child.wait() == RetryLater.exit_code
        assert not list(out.glob("*transcripts*")) + list(out.glob(".*partial"))
        ballast.unlink()
        child = start(work(0.0))
        assert child.wait() == 0, child.said()
        check(out, whole)

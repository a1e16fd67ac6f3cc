"""Checkpoints: whatever happens to the disk, there is a sound one to go on from."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.errors import RetryLater
from isthmus.files import observers, verify_folder
from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import (
    OPTIMISER,
    STATE,
    WEIGHTS,
    Progress,
    checkpoints,
    load_weights,
    newest_checkpoint,
    retire,
    save_checkpoint,
)


def state(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((20, 30), float(step)), "bias": torch.arange(30.0) + step}


def save(folder: Path, step: int) -> Path:
    target = folder / f"step-{step:06d}"
    save_checkpoint(target, state(step), Progress(step=step), {"moment": torch.zeros(4)})
    return target


def flip(file: Path) -> None:
    """One bit of the last tensor, which safetensors loads without a word."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@contextmanager
def failing(number: int, operation: str, name: str) -> Iterator[None]:
    def observe(found: str, path: Path) -> None:
        if (found, path.name) == (operation, name):
            raise OSError(number, os.strerror(number))

    observers.append(observe)
    try:
        yield
    finally:
        observers.remove(observe)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    target = save(tmp_path, 7)
    assert {WEIGHTS, OPTIMISER, STATE} < {file.name for file in target.iterdir()}
    loaded = state(0)
    assert load_weights(target, loaded).step == 7
    assert all(torch.equal(loaded[name], value) for name, value in state(7).items())


@pytest.mark.parametrize(
    ("number", "operation", "name"),
    [
        (errno.ENOSPC, "write", WEIGHTS),
        (errno.EDQUOT, "flush", OPTIMISER),
        (errno.EIO, "fsync", STATE),
        (errno.EROFS, "mkdir", ".step-000002.partial"),
        (errno.EACCES, "open", "MANIFEST.json"),
        (errno.EIO, "rename", ".step-000002.partial"),
    ],
)
def test_a_disk_that_does_not_take_it_is_one_line_and_exit_code_75(
    tmp_path: Path, number: int, operation: str, name: str
) -> None:
    save(tmp_path, 1)
    with failing(number, operation, name), pytest.raises(RetryLater) as caught:
        save(tmp_path, 2)
    line = str(caught.value)
    assert "\n" not in line
    assert f"step-000002 could not be written: {os.strerror(number)}." in line
    assert "The last checkpoint step-000001 is intact. Resume when" in line
    assert caught.value.exit_code == 75
    assert os.listdir(tmp_path) == ["step-000001"]


def test_the_best_weights_outlive_a_failed_save(tmp_path: Path) -> None:
    best = tmp_path / "best"
    save_checkpoint(best, state(1), Progress(step=1))
    with (
        failing(errno.EIO, "fsync", WEIGHTS),
        pytest.raises(RetryLater, match="The last checkpoint best is intact"),
    ):
        save_checkpoint(best, state(2), Progress(step=2))
    assert load_weights(best, state(0)).step == 1


def test_the_first_checkpoint_that_fails_names_no_other(tmp_path: Path) -> None:
    with (
        failing(errno.ENOSPC, "write", WEIGHTS),
        pytest.raises(RetryLater, match="There is no earlier checkpoint"),
    ):
        save(tmp_path / "checkpoints", 1)


def test_a_full_disk_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 5000}))
    with pytest.raises(RetryLater, match=r"0\.0 MB free, and 0\.0 MB .* step-000001 is intact"):
        save(tmp_path, 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 9000}))
    save(tmp_path, 2)


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in (".step-000003.partial", ".step-000001.removed", ".other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(b"part")
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == [".other.partial", "step-000002"]


def test_a_checkpoint_killed_while_it_was_replaced_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".step-000002.replaced")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-000002", [])


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-2", "step-x", "best"):
        (tmp_path / name).mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step-2", "step-999999", "step-1000000"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(save(tmp_path, step) / WEIGHTS)
    assert newest_checkpoint(tmp_path)[0] is None
    older = save(tmp_path, 2)
    found, faults = newest_checkpoint(tmp_path)
    assert found == older
    assert len(faults) == 1
    assert "step-000003/trainable.safetensors is damaged" in faults[0]


def test_without_the_manifest_a_flipped_bit_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = save(tmp_path, 1)
    flip(newest / WEIGHTS)
    monkeypatch.setattr(checkpoint, "verify_folder", lambda path: None)
    loaded = state(0)
    assert newest_checkpoint(tmp_path) == (newest, [])
    assert load_weights(newest, loaded).step == 1
    assert not all(torch.equal(loaded[name], value) for name, value in state(1).items())


def retired(folder: Path, act: Callable[[], None]) -> list[str]:
    for step in (1, 2, 3):
        save(folder, step)
    act()
    retire(folder, 1)
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    assert retired(tmp_path, lambda: None) == ["step-000003"]
    retire(tmp_path, 1)
    verify_folder(tmp_path / "step-000003")


@pytest.mark.parametrize("protected", [True, False])
def test_nothing_is_deleted_for_a_newest_one_that_is_not_sound(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    protected: bool,
) -> None:
    def damage() -> None:
        flip(tmp_path / "step-000003" / WEIGHTS)
        if not protected:
            monkeypatch.setattr(checkpoint, "verify_folder", lambda path: None)

    found = retired(tmp_path, damage)
    monkeypatch.setattr(checkpoint, "verify_folder", verify_folder)
    if protected:
        assert found == ["step-000001", "step-000002", "step-000003"]
        assert "Older checkpoints are kept" in caplog.text
        assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-000002"
    else:  # deleted before it was verified: the run is lost
        assert newest_checkpoint(tmp_path)[0] is None


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with failing(errno.EACCES, "rename", "step-000001"), caplog.at_level(logging.WARNING):
        retire(tmp_path, 1)
    assert "step-000001 could not be removed: Permission denied" in caplog.text
    retire(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-000002"]

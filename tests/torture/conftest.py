"""How much of the torture is done, and what it is done to.

All of it is done with ISTHMUS_TORTURE=1, otherwise a sample.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from isthmus.training import runs
from tests.torture.child import Child, Start, Whole, Work, outcome, settings

FULL = os.environ.get("ISTHMUS_TORTURE") == "1"


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """`count(sample, full)`: how many cases to do."""
    return lambda sample, full: full if FULL else sample


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


@pytest.fixture
def whole(start: Start, tmp_path: Path) -> Whole:
    """Outcome, and seconds, of work that nothing interrupts."""

    def measure(work: Work) -> tuple[dict[str, Any], float]:
        folder = tmp_path / f"whole-{len(list(tmp_path.iterdir()))}"
        child = start(work(folder))
        assert child.wait() == 0, child.said()
        return outcome(folder), time.monotonic() - child.began

    return measure


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recordings of noise with transcripts."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    for i in range(8):
        soundfile.write(folder / f"u{i}.flac", 0.1 * rng.standard_normal(4000 + 800 * i), 16000)
        (folder / f"u{i}.txt").write_text("abc defgh"[i:] + "a")
    return folder


@pytest.fixture(scope="session")
def same_code() -> Iterator[None]:
    """The code of a run is that of its first process, though it be edited while tests run."""
    environment = runs._environment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_environment", lambda: environment)
        yield


@pytest.fixture(scope="session")
def recipe(
    sounds: Path,
    model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    same_code: None,
) -> Path:
    """A real model, in which all that can be random is: LoRA with dropout, augmented audio."""
    import peft  # noqa: F401  # here, or each process would take seconds for it

    train = settings(batch_size=2).model_dump(mode="json", exclude_unset=True)
    values: dict[str, Any] = {
        "name": "noise",
        "encoder": {"type": "conformer", "path": str(model_folder("conformer"))},
        "projector": {"downsample_rate": 2, "hidden": 16},
        "llm": {"path": str(model_folder("llama")), "tune": "lora"},
        "data": {
            "train": [str(sounds)],
            "dev": [str(sounds)],
            "augment": {"speed_probability": 1.0, "noise_probability": 1.0},
        },
        "train": train,
    }
    values["llm"]["lora"] = {"rank": 2, "dropout": 0.1}
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file

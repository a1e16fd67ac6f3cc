"""How much of the torture is done: all of it with ISTHMUS_TORTURE=1, otherwise a sample."""

import os
from collections.abc import Callable

import pytest

FULL = os.environ.get("ISTHMUS_TORTURE") == "1"


@pytest.fixture(scope="session")
def count() -> Callable[[int, int], int]:
    """`count(sample, full)`: how many cases to do."""
    return lambda sample, full: full if FULL else sample

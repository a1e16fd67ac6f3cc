"""The public names: all there, explained, told by dir(), and loaded only when asked for."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus

NAMES = [name for name in isthmus.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_explained(name: str) -> None:
    assert getattr(isthmus, name).__doc__
    assert name in dir(isthmus)


def test_type_checkers_and_readers_see_the_same_names() -> None:
    source = Path(str(isthmus.__file__)).read_text(encoding="utf-8")
    checked = {
        (alias.name, node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("isthmus.")
        for alias in node.names
    }
    assert checked == set(isthmus._HOMES.items())
    assert {name for name, _ in checked} == set(NAMES)
    page = Path(__file__).parents[1].joinpath("docs/python.md").read_text(encoding="utf-8")
    rows = "".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == set(NAMES)


def test_what_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = isthmus.lode
    assert not hasattr(isthmus, "np")


def test_names_load_only_what_they_need() -> None:
    code = (
        "import sys, isthmus\n"
        "heavy = lambda: {'torch', 'transformers', 'lhotse'} & set(sys.modules)\n"
        "dir(isthmus)\n"
        "assert not heavy()\n"
        "assert isthmus.score({'a': 'one two'}, {'a': 'one'}).wer == 0.5\n"
        "isthmus.compare, isthmus.Transcript, isthmus.IsthmusError\n"
        "assert not heavy()\n"
        "isthmus.load\n"
        "assert 'torch' in heavy()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

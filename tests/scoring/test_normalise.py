"""Normalisers: a table of lines, names and errors."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.scoring import NORMALISERS, normaliser

TABLE = [
    # English, Whisper's rules
    ("whisper", "Let's go.", "let us go"),
    ("whisper", "he's like", "he is like"),
    ("whisper", "I won't do it", "i will not do it"),
    ("whisper", "The colour of the theatre", "the color of the theater"),
    ("whisper", "twenty-one guns", "21 guns"),
    ("whisper", "one hundred and five", "105"),
    ("whisper", "$20 million", "$20000000"),
    ("whisper", "three point one four", "3.14"),
    ("whisper", "um, so uh yes", "so yes"),
    ("whisper", "Mr. Quilter", "mister quilter"),
    ("whisper", "well [laughter] well", "well well"),
    ("whisper", "yes (she coughs) no", "yes no"),
    ("whisper", "the 1960s", "the 1960s"),
    ("whisper", "café", "cafe"),
    ("whisper", "gonna leave", "going to leave"),
    ("whisper", "  ", ""),
    # any language, Whisper's rules
    ("basic", "Hello, World!", "hello world"),
    ("basic", "don't", "don t"),
    ("basic", "a\tb\n c ", "a b c"),
    ("basic", "Ünïcödé", "ünïcödé"),
    ("basic", "<|en|> yes", "yes"),
    ("basic", "今天，天气很好。", "今天 天气很好"),
    ("basic", "ＡＢＣ", "abc"),
    ("basic", "twenty-one", "twenty one"),
    ("basic", "Größe", "größe"),
    ("basic", "...", ""),
    ("basic-marks", "ที่นี่", "ที่นี่"),
    ("basic-marks", "हिन्दी, नमस्ते!", "हिन्दी नमस्ते"),
    # lower case, apostrophes stay
    ("lower", "Don't STOP, believing!", "don't stop believing"),
    ("lower", "Don\u2019t", "don't"),
    ("lower", "well-known", "well known"),
    ("lower", "dogs ' tails '", "dogs tails"),
    ("lower", "cafe\u0301", "café"),
    ("lower", "a + b = 3", "a b 3"),
    ("lower", "ﬁne", "fine"),
    ("lower", "«Oui» – dit-il…", "oui dit il"),
    ("lower", "", ""),
    # white space only
    ("none", "  Hello,   World! ", "Hello, World!"),
    ("none", "a\u00a0b\u3000c\r\n", "a b c"),
    ("none", "", ""),
]


@pytest.mark.parametrize(("name", "text", "expected"), TABLE)
def test_table(name: str, text: str, expected: str) -> None:
    assert normaliser(name)(text) == expected


@pytest.mark.parametrize("name", NORMALISERS)
@settings(deadline=None)  # the first call loads the tables
@given(text=st.text(max_size=40))
def test_white_space_is_always_folded(name: str, text: str) -> None:
    normalised = normaliser(name)(text)
    assert normalised == " ".join(normalised.split())


def test_basic_is_whispers_for_thai_and_marks_are_a_name_of_their_own() -> None:
    thai = "ที่"
    assert normaliser("basic")(thai) != thai
    assert normaliser("basic-marks")(thai) == thai


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'wisper'.*Did you mean 'whisper'"):
        normaliser("wisper")
    with pytest.raises(ValueError, match=r"'qqq'. Known: whisper, basic"):
        normaliser("qqq")


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rules.py").write_text(
        "def shout(text):\n    return text.upper() + '  '\n"
        "def broken(text):\n    return 3\n"
        "number = 4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rules", raising=False)
    return "own_rules"


def test_module_and_callable(own_module: str) -> None:
    assert normaliser(f"{own_module}:shout")("a  b") == "A B"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:shout", "cannot be imported"),
        ("own_rules:absent", "cannot be imported.*absent"),
        ("own_rules:number", "is a int, not callable"),
        (":shout", "cannot be imported"),
        ("own_rules:", "cannot be imported"),
    ],
)
def test_module_and_callable_that_is_none(own_module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normaliser(name)


def test_own_callable_must_give_text(own_module: str) -> None:
    with pytest.raises(ValueError, match="gave int for 'a'"):
        normaliser(f"{own_module}:broken")("a")

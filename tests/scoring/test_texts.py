"""Reading references and hypotheses: every form, and errors that name file and line."""

import re
from pathlib import Path

import pytest

from isthmus.scoring import read_texts


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.jsonl",
            '{"id": "u1", "text": "one"}\n\n{"id": 2, "text": "two"}\n',
            {"u1": "one", "2": "two"},
        ),
        ("a.jsonl", '{"id": "u1", "pred_text": "one"}', {"u1": "one"}),
        ("a.jsonl", '\ufeff{"id": "u1", "hypothesis": ""}', {"u1": ""}),
        ("a.tsv", "id\ttext\nu1\tone two\nu2\t\n", {"u1": "one two", "u2": ""}),
        ("a.txt", "u1\tone two\r\nu2\ttwo\r\n", {"u1": "one two", "u2": "two"}),
        ("a.trans.txt", "1089-1 ONE TWO\n1089-2\n", {"1089-1": "ONE TWO", "1089-2": ""}),
        ("text", "alpha one two\nbeta three\n", {"alpha": "one two", "beta": "three"}),
        ("a.txt", "one two\n\nthree\n", {"1": "one two", "2": "", "3": "three"}),
        ("a.txt", "7 men\n7 men\n", {"1": "7 men", "2": "7 men"}),
        ("a.txt", "one\u2028two\nthree", {"1": "one\u2028two", "2": "three"}),
        ("a.txt", "", {}),
        ("a.txt", "\n", {"1": ""}),
    ],
)
def test_forms(tmp_path: Path, name: str, text: str, expected: dict[str, str]) -> None:
    assert read_texts(written(tmp_path, name, text)) == expected


def test_form_may_be_given(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "5 apples\n6 pears\n")
    assert read_texts(path) == {"5": "apples", "6": "pears"}
    assert read_texts(path, form="lines") == {"1": "5 apples", "2": "6 pears"}
    with pytest.raises(ValueError, match="form='xml'"):
        read_texts(path, form="xml")  # type: ignore[arg-type] # the wrong value is the test


def test_a_decoded_manifest_is_never_scored_against_itself(tmp_path: Path) -> None:
    line = '{"id": "u1", "text": "right", "pred_text": "wrong"}\n'
    path = written(tmp_path, "a.jsonl", line)
    assert read_texts(path, role="reference") == {"u1": "right"}
    assert read_texts(path, role="hypothesis") == {"u1": "wrong"}
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*pred_text and text.*role="):
        read_texts(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"id": "u1", "text": "a"}\n{"id": ', ":2: not JSON"),
        ("a.jsonl", '{"id": "u1", "text": "a"}\n[1]', ":2: no object with an `id`"),
        ("a.jsonl", '{"text": "a"}', ":1: no object with an `id`"),
        ("a.jsonl", '{"id": "u1", "txt": "a"}', ":1: utterance 'u1' has none of the fields"),
        ("a.jsonl", '{"id": "u1", "text": null}', ":1: the text of 'u1' is None"),
        ("a.jsonl", '{"id": "u1", "text": "a"}\n' * 2, ":2: utterance id 'u1' stands in line 1"),
        ("a.tsv", "u1\ta\nu2 b\n", ":2: no tab in 'u2 b'"),
        ("a.tsv", "u1\ta\n\tb\n", ":2: no utterance id"),
        ("text", "u1 a\nu2 b\nu1 c\n", ":3: utterance id 'u1' stands in line 1"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        read_texts(path)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_texts(path)

"""Reading references and hypotheses: every form, and errors that name file and line."""

import re
from pathlib import Path

import pytest

from isthmus.scoring import read_pair, read_texts, score


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
        ("a.txt", "2 apples\n3 pears\n", {"1": "2 apples", "2": "3 pears"}),
        ("a.txt", "2020-01-05 was\n555-123-4567\n", {"1": "2020-01-05 was", "2": "555-123-4567"}),
        ("a.txt", "the id, and\nthe text\n", {"1": "the id, and", "2": "the text"}),
        (
            "a.txt",
            "84-121123-0001 a\n84-121123-0002\n",
            {"84-121123-0001": "a", "84-121123-0002": ""},
        ),
        ("a.csv", 'text,id\n"one, two",u1\n', {"u1": "one, two"}),
        ("a.txt", "id,text\nu1,one\n", {"u1": "one"}),
        ("a.csv", "u1,one\n", {"u1": "one"}),
        (
            "a.json",
            '[{"id": "u1", "text": "one"},\n {"id": "u2", "text": ""}]',
            {"u1": "one", "u2": ""},
        ),
        ("a.trn", ";; made\none two (u1)\n(u2)\n", {"u1": "one two", "u2": ""}),
        ("a.txt", "one (a)\ntwo (b)\n", {"a": "one", "b": "two"}),
        ("a.txt", "one (laughs)\ntwo (laughs)\n", {"1": "one (laughs)", "2": "two (laughs)"}),
        ("a.txt", "one\rtwo\r", {"1": "one", "2": "two"}),
        ("text", "e\u0301 one\n", {"\u00e9": "one"}),
        ("a.txt", "", {}),
        ("a.csv", "", {}),
        ("a.txt", "\n", {"1": ""}),
    ],
)
def test_forms(tmp_path: Path, name: str, text: str, expected: dict[str, str]) -> None:
    assert read_texts(written(tmp_path, name, text)) == expected


def test_form_may_be_given(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "5 apples\n6 pears\n")
    assert read_texts(path, form="kaldi") == {"5": "apples", "6": "pears"}
    assert read_texts(path) == {"1": "5 apples", "2": "6 pears"}
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
        ("a.jsonl", '{"id": "u1", "text": "a"}\n{"id": ', ":2: not valid JSON"),
        ("a.jsonl", '{"id": "u1", "text": "a"}\n[1]', ":2: a list where an object"),
        ("a.jsonl", '{"text": "a"}', ":1: no object with an `id`"),
        ("a.jsonl", '{"id": "u1", "txt": "a"}', ":1: utterance 'u1' has none of the fields"),
        ("a.jsonl", '{"id": "u1", "text": null}', ":1: the text of 'u1' is None"),
        ("a.jsonl", '{"id": "u1", "text": "a"}\n' * 2, ":2: utterance id 'u1' stands in line 1"),
        ("a.tsv", "u1\ta\nu2 b\n", ":2: 1 columns where 2 were expected (id, text)"),
        ("a.tsv", "u1\ta\n\tb\n", ":2: no utterance id"),
        ("a.csv", 'u1,a\nu2,"b\n', ":2: no row of a table"),
        ("a.trn", "a (u1)\nb\n", ":2: no (id)"),
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


KALDI, WORDS = "read as Kaldi text", "first words of the lines are read as words"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "ids", "note"),
    [
        ("2 apples\n3 pears", "2 apples\n3 bears", ["1", "2"], WORDS),
        ("1st one\n2nd two", "1st one\n2nd two", ["1", "2"], WORDS),
        ("2 apples\n3 pears", "two apples\nthree bears", ["1", "2"], ""),
        ("1089-1 one\n1089-2 two", "1089-2 two\n1089-1 one", ["1", "2"], WORDS),
        ("u1 one\nu2 two", "u2 two\nu1 one", ["u1", "u2"], KALDI),
        ("u1 one\nu2 two\nu3", "u2 two\nu1 one", ["u1", "u2", "u3"], KALDI),
        ("u1 one\nu2 two", "one\ntwo", ["1", "2"], WORDS),
        ("one\ntwo", "one\ntwo", ["1", "2"], ""),
        ("one (u1)\ntwo (u2)", "two (u2)\none (u1)", ["u1", "u2"], "read as trn"),
        ("one (a)\ntwo (b)", "one\ntwo", ["1", "2"], ""),
        ('{"id": "2", "text": "one"}', "2 one", ["2"], KALDI),
        ('{"id": "2", "text": "one"}', "one (2)", ["2"], "read as trn"),
        ("2 one", "2\tone", ["2"], KALDI),
    ],
)
def test_ids_are_what_both_files_have(
    tmp_path: Path, reference: str, hypothesis: str, ids: list[str], note: str
) -> None:
    paths = written(tmp_path, "r.txt", reference), written(tmp_path, "h.txt", hypothesis)
    references, _, notes = read_pair(*paths)
    assert list(references) == ids
    assert note in "; ".join(notes)
    assert bool(notes) == bool(note)
    assert read_pair(*paths[:1], *paths[:1], form="lines")[2] == []


def test_ids_and_words_match_however_their_accents_are_composed(tmp_path: Path) -> None:
    reference = written(tmp_path, "r.txt", "caf\u00e9_1 \u00e9t\u00e9\n")
    hypothesis = written(tmp_path, "h.txt", "cafe\u0301_1 e\u0301te\u0301\n")
    references, hypotheses, _ = read_pair(reference, hypothesis)
    assert score(references, hypotheses, normaliser="none").counts.errors == 0

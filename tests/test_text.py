"""Files of text from anywhere: one bad row is one fault with its line, and nothing is cut short."""

import gzip
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from isthmus import text
from isthmus.errors import IsthmusError
from isthmus.text import composed, is_control, is_word, json_rows, raw_lines, table_rows

HEADER = "file,text\n"
ONE = '{"id": 1}'


def table(folder: Path, content: str | bytes, name: str = "a.csv") -> list[tuple[int, Any]]:
    """Number, and cells or the fault, of each row."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)

    def named(cells: Collection[str]) -> bool:
        return "file" in cells

    rows = table_rows(path, raw_lines(path), named=named, unnamed=("file", "text"))
    return [(number, fault or tuple(cells.values())) for number, cells, fault in rows]


def objects(folder: Path, content: str | bytes) -> list[tuple[int, Any]]:
    path = folder / "a.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(number, fault or row) for number, row, fault in json_rows(path, raw_lines(path))]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'a,"one\ntwo"\nb,x\n', [(1, ("a", "one\ntwo")), (3, ("b", "x"))]),
        ("a.csv", HEADER + 'a,"one, ""two"""\r\n', [(2, ("a", 'one, "two"'))]),
        ("a.csv", "text,file,n\nx,a,3\n", [(2, ("x", "a", "3"))]),
        ("a.csv", "file,text\ra,one\rb,two", [(2, ("a", "one")), (3, ("b", "two"))]),
        ("a.csv", HEADER + "a," + "x" * 200_000, [(2, ("a", "x" * 200_000))]),
        ("a.csv", "\ufeff" + HEADER + "a,o\0ne", [(2, ("a", "o\0ne"))]),
        ("a.csv", "\n" + HEADER + "\na,one\n", [(4, ("a", "one"))]),
        ("a.csv", 'file;text\na;"one; two, three"\n', [(2, ("a", "one; two, three"))]),
        ("a.csv", "a|one|One.\nb|two|Two.\n", [(1, ("a", "one")), (2, ("b", "two"))]),
        ("a.tsv", 'a\tsay "one"\nb\t"two"\n', [(1, ("a", 'say "one"')), (2, ("b", '"two"'))]),
        ("a.tsv", 'a\t"one\ntwo"\nb\tx\n', [(1, ("a", "one\ntwo")), (3, ("b", "x"))]),
        ("a.tsv", 'a\t"say ""one"""\n', [(1, ("a", 'say "one"'))]),
        ("a.tsv", 'a\t"one\nb\ttwo\n', [(1, ("a", '"one')), (2, ("b", "two"))]),
    ],
)
def test_tables_by_their_grammar(
    tmp_path: Path, name: str, content: str, expected: list[tuple[int, Any]]
) -> None:
    assert table(tmp_path, content, name) == expected


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("a,one\rtwo", "line end seen in unquoted field"),
        ('a,"one', "no row of a table"),
        ('a,"one" two', "expected after"),
        ("a", "1 columns where 2"),
        ("a,one,two", "3 columns where 2 were expected (file, text)"),
    ],
)
@pytest.mark.parametrize("rest", ["three", '"three, four"'])
def test_one_bad_row_is_one_fault(tmp_path: Path, bad: str, reason: str, rest: str) -> None:
    first, *others = table(tmp_path, f"{HEADER}{bad}\nb,{rest}\nc,five\n")
    assert first[0] == 2
    assert reason in first[1]
    assert others == [(3, ("b", rest.strip('"'))), (4, ("c", "five"))]


def test_many_torn_rows_take_no_longer_than_their_number(tmp_path: Path) -> None:
    found = table(tmp_path, HEADER + 'a,"one\n' * 3000)
    assert len(found) == 3000
    assert all(isinstance(fault, str) for _, fault in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER.replace("file", "text,file"), "the column 'text' stands twice"),
        ("", "nothing in it"),
        (HEADER.encode("utf-16"), "this is UTF-16"),
        (HEADER.encode("utf-16-be"), "this is UTF-16"),
        (HEADER.encode("utf-32"), "this is UTF-32"),
        (gzip.compress(HEADER.encode())[:20], "cannot be opened"),
    ],
)
def test_a_file_that_is_no_table_is_named(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(IsthmusError, match=rf"a\.csv: .*{message}"):
        table(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{ONE}\r{ONE}\r", [(1, {"id": 1}), (2, {"id": 1})]),
        (f"\n{ONE}\n\n{ONE}", [(2, {"id": 1}), (4, {"id": 1})]),
        (f"[{ONE},\n{ONE}]", [(1, {"id": 1}), (2, {"id": 1})]),
        (f"[\n\n {ONE},\n {ONE}\n]\n", [(3, {"id": 1}), (4, {"id": 1})]),
        ('{\n"id": 1\n}\n{\n"id": 2}', [(1, {"id": 1}), (4, {"id": 2})]),
        (gzip.compress(ONE.encode()), [(1, {"id": 1})]),
    ],
)
def test_json_in_lines_arrays_and_over_lines(
    tmp_path: Path, content: str | bytes, expected: list[tuple[int, Any]]
) -> None:
    assert objects(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a list where"),
        ("3", "a int where"),
        ("\0", "not valid JSON"),
        ('{"id": 1, "id": 2}', "the field 'id' stands twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"id": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("before", ["", ONE + "\n"])
def test_a_line_that_is_no_object_is_one_fault(
    tmp_path: Path, bad: str, reason: str, before: str
) -> None:
    found = objects(tmp_path, f"{before}{bad}\n{ONE}\n")
    faults = [fault for _, fault in found if isinstance(fault, str)]
    assert len(found) == 2 + bool(before)
    assert len(faults) == 1
    assert faults[0].startswith(reason) or reason in faults[0]


def test_a_torn_array_says_where(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"a\.json:3: not valid JSON .*array"):
        objects(tmp_path, f"[\n{ONE},\n{ONE} {ONE}]")


def test_an_endless_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINE", 10)
    (tmp_path / "a").write_text("short\n" + "x" * 30)
    with pytest.raises(IsthmusError, match="a:2: a line of more than 10 characters"):
        list(raw_lines(tmp_path / "a"))


@pytest.mark.parametrize("letter", ["\U00031350", "\U0001fae8", "\U000323af", "\u0378", "\u200d"])
def test_letters_that_this_unicode_may_not_know_are_no_fault(letter: str) -> None:
    assert not is_control(letter)
    if unicodedata.category(letter) == "Cn":
        assert is_word(letter)


@pytest.mark.parametrize("character", ["\0", "\n", "\x7f", "\x85", "\ud800", "\ufffe", "\u202e"])
def test_what_nobody_can_mean_is_a_control(character: str) -> None:
    assert is_control(character)
    assert not is_word(character) or character == "\ufffe"


def test_accents_are_composed() -> None:
    assert composed("e\u0301") == "\u00e9"
    assert composed("\u1112\u1161\u11ab") == "\ud55c"

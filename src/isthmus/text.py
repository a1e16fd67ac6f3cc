"""Text of any origin: files of it by lines, table rows and JSON values, and what letters are.

Each reader gives what it finds with the number of the line that it begins in, from 1. What is wrong
with one row is a fault of that row, a sentence that leaves the place to the caller, and the reading
goes on behind it.
"""

import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

from isthmus.errors import IsthmusError

MAX_LINE = 1 << 26  # characters; beyond it is no line of text but some other file
_HEAD = 1 << 16  # bytes by which encoding and line ends are told
_ENCODINGS = {  # by how a file begins; the longer marks come first
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]",
}
# Marks that turn the direction of text around: invisible, and no part of a transcript.
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# Thai and Lao, Burmese, Khmer, kana, Han, with their punctuation: written without spaces.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u312f\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]"
)

Cells = dict[str, str]  # of a row of a table, by column


def composed(text: str) -> str:
    """`text` with each letter and its accents as one code point where there is one (NFC)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def is_control(character: str) -> bool:
    """Whether nobody can mean this character: a control, half a pair, no character by definition.

    What this Python's Unicode is too old to know (category Cn) may well be a letter.
    """
    code = ord(character)
    undefined = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    kind = unicodedata.category(character)
    return undefined or kind in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTION_MARKS


def is_word(text: str) -> bool:
    """Whether anything in it can be said: a letter, a digit, or what Unicode may yet call one."""
    return any(one.isalnum() or unicodedata.category(one) in ("Cn", "Co") for one in text)


def raw_lines(path: Path, *, strict: bool = False) -> Iterator[str]:
    """The lines of a UTF-8 file, gzip or not, with their ends; lone CRs end them in a file that has
    no other ends.

    Bytes that are no UTF-8 become lone surrogates. Raises IsthmusError for a file that cannot be
    read, or is in another Unicode encoding; where `strict`, for such bytes too.
    """
    with _open(path) as stream:
        try:
            for number, line in enumerate(iter(partial(stream.readline, MAX_LINE), ""), start=1):
                if len(line) == MAX_LINE:
                    raise IsthmusError(
                        f"{path}:{number}: a line of more than {MAX_LINE} characters. Name a file "
                        "of text."
                    )
                if strict and re.search("[\udc80-\udcff]", line):
                    raise IsthmusError(
                        f"{path}:{number}: not UTF-8 text. Convert it, e.g. by iconv."
                    )
                yield line
        except (EOFError, OSError, zlib.error) as error:
            raise IsthmusError(f"{path}: damaged ({error}). Copy it again.") from error


def _open(path: Path) -> TextIO:
    try:
        stream: io.BufferedReader[Any] = io.BufferedReader(io.FileIO(path), _HEAD)
        if stream.peek(2)[:2] == b"\x1f\x8b":
            stream.close()
            stream = io.BufferedReader(gzip.GzipFile(path), _HEAD)
        head = stream.peek(_HEAD)
    except (EOFError, OSError, zlib.error) as error:
        raise IsthmusError(f"{path}: cannot be opened ({error}). Correct the path.") from error
    for name, beginning in _ENCODINGS.items():
        if re.match(beginning, head):
            stream.close()
            raise IsthmusError(
                f"{path}: this is {name}, and text is read as UTF-8. Convert it, e.g. by iconv."
            )
    ends = "\r" if b"\r" in head[:-1] and b"\n" not in head else "\n"
    return io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=ends)


def text_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Number and content of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def json_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Number, object and fault of each JSON object: one a line, in an array, or over several lines.

    Raises IsthmusError for an array that is damaged.
    """
    filled = text_lines(lines)
    first = list(next(([line] for line in filled), []))
    if first and first[0][1].lstrip()[0] in "[{" and not _is_row(first[0][1]):
        first += filled
        if (found := _json_values(path, first)) is not None:
            yield from ((number, *_object(value)) for number, value in found)
            return
    for number, text in chain(first, filled):
        try:
            yield number, *_object(_loads(text))
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)  # of which the place is only that in the line
            yield number, {}, f"not valid JSON ({why}). Write one JSON object on each line."


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the field {_doubled(key for key, _ in pairs)!r} stands twice")
    return found


def _doubled(names: Iterable[str]) -> str:
    """The name that comes most often, the first of them."""
    return Counter(names).most_common(1)[0][0]


def _object(value: Any) -> tuple[dict[str, Any], str]:
    if isinstance(value, dict):
        return value, ""
    kind = type(value).__name__
    return {}, f"a {kind} where an object was expected. Write one JSON object on each line."


def _is_row(line: str) -> bool:
    """Whether a line is JSON of its own, and no array of objects."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return not (isinstance(value, list) and any(isinstance(one, dict) for one in value))


def _json_values(path: Path, lines: Sequence[tuple[int, str]]) -> list[tuple[int, Any]] | None:
    """Number and value of each element of an array, or of objects over several lines; else None."""
    text = "\n".join(line for _, line in lines)
    is_array = text.lstrip().startswith("[")
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    between = re.compile(r"[\s,\[\]]*" if is_array else r"\s*")
    found: list[tuple[int, Any]] = []
    place = row = 0
    try:
        if is_array:
            _loads(text)
        while match := between.match(text, place):
            row += text.count("\n", place, match.end())
            if match.end() == len(text):
                return found
            value, place = decoder.raw_decode(text, match.end())
            found.append((lines[row][0], value))
            row += text.count("\n", match.end(), place)
    except json.JSONDecodeError as error:
        if is_array:
            raise IsthmusError(
                f"{path}:{lines[min(error.lineno, len(lines)) - 1][0]}: not valid JSON "
                f"({error.msg}), in an array. Write it whole."
            ) from error
    except (ValueError, RecursionError):
        pass
    return None


def table_rows(
    path: Path,
    lines: Iterable[str],
    *,
    named: Callable[[Collection[str]], bool],
    unnamed: Sequence[str],
    delimiters: str = "\t|;,",
) -> Iterator[tuple[int, Cells, str]]:
    """Number, cells by column and fault of each row of a table of tabs, bars, semicolons or commas.

    `named` tells a line of names, in lower case; without one the columns are `unnamed`. A quoted
    cell may hold separators, line ends and doubled quotes (RFC 4180). Tables of tabs or bars often
    take quotes as text: theirs are quotes only where that leaves fewer rows at fault. Raises
    IsthmusError for a table without rows and for a column that stands twice.
    """
    csv.field_size_limit(2**31 - 1)
    lines = list(lines)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise IsthmusError(f"{path}: there is nothing in it.")
    delimiter = _delimiter(path, first, named, delimiters)
    rows = _best_rows(lines, delimiter)
    names = [name.strip().lower() for name in rows[0][1]]
    if is_named := named(names):
        if (doubled := _doubled(filter(None, names))) and names.count(doubled) > 1:
            raise IsthmusError(f"{path}: the column {doubled!r} stands twice. Rename one of them.")
    else:
        names = list(unnamed)
    # LJSpeech has a third column without a name; elsewhere more columns mean an unquoted separator.
    has_rest = delimiter == "|" and not is_named
    for number, cells, fault in rows[is_named:]:
        if not fault and (len(cells) < len(names) or (len(cells) > len(names) and not has_rest)):
            fault = (
                f"{len(cells)} columns where {len(names)} were expected ({', '.join(names)}). "
                f"Quote texts that hold the separator {delimiter!r}."
            )
        stripped = [] if fault else [cell.strip() for cell in cells]
        yield number, dict(zip(names, stripped, strict=False)), fault


def _delimiter(
    path: Path, first: str, named: Callable[[Collection[str]], bool], delimiters: str
) -> str:
    """What parts the columns: it gives a line of names, or else stands in the first line."""
    for one in delimiters:
        cells = next(csv.reader([first], delimiter=one), [])
        if named([cell.strip().lower() for cell in cells]):
            return one
    of_tabs = Path(path.name.removesuffix(".gz")).suffix.lower() == ".tsv"
    usual = [one for one in ("\t", "|", ",", ";") if one in delimiters]
    return usual[0] if of_tabs else next((one for one in usual if one in first), usual[-1])


def _best_rows(lines: Sequence[str], delimiter: str) -> list[tuple[int, list[str], str]]:
    """All rows, with quotes or without by what the table seems to be written in."""
    quoted = list(_rows(lines, delimiter, csv.QUOTE_MINIMAL))
    if delimiter in ",;":
        return quoted
    plain = list(_rows(lines, delimiter, csv.QUOTE_NONE))
    bad, bad_plain = (
        sum(bool(fault) or len(cells) != len(rows[0][1]) for _, cells, fault in rows)
        for rows in (quoted, plain)
    )
    doubled = any(cell[:1] == '"' and '""' in cell[1:-1] for _, cells, _ in plain for cell in cells)
    return quoted if bad < bad_plain or (bad == 0 and doubled) else plain


def _rows(
    lines: Sequence[str], delimiter: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, list[str], str]]:
    """Number, cells and fault of each row; a bad one is one line, and the next may be good."""
    start = 0
    while start < len(lines):
        reader = csv.reader(
            map(lines.__getitem__, range(start, len(lines))),
            delimiter=delimiter,
            quoting=quoting,
            strict=True,
        )
        end = start
        try:
            for cells in reader:
                if len(cells) > 1 or "".join(cells).strip():
                    yield end + 1, cells, ""
                end = start + reader.line_num
            return
        except csv.Error as error:
            reason = str(error).partition(" - ")[0].replace("new-line character", "line end")
            yield end + 1, [], f"no row of a table ({reason}). Quote cells with both marks around."
            start = end + 1

"""Reads references and hypotheses by utterance id from the files people keep them in."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from isthmus.errors import IsthmusError, suggest
from isthmus.text import composed, json_rows, raw_lines, table_rows

Form: TypeAlias = Literal["auto", "json", "csv", "tsv", "kaldi", "trn", "lines"]
Role: TypeAlias = Literal["reference", "hypothesis"]
Entry: TypeAlias = tuple[int, str, str]  # line number, id, text

# The fields a text may stand in, the first present one counting. A decoded manifest often keeps
# the reference beside the hypothesis, so without a role two present fields are an error.
_FIELDS: dict[Role, tuple[str, ...]] = {
    "reference": ("text",),
    "hypothesis": ("hypothesis", "pred_text", "text"),
}
_DELIMITERS = {"csv": ",;", "tsv": "\t"}
_TRN = re.compile(r"(.*?)\s*\(([^()\s]+)\)\s*")
# What names an utterance and hardly begins a sentence: a_b, utt-17, 1089-134686-0000. Numerals,
# dates and telephone numbers do begin sentences.
_ID = re.compile(r"\S*_\S*|[^\W\d]\S*\d\S*|\d+-\d{4,}-\d+")
_NAMES = {
    "kaldi": "Kaldi text, whose lines begin with ids",
    "trn": "trn, whose lines end with ids",
    "json": "JSON",
    "csv": "a table of commas",
    "tsv": "a table of tabs",
    "lines": "plain lines",
}


def read_texts(
    path: str | Path, *, role: Role | None = None, form: Form = "auto"
) -> dict[str, str]:
    """Texts by utterance id from a UTF-8 file, in file order, as they stand (not normalised).

    Forms, and how `auto` tells them apart:
        json: objects with `id` and a text, one a line or in an array; it begins with one.
        csv, tsv: columns `id` and text, which a line of names may name, in any order; the file is
            called so, every line holds a tab, or the first line has such names.
        trn: `words ... (id)`, all lines, each with another id.
        kaldi: `id words ...`; the file is called `text`, or every line begins with another word
            that can hardly begin a sentence (see also `read_pair`).
        lines: anything else; ids are the line numbers, from "1"; an empty line is an empty text.

    Args:
        role: which field of an object or row to read. `reference` reads `text`; `hypothesis` reads
            `hypothesis`, else `pred_text`, else `text`; None takes whichever is there, and fails
            where several are.

    Raises:
        IsthmusError: a line is not of its form or an id comes twice; the message names file:line.
    """
    return _read(_File(Path(path), role), form)[1]


def read_pair(
    reference: str | Path, hypothesis: str | Path, *, form: Form = "auto"
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """`read_texts` of both, and remarks on how they were understood where that is not plain lines.

    What could be ids or words is ids only where both files have them, and have the same.
    """
    files = _File(Path(reference), "reference"), _File(Path(hypothesis), "hypothesis")
    forms = [form if form != "auto" else one.form for one in files]
    if form == "auto" and None in forms:
        for index, (one, other) in enumerate((files, files[::-1])):
            forms[index] = one.form or one.form_beside(other)
    read = [_read(one, found) for one, found in zip(files, forms, strict=True)]
    notes = [
        f"{file.path} is read as {_NAMES[found]}"
        for file, (found, _) in zip(files, read, strict=True)
        if form == "auto" and found != "lines"
    ]
    if form == "auto" and not notes and any(one.may_have_ids(files) for one in files):
        notes = ["the first words of the lines are read as words; for ids, add --format kaldi"]
    return read[0][1], read[1][1], notes


@dataclass(frozen=True)
class _File:
    path: Path
    role: Role | None

    @cached_property
    def lines(self) -> list[str]:
        """All lines, with their ends; read once, for a pipe has no second time."""
        return list(raw_lines(self.path, strict=True))

    @cached_property
    def filled(self) -> list[str]:
        return [line.strip() for line in self.lines if line.strip()]

    @cached_property
    def form(self) -> Form | None:
        """What it is by itself; None where lines may begin or end with ids, or with words."""
        name = self.path.name.lower().removesuffix(".gz")
        kind = Path(name).suffix
        first = self.filled[0] if self.filled else ""
        if not first:
            return "lines"  # without ids if there are lines at all: empty texts
        if kind in (".json", ".jsonl") or re.fullmatch(r'\[?\s*\{\s*(".*)?|\[', first):
            return "json"
        names = {name.strip(' "') for name in re.split("[,;\t]", first.lower())}
        if kind == ".csv" or ("id" in names and not names.isdisjoint(_FIELDS["hypothesis"])):
            return "tsv" if "\t" in first else "csv"
        if kind == ".tsv" or all("\t" in line for line in self.filled):
            return "tsv"
        if kind == ".trn":
            return "trn"
        return "kaldi" if name == "text" or name.endswith(".trans.txt") else None

    def ids(self, form: Form) -> set[str]:
        """The ids that it has in a form; none where not all lines can have one."""
        if form == "kaldi":
            return {composed(line.split()[0]) for line in self.filled}
        if form == "trn":
            found = {composed(match[2]) for match in map(_TRN.fullmatch, self.filled) if match}
            return found if len(found) == len(self.filled) else set()
        return set() if form == "lines" else set(_read(self, form)[1])

    def share(self, other: "_File", form: Form) -> bool:
        """Whether, read in this form, it has ids that the other has too, most of those of one."""
        own, others = self.ids(form), other.ids(other.form or form)
        return 2 * len(own & others) >= max(1, min(len(own), len(others)))

    def may_have_ids(self, files: Sequence["_File"]) -> bool:
        """Whether its first words could be ids, or are numerals that all `files` have."""
        ids = self.ids("kaldi")
        numbered = all(any(map(str.isdigit, id)) for id in ids)
        shared = numbered and all(self.share(file, "kaldi") for file in files)
        return bool(ids) and (shared or all(map(_ID.fullmatch, ids)))

    def form_beside(self, other: "_File | None") -> Form:
        """Of a file whose form is None: with ids where they are as good as certain."""
        if self.ids("trn") and (other is None or self.share(other, "trn")):
            return "trn"
        if other is not None and other.form:
            return "kaldi" if self.share(other, "kaldi") else "lines"
        both = (self, other or self)
        certain = all(_ID.fullmatch(id) for one in both for id in one.ids("kaldi"))
        return "kaldi" if certain and self.share(both[1], "kaldi") else "lines"


def _read(file: _File, form: Form | None) -> tuple[Form, dict[str, str]]:
    """The form that the file is in, and its texts by id."""
    known = get_args(Form)
    if form not in (None, *known):
        near = suggest(str(form), known)
        raise IsthmusError(f"form={form!r}: give {', '.join(known)}.{near}")
    if form in (None, "auto"):
        form = file.form or file.form_beside(None)
    texts: dict[str, str] = {}
    first_lines: dict[str, int] = {}
    for number, id, text in _entries(file, form):
        if not id:
            raise IsthmusError(f"{file.path}:{number}: no utterance id in it. Give it one.")
        if (id := composed(id)) in texts:
            raise IsthmusError(
                f"{file.path}:{number}: utterance id {id!r} stands in line {first_lines[id]} "
                f"already. Give every utterance one line."
            )
        texts[id], first_lines[id] = text, number
    return form, texts


def _entries(file: _File, form: Form) -> Iterator[Entry]:
    if form in ("json", "csv", "tsv"):
        yield from _row_entries(file, form)
        return
    for number, line in enumerate(map(str.strip, file.lines), 1):
        if form == "lines":
            yield number, str(number), line
        elif form == "kaldi" and line:
            id, text = (*line.split(maxsplit=1), "")[:2]
            yield number, id, text
        elif line and not line.startswith(";;"):  # a comment of NIST's
            if not (match := _TRN.fullmatch(line)):
                raise IsthmusError(f"{file.path}:{number}: no (id) ends {line!r}. Give it one.")
            yield number, match[2], match[1]


def _row_entries(file: _File, form: Form) -> Iterator[Entry]:
    rows: Iterator[tuple[int, dict[str, Any], str]] = iter(())
    if form == "json":
        rows = json_rows(file.path, file.lines)
    elif file.filled:
        rows = table_rows(
            file.path,
            file.lines,
            named=lambda cells: "id" in cells,
            unnamed=("id", "text"),
            delimiters=_DELIMITERS[form],
        )
    for number, row, fault in rows:
        where = f"{file.path}:{number}"
        if fault:
            raise IsthmusError(f"{where}: {fault}")
        if not isinstance(row.get("id"), str | int):
            raise IsthmusError(f"{where}: no object with an `id` of letters or digits: {row!r}.")
        text = row[_field(row, file.role, where)]
        if not isinstance(text, str):
            raise IsthmusError(f"{where}: the text of {row['id']!r} is {text!r}, not a string.")
        yield number, str(row["id"]), text


def _field(row: dict[str, Any], role: Role | None, where: str) -> str:
    names = _FIELDS[role or "hypothesis"]
    present = [name for name in names if name in row]
    if not present:
        raise IsthmusError(
            f"{where}: utterance {row['id']!r} has none of the fields {', '.join(names)}; "
            f"it has {', '.join(row)}."
        )
    if role is None and len(present) > 1:
        raise IsthmusError(
            f"{where}: utterance {row['id']!r} has the fields {' and '.join(present)}. "
            f"Say which text is meant: role='reference' or role='hypothesis'."
        )
    return present[0]

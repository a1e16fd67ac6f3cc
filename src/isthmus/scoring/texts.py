"""Reads references and hypotheses by utterance id from the files people keep them in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

from isthmus.errors import IsthmusError

Form: TypeAlias = Literal["auto", "json", "tsv", "kaldi", "lines"]
Role: TypeAlias = Literal["reference", "hypothesis"]

# The fields a text may stand in, the first present one counting. A decoded manifest often keeps
# the reference beside the hypothesis, so without a role two present fields are an error.
_FIELDS: dict[Role, tuple[str, ...]] = {
    "reference": ("text",),
    "hypothesis": ("hypothesis", "pred_text", "text"),
}
_Entry: TypeAlias = tuple[int, str, str]  # line number, id, text


def read_texts(
    path: str | Path, *, role: Role | None = None, form: Form = "auto"
) -> dict[str, str]:
    """Texts by utterance id from a UTF-8 file, in file order, as they stand (not normalised).

    Forms, and how `auto` tells them apart:
        json: an object a line with `id` and a text; the first line begins with `{`.
        tsv: `id<tab>text`, a header `id<tab>text` allowed; the first line holds a tab.
        kaldi: `id words ...`; the file is called `text`, or every line begins with a word of its
            own that holds a digit or an underscore.
        lines: anything else; ids are the line numbers, from "1"; an empty line is an empty text.

    Args:
        role: which field of a JSON object to read. `reference` reads `text`; `hypothesis` reads
            `hypothesis`, else `pred_text`, else `text`; None takes whichever is there, and fails
            where several are.

    Raises:
        IsthmusError: a line is not of its form or an id comes twice; the message names file:line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise IsthmusError(
            f"{path}: not UTF-8 text ({error}). Convert it, e.g. by iconv."
        ) from error
    if lines[-1] == "":
        lines.pop()  # what stands after the last newline is no line
    found = _form(path, lines) if form == "auto" else form
    if found == "lines":
        return {str(number): line.strip() for number, line in enumerate(lines, 1)}
    if found == "json":
        entries = _json_entries(path, lines, role)
    elif found in ("tsv", "kaldi"):
        entries = _split_entries(path, lines, "\t" if found == "tsv" else None)
    else:
        raise IsthmusError(f"form={form!r}: give auto, json, tsv, kaldi or lines.")
    texts: dict[str, str] = {}
    first_lines: dict[str, int] = {}
    for number, id, text in entries:
        if id in texts:
            raise IsthmusError(
                f"{path}:{number}: utterance id {id!r} stands in line {first_lines[id]} already. "
                f"Give every utterance one line."
            )
        texts[id], first_lines[id] = text, number
    return texts


def _form(path: Path, lines: list[str]) -> Form:
    filled = [line for line in lines if line.strip()]
    if not filled:
        # No line tells: without ids when there are lines at all (empty texts), else simply nothing.
        return "lines"
    if filled[0].lstrip().startswith("{"):
        return "json"
    if "\t" in filled[0]:
        return "tsv"
    first_words = [line.split()[0] for line in filled]
    alike = all("_" in word or any(map(str.isdigit, word)) for word in first_words)
    if path.name == "text" or (alike and len(set(first_words)) == len(first_words)):
        return "kaldi"
    return "lines"


def _split_entries(path: Path, lines: list[str], separator: str | None) -> Iterator[_Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if separator and separator not in line:
            raise IsthmusError(f"{path}:{number}: no tab in {line!r}. Write id<tab>text.")
        id, *rest = line.split(separator, 1)
        text = rest[0].strip() if rest else ""
        if not id.strip():
            raise IsthmusError(f"{path}:{number}: no utterance id before the tab in {line!r}.")
        if separator and number == 1 and (id.strip(), text) == ("id", "text"):
            continue
        yield number, id.strip(), text


def _json_entries(path: Path, lines: list[str], role: Role | None) -> Iterator[_Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise IsthmusError(f"{where}: not JSON ({error}). Write one object a line.") from error
        if not isinstance(item, dict) or not isinstance(item.get("id"), str | int):
            raise IsthmusError(f"{where}: no object with an `id` of letters or digits: {line!r}.")
        text = item[_field(item, role, where)]
        if not isinstance(text, str):
            raise IsthmusError(f"{where}: the text of {item['id']!r} is {text!r}, not a string.")
        yield number, str(item["id"]), text


def _field(item: dict[str, object], role: Role | None, where: str) -> str:
    names = _FIELDS[role or "hypothesis"]
    present = [name for name in names if name in item]
    if not present:
        raise IsthmusError(
            f"{where}: utterance {item['id']!r} has none of the fields {', '.join(names)}; "
            f"it has {', '.join(item)}."
        )
    if role is None and len(present) > 1:
        raise IsthmusError(
            f"{where}: utterance {item['id']!r} has the fields {' and '.join(present)}. "
            f"Say which text is meant: role='reference' or role='hypothesis'."
        )
    return present[0]

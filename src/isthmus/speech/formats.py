"""Readers of the corpus formats people have: each gives rows under isthmus's own field names.

Known are folders of audio with transcripts, JSON lines (isthmus, NeMo, SLAM-LLM) and Kaldi
folders. The format is recognised by content, never by the name of the corpus.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.speech.utterances import Line, Row, beside, is_there, same_id
from isthmus.text import composed, json_rows, raw_lines, table_rows, text_lines

AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("wav", "flac", "ogg", "opus", "mp3", "m4a", "mp4", "aac", "webm", "mkv"),
        *(
            "aif",
            "aiff",
            "au",
            "caf",
            "w64",
            "rf64",
            "amr",
            "wma",
            "sph",
            "ac3",
            "eac3",
            "tta",
            "wv",
        ),
        *("3gp", "avi", "m4b", "mka", "mov", "mpga", "oga"),
    )
)
TABLES = ("metadata.csv", "metadata.tsv", "transcripts.tsv", "transcripts.csv")
_FILE_COLUMNS = ("file_name", "filename", "file", "path", "audio", "audio_filepath", "wav")
_TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "target")

# Field of the format -> field of isthmus; the first key tells the format.
ISTHMUS_FIELDS = {"audio": "audio"}
JSON_FORMATS = {
    "nemo": {"audio_filepath": "audio", "offset": "start", "lang": "language"},
    "isthmus": ISTHMUS_FIELDS,
    "folder": {"file_name": "audio", "transcription": "text"},
    "slam-llm": {"source": "audio", "key": "id", "target": "text"},
}
_TELLING_LINES = 100  # that may be bad before one tells the format


def json_lines(path: Path) -> Iterator[Line]:
    """The objects of a file of JSON, lines or an array; those that are none have a fault."""
    for number, row, fault in json_rows(path, raw_lines(path)):
        line = Line(row, path.parent, f"{path}:{number}", number)
        yield line.broken(fault) if fault else line


def is_lhotse(row: Row) -> bool:
    """Whether a JSON object is a manifest item of lhotse (cut, recording or supervision)."""
    return {"type", "id"} <= row.keys() or "sources" in row or "recording_id" in row


def recognise(path: Path) -> str:
    """The format of `path`: `kaldi`, `folder`, `lhotse` or a key of JSON_FORMATS.

    Raises IsthmusError where it is nothing known.
    """
    if path.is_dir():
        return "kaldi" if (path / "wav.scp").is_file() else "folder"
    if path.suffix.lower() in AUDIO_SUFFIXES:
        raise IsthmusError(f"{path}: one audio file is no corpus. Name its folder or a manifest.")
    if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return "table"
    if not path.is_file():
        raise IsthmusError(f"{path}: no file that can be read twice. Save it, and name that.")
    reason = f"{path}: there is no utterance in it. Name a manifest that has some."
    for count, line in enumerate(itertools.islice(json_lines(path), _TELLING_LINES)):
        if line.fault:
            why = line.fault[1]
        elif is_lhotse(line.row):
            return "lhotse"
        else:
            for name, fields in JSON_FORMATS.items():
                if next(iter(fields)) in line.row:
                    return name
            why = (
                f"{line.origin}: none of the fields audio, audio_filepath (NeMo), source (SLAM-LLM)"
                f" or recording (lhotse) is in it, only {', '.join(sorted(line.row)) or 'nothing'}."
            )
        reason = reason if count else why
    raise IsthmusError(reason)


def read_lines(path: Path, form: str) -> Iterator[Line]:
    """Rows of the corpus `path` in format `form`, as `recognise` gives it; lhotse's as they are."""
    if form == "lhotse":
        return json_lines(path)
    if form == "kaldi":
        return _kaldi(path)
    if form == "table":
        return _table(path)
    if path.is_dir():
        return _folder(path)
    return _json_lines(path, JSON_FORMATS[form])


def _json_lines(path: Path, fields: dict[str, str]) -> Iterator[Line]:
    # Foreign tools write paths relative to where they ran; isthmus's are relative to the manifest.
    foreign = fields is not ISTHMUS_FIELDS
    for line in json_lines(path):
        renamed = {fields.get(key, key): value for key, value in line.row.items()}
        if len(renamed) < len(line.row):
            yield line.broken(
                f"two of the fields {', '.join(line.row)} mean one. Keep one of them."
            )
            continue
        audio = renamed.get("audio")
        if foreign and isinstance(audio, str):
            renamed["audio"] = beside_or_here(audio, path.parent)
        yield replace(line, row=renamed)


def beside_or_here(audio: str, base: Path) -> str:
    """`audio` relative to `base`, or to the working folder where only that exists."""
    if not is_there(beside(base, audio)) and is_there(here := beside(Path(), audio)):
        return str(here.absolute())
    return audio


def audio_files(folder: Path) -> list[Path]:
    """Recordings in a folder and below, by their names."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)


def _folder(folder: Path) -> Iterator[Line]:
    """Audio with transcripts in a table, in `*.trans.txt` files, or beside each file."""
    for name in TABLES:
        if (folder / name).is_file():
            yield from _table(folder / name)
            return
    transcripts = sorted(folder.rglob("*.trans.txt"))
    if transcripts:
        for path in transcripts:
            yield from transcript_lines(path)
        return
    files = audio_files(folder)
    manifests = sorted(folder.glob("*.jsonl")) + sorted(folder.glob("*.jsonl.gz"))
    if manifests and not any(file.parent == folder for file in files):
        if len(manifests) > 1:
            names = ", ".join(manifest.name for manifest in manifests)
            raise IsthmusError(f"{folder}: holds several manifests ({names}). Name one of them.")
        form = recognise(manifests[0])
        if form == "lhotse":
            raise IsthmusError(f"{folder}: name the lhotse manifest itself, {manifests[0]}.")
        yield from read_lines(manifests[0], form)
        return
    if not files:
        raise IsthmusError(
            f"{folder}: no audio, no wav.scp (Kaldi), no *.trans.txt and none of "
            f"{', '.join(TABLES)} in it. Name a folder that has one of them."
        )
    for position, file in enumerate(files, start=1):
        relative = file.relative_to(folder)
        row: Row = {"audio": str(relative), "id": "-".join(relative.with_suffix("").parts)}
        line = Line({}, folder, str(file), position)
        for suffix in (".txt", ".lab"):
            if is_there(beside(folder, sidecar := relative.with_suffix(suffix))):
                try:
                    row["text"] = "".join(raw_lines(beside(folder, sidecar))).strip()
                except IsthmusError as error:
                    line = line.broken(str(error))
                break
        yield line if line.fault else replace(line, row=row)


def transcript_lines(path: Path) -> Iterator[Line]:
    """Lines `id words` of a LibriSpeech `*.trans.txt`, with the audio beside it."""
    for number, line in text_lines(raw_lines(path)):
        identifier, text = (*line.split(maxsplit=1), "")[:2]
        audio = next(
            (
                identifier + suffix
                for suffix in (".flac", *sorted(AUDIO_SUFFIXES))
                if is_there(beside(path.parent, identifier + suffix))
            ),
            identifier + ".flac",
        )
        row = {"id": identifier, "audio": audio, "text": text.strip()}
        yield Line(row, path.parent, f"{path}:{number}", number)


def _table(path: Path) -> Iterator[Line]:
    """A table of file and text, with or without a line of names (see `table_rows`)."""
    rows = table_rows(path, raw_lines(path), named=_are_names, unnamed=("audio", "text"))
    for number, cells, fault in rows:
        line = Line({}, path.parent, f"{path}:{number}", number)
        if fault:
            yield line.broken(fault)
            continue
        row: Row = dict(cells)
        for name, columns in (("audio", _FILE_COLUMNS), ("text", _TEXT_COLUMNS)):
            if column := next((one for one in columns if one in cells), None):
                row[name] = row.pop(column)
        row["audio"] = _find_audio(row["audio"], path.parent)
        yield replace(line, row=row)


def _are_names(cells: Collection[str]) -> bool:
    """Whether these are names of columns: one of a file, and no file."""
    files = any(Path(cell).suffix in AUDIO_SUFFIXES for cell in cells)
    return not files and not set(_FILE_COLUMNS).isdisjoint(cells)


def _find_audio(name: str, base: Path) -> str:
    """The file meant by a table's name: itself, or with a suffix, or in a usual folder."""
    if Path(name).suffix.lower() in AUDIO_SUFFIXES and is_there(beside(base, name)):
        return name
    for folder in ("", "wavs", "clips", "audio", "wav"):
        for suffix in ("", *sorted(AUDIO_SUFFIXES)):
            candidate = Path(folder) / (name + suffix)
            if candidate.suffix.lower() in AUDIO_SUFFIXES and is_there(beside(base, candidate)):
                return str(candidate)
    return name


def _kaldi(folder: Path) -> Iterator[Line]:
    """A Kaldi data folder: wav.scp and, where there, segments, text, utt2spk, utt2lang."""
    spare: list[Line] = []
    audio = _mapping(folder / "wav.scp", spare)
    for identifier, line in audio.items():
        if line.row["value"].endswith("|"):
            raise IsthmusError(
                f"{line.origin}: recording {identifier!r} is the output of a command, and isthmus "
                "runs no commands from data. Run it once, keep its output as a file, and name "
                "that file here."
            )
    fields = {
        field: _mapping(folder / name, spare)
        for field, name in (("text", "text"), ("speaker", "utt2spk"), ("language", "utt2lang"))
        if (folder / name).is_file()
    }
    segments = folder / "segments"
    source = _mapping(segments, spare) if segments.is_file() else audio
    for identifier, line in source.items():
        row: Row = {"id": identifier, "audio": line.row["value"]}
        if source is not audio:
            try:
                row |= _segment(line.row["value"], audio)
            except ValueError as error:
                yield line.broken(str(error))
                continue
        row["audio"] = beside_or_here(row["audio"], folder)
        row |= {
            name: values[identifier].row["value"]
            for name, values in fields.items()
            if identifier in values
        }
        yield replace(line, row=row)
    yield from spare
    for identifier, line in fields.get("text", {}).items():
        if identifier not in source:
            yield line.broken(f"utterance {identifier!r} has no audio", "missing")


def _segment(value: str, audio: dict[str, Line]) -> Row:
    """File and times of `recording start end`; raises ValueError."""
    try:
        recording, begin, end = composed(value).split()
        start, stop = float(begin), float(end)
    except ValueError as error:
        raise ValueError(
            f"{value!r} is no segment. Write: utterance recording start end."
        ) from error
    if recording not in audio:
        raise ValueError(f"recording {recording!r} is not in wav.scp. Add it there.")
    # Kaldi writes an end of -1 for "up to the end of the recording".
    duration = None if stop == -1 else round(stop - start, 6)
    return {"audio": audio[recording].row["value"], "start": start, "duration": duration}


def _mapping(path: Path, spare: list[Line]) -> dict[str, Line]:
    """Kaldi's `key value` lines by key; lines whose key stands before go to `spare`, with a fault.

    A row holds `value`.
    """
    found: dict[str, Line] = {}
    for number, text in text_lines(raw_lines(path)):
        key, *rest = text.split(maxsplit=1)
        key = composed(key)
        value = rest[0].strip() if rest else ""
        line = Line({"value": value}, path.parent, f"{path}:{number}", number)
        if key in found:
            what = f"utterance {key!r} {same_id(found[key].origin)}"
            spare.append(line.broken(what, "duplicate_id"))
        else:
            found[key] = line
    return found

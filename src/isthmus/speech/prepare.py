"""Corpora as they are published, turned into isthmus manifests: one JSON line an utterance."""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from isthmus.errors import IsthmusError, suggest
from isthmus.files import write_atomic
from isthmus.speech.audio import audio_info
from isthmus.speech.formats import (
    AUDIO_SUFFIXES,
    read_lines,
    recognise,
    transcript_lines,
)
from isthmus.speech.utterances import (
    Line,
    Row,
    Utterance,
    UtteranceBuilder,
    beside,
    expand_path,
    find_corpus,
    is_there,
)
from isthmus.text import raw_lines, text_lines

KINDS = ("librispeech", "mls", "folder", "kaldi", "nemo", "slam-llm")

# The languages of Multilingual LibriSpeech, as its folders name them, and their ISO 639-1 codes.
_MLS_LANGUAGES = {
    "dutch": "nl",
    "english": "en",
    "french": "fr",
    "german": "de",
    "italian": "it",
    "polish": "pl",
    "portuguese": "pt",
    "spanish": "es",
}


def prepare(kind: str, source: Path, out: Path) -> dict[str, Path]:
    """Write `out`/<split>.jsonl for each split of the corpus at `source`; split -> manifest.

    Audio inside `out` is named relative to it, other audio by its absolute path. Utterances that
    cannot be used are left out with one warning. Raises IsthmusError for an unknown `kind`, a
    `source` that is not of that kind, and a manifest that is there already.
    """
    if kind not in KINDS:
        raise IsthmusError(
            f"unknown kind of corpus {kind!r}.{suggest(kind, KINDS)} Known: {', '.join(KINDS)}."
        )
    source, out = find_corpus(source), expand_path(out)
    splits = _splits(kind, source)
    manifests = {split: out / f"{split}.jsonl" for split in splits}
    for manifest in manifests.values():
        _refuse_existing(manifest)
    for split, lines in splits.items():
        _write(manifests[split], _utterances(lines), str(source))
    return manifests


def _splits(kind: str, source: Path) -> dict[str, Iterable[Line]]:
    """Split -> its lines, read when they are asked for."""
    if kind == "librispeech":
        return _librispeech_splits(source)
    if kind == "mls":
        return _mls_splits(source)
    if kind == "kaldi" and source.is_dir() and not (source / "wav.scp").is_file():
        folders = sorted(path.parent for path in source.glob("*/wav.scp"))
        if folders:
            return {folder.name: read_lines(folder, "kaldi") for folder in folders}
    form = recognise(source)
    known = {"folder": ("folder", "table"), "nemo": ("nemo",), "slam-llm": ("slam-llm",)}
    if form not in known.get(kind, (kind,)):
        raise IsthmusError(f"{source}: this is {form}, not {kind}. Correct the kind or the source.")
    name = source.resolve().name.removesuffix(".gz")
    return {Path(name).stem if source.is_file() else name: read_lines(source, form)}


def _librispeech_splits(source: Path) -> dict[str, Iterable[Line]]:
    """<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt, beside its flac files."""
    root = source / "LibriSpeech" if (source / "LibriSpeech").is_dir() else source
    # The lists of speakers and books, and splits still packed, are no folders with transcripts.
    found = {path.parents[2].name for path in root.glob("*/*/*/*.trans.txt")}
    if not found:
        raise IsthmusError(
            f"{source}: no <split>/<speaker>/<chapter>/*.trans.txt in it. Name the folder "
            "LibriSpeech that the archives unpack to."
        )
    return {split: _librispeech_lines(root / split) for split in sorted(found)}


def _librispeech_lines(split: Path) -> Iterator[Line]:
    for path in sorted(split.glob("*/*/*.trans.txt")):
        for line in transcript_lines(path):
            # Published in capitals; transcripts here are lower case.
            text = line.row["text"].lower()
            extra = {"text": text, "speaker": path.parents[1].name, "language": "en"}
            yield Line(line.row | extra, line.base, line.origin, line.position)


def _mls_splits(source: Path) -> dict[str, Iterable[Line]]:
    """<split>/transcripts.txt with audio/<speaker>/<book>/<id>.flac, of one or more languages."""
    own = sorted(source.glob("*/transcripts.txt"))
    if own:
        return {path.parent.name: _mls_lines(path, source) for path in own}
    found = sorted(source.glob("*/*/transcripts.txt"))
    if not found:
        raise IsthmusError(
            f"{source}: no <split>/transcripts.txt in it. Name the folder of one language, such "
            "as mls_german, or the folder that holds several."
        )
    return {
        f"{path.parents[1].name}-{path.parent.name}": _mls_lines(path, path.parents[1])
        for path in found
    }


def _mls_lines(transcripts: Path, language_folder: Path) -> Iterator[Line]:
    name = language_folder.resolve().name.removeprefix("mls_").removesuffix("_opus")
    audio = transcripts.parent / "audio"
    for number, content in text_lines(raw_lines(transcripts)):
        line = Line({}, audio, f"{transcripts}:{number}", number)
        identifier, tab, text = content.partition("\t")
        parts = identifier.split("_")
        if not tab or len(parts) != 3:
            yield line.broken(
                f"{content[:80]!r} is no line of Multilingual LibriSpeech. Expected "
                "<speaker>_<book>_<number>, a tab and the text."
            )
            continue
        folder = audio / parts[0] / parts[1]
        suffixes = (".flac", ".opus", *sorted(AUDIO_SUFFIXES))
        suffix = next((s for s in suffixes if is_there(beside(folder, identifier + s))), ".flac")
        row: Row = {
            "id": identifier,
            "audio": identifier + suffix,
            "text": text.strip(),
            "speaker": parts[0],
            "language": _MLS_LANGUAGES.get(name, name),
        }
        yield replace(line, row=row, base=folder)


def _utterances(lines: Iterable[Line]) -> Iterator[Utterance]:
    builder = UtteranceBuilder(probe=lru_cache(maxsize=4096)(audio_info))
    for line in lines:
        yield builder.build(line)


def _write(manifest: Path, utterances: Iterable[Utterance], source: str) -> None:
    lines: list[str] = []
    faults: list[str] = []
    for utterance in utterances:
        if utterance.fault:
            faults.append(utterance.fault[1])
        else:
            row = _row(utterance, manifest.parent)
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        first = f" The first fault: {faults[0]}" if faults else ""
        raise IsthmusError(f"{source}: no utterance of {manifest.stem} can be used.{first}")
    if faults:
        warnings.warn(
            f"{manifest}: {len(faults)} of {len(faults) + len(lines)} utterances left out. "
            f"The first: {faults[0]}",
            stacklevel=3,
        )
    _refuse_existing(manifest)
    write_atomic(manifest, "".join(lines))


def _row(utterance: Utterance, folder: Path) -> Row:
    """The manifest line of an utterance, without the fields it does not have."""
    audio, folder = Path(os.path.abspath(utterance.audio)), Path(os.path.abspath(folder))
    is_part = utterance.start > 0 or utterance.recording_duration > utterance.duration
    row: Row = {
        "id": utterance.id,
        "audio": str(audio.relative_to(folder) if audio.is_relative_to(folder) else audio),
        "start": utterance.start if is_part else None,
        "duration": round(utterance.duration, 6),
        "sample_rate": utterance.sample_rate,
        "text": utterance.text,
        "speaker": utterance.speaker,
        "language": utterance.language,
        "gender": utterance.gender,
    }
    return {key: value for key, value in row.items() if value is not None} | utterance.custom


def _refuse_existing(manifest: Path) -> None:
    if manifest.exists():
        raise IsthmusError(f"{manifest} exists already. Remove it, or write to another folder.")

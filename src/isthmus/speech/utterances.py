"""One line of a corpus, checked: the common form between the manifest formats and lhotse's cuts.

A line that cannot be right (no JSON, an id that is taken, a negative duration) does not end the
reading: the utterance carries its `fault`, and the corpus check counts it and says where it was.
"""

import math
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError, suggest
from isthmus.speech.audio import SAMPLE_RATE, AudioError, AudioInfo

DEFAULT_SPEECH_FOLDER = "../shared/speech"

Row = dict[str, Any]  # one line of a manifest, under isthmus's field names
Fault = tuple[str, str]  # reason code, and a sentence
Probe = Callable[[Path], AudioInfo]


@dataclass(frozen=True)
class Line:
    """One row, the folder its relative path starts at, where it stands and its number from 1."""

    row: Row
    base: Path
    origin: str
    position: int
    fault: Fault | None = None

    def broken(self, what: str, code: str = "bad_line") -> "Line":
        """The line as one that cannot be read, for which `what` is the reason."""
        name = Path(self.origin).name  # train.jsonl:3, as no utterance is called
        return replace(self, row={"id": name}, fault=(code, f"{self.origin}: {what}"))


@dataclass(frozen=True)
class Utterance:
    """`duration` seconds of the file `audio` from `start`, and what is known about them.

    `duration` is 0 only with a `fault`. `custom` holds the fields that have no place of their own.
    `origin` is the line it came from.
    """

    id: str
    audio: Path
    text: str | None
    start: float
    duration: float
    sample_rate: int
    recording_duration: float
    speaker: str | None
    language: str | None
    gender: str | None
    custom: Row
    origin: str
    fault: Fault | None = None


def expand_path(path: str | Path) -> Path:
    """`path` with `~` and environment variables (`$NAME`, `${NAME}`) replaced.

    `ISTHMUS_SPEECH`, where unset, is `../shared/speech`. Raises IsthmusError for any other unset
    variable.
    """
    values = {**os.environ}
    values["ISTHMUS_SPEECH"] = values.get("ISTHMUS_SPEECH") or DEFAULT_SPEECH_FOLDER

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise IsthmusError(
                f"{path}: the environment variable {name} is not set."
                f"{suggest(name, values)} Set it, or write the path out."
            )
        return values[name]

    return Path(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, str(path))).expanduser()


def find_corpus(path: str | Path) -> Path:
    """`expand_path` of a corpus that is there; raises IsthmusError where none is."""
    found = expand_path(path)
    if found.exists():
        return found
    remedy = "Name a manifest or a folder that exists."
    named = re.search(r"\$\{?ISTHMUS_SPEECH\b\}?/*(.*)", str(path))
    if named:
        folder = os.environ.get("ISTHMUS_SPEECH")
        remedy = (
            f"The environment variable ISTHMUS_SPEECH is {repr(folder) if folder else 'not set'}"
            f"{'' if folder else f', which stands for {DEFAULT_SPEECH_FOLDER}'}. Set it to the "
            f"folder of speech corpora that holds {named[1] or 'them'}."
        )
    raise IsthmusError(f"{found}: no such corpus. {remedy}")


@dataclass
class UtteranceBuilder:
    """Makes utterances of lines; remembers their ids, to find those that come twice."""

    probe: Probe
    _origins: dict[str, str] = field(default_factory=dict)

    def build(self, line: Line) -> Utterance:
        """The utterance of `line`.

        Without an `id` it gets the name of its file, with the line's position behind it where that
        name is taken.
        """
        row = dict(line.row)
        audio = row.pop("audio", None)
        identifier = self._identify(row.pop("id", None), audio, line.position)
        faults = _Faults(f"{line.origin}: utterance {identifier!r}", line.fault)
        first = self._origins.setdefault(identifier, line.origin)
        if first != line.origin:
            faults.add("duplicate_id", same_id(first))
        path = _path(audio, line.base, faults)
        text = _text(row.pop("text", None), faults)
        is_part = row.get("start") is not None
        start = _seconds(row, "start", faults) or 0.0
        duration = _seconds(row, "duration", faults)
        rate = row.pop("sample_rate", None)
        recording_duration = 0.0
        # A part needs the length of the whole recording, which only the file knows.
        if not faults.found and (duration is None or is_part):
            info = self._measure(path, start, faults)
            if info is not None:
                rate, recording_duration = info.sample_rate, info.duration
                duration = info.duration - start if duration is None else duration
        duration = duration or 0.0
        return Utterance(
            id=identifier,
            audio=path,
            text=text,
            start=start,
            duration=duration,
            sample_rate=rate if isinstance(rate, int) and rate > 0 else SAMPLE_RATE,
            recording_duration=max(recording_duration, start + duration),
            speaker=_name(row.pop("speaker", None)),
            language=_name(row.pop("language", None)),
            gender=_name(row.pop("gender", None)),
            custom=row,
            origin=line.origin,
            fault=faults.found[0] if faults.found else None,
        )

    def _measure(self, path: Path, start: float, faults: "_Faults") -> AudioInfo | None:
        """What the file says of itself; None with a fault where it cannot be read from `start`."""
        try:
            info = self.probe(path)
        except AudioError as error:
            faults.add(error.code, f"cannot be loaded: {error}")
            return None
        if start >= info.duration:
            faults.add("past_end", f"starts at {start} s of {info.duration} s. Correct its start.")
            return None
        return info

    def _identify(self, given: object, audio: object, position: int) -> str:
        if given is not None and given != "":
            return str(given)
        stem = Path(str(audio or "utterance")).stem
        return f"{stem}-{position}" if stem in self._origins else stem


def same_id(first: str) -> str:
    """What is wrong with an utterance whose id stands at `first` already."""
    return f"has the id of another one at {first}. Remove one of them, or rename it."


def beside(base: Path, name: str | Path) -> Path:
    """File `name` in folder `base`, its accents composed or not, as the disk has them."""
    path = base / name
    if str(name).isascii():
        return path
    found = base
    for part in Path(name).parts:
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        found = next((found / form for form in forms if is_there(found / form)), found / part)
    return found if is_there(found) else path


def is_there(path: Path) -> bool:
    """Whether the file exists; no name too long for the disk or with a NUL in it does."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


class _Faults:
    """Collects what is wrong with one utterance, which `where` names; `known` comes first."""

    def __init__(self, where: str, known: Fault | None) -> None:
        self.where = where
        self.found: list[Fault] = [known] if known else []

    def add(self, code: str, sentence: str) -> None:
        self.found.append((code, f"{self.where} {sentence}"))


def _path(audio: object, base: Path, faults: _Faults) -> Path:
    if isinstance(audio, (str, Path)) and str(audio):
        return beside(base, audio)
    faults.add("missing", f"has no audio file but {audio!r}. Give the path of its file.")
    return Path()


def _text(value: object, faults: _Faults) -> str | None:
    if value is None or isinstance(value, str):
        return value
    faults.add("bad_text", f"has text {value!r}; a transcript is a string. Put it in quotes.")
    return None


def _seconds(row: Row, name: str, faults: _Faults) -> float | None:
    """Time `name` of `row` in seconds; None where there is none, or none that can be."""
    value = row.pop(name, None)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    least = 0.0 if name == "start" else math.ulp(0.0)
    if least <= number < math.inf:
        return number
    shown = f"{value} s" if isinstance(value, float | int) else repr(value)
    rule = "durations must be positive" if name == "duration" else "it must be 0 or more"
    faults.add(
        "bad_duration",
        f"has {name} {shown}; {rule}. Fix the manifest, or leave {name} out to take all audio.",
    )
    return None


def _name(value: object) -> str | None:
    return None if value is None or value == "" else str(value)

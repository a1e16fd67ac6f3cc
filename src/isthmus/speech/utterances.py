"""One line of a corpus, checked: the common form between the manifest formats and lhotse's cuts.

A line that cannot be right (a negative duration, a number for a transcript) does not end the
reading: the utterance carries its `fault`, and the corpus check counts it and says where it was.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError, suggest
from isthmus.speech.audio import SAMPLE_RATE, AudioError, AudioInfo

DEFAULT_SPEECH_FOLDER = "../shared/speech"

Row = dict[str, Any]  # one line of a manifest, under isthmus's field names
Probe = Callable[[Path], AudioInfo]


@dataclass(frozen=True)
class Utterance:
    """`duration` seconds of the file `audio` from `start`, and what is known about them.

    `duration` is 0 only with a `fault`, a pair (reason code, sentence). `custom` holds the fields
    that have no place of their own. `origin` is the line it came from.
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
    fault: tuple[str, str] | None = None


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


@dataclass
class UtteranceBuilder:
    """Makes utterances of rows; remembers their ids, so that each is there once."""

    probe: Probe
    _origins: dict[str, str] = field(default_factory=dict)

    def build(self, row: Row, base: Path, origin: str, *, position: int) -> Utterance:
        """The utterance of `row`, whose relative path starts at `base`.

        Without an `id` it gets the name of its file, with `position` (the line) behind it where
        that name is taken. Raises IsthmusError when an id comes twice.
        """
        row = dict(row)
        audio = row.pop("audio", None)
        identifier = self._identify(row.pop("id", None), audio, origin, position)
        faults = _Faults(f"{origin}: utterance {identifier!r}")
        path = _path(audio, base, faults)
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
            origin=origin,
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

    def claim(self, identifier: str, origin: str) -> None:
        """Note that `identifier` stands at `origin`; raise IsthmusError if it stood before."""
        if identifier in self._origins:
            raise IsthmusError(
                f"{origin}: the id {identifier!r} stands at {self._origins[identifier]} already. "
                "Ids must be unique: remove one of the lines, or rename it."
            )
        self._origins[identifier] = origin

    def _identify(self, given: object, audio: object, origin: str, position: int) -> str:
        if given is not None and given != "":
            identifier = str(given)
        else:
            identifier = stem = Path(str(audio or "utterance")).stem
            if identifier in self._origins:
                identifier = f"{stem}-{position}"
        self.claim(identifier, origin)
        return identifier


class _Faults:
    """Collects what is wrong with one utterance, which `where` names."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: list[tuple[str, str]] = []

    def add(self, code: str, sentence: str) -> None:
        self.found.append((code, f"{self.where} {sentence}"))


def _path(audio: object, base: Path, faults: _Faults) -> Path:
    if isinstance(audio, (str, Path)) and str(audio):
        return base / audio
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

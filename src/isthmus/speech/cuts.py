"""Between utterances, lhotse's cuts and waveforms."""

from pathlib import Path
from typing import Any

import numpy as np
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy

from isthmus.errors import IsthmusError
from isthmus.speech.audio import (
    DURATION_TOLERANCE,
    SAMPLE_RATE,
    AudioError,
    audio_info,
    load_audio,
)
from isthmus.speech.utterances import Line, Utterance, beside, is_there

# Custom fields that isthmus adds to a cut: the line it came from, and what is wrong with that line.
ORIGIN, FAULT = "isthmus_origin", "isthmus_fault"


def to_cut(utterance: Utterance) -> MonoCut:
    """A cut with one supervision; fields without a place of their own are in `cut.custom`."""
    duration = utterance.duration
    recording = Recording(
        id=utterance.id,
        # One channel whatever the file has: the mean of them (see load_cut).
        sources=[AudioSource(type="file", channels=[0], source=str(utterance.audio))],
        sampling_rate=utterance.sample_rate,
        num_samples=round(utterance.recording_duration * utterance.sample_rate),
        duration=utterance.recording_duration,
    )
    supervision = SupervisionSegment(
        id=utterance.id,
        recording_id=utterance.id,
        start=0.0,
        duration=duration,
        text=utterance.text,
        language=utterance.language,
        speaker=utterance.speaker,
        gender=utterance.gender,
    )
    custom: dict[str, Any] = {**utterance.custom, ORIGIN: utterance.origin}
    if utterance.fault:
        custom[FAULT] = list(utterance.fault)
    return MonoCut(
        id=utterance.id,
        start=utterance.start,
        duration=duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
        custom=custom,
    )


def lhotse_cuts(line: Line) -> list[Cut]:
    """The utterances of one line of a lhotse manifest: a cut, or those parts of it that its
    supervisions cover, called as these are where there are several.

    Raises IsthmusError for other items; its message leaves the place to the caller.
    """
    try:
        cut = deserialize_item(line.row)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise IsthmusError(f"lhotse cannot read this line ({error!r}).") from error
    if not isinstance(cut, Cut):
        raise IsthmusError(
            f"a {type(cut).__name__} where a cut was expected. Join recordings and supervisions "
            "with `lhotse cut simple`."
        )
    if not isinstance(cut, MonoCut):
        return [cut]  # which cannot be loaded, and says so then
    cut.custom = {**(cut.custom or {}), ORIGIN: line.origin}
    for source in cut.recording.sources if cut.has_recording else ():
        if source.type == "file":
            here = beside(Path(), source.source)
            source.source = str(here if is_there(here) else beside(line.base, source.source))
    return [_supervised(cut, one) for one in cut.supervisions] or [cut]


def _supervised(cut: MonoCut, supervision: SupervisionSegment) -> MonoCut:
    """The part of `cut` that a supervision covers; the same cut where that is all of it."""
    start, end = supervision.start, supervision.end
    if not (-DURATION_TOLERANCE <= start < end <= cut.duration + DURATION_TOLERANCE):
        raise IsthmusError(
            f"cut {cut.id!r} lasts {cut.duration} s, and its supervision {supervision.id!r} "
            f"reaches from {start} s to {end} s. Correct them, or trim the supervision."
        )
    is_only = len(cut.supervisions) == 1
    if is_only and max(start, cut.duration - end) <= DURATION_TOLERANCE:
        return cut
    start, end = max(0.0, start), min(cut.duration, end)
    return fastcopy(
        cut,
        id=cut.id if is_only else supervision.id,
        start=round(cut.start + start, 8),
        duration=round(end - start, 8),
        supervisions=[supervision.with_offset(-supervision.start)],
    )


def transcript(cut: Cut) -> str:
    """The text of an utterance, "" where it has none."""
    return (cut.supervisions[0].text or "") if cut.supervisions else ""


def language(cut: Cut) -> str:
    """The language of an utterance as its corpus writes it, "" where it does not."""
    return (cut.supervisions[0].language or "") if cut.supervisions else ""


def load_cut(cut: Cut) -> np.ndarray:
    """(S,) float32 mono 16 kHz waveform of a cut, read by `load_audio`.

    Raises AudioError for bad audio and where its length differs from the cut's duration by more
    than 25 ms, IsthmusError where the cut's line of the manifest is at fault.
    """
    custom = getattr(cut, "custom", None) or {}
    if FAULT in custom:
        raise IsthmusError(custom[FAULT][1])
    waveform = load_audio(
        _source(cut),
        start=cut.start,
        duration=cut.duration + _margin(cut),
        channel=cut.channel if cut.recording.num_channels > 1 else None,
    )
    _check_duration(cut, len(waveform) / SAMPLE_RATE)
    return waveform


def check_header(cut: Cut) -> None:
    """What can be said of a cut's audio without decoding it; raises AudioError as `load_cut`."""
    source = _source(cut)
    held = audio_info(source).duration - cut.start
    if held <= 0:
        raise AudioError(
            "past_end",
            f"{_shown(source)}: start {cut.start} s lies behind the end of {held + cut.start} s. "
            "Correct the start.",
        )
    _check_duration(cut, min(held, cut.duration + _margin(cut)))


def _margin(cut: Cut) -> float:
    """Seconds to read beyond a whole recording, to notice one longer than its manifest says."""
    is_whole = cut.start == 0 and cut.recording.duration - cut.duration <= DURATION_TOLERANCE
    return 4 * DURATION_TOLERANCE if is_whole else 0.0


def _check_duration(cut: Cut, held: float) -> None:
    if abs(held - cut.duration) > DURATION_TOLERANCE:
        at_least = "at least " if held > cut.duration else ""
        raise AudioError(
            "wrong_duration",
            f"{_shown(_source(cut))}: holds {at_least}{held:.3f} s, but the manifest says "
            f"{cut.duration:.3f} s. Correct the duration, or leave it out to have it measured.",
        )


def _source(cut: Cut) -> str | bytes:
    """The file of a cut, or its bytes; refuses what only lhotse's own audio reading could do."""
    if not isinstance(cut, MonoCut) or not cut.has_recording:
        raise _unsupported(cut, f"is a {type(cut).__name__} without one recording")
    if len(cut.recording.sources) != 1 or cut.recording.transforms:
        raise _unsupported(cut, "has several files, or audio that is yet to be changed")
    source = cut.recording.sources[0]
    if source.type not in ("file", "memory"):
        raise _unsupported(cut, f"has its audio behind a {source.type}")
    content: str | bytes = source.source
    return content


def _unsupported(cut: Cut, what: str) -> AudioError:
    return AudioError(
        "unsupported",
        f"cut {cut.id!r} {what}; isthmus reads one plain file for each utterance. Save it with "
        "lhotse's `cut.save_audio` and use the cut that gives.",
    )


def _shown(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"audio of {len(source)} bytes"

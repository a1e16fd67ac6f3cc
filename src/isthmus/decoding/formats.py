"""Transcripts as text, subtitles, tables and JSON, written as openai-whisper writes them.

Two things differ, because readers of the files stumble otherwise: line breaks inside a segment
become spaces, and a segment without text is left out of all files but JSON.
"""

import html
import json
import math
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from isthmus.decoding.transcript import Segment, Transcript, Word, gap, words_of
from isthmus.errors import IsthmusError, of_system, suggest
from isthmus.files import write_atomic
from isthmus.speech.formats import audio_files

LONG_PAUSE = 3.0  # seconds from one word's start to the next one's, where flowing lines end a cue
LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


@dataclass(frozen=True)
class Layout:
    """How subtitles are set; every option but the default needs words.

    With both `max_line_width` and `max_line_count`, words flow on from segment to segment. With
    `max_line_width` alone a cue is a segment, of as many lines as it takes.
    """

    highlight_words: bool = False  # a cue for each word, which is underlined
    max_line_width: int | None = None  # characters
    max_line_count: int | None = None  # lines of a cue
    max_words_per_line: int | None = None  # a cue is at most so many words

    def __post_init__(self) -> None:
        """Raises IsthmusError for a limit below one; warns of an option that has no effect."""
        for name in ("max_line_width", "max_line_count", "max_words_per_line"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise IsthmusError(f"{name} is {value}. Give at least 1, or leave it out.")
        if self.max_line_count and not self.max_line_width:
            warnings.warn("max_line_count has no effect without max_line_width.", stacklevel=3)
        if self.max_words_per_line and self.max_line_width:
            warnings.warn("max_words_per_line has no effect with max_line_width.", stacklevel=3)


PLAIN = Layout()
Cue: TypeAlias = tuple[float, float, str]  # start, end, text


def as_txt(segments: Sequence[Segment]) -> str:
    """A line for each segment."""
    return "".join(f"{segment.text}\n" for segment in _spoken(segments))


def as_srt(segments: Sequence[Segment], layout: Layout = PLAIN) -> str:
    """SubRip: numbered cues, `00:00:00,000 --> 00:00:02,500`."""
    return "".join(
        f"{number}\n{_clock(start, ',', True)} --> {_clock(end, ',', True)}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_cues(segments, layout), start=1)
    )


def as_vtt(segments: Sequence[Segment], layout: Layout = PLAIN) -> str:
    """WebVTT: `00:00.000 --> 00:02.500`, with hours where there are any; `&`, `<`, `>` escaped."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(start, '.', False)} --> {_clock(end, '.', False)}\n{text}\n\n"
        for start, end, text in _cues(segments, layout, partial(html.escape, quote=False))
    )


def as_tsv(segments: Sequence[Segment]) -> str:
    """A table of start and end in milliseconds, and text."""
    rows = [
        f"{_milliseconds(segment.start)}\t{_milliseconds(segment.end)}\t"
        + segment.text.replace("\t", " ")
        for segment in _spoken(segments)
    ]
    return "\n".join(["start\tend\ttext", *rows, ""])


def as_json(transcript: Transcript) -> str:
    """The transcript_dict in one line."""
    return json.dumps(transcript_dict(transcript), allow_nan=False)


def transcript_dict(transcript: Transcript) -> dict[str, Any]:
    """Whisper's keys and, behind them, isthmus' own, for JSON.

    As in Whisper the texts of segments and words begin with the space, if any, that parts them from
    what comes before. What Whisper decides by other means is told by what was decided here:
    `no_speech_prob` is 1 where nothing was heard and 0 elsewhere, `temperature` is 0 (the search
    draws nothing by lot), `seek` is the segment's own start (in frames of 10 ms). A number that is
    not finite is null.
    """
    before = ""
    segments = []
    for number, segment in enumerate(transcript.segments):
        segments.append(_segment(number, segment, before or segment.text))
        before = segment.text or before
    return {
        "text": transcript.text,
        "segments": segments,
        "language": transcript.language,
        "duration": transcript.duration,
        "finish_reason": transcript.finish_reason,
        "score": _finite(transcript.score),
        "confidence": _finite(transcript.confidence),
        "ctc_distance": transcript.ctc_distance,
        "doubtful": transcript.doubtful,
        "seconds": transcript.seconds,
    }


RENDERERS: dict[str, Callable[[Transcript, Layout], str]] = {
    "txt": lambda transcript, layout: as_txt(transcript.segments),
    "srt": lambda transcript, layout: as_srt(transcript.segments, layout),
    "vtt": lambda transcript, layout: as_vtt(transcript.segments, layout),
    "tsv": lambda transcript, layout: as_tsv(transcript.segments),
    "json": lambda transcript, layout: as_json(transcript),
}


def outputs(
    audio: Sequence[str], output_format: str = "all", output_dir: Path | None = None
) -> list[tuple[str, Path]]:
    """Recordings, each with the folder that its files are written to.

    A folder stands for the recordings in it and below, whose files go beside them, or else into the
    same places below `output_dir`; those of others go into `output_dir`, or else here.

    Raises IsthmusError for a folder without recordings, for an unknown format, and where what was
    there before, such as transcripts, would be written over beside the recordings of a folder.
    """
    kinds, found = _formats(output_format), list[tuple[str, Path]]()
    for name in audio:
        place = Path(name).expanduser()
        if not place.is_dir():
            found.append((name, output_dir or Path()))
            continue
        files = audio_files(place)
        if not files:
            raise IsthmusError(f"{name}: no recordings in it. Name a folder that has some.")
        if output_dir is None:
            written = [file.with_name(f"{file.stem}.{kind}") for file in files for kind in kinds]
            there = next(filter(Path.exists, written), None)
            if there is not None:
                raise IsthmusError(f"{there} exists. Name another folder with --output-dir.")
            found += [(str(file), file.parent) for file in files]
        else:
            found += [(str(one), output_dir / one.parent.relative_to(place)) for one in files]
    return found


def check_outputs(audio: Iterable[tuple[str, Path]], output_format: str = "all") -> None:
    """Call before anything is decoded, with recordings and the folders their files go to.

    Raises IsthmusError for an unknown format, where two outputs would be one file, and for a folder
    that cannot be written.
    """
    _formats(output_format)
    by_stem: dict[Path, str] = {}
    for one, folder in audio:
        if not any(path.parent == folder for path in by_stem):
            check_folder(folder)
        other = by_stem.setdefault(folder / Path(one).stem, one)
        if other != one:
            raise IsthmusError(
                f"{other} and {one} would both be written to {Path(one).stem}.*. Transcribe them "
                "into different output folders, or rename one."
            )


def check_folder(folder: str | Path) -> None:
    """Raise IsthmusError unless files can be written into `folder`, which may have to be made."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):  # nothing says it as surely as trying
            pass
    except OSError as error:
        raise type(of_system(error))(
            f"{folder} cannot be written: nothing can be made in {place} ({error.strerror}). Name "
            "another folder with --output-dir."
        ) from error


def write_transcript(
    transcript: Transcript,
    audio: str | Path,
    output_dir: str | Path,
    output_format: str = "all",
    layout: Layout = PLAIN,
) -> list[Path]:
    """Write `output_dir`/stem of `audio`.format, or one file of each format; returns their paths.

    A file is replaced as a whole or not at all. Two recordings of one stem share their files:
    see check_outputs. Raises IsthmusError for an unknown format, and OSError.
    """
    paths = []
    for name in _formats(output_format):
        paths.append(Path(output_dir) / f"{Path(audio).stem}.{name}")
        write_atomic(paths[-1], RENDERERS[name](transcript, layout))
    return paths


def _formats(output_format: str) -> list[str]:
    """The formats that a name stands for; raises IsthmusError for one that is unknown."""
    known = [*RENDERERS, "all"]
    if output_format not in known:
        raise IsthmusError(
            f"Unknown output format {output_format!r}; there are {', '.join(known)}."
            f"{suggest(output_format, known)}"
        )
    return list(RENDERERS) if output_format == "all" else [output_format]


def _spoken(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Segments that have text, each on one line."""
    for segment in segments:
        if text := LINE_BREAKS.sub(" ", segment.text).strip():
            yield replace(segment, text=text)


def _cues(
    segments: Sequence[Segment], layout: Layout, escape: Callable[[str], str] = str
) -> Iterator[Cue]:
    spoken = list(_spoken(segments))
    if not any(segment.words for segment in spoken):
        if spoken and layout != PLAIN:
            raise IsthmusError(
                "Highlighted words and limits of lines need words, and the transcript has none. "
                "Ask for word timestamps."
            )
        for segment in spoken:
            yield segment.start, segment.end, escape(_no_arrow(segment.text))
        return
    for lines in _laid_out(spoken, layout):
        yield from _cues_of(lines, layout.highlight_words, escape)


def _laid_out(segments: Sequence[Segment], layout: Layout) -> Iterator[list[list[Word]]]:
    """Cues as lines of words."""
    width, count = layout.max_line_width or math.inf, layout.max_line_count or math.inf
    flowing = math.isfinite(width) and math.isfinite(count)
    if flowing:
        runs = [[word for segment in segments for word in _words(segment)]]
    else:
        size = layout.max_words_per_line if math.isinf(width) else None
        runs = [
            words[start : start + (size or len(words))]
            for words in map(_words, segments)
            for start in range(0, len(words), size or len(words))
        ]
    for run in runs:
        lines = [[run[0]]]
        for previous, word in pairwise(run):
            pause = flowing and word.start - previous.start > LONG_PAUSE
            if len(_line([*lines[-1], word])) <= width and not pause:
                lines[-1].append(word)
            elif pause or (flowing and len(lines) == count):
                yield lines
                lines = [[word]]
            else:
                lines.append([word])
        yield lines


def _words(segment: Segment) -> list[Word]:
    """Its words; a segment that was not aligned is one."""
    return list(segment.words) or [Word(segment.text, segment.start, segment.end, 0.0)]


def _line(
    words: Sequence[Word], marked: Word | None = None, escape: Callable[[str], str] = str
) -> str:
    """Words on one line, one of them underlined."""
    texts = [escape(_no_arrow(word.text)) for word in words]
    shown = (
        f"<u>{one}</u>" if word is marked else one for one, word in zip(texts, words, strict=True)
    )
    gaps = ["", *(gap(one.text, other.text) for one, other in pairwise(words))]
    return _no_arrow("".join(map("".join, zip(gaps, shown, strict=True))))


def _cues_of(
    lines: list[list[Word]], highlight: bool, escape: Callable[[str], str]
) -> Iterator[Cue]:
    """One cue, or with `highlight` one for each word and for each moment between words."""
    words = [word for line in lines for word in line]
    plain = "\n".join(_line(line, escape=escape) for line in lines)
    if not highlight:
        yield words[0].start, words[-1].end, plain
        return
    last = words[0].start
    for said in words:
        if _milliseconds(said.start) > _milliseconds(last):
            yield last, said.start, plain
        yield said.start, said.end, "\n".join(_line(line, said, escape) for line in lines)
        last = said.end


def _no_arrow(text: str) -> str:
    """No arrow that would be read as a cue's times."""
    return re.sub("-{2,}>", "->", text)


def _milliseconds(seconds: float) -> int:
    return round(1000 * max(0.0, seconds))


def _clock(seconds: float, marker: str, always_hours: bool) -> str:
    minutes, milliseconds = divmod(_milliseconds(seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, part = divmod(milliseconds, 1000)
    front = f"{hours:02d}:" if hours or always_hours else ""
    return f"{front}{minutes:02d}:{whole:02d}{marker}{part:03d}"


def _segment(number: int, segment: Segment, before: str) -> dict[str, Any]:
    """`before` is the text that this one's gap, if any, parts it from."""
    text = segment.text.encode()
    probabilities = segment.token_log_probs
    found: dict[str, Any] = {
        "id": number,
        "seek": round(100 * segment.start),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text and gap(before, segment.text) + segment.text,
        "tokens": list(segment.tokens),
        "temperature": 0.0,
        "avg_logprob": _finite(
            sum(probabilities) / len(probabilities) if probabilities else segment.score
        ),
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": float(segment.finish_reason == "no_speech"),
        "ctc_distance": segment.ctc_distance,
        "doubtful": segment.doubtful,
    }
    if len(segment.confidences) == len(words_of(segment.text)):
        found["confidences"] = list(segment.confidences)
    if segment.words:
        found["words"] = [
            {
                "word": gap(previous.text, word.text) + word.text,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "probability": word.confidence,
            }
            for previous, word in pairwise([segment.words[0], *segment.words])
        ]
    if segment.alternatives:
        found["alternatives"] = [
            {"text": one.text, "score": _finite(one.score)} for one in segment.alternatives
        ]
    return found | {"finish_reason": segment.finish_reason, "score": _finite(segment.score)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Corpora of any known format as lhotse CutSets, and what is wrong in them."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from lhotse import CutSet
from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.speech.audio import AudioError, audio_info
from isthmus.speech.cuts import FAULT, ORIGIN, check_header, lhotse_cuts, load_cut, to_cut
from isthmus.speech.formats import read_lines, recognise
from isthmus.speech.utterances import (
    Fault,
    Line,
    UtteranceBuilder,
    expand_path,
    find_corpus,
    same_id,
)
from isthmus.text import is_control, is_word

__all__ = [
    "CorpusReport",
    "Rejection",
    "check_corpus",
    "expand_path",
    "load_cut",
    "read_corpus",
    "scorable",
    "usable",
]

MAX_CHARACTERS_PER_SECOND = 40  # fast speech has 20 to 25
# Faults of a line that leave nothing to hold a transcript against; others are of the audio.
WITHOUT_REFERENCE = ("duplicate_id", "bad_id", "bad_line", "no_text", "empty_text", "bad_text")
DecodeAudio = bool | Literal["header"]  # what a check does with the audio
_SHOWN = 5  # rejections quoted in an error or a report for people


def read_corpus(path: str | Path) -> CutSet:
    """The corpus at `path`, its format recognised by content, as an eager CutSet.

    Known: isthmus, NeMo and SLAM-LLM JSON lines, lhotse cuts, Kaldi folders, tables, and folders
    of audio with transcripts (see `isthmus.speech.formats`). Audio is opened only where the
    manifest lacks a duration or names a part. A line that cannot be right becomes a cut that
    `check_corpus` rejects. Raises IsthmusError for an unknown format, and where no line can be
    read.
    """
    path = find_corpus(path)
    form = recognise(path)
    builder = UtteranceBuilder(probe=lru_cache(maxsize=4096)(audio_info))
    cuts = [cut for line in read_lines(path, form) for cut in _cuts(line, form, builder)]
    if not cuts:
        raise IsthmusError(f"{path}: there is no utterance in it. Name a corpus that has some.")
    faults = [_line_fault(cut) for cut in cuts]
    if faults[0] and all(fault and fault[0] == "bad_line" for fault in faults):
        raise IsthmusError(faults[0][1])
    return CutSet.from_cuts(cuts)


def _cuts(line: Line, form: str, builder: UtteranceBuilder) -> list[Cut]:
    if form == "lhotse" and not line.fault:
        try:
            return lhotse_cuts(line)
        except IsthmusError as error:
            line = line.broken(str(error))
    return [to_cut(builder.build(line))]


@dataclass(frozen=True)
class Rejection:
    """One utterance that cannot be used: `code` is the reason, `message` says it in full."""

    id: str
    code: str
    message: str


@dataclass(frozen=True)
class CorpusReport:
    """What a check found; the counts from `seconds` on are of the accepted utterances alone.

    `n_in == n_ok + n_rejected`, and `reasons` maps each code to its count. Lengths in seconds.
    """

    n_in: int
    n_ok: int
    n_rejected: int
    reasons: dict[str, int]
    seconds: float
    words: int
    speakers: int
    languages: dict[str, int]
    shortest: float
    longest: float
    characters: str
    rejections: list[Rejection] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [
            f"{self.n_ok} of {self.n_in} utterances usable, {self.n_rejected} rejected",
            f"{self.seconds / 60:.1f} minutes ({self.shortest:.2f} to {self.longest:.2f} s each), "
            f"{self.words} words, {self.speakers} speakers",
            "languages: " + (", ".join(f"{k} {n}" for k, n in self.languages.items()) or "unknown"),
            f"{len(self.characters)} characters: {self.characters}",
        ]
        lines += [f"rejected, {code}: {count}" for code, count in self.reasons.items()]
        lines += [f"  {rejection.message}" for rejection in self.rejections[:_SHOWN]]
        return lines


def check_corpus(
    cuts: CutSet,
    *,
    decode_audio: DecodeAudio = True,
    max_seconds: float | None = None,
    require_text: bool = True,
) -> CorpusReport:
    """Check each utterance and count; one reason for each that cannot be used.

    Reasons: the codes of `AudioError`, and bad_duration, bad_id, bad_line (cannot be read),
    bad_text (control characters, bytes that are no UTF-8, no string), duplicate_id, empty_text
    (nothing to say), no_text, too_fast (above 40 characters a second) and too_long (above
    `max_seconds`). Of utterances with the same id the first one is good.
    `decode_audio="header"` asks of the audio only that it is there, complete by its header and of
    the right duration; `False` trusts it. `require_text=False` accepts a missing transcript.
    """
    return _check(cuts, decode_audio, max_seconds, require_text)[1]


def usable(
    cuts: CutSet,
    *,
    max_bad_fraction: float,
    decode_audio: DecodeAudio = True,
    max_seconds: float | None = None,
    require_text: bool = True,
) -> tuple[CutSet, CorpusReport]:
    """The cuts that pass `check_corpus`, with its report.

    Raises IsthmusError when more than `max_bad_fraction` of them, or all, fail.
    """
    good, report = _check(cuts, decode_audio, max_seconds, require_text)
    if not report.n_ok or report.n_rejected > max_bad_fraction * report.n_in:
        shown = [f"  {one.code}: {one.message}" for one in report.rejections[:_SHOWN]]
        if report.n_rejected > _SHOWN:
            shown.append(f"  and {report.n_rejected - _SHOWN} more")
        raise IsthmusError(
            f"{report.n_rejected} of {report.n_in} utterances cannot be used; at most "
            f"{max_bad_fraction:.1%} may be bad. Mend the corpus, or allow more.\n"
            + "\n".join(shown)
        )
    return CutSet.from_cuts(good), report


def scorable(cuts: CutSet) -> tuple[list[Cut], list[Rejection]]:
    """The cuts that have a transcript, whether or not their audio can be heard, and what is wrong
    with the others."""
    good: list[Cut] = []
    bad: list[Rejection] = []
    seen: dict[str, str] = {}
    for cut in cuts:
        faults = _faults(cut, seen, None, require_text=True)
        fault = next((one for one in faults if one[0] in WITHOUT_REFERENCE), None)
        seen.setdefault(cut.id, _origin(cut))
        if fault is None:
            good.append(cut)
        else:
            bad.append(Rejection(str(cut.id), *fault))
    return good, bad


def _check(
    cuts: CutSet, decode_audio: DecodeAudio, max_seconds: float | None, require_text: bool
) -> tuple[list[Cut], CorpusReport]:
    items = list(cuts)
    seen: dict[str, str] = {}
    found: list[Fault | None] = []
    for cut in items:
        found.append(next(_faults(cut, seen, max_seconds, require_text), None))
        seen.setdefault(cut.id, _origin(cut))
    if decode_audio:
        fault_of = partial(_audio_fault, check_header if decode_audio == "header" else load_cut)
        unheard = [index for index, fault in enumerate(found) if fault is None]
        # Decoders release the interpreter's lock, so threads are enough.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            heard = pool.map(fault_of, [items[index] for index in unheard])
            for index, fault in zip(unheard, heard, strict=True):
                found[index] = fault
    good = [cut for cut, fault in zip(items, found, strict=True) if fault is None]
    bad = [Rejection(str(cut.id), *fault) for cut, fault in zip(items, found, strict=True) if fault]
    return good, _report(good, bad)


def _faults(
    cut: Cut, seen: dict[str, str], max_seconds: float | None, require_text: bool
) -> Iterator[Fault]:
    """What is wrong with a cut but for its audio; `seen` is where ids stood before."""
    where = _where(cut)
    if cut.id in seen:
        yield "duplicate_id", f"{where} {same_id(seen[cut.id])}"
    if not cut.id.strip() or any(map(is_control, cut.id)) or ".." in Path(cut.id).parts:
        yield "bad_id", f"{where} has an id that can name no file. Give it a plain one."
    known = _line_fault(cut)
    if known:
        yield known
    for code, what in _text_faults(cut, require_text):
        yield code, f"{where} {what}"
    if not cut.duration > 0:
        yield "bad_duration", f"{where} has duration {cut.duration} s; durations must be positive."
    if max_seconds is not None and cut.duration > max_seconds:
        yield (
            "too_long",
            f"{where} lasts {cut.duration:.2f} s; the limit is {max_seconds:g} s. "
            "Cut it up, or raise the limit.",
        )


def _audio_fault(check: Callable[[Cut], object], cut: Cut) -> Fault | None:
    try:
        check(cut)
    except AudioError as error:
        return error.code, f"{_where(cut)} cannot be loaded: {error}"
    return None


def _text_faults(cut: Cut, require_text: bool) -> Iterator[Fault]:
    text = cut.supervisions[0].text if cut.supervisions else None
    if text is None:
        if require_text:
            yield "no_text", "has no transcript. Add the field text, or remove the utterance."
        return
    if not isinstance(text, str):
        yield "bad_text", f"has text {text!r}; a transcript is a string. Put it in quotes."
        return
    if not is_word(text):
        yield "empty_text", f"has text {text!r}, with no word in it. Remove the utterance."
    for character in text:
        if is_control(character):
            yield (
                "bad_text",
                f"has the character {character!a} in its text, which nobody can say (a control "
                "character, or bytes that are no UTF-8). Mend the transcript.",
            )
            return
    if cut.duration > 0 and len(text) > MAX_CHARACTERS_PER_SECOND * cut.duration:
        yield (
            "too_fast",
            f"has {len(text)} characters of text in {cut.duration:.2f} s, more than "
            f"{MAX_CHARACTERS_PER_SECOND} a second. Text and audio do not belong together.",
        )


def _report(good: list[Cut], bad: list[Rejection]) -> CorpusReport:
    supervisions = [cut.supervisions[0] for cut in good if cut.supervisions]
    texts = [supervision.text or "" for supervision in supervisions]
    durations = [cut.duration for cut in good]
    languages = Counter(one.language for one in supervisions if one.language)
    return CorpusReport(
        n_in=len(good) + len(bad),
        n_ok=len(good),
        n_rejected=len(bad),
        reasons=dict(sorted(Counter(one.code for one in bad).items())),
        seconds=round(sum(durations), 3),
        words=sum(len(text.split()) for text in texts),
        speakers=len({one.speaker for one in supervisions if one.speaker}),
        languages=dict(sorted(languages.items())),
        shortest=min(durations, default=0.0),
        longest=max(durations, default=0.0),
        characters="".join(sorted(set().union(*texts))),
        rejections=bad,
    )


def _where(cut: Cut) -> str:
    origin = _origin(cut)
    return f"{origin}: utterance {cut.id!r}" if origin else f"utterance {cut.id!r}"


def _origin(cut: Cut) -> str:
    return str(_custom(cut).get(ORIGIN, ""))


def _line_fault(cut: Cut) -> Fault | None:
    """What is wrong with the line of the manifest that a cut came from."""
    fault = _custom(cut).get(FAULT)
    return (fault[0], fault[1]) if fault else None


def _custom(cut: Cut) -> dict[str, Any]:
    return getattr(cut, "custom", None) or {}

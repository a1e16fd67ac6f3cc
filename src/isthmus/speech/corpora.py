"""Corpora of any known format as lhotse CutSets, and what is wrong in them."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.speech.audio import AudioError, audio_info
from isthmus.speech.cuts import FAULT, ORIGIN, lhotse_cut, load_cut, to_cut
from isthmus.speech.formats import json_rows, read_lines, recognise
from isthmus.speech.utterances import UtteranceBuilder, expand_path

__all__ = [
    "CorpusReport",
    "Rejection",
    "check_corpus",
    "expand_path",
    "load_cut",
    "read_corpora",
    "read_corpus",
    "usable",
]

MAX_CHARACTERS_PER_SECOND = 40  # fast speech has 20 to 25
_SHOWN = 5  # rejections quoted in an error or a report for people
# Marks that turn the direction of text around: invisible, and no part of a transcript.
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def read_corpus(path: str | Path) -> CutSet:
    """The corpus at `path`, its format recognised by content, as an eager CutSet.

    Known: isthmus, NeMo and SLAM-LLM JSON lines, lhotse cuts, Kaldi folders, tables, and folders
    of audio with transcripts (see `isthmus.speech.formats`). Audio is opened only where the
    manifest lacks a duration or names a part. A line that cannot be right becomes a cut that
    `check_corpus` rejects. Raises IsthmusError for an unknown format and an id that comes twice.
    """
    path = expand_path(path)
    form = recognise(path)
    builder = UtteranceBuilder(probe=lru_cache(maxsize=4096)(audio_info))
    cuts: list[Cut] = []
    if form == "lhotse":
        for number, item in json_rows(path):
            cut = lhotse_cut(item, path, number)
            builder.claim(cut.id, f"{path}:{number}")
            cuts.append(cut)
    else:
        for line in read_lines(path, form):
            utterance = builder.build(line.row, line.base, line.origin, position=line.position)
            cuts.append(to_cut(utterance))
    if not cuts:
        raise IsthmusError(f"{path}: there is no utterance in it. Name a corpus that has some.")
    return CutSet.from_cuts(cuts)


def read_corpora(paths: Sequence[str | Path]) -> CutSet:
    """All corpora as one CutSet; raises IsthmusError when two of them share an id."""
    seen: dict[str, str] = {}
    cuts: list[Cut] = []
    for path in paths:
        for cut in read_corpus(path):
            origin = _origin(cut) or str(path)
            if cut.id in seen:
                raise IsthmusError(
                    f"{origin}: the id {cut.id!r} stands at {seen[cut.id]} already. Ids must be "
                    "unique over all corpora: rename one, or name the corpus once only."
                )
            seen[cut.id] = origin
            cuts.append(cut)
    return CutSet.from_cuts(cuts)


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
    decode_audio: bool = True,
    max_seconds: float | None = None,
    require_text: bool = True,
) -> CorpusReport:
    """Check each utterance and count; one reason for each that cannot be used.

    Reasons: the codes of `AudioError`, and bad_duration, bad_id, bad_text (control characters,
    bytes that are no UTF-8, no string), duplicate_id, empty_text (nothing to say), no_text,
    too_fast (above 40 characters a second) and too_long (above `max_seconds`).
    `decode_audio=False` trusts the audio files. `require_text=False` accepts a missing transcript.
    """
    return _check(cuts, decode_audio, max_seconds, require_text)[1]


def usable(
    cuts: CutSet,
    *,
    max_bad_fraction: float,
    decode_audio: bool = True,
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


def _check(
    cuts: CutSet, decode_audio: bool, max_seconds: float | None, require_text: bool
) -> tuple[list[Cut], CorpusReport]:
    good: list[Cut] = []
    bad: list[Rejection] = []
    seen: dict[str, str] = {}
    for cut in cuts:
        faults = _faults(cut, seen, decode_audio, max_seconds, require_text)
        found = next(faults, None)
        seen.setdefault(cut.id, _origin(cut))
        if found is None:
            good.append(cut)
        else:
            bad.append(Rejection(str(cut.id), found[0], found[1]))
    return good, _report(good, bad)


def _faults(
    cut: Cut,
    seen: dict[str, str],
    decode_audio: bool,
    max_seconds: float | None,
    require_text: bool,
) -> Iterator[tuple[str, str]]:
    """(code, message) of what is wrong with a cut, the cheap checks first."""
    where = f"{_origin(cut)}: utterance {cut.id!r}" if _origin(cut) else f"utterance {cut.id!r}"
    if cut.id in seen:
        yield "duplicate_id", f"{where} has the id of another one at {seen[cut.id]}. Rename it."
    if not cut.id.strip() or not cut.id.isprintable() or ".." in Path(cut.id).parts:
        yield "bad_id", f"{where} has an id that can name no file. Give it a plain one."
    fault = (getattr(cut, "custom", None) or {}).get(FAULT)
    if fault:
        yield fault[0], fault[1]
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
    if decode_audio:
        try:
            load_cut(cut)
        except AudioError as error:
            yield error.code, f"{where} cannot be loaded: {error}"


def _text_faults(cut: Cut, require_text: bool) -> Iterator[tuple[str, str]]:
    text = cut.supervisions[0].text if cut.supervisions else None
    if text is None:
        if require_text:
            yield "no_text", "has no transcript. Add the field text, or remove the utterance."
        return
    if not isinstance(text, str):
        yield "bad_text", f"has text {text!r}; a transcript is a string. Put it in quotes."
        return
    if not any(character.isalnum() for character in text):
        yield "empty_text", f"has text {text!r}, with no word in it. Remove the utterance."
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Cn") or character in _DIRECTION_MARKS:
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


def _origin(cut: Cut) -> str:
    custom: dict[str, Any] = getattr(cut, "custom", None) or {}
    return str(custom.get(ORIGIN, ""))

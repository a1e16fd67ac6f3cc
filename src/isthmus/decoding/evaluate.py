"""Decode corpora with a run or another recogniser, and score them."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from isthmus.decoding.calibration import Calibration, calibrate
from isthmus.decoding.recogniser import Recogniser, Result
from isthmus.decoding.transcript import Transcript
from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.model.parts import Source
from isthmus.scoring import LanguageScores, SetScores, score_languages, score_sets
from isthmus.scoring import normaliser as find_normaliser
from isthmus.scoring.normalise import has_marks
from isthmus.speech.audio import AudioError
from isthmus.speech.corpora import read_corpus, scorable
from isthmus.speech.cuts import (
    FAULT,
    language,
    transcript,
)

OnBatch = Callable[[int, int], None]  # utterances done, of how many
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """One utterance, decoded, or why it could not be: then its transcript is empty."""

    cut: Cut
    transcript: Transcript
    seconds: float  # of computing, its share of the batch's
    fault: IsthmusError | None = None


@dataclass(frozen=True)
class Evaluation:
    """Transcripts of each set and their error rates."""

    sets: dict[str, list[Decoded]]
    scores: SetScores
    settings: dict[str, Any]
    # of each set, by reason: lines without a transcript to score by, which count for nothing
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    chunk_seconds: float | None = None  # that the recogniser decodes as one, at most
    feature_cache: str = "none"  # or the precision of the frames that were taken from it
    languages: LanguageScores | None = None  # where there are several
    ears: Source | None = None  # the run whose ears heard, if not its own
    unwritten: OSError | None = None  # why transcripts could not be written

    @property
    def unheard(self) -> dict[str, Counter[str]]:
        """Recordings of each set that could not be heard, by reason: their words are deleted."""
        return {
            name: Counter(_reason(item) for item in items if item.fault)
            for name, items in self.sets.items()
        }

    @property
    def calibration(self) -> Calibration | None:
        """Whether words are as often right as their confidence says."""
        utterances = []
        for name, items in self.sets.items():
            alignments = {one.id: one.alignment for one in self.scores.sets[name].utterances}
            for item in items:
                sure = [p for part in item.transcript.segments for p in part.confidences]
                utterances.append((sure, alignments.get(item.cut.id, ())))
        return calibrate(utterances)

    def to_dict(self) -> dict[str, Any]:
        decoded = [item for items in self.sets.values() for item in items]
        computing = sum(item.seconds for item in decoded)
        audio = sum(item.transcript.duration for item in decoded)
        return {
            **self.scores.to_dict(),
            **(self.languages.to_dict() if self.languages else {}),
            "left_out": self.left_out,
            "unheard": self.unheard,
            "decode": self.settings,
            "chunk_seconds": self.chunk_seconds,
            "ears": self.ears.to_dict() if self.ears else None,
            "feature_cache": self.feature_cache,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "audio_seconds": audio,
            # Frames that are read say nothing of the time it takes to compute them.
            "rtfx": audio / computing if computing and self.feature_cache == "none" else None,
        }

    def write(self, folder: Path) -> list[Path]:
        """A JSON-lines manifest a set, in the form of the Open ASR Leaderboard, with ids."""
        files = new_files(folder, self.sets)
        for name, items in self.sets.items():
            if unwritten := _write_set(files[name], items):
                raise unwritten
        return list(files.values())


def evaluate(
    recogniser: Recogniser,
    corpora: Sequence[str],
    *,
    normaliser: str = "basic",
    folder: str | Path | None = None,
    on_batch: OnBatch = lambda done, total: None,
) -> Evaluation:
    """Transcribe corpora (manifests, folders) and score them: each, and all together.

    Rates are fractions. The words of recordings that cannot be heard count as deleted; lines
    without a transcript are counted in `left_out`. Transcripts are written into `folder` before
    they are scored; where that fails, `unwritten` says why.

    Raises:
        IsthmusError: before anything is decoded, for an unknown normaliser, for files that exist
            and for a language that the recogniser does not know; and when no utterance can be
            heard.
    """
    find_normaliser(normaliser)
    sets, left_out = load_sets(corpora)
    for name in {language(cut) for cuts in sets.values() for cut in cuts}:
        recogniser.check_language(name)
    files = {} if folder is None else new_files(Path(folder), sets)
    done, total = 0, sum(map(len, sets.values()))
    decoded: dict[str, list[Decoded]] = {}
    unwritten: OSError | None = None
    for name, cuts in sets.items():
        decoded[name] = []
        for result in recogniser.results(cuts):
            decoded[name].append(_decoded(cuts[result.index], result))
            done += 1
            on_batch(done, total)
        if files:
            unwritten = _write_set(files[name], decoded[name]) or unwritten
    faults = [item for items in decoded.values() for item in items if item.fault]
    if len(faults) == total:
        reasons = ", ".join(sorted(set(map(_reason, faults))))
        raise IsthmusError(f"None of {total} utterances could be transcribed: {reasons}.")
    scores = _scores(decoded, normaliser)
    spoken = {n: {one.cut.id: language(one.cut) for one in items} for n, items in decoded.items()}
    languages = score_languages(scores, spoken)
    _warn_of_marks(decoded, normaliser)
    return Evaluation(
        decoded,
        scores,
        recogniser.settings.model_dump(mode="json"),
        left_out,
        recogniser.longest,
        recogniser.cache.precision if recogniser.cache else "none",
        languages,
        recogniser.ears,
        unwritten,
    )


def _decoded(cut: Cut, result: Result) -> Decoded:
    """What was heard of a cut; nothing, with the reason, where it cannot be heard."""
    if isinstance(result.found, Transcript):
        return Decoded(cut, result.found, result.seconds)
    log.info("counted as deleted: %s", result.found)
    return Decoded(cut, Transcript((), 0.0), 0.0, result.found)


def _warn_of_marks(decoded: Mapping[str, Sequence[Decoded]], normaliser: str) -> None:
    if normaliser != "basic":
        return
    marked = [one for items in decoded.values() for one in items if has_marks(transcript(one.cut))]
    if marked:
        log.warning(
            "%d transcripts have marks such as vowel points, which the normaliser basic makes "
            "spaces: words fall apart. Score them with --normaliser basic-marks.",
            len(marked),
        )


def check_ctc(recogniser: Recogniser) -> None:
    """Raise IsthmusError unless it has a CTC head that knows its encoder's frames."""
    if recogniser.ctc is None:
        raise IsthmusError(f"No CTC to score: {recogniser.without_ctc}. Leave out --ctc.")


def ctc_scores(evaluation: Evaluation) -> SetScores:
    """What the recogniser's CTC head alone heard in an evaluation, by best path.

    In the same chunks, and nothing where the recogniser found that nobody speaks.
    """
    normaliser = evaluation.scores.pooled.normaliser
    return _scores(evaluation.sets, normaliser, lambda heard: heard.ctc_text)


def load_sets(corpora: Sequence[str]) -> tuple[dict[str, list[Cut]], dict[str, Counter[str]]]:
    """Utterances of each corpus by a short name for it, and why how many are left out."""
    sets: dict[str, list[Cut]] = {}
    left_out: dict[str, Counter[str]] = {}
    for corpus in corpora:
        whole = read_corpus(corpus)
        good, bad = scorable(whole)  # audio is looked at when it is decoded
        if not good:
            raise IsthmusError(
                f"{corpus}: none of {len(whole)} utterances can be scored, such as: "
                f"{bad[0].message}"
            )
        path = Path(corpus).resolve()
        short = f"{path.parent.name}/{path.stem}" if path.suffix else path.name
        names = (f"{short}-{number}" if number > 1 else short for number in count(1))
        taken = set(map(_file_name, sets))
        name = next(name for name in names if _file_name(name) not in taken)
        sets[name], left_out[name] = good, Counter(rejection.code for rejection in bad)
        for rejection in bad:
            log.info("left out: %s", rejection.message)
    return sets, left_out


def new_files(folder: Path, sets: Iterable[str]) -> dict[str, Path]:
    """The manifest to write for each set; raises IsthmusError when one exists."""
    files = {name: folder / _file_name(name) for name in sets}
    for file in files.values():
        if file.exists():
            raise IsthmusError(f"{file} exists. Name another folder with --output-dir.")
    return files


def _file_name(name: str) -> str:
    return f"{name.replace('/', '_')}.jsonl"


def _write_set(file: Path, items: Sequence[Decoded]) -> OSError | None:
    """Why it could not be written, which is no reason to lose what was decoded."""
    lines = [json.dumps(_row(item), ensure_ascii=False) + "\n" for item in items]
    try:
        write_atomic(file, "".join(lines))
    except OSError as error:
        return error
    return None


def _reason(item: Decoded) -> str:
    if known := (getattr(item.cut, "custom", None) or {}).get(FAULT):
        return str(known[0])
    return item.fault.code if isinstance(item.fault, AudioError) else "unusable"


def _scores(
    decoded: Mapping[str, Sequence[Decoded]],
    normaliser: str,
    text: Callable[[Transcript], str] = lambda heard: heard.text,
) -> SetScores:
    sets = {
        name: (
            {item.cut.id: transcript(item.cut) for item in items},
            {item.cut.id: text(item.transcript) for item in items if not item.fault},
        )
        for name, items in decoded.items()
    }
    return score_sets(sets, normaliser=normaliser, missing="empty")


def _row(item: Decoded) -> dict[str, Any]:
    source = item.cut.recording.sources[0].source if item.cut.has_recording else None
    return {
        "id": item.cut.id,
        "audio_filepath": source if isinstance(source, str) else None,
        "duration": item.cut.duration if item.fault else item.transcript.duration,
        "time": item.seconds,
        "text": transcript(item.cut),
        "pred_text": item.transcript.text,
        "score": item.transcript.score,
        "finish_reason": item.transcript.finish_reason,
        **({"error": str(item.fault)} if item.fault else {}),
    }

"""Decode corpora with a run and score them."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut

from isthmus.analysis.calibration import Calibration, calibrate
from isthmus.decoding.longform import joined
from isthmus.decoding.transcriber import Speech, Transcriber
from isthmus.decoding.transcript import Segment, Transcript, together
from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.scoring import LanguageScores, SetScores, score_languages, score_sets
from isthmus.scoring import normaliser as find_normaliser
from isthmus.scoring.normalise import has_marks
from isthmus.speech.audio import SAMPLE_RATE, AudioError
from isthmus.speech.corpora import read_corpus, usable
from isthmus.training.batches import collate, transcript
from isthmus.training.languages import language

OnBatch = Callable[[int, int], None]  # utterances done, of how many
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """One utterance, decoded."""

    cut: Cut
    transcript: Transcript
    seconds: float  # of computing, its share of the batch's


@dataclass(frozen=True)
class Evaluation:
    """Transcripts of each set and their error rates."""

    sets: dict[str, list[Decoded]]
    scores: SetScores
    settings: dict[str, Any]
    left_out: dict[str, Counter[str]] = field(default_factory=dict)  # of each set, by reason
    feature_cache: str = "none"  # or the precision of the frames that were taken from it
    languages: LanguageScores | None = None  # where there are several

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
            "decode": self.settings,
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
            _write_set(files[name], items)
        return list(files.values())


def evaluate(
    transcriber: Transcriber,
    corpora: Sequence[str],
    *,
    normaliser: str = "basic",
    folder: Path | None = None,
    on_batch: OnBatch = lambda done, total: None,
) -> Evaluation:
    """Transcribe corpora and score them: each, and all together.

    Utterances that cannot be used are counted in `left_out`. Transcripts are written into `folder`
    before they are scored. Raises IsthmusError, before anything is decoded, for an unknown
    normaliser and for files that exist; and when no utterance can be used.
    """
    find_normaliser(normaliser)
    sets, left_out = load_sets(corpora)
    files = {} if folder is None else new_files(folder, sets)
    done, total = 0, sum(map(len, sets.values()))
    decoded: dict[str, list[Decoded]] = {}
    for name, cuts in sets.items():
        decoded[name] = []
        for result in transcriber.results(cuts):
            if isinstance(result.found, Transcript):
                item = Decoded(cuts[result.index], result.found, result.seconds)
                decoded[name].append(item)
            else:
                left_out[name][_reason(result.found)] += 1
                log.info("left out: %s", result.found)
            done += 1
            on_batch(done, total)
        if files:
            _write_set(files[name], decoded[name])
    if not any(decoded.values()):
        reasons = ", ".join(sum(left_out.values(), Counter()))
        raise IsthmusError(f"None of {total} utterances could be transcribed: {reasons}.")
    scores = score_sets(
        {name: _texts(items) for name, items in decoded.items()}, normaliser=normaliser
    )
    spoken = {n: {one.cut.id: language(one.cut) for one in items} for n, items in decoded.items()}
    languages = score_languages(scores, spoken)
    _warn_of_marks(decoded, normaliser)
    settings = transcriber.settings.model_dump(mode="json")
    cache = transcriber.cache.precision if transcriber.cache else "none"
    return Evaluation(decoded, scores, settings, left_out, cache, languages)


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


def check_ctc(transcriber: Transcriber) -> None:
    """Raise IsthmusError unless the encoder has a CTC head that knows its frames."""
    if transcriber.ctc is None:
        raise IsthmusError(f"No CTC to score: {transcriber.without_ctc}. Leave out --ctc.")


def ctc_scores(transcriber: Transcriber, evaluation: Evaluation) -> SetScores:
    """What the encoder's own CTC head hears in the utterances of an evaluation, by best path.

    Those too long for the model are heard in the same chunks as it heard them.
    """
    check_ctc(transcriber)

    def hear(speech: list[Speech]) -> list[str]:
        fit = [one.waveform for one in speech if transcriber.fits(one)]
        heard = iter(_spell(transcriber, fit))
        return [
            next(heard) if transcriber.fits(one) else _spell_long(transcriber, one)
            for one in speech
        ]

    texts: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
    for name, items in evaluation.sets.items():
        cuts = [item.cut for item in items]
        durations = [cut.duration for cut in cuts]
        found = {cuts[r.index].id: r.found for r in transcriber.each_batch(cuts, durations, hear)}
        hypotheses = {id: text for id, text in found.items() if isinstance(text, str)}
        texts[name] = ({cut.id: transcript(cut) for cut in cuts}, hypotheses)
    return score_sets(texts, normaliser=evaluation.scores.pooled.normaliser)


@torch.inference_mode()
def _spell(transcriber: Transcriber, waveforms: Sequence[np.ndarray]) -> list[str]:
    head = transcriber.ctc
    assert head is not None
    if not waveforms:
        return []
    device = next(transcriber.model.parameters()).device
    batch = collate([""] * len(waveforms), waveforms, []).to(device)
    frames, lengths = transcriber.model.encoder(batch.waveforms, batch.num_samples)
    return head.greedy(head.log_probs(frames), lengths)


def _spell_long(transcriber: Transcriber, speech: Speech) -> str:
    def segments() -> Iterator[tuple[Segment, float]]:
        for chunk in transcriber.chunks(speech.waveform):
            [text] = _spell(transcriber, [chunk.waveform])
            end = chunk.start + len(chunk.waveform) / SAMPLE_RATE
            yield Segment(chunk.start, end, text), chunk.overlap

    return together(segment.text for segment in joined(segments()))


def load_sets(corpora: Sequence[str]) -> tuple[dict[str, list[Cut]], dict[str, Counter[str]]]:
    """Utterances of each corpus by a short name for it, and why how many are left out."""
    sets: dict[str, list[Cut]] = {}
    left_out: dict[str, Counter[str]] = {}
    for corpus in corpora:
        # Audio is looked at when it is decoded.
        good, report = usable(read_corpus(corpus), max_bad_fraction=1.0, decode_audio=False)
        path = Path(corpus).resolve()
        short = f"{path.parent.name}/{path.stem}" if path.suffix else path.name
        names = (f"{short}-{number}" if number > 1 else short for number in count(1))
        taken = set(map(_file_name, sets))
        name = next(name for name in names if _file_name(name) not in taken)
        sets[name], left_out[name] = list(good), Counter(report.reasons)
        for rejection in report.rejections:
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


def _write_set(file: Path, items: Sequence[Decoded]) -> None:
    lines = [json.dumps(_row(item), ensure_ascii=False) + "\n" for item in items]
    write_atomic(file, "".join(lines))


def _reason(error: IsthmusError) -> str:
    return error.code if isinstance(error, AudioError) else "unusable"


def _texts(items: Sequence[Decoded]) -> tuple[dict[str, str], dict[str, str]]:
    references = {item.cut.id: transcript(item.cut) for item in items}
    return references, {item.cut.id: item.transcript.text for item in items}


def _row(item: Decoded) -> dict[str, Any]:
    source = item.cut.recording.sources[0].source if item.cut.has_recording else None
    return {
        "id": item.cut.id,
        "audio_filepath": source if isinstance(source, str) else None,
        "duration": item.transcript.duration,
        "time": item.seconds,
        "text": transcript(item.cut),
        "pred_text": item.transcript.text,
        "score": item.transcript.score,
        "finish_reason": item.transcript.finish_reason,
    }

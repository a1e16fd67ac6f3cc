"""Decode corpora with a run and score them."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lhotse.cut import Cut

from isthmus.decoding.transcriber import Speech, Transcriber
from isthmus.decoding.transcript import Transcript
from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.scoring import SetScores, score_sets
from isthmus.scoring import normaliser as find_normaliser
from isthmus.speech.audio import AudioError
from isthmus.speech.corpora import read_corpus, usable
from isthmus.training.batches import collate, transcript

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

    def to_dict(self) -> dict[str, Any]:
        decoded = [item for items in self.sets.values() for item in items]
        computing = sum(item.seconds for item in decoded)
        audio = sum(item.transcript.duration for item in decoded)
        return self.scores.to_dict() | {
            "left_out": self.left_out,
            "decode": self.settings,
            "audio_seconds": audio,
            "rtfx": audio / computing if computing else None,
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
    return Evaluation(decoded, scores, transcriber.settings.model_dump(mode="json"), left_out)


def check_ctc(transcriber: Transcriber) -> None:
    """Raise IsthmusError unless the encoder has a CTC head."""
    if transcriber.model.encoder.ctc is None:
        raise IsthmusError(
            "This run's encoder has no CTC head, it cannot spell by itself. Leave out --ctc."
        )


def ctc_scores(transcriber: Transcriber, evaluation: Evaluation) -> SetScores:
    """What the encoder's own CTC head hears in the utterances of an evaluation, by best path."""
    check_ctc(transcriber)
    encoder = transcriber.model.encoder
    head = encoder.ctc
    assert head is not None
    device = next(transcriber.model.parameters()).device

    @torch.inference_mode()
    def hear(speech: list[Speech]) -> list[str]:
        batch = collate([""] * len(speech), [one.waveform for one in speech], []).to(device)
        frames, lengths = encoder(batch.waveforms, batch.num_samples)
        return head.greedy(head.log_probs(frames), lengths)

    texts: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
    for name, items in evaluation.sets.items():
        cuts = [item.cut for item in items]
        found = {cuts[r.index].id: r.found for r in transcriber.each_batch(cuts, hear)}
        hypotheses = {id: text for id, text in found.items() if isinstance(text, str)}
        texts[name] = ({cut.id: transcript(cut) for cut in cuts}, hypotheses)
    return score_sets(texts, normaliser=evaluation.scores.pooled.normaliser)


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

"""Decode corpora with a run and score them."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lhotse.cut import Cut

from isthmus.decoding.transcriber import Transcriber, Transcript
from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.scoring import SetScores, score_sets
from isthmus.speech.corpora import load_cut, read_corpus, usable
from isthmus.training.batches import collate, transcript

OnBatch = Callable[[int, int], None]  # utterances done, of how many


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

    def to_dict(self) -> dict[str, Any]:
        decoded = [item for items in self.sets.values() for item in items]
        computing = sum(item.seconds for item in decoded)
        audio = sum(item.transcript.duration for item in decoded)
        return self.scores.to_dict() | {
            "decode": self.settings,
            "audio_seconds": audio,
            "rtfx": audio / computing if computing else None,
        }

    def write(self, folder: Path) -> list[Path]:
        """A JSON-lines manifest a set, in the form of the Open ASR Leaderboard, with ids."""
        paths = []
        for name, items in self.sets.items():
            path = folder / f"{name.replace('/', '_')}.jsonl"
            lines = [json.dumps(_row(item), ensure_ascii=False) + "\n" for item in items]
            write_atomic(path, "".join(lines))
            paths.append(path)
        return paths


def evaluate(
    transcriber: Transcriber,
    corpora: Sequence[str],
    *,
    normaliser: str = "basic",
    max_bad_fraction: float = 0.01,
    on_batch: OnBatch = lambda done, total: None,
) -> Evaluation:
    """Transcribe corpora and score them: each, and all together."""
    sets = load_sets(corpora, transcriber.model.encoder.max_seconds, max_bad_fraction)
    total = sum(map(len, sets.values()))
    decoded: dict[str, list[Decoded]] = {}
    for name, cuts in sets.items():
        found = []
        for item in decode(transcriber, cuts):
            found.append(item)
            on_batch(sum(map(len, decoded.values())) + len(found), total)
        decoded[name] = found
    return Evaluation(
        decoded,
        score_sets({name: _texts(items) for name, items in decoded.items()}, normaliser=normaliser),
        transcriber.settings.model_dump(mode="json"),
    )


def ctc_scores(
    transcriber: Transcriber, corpora: Sequence[str], *, normaliser: str = "basic"
) -> SetScores:
    """What the encoder's own CTC head hears in the same corpora, by best path."""
    encoder = transcriber.model.encoder
    if encoder.ctc is None:
        raise IsthmusError("This run's encoder has no CTC head, it cannot spell by itself.")
    device = next(transcriber.model.parameters()).device
    texts: dict[str, tuple[Mapping[str, str], Mapping[str, str]]] = {}
    for name, cuts in load_sets(corpora, encoder.max_seconds, 0.01).items():
        hypotheses: dict[str, str] = {}
        for batch in _batches(cuts, transcriber.settings.batch_size):
            ids, waveforms = [cut.id for cut in batch], [load_cut(cut) for cut in batch]
            waves = collate(ids, waveforms, [""] * len(batch)).to(device)
            with torch.inference_mode():
                frames, lengths = encoder(waves.waveforms, waves.num_samples)
                found = encoder.ctc.greedy(encoder.ctc.log_probs(frames), lengths)
            hypotheses.update(zip(waves.ids, found, strict=True))
        texts[name] = ({cut.id: transcript(cut) for cut in cuts}, hypotheses)
    return score_sets(texts, normaliser=normaliser)


def load_sets(
    corpora: Sequence[str], max_seconds: float | None, max_bad_fraction: float
) -> dict[str, list[Cut]]:
    """Usable utterances of each corpus by a short name for it."""
    sets: dict[str, list[Cut]] = {}
    for corpus in corpora:
        cuts, _ = usable(
            read_corpus(corpus), max_bad_fraction=max_bad_fraction, max_seconds=max_seconds
        )
        path = Path(corpus)
        name = f"{path.resolve().parent.name}/{path.stem}" if path.suffix else path.name
        sets[name if name not in sets else str(corpus)] = list(cuts)
    return sets


def decode(transcriber: Transcriber, cuts: Sequence[Cut]) -> Iterator[Decoded]:
    """Transcribe utterances, batches of like length first; yields in that order."""
    for batch in _batches(cuts, transcriber.settings.batch_size):
        waveforms = [load_cut(cut) for cut in batch]
        started = time.perf_counter()
        transcripts = transcriber.transcribe_waveforms(waveforms)
        seconds = (time.perf_counter() - started) / len(batch)
        for cut, found in zip(batch, transcripts, strict=True):
            yield Decoded(cut, found, seconds)


def _batches(cuts: Sequence[Cut], size: int) -> Iterator[list[Cut]]:
    ordered = sorted(cuts, key=lambda cut: (cut.duration, cut.id))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


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

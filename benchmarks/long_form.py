"""One very long recording: is memory flat, how fast is it read, and how well?

Puts validation utterances of ISTHMUS_SPEECH (../shared/speech unless set) one behind the other,
with pauses, into one file of so many hours, and reads it with the shipped system. Prints what the
process held once the model had read its first minute, and what it held at most; up to an hour, also
the word error rate.

    python benchmarks/long_form.py [HOURS [CHUNK_SECONDS]]
"""

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from quality import dev_sets

from isthmus.decoding.transcriber import load
from isthmus.decoding.transcript import together
from isthmus.scoring import score
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.corpora import load_cut, read_corpus

SAMPLE_EVERY = 600.0  # seconds of audio between two lines


def main() -> None:
    hours = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    chunk = float(sys.argv[2]) if len(sys.argv) > 2 else None
    paths = dev_sets()
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "long.flac"
        said = write_recording(recording, paths, hours)
        transcriber = load("tiny", chunk_seconds=chunk)
        transcriber.transcribe(next(blocks(paths, 60.0))[0])
        loaded = resident()
        started, most, next_line = time.perf_counter(), loaded, SAMPLE_EVERY
        heard: list[str] = []
        for segment in transcriber.stream(recording):
            heard.append(segment.text)
            most = max(most, resident())
            if segment.end >= next_line:
                print(f"{segment.end / 3600:6.2f} h  {resident() / 2**20:7.0f} MiB", flush=True)
                next_line += SAMPLE_EVERY
        seconds = time.perf_counter() - started
    figures = {
        "hours": hours,
        "chunk_seconds": transcriber.settings.chunk_seconds,
        "loaded_mib": round(loaded / 2**20),
        "above_it_mib": round((most - loaded) / 2**20),
        "rtfx": round(hours * 3600 / seconds, 1),
        "words": [len(said), len(together(heard).split())],
    }
    if hours <= 1:  # aligning is quadratic
        figures["wer"] = score({"all": " ".join(said)}, {"all": together(heard)}).wer
    print(json.dumps(figures))


def write_recording(file: Path, paths: list[str], hours: float) -> list[str]:
    """Speech of at least `hours` hours; returns the words that are said in it."""
    words: list[str] = []
    left = hours * 3600 * SAMPLE_RATE
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1) as out:
        for samples, said in blocks(paths, 60.0):
            out.write(samples)
            words += said
            left -= len(samples)
            if left <= 0:
                return words
    raise AssertionError("blocks never end")


def blocks(paths: list[str], seconds: float) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Samples of about so many seconds, and the words in them, for ever."""
    rng = random.Random(0)
    cuts = [cut for path in paths for cut in read_corpus(path)]
    spoken = [(load_cut(cut), cut.supervisions[0].text.split()) for cut in cuts]
    for _ in itertools.count():
        pieces: list[np.ndarray] = []
        words: list[str] = []
        while sum(map(len, pieces)) < seconds * SAMPLE_RATE:
            samples, said = rng.choice(spoken)
            pause = np.zeros(int(rng.uniform(0.2, 1.2) * SAMPLE_RATE), np.float32)
            pieces += [samples, pause]
            words += said
        yield np.concatenate(pieces), words


def resident() -> int:
    """Bytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()

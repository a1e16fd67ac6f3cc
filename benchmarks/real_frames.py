"""What it costs to fill the feature cache with the frames of a real Whisper, by precision.

Whisper base from $ISTHMUS_PARTS on recordings of 3 to 5 s below $ISTHMUS_SPEECH, each encoded and
stored as `isthmus cache` does it. Time is CPU time of this process with one thread; the ways take
turns on every recording, and the quickest of their rounds counts. Prints a Markdown table. The
floors are those of a CPU with matrix units for bfloat16 (AMX); others miss the padded one.

    python benchmarks/real_frames.py [--utterances N] [--rounds N]
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch

from isthmus.build import encoder_of
from isthmus.recipe import Recipe
from isthmus.runs.feature_cache import FeatureCache, encoder_description
from isthmus.speech.corpora import load_cut, read_corpus

PARTS = Path(os.environ.get("ISTHMUS_PARTS", "~/.cache/isthmus-parts")).expanduser()
SPEECH = Path(os.environ.get("ISTHMUS_SPEECH", "../shared/speech")) / "en_librispeech/train.jsonl"
BASE = ("float32", True)
FLOORS = {("bfloat16", True): 0.35, ("float32", False): None, ("bfloat16", False): 0.12}


class Way:
    """A frozen Whisper at one precision, padded to 30 s or not, and a cache of its own."""

    def __init__(self, precision: str, pad_to_30s: bool, folder: Path):
        recipe = Recipe.model_validate(
            {
                "name": "frames",
                "encoder": {
                    "type": "whisper",
                    "path": str(PARTS / "whisper-base"),
                    "pad_to_30s": pad_to_30s,
                },
                "llm": {"path": "never loaded"},
                "train": {"precision": precision},
            }
        )
        self.encoder = encoder_of(recipe).eval()
        about = encoder_description(recipe.encoder, dtype=precision, precision="bfloat16")
        self.cache = FeatureCache(folder / f"{precision}-{pad_to_30s}", about, strict=True)

    @torch.no_grad()
    def seconds(self, key: str, waveform: torch.Tensor) -> float:
        """CPU time to encode and store a waveform (S,)."""
        started = time.process_time()
        frames, (length,) = self.encoder(waveform[None], torch.tensor([len(waveform)]))
        self.cache.put(key, frames[0, : int(length)])
        return time.process_time() - started


def measure(utterances: int, rounds: int, folder: Path) -> dict[tuple[str, bool], float]:
    """Seconds an utterance of each way, by precision and padding."""
    ways = {one: Way(*one, folder) for one in (BASE, *FLOORS)}
    short = [cut for cut in read_corpus(str(SPEECH)) if 3 <= cut.duration <= 5]
    cuts = short[:utterances]
    totals = dict.fromkeys(ways, 0.0)
    for cut in cuts:
        waveform = torch.from_numpy(load_cut(cut))
        found = [
            {one: way.seconds(cut.id, waveform) for one, way in ways.items()} for _ in range(rounds)
        ]
        for one in ways:
            totals[one] += min(times[one] for times in found) / len(cuts)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--utterances", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    if not (PARTS / "whisper-base").is_dir() or not SPEECH.is_file():
        print(f"Skipped: wants $ISTHMUS_PARTS with whisper-base ({PARTS}), and {SPEECH}.")
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of Whisper without padding
    with tempfile.TemporaryDirectory(prefix="isthmus-benchmark-") as folder:
        totals = measure(given.utterances, given.rounds, Path(folder))
    print("| frames of Whisper base in the feature cache | floor | of padded float32 | s a core |")
    print("|---|---|---|---|")
    for (precision, padded), seconds in totals.items():
        floor, ratio = FLOORS.get((precision, padded)), seconds / totals[BASE]
        limit = "-" if floor is None else f"<= {floor:g}{', missed' if ratio > floor else ''}"
        what = f"{precision}, {'padded to 30 s' if padded else 'unpadded'}"
        print(f"| {what} | {limit} | {ratio:.3f} | {seconds:.3f} |")


if __name__ == "__main__":
    main()

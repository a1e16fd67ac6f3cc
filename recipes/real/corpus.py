"""Makes the corpora of the recipes here: sentences by a natural voice, and real speech joined.

    pip install hibari-tts  # Apache-2.0: one voice, a hundred times as fast as it speaks
    python recipes/real/corpus.py SENTENCES.txt $ISTHMUS_SPOKEN

SENTENCES has one a line. Left out are those that share six words in a row with a text of the dev
and test manifests in $ISTHMUS_SPEECH, and those with digits. One voice becomes many: it is played
at other speeds, in rooms, through bands and under noise; so is, three times, the real speech. The
voices of espeak-ng (extra `synth`) say some of the sentences, and some of isthmus' own. Whisper
takes 30 s however short an utterance is, so utterances of one speaker are joined to about as much:
OUT/spoken, OUT/espeak, OUT/joined, and OUT/others-1 to -3, real speech as other speakers.
"""

import argparse
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from isthmus.lab import synthesis
from isthmus.lab.sentences import sentence
from isthmus.scoring.normalise import lower
from isthmus.speech.audio import SAMPLE_RATE, load_audio
from isthmus.speech.augment import Augmentation

Line = dict[str, Any]
SHARED_WORDS = 6
LONGEST = 29.0  # seconds
PAUSE = (0.05, 0.5)  # seconds between utterances that are joined
ESPEAK_SENTENCES, OWN_SENTENCES = 1100, 1500  # that the voices of espeak-ng say
OTHERS = 3  # how often real speech is spoken by others
VOICES = Augmentation.model_validate(
    {
        "speed": {"factors": [0.8, 1.25]},
        "reverb": {},
        "equaliser": {},
        "noise": {"snr": [8, 35]},
        "gain": {},
        "telephone": {},
    }
)
FOLDERS = ("en_speechocean", "en_barista", "en_kathleen", "en_librispeech", "en_recordings")
FOLDERS += ("en_asterisk", "en_keywords", "en_speech_commands", "en_digits", "en_alphanumeric")


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of SHARED_WORDS words of a plain text."""
    words = text.split()
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def usable(sentences: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """Sentences without digits that share no run of words with the texts held out."""
    taken = set().union(*(runs(lower(text)) for text in held_out))
    return [
        one
        for one in sentences
        if lower(one) and not re.search(r"\d", one) and not runs(lower(one)) & taken
    ]


def lines(manifest: Path) -> Iterator[Line]:
    """Lines of a manifest, the audio as a path."""
    for text in manifest.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        yield line | {"audio": manifest.parent / line["audio"]}


def joined(utterances: Sequence[Line], rng: np.random.Generator) -> Iterator[list[Line]]:
    """Utterances in groups, some of them short and most as long as an encoder takes."""
    group: list[Line] = []
    limit = LONGEST
    for one in utterances:
        seconds = sum(other["duration"] + PAUSE[1] for other in (*group, one))
        if group and seconds > limit:
            yield group
            group = []
            limit = LONGEST if rng.random() < 0.6 else rng.uniform(3.0, LONGEST)
        group.append(one)
    if group:
        yield group


def write(folder: Path, groups: Iterable[list[Line]], rng: np.random.Generator) -> None:
    """A corpus of each group's utterances, one behind the other."""
    (folder / "audio").mkdir(parents=True)
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
        for number, group in enumerate(groups):
            parts = [load_audio(group[0]["audio"])]
            for one in group[1:]:
                parts.append(np.zeros(int(rng.uniform(*PAUSE) * SAMPLE_RATE), np.float32))
                parts.append(load_audio(one["audio"]))
            name, samples = f"{folder.name}-{number:06d}", np.concatenate(parts)
            soundfile.write(folder / f"audio/{name}.flac", samples, SAMPLE_RATE)
            line = {
                "id": name,
                "audio": f"audio/{name}.flac",
                "duration": len(samples) / SAMPLE_RATE,
                "text": " ".join(one["text"] for one in group),
                "speaker": group[0]["speaker"],
                "language": "en",
            }
            manifest.write(json.dumps(line) + "\n")


def written(
    samples: np.ndarray,
    line: Line,
    audio: Path,
    rng: np.random.Generator,
    change: Augmentation | None = VOICES,
) -> Line:
    """Speech at 16 kHz, as another speaker's unless `change` is None, in the file `audio`."""
    samples = change(samples, rng) if change else samples
    soundfile.write(audio, samples, SAMPLE_RATE)
    return line | {"audio": audio, "duration": len(samples) / SAMPLE_RATE}


def speak(sentences: Sequence[str], folder: Path, rng: np.random.Generator) -> list[Line]:
    """Each sentence by one voice made another: their lines."""
    from hibari import Hibari

    voice = Hibari(threads=1)
    folder.mkdir(parents=True)
    found = []
    for number, text in enumerate(sentences):
        spoken = np.asarray(voice(text, seed=int(rng.integers(2**31))), np.float32)
        line = {"text": lower(text), "speaker": "hibari"}
        samples = soxr.resample(spoken, 24_000, SAMPLE_RATE)
        found.append(written(samples, line, folder / f"{number:06d}.flac", rng))
    return [line for line in found if line["duration"] < LONGEST]


def speak_by_espeak(
    sentences: Sequence[str], held_out: Iterable[str], folder: Path, rng: np.random.Generator
) -> list[Line]:
    """The sentences and some more of orders and the like by random voices, half of them changed."""
    taken = set().union(*(runs(lower(text)) for text in held_out))
    own = (lower(sentence(rng)) for _ in range(OWN_SENTENCES))
    texts = [*map(lower, sentences), *(text for text in own if not runs(text) & taken)]
    folder.mkdir(parents=True)
    found = []
    for number, index in enumerate(rng.permutation(len(texts))):
        samples, _ = synthesis.speak(texts[index], synthesis.random_voice(rng))
        line = {"text": texts[index], "speaker": "espeak"}
        change = VOICES if rng.random() < 0.5 else None
        found.append(written(samples, line, folder / f"{number:06d}.flac", rng, change))
    return [line for line in found if line["duration"] < LONGEST]


def as_other(line: Line, folder: Path, rng: np.random.Generator) -> Line:
    """A line of real speech as another speaker's."""
    audio = folder / line["audio"].parent.parent.name / line["audio"].with_suffix(".flac").name
    audio.parent.mkdir(parents=True, exist_ok=True)
    return written(load_audio(line["audio"]), line, audio, rng)


def groups(speakers: Iterable[list[Line]], rng: np.random.Generator) -> Iterator[list[Line]]:
    """Each speaker's utterances in another order, joined."""
    for own in speakers:
        short = [own[i] for i in rng.permutation(len(own)) if own[i]["duration"] < LONGEST]
        yield from joined(short, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sentences", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--most", type=int, help="sentences that are spoken, all without")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    speech = Path(os.environ.get("ISTHMUS_SPEECH", "../shared/speech"))
    rng = np.random.default_rng(arguments.seed)

    held = [path for path in speech.glob("*/*.jsonl") if path.name != "train.jsonl"]
    texts = [line["text"] for line in itertools.chain.from_iterable(map(lines, held))]
    sentences = usable(arguments.sentences.read_text(encoding="utf-8").splitlines(), texts)
    order = [sentences[index] for index in rng.permutation(len(sentences))[: arguments.most]]
    spoken = speak(order, arguments.out / "sentences", rng)
    write(arguments.out / "spoken", joined(spoken, rng), rng)

    few = [sentences[index] for index in rng.permutation(len(sentences))[:ESPEAK_SENTENCES]]
    synthetic = speak_by_espeak(few, texts, arguments.out / "synthetic", rng)
    write(arguments.out / "espeak", joined(synthetic, rng), rng)

    speakers: dict[str, list[Line]] = defaultdict(list)
    for folder in FOLDERS:
        for line in lines(speech / folder / "train.jsonl"):
            speakers[f"{folder} {line['speaker']}"].append(line)
    real = list(speakers.values())
    write(arguments.out / "joined", groups(real, rng), rng)
    for number in range(1, OTHERS + 1):
        heard = arguments.out / f"heard-{number}"
        changed = [[as_other(line, heard, rng) for line in own] for own in real]
        write(arguments.out / f"others-{number}", groups(changed, rng), rng)


if __name__ == "__main__":
    main()

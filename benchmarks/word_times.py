"""When words start, by a CTC head against what the synthesiser says, and the delay of the head.

Speaks sentences with voices that the shipped encoder was not trained on (needs the extra `synth`),
with silence around them, and aligns their true texts. The delay is measured on the first half of
them, errors on the second: with the delay that the head has, and with the one measured. Put that
into the recipe of a run as `decode.ctc_delay`.

    python benchmarks/word_times.py [RUN, or a CTC model [SENTENCES, 200 unless given]]
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.decoding.systems import load_system
from isthmus.decoding.timestamps import align_words, meetings
from isthmus.lab.synthesis import draw_texts, random_voice, speak
from isthmus.model.ctc_head import CTCHead
from isthmus.speech.audio import SAMPLE_RATE

SEED = 72


@dataclass(frozen=True)
class Spoken:
    """A sentence, what a head hears in it, and when each of its words starts, in seconds."""

    text: str
    waveform: np.ndarray
    log_probs: Tensor
    starts: list[float]


def errors(sentences: list[Spoken], ctc: CTCHead, delay: float) -> str:
    found = []
    for one in sentences:
        words = align_words(one.log_probs, one.text, ctc, one.waveform, delay)
        found += [abs(word.start - true) for word, true in zip(words, one.starts, strict=True)]
    median, most, nearly_all = np.quantile(found, [0.5, 0.9, 0.99]) * 1000
    return (
        f"delay {delay:.2f} s: {len(found)} words, median {median:.1f} ms, 90 % within {most:.1f} "
        f"ms, 99 % within {nearly_all:.1f} ms"
    )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "isthmus/tiny-conformer"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    system = load_system(name)
    ctc, encoder = system.ctc, system.encoder
    if ctc is None or encoder is None:
        sys.exit(system.without_ctc)
    sentences: list[Spoken] = []
    for index, text in enumerate(draw_texts(count, seed=SEED)):
        rng = np.random.default_rng((SEED, index))
        speech, spoken = speak(text, random_voice(rng, held_out=True))
        lead, tail = (int(SAMPLE_RATE * rng.uniform(0.05, 0.5)) for _ in range(2))
        waveform = np.pad(speech, (lead, tail))
        with torch.inference_mode():
            samples = torch.from_numpy(waveform)[None]
            frames, lengths = encoder(samples, torch.tensor([len(waveform)]))
            log_probs = ctc.log_probs(frames[:, : int(lengths[0])])[0]
        starts = [word.start + lead / SAMPLE_RATE for word in spoken]
        sentences.append(Spoken(text, waveform, log_probs, starts))
    half = len(sentences) // 2
    late = [
        meeting - start
        for one in sentences[:half]
        for meeting, start in zip(
            meetings(one.log_probs, one.text, ctc), one.starts[1:], strict=False
        )
    ]
    measured = float(np.median(late))
    settings_delay = system.ctc_delay
    print(errors(sentences[half:], ctc, ctc.delay if settings_delay is None else settings_delay))
    print(f"measured over {len(late)} boundaries: decode.ctc_delay: {measured:.2f}")
    print(errors(sentences[half:], ctc, measured))


if __name__ == "__main__":
    main()

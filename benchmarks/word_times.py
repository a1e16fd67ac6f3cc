"""When words start, by CTC alignment against what the synthesiser says, in milliseconds.

Speaks sentences with voices that the shipped encoder was not trained on (needs the extra `synth`),
with silence around them, and aligns their true texts with the shipped Conformer.

    python benchmarks/word_times.py [SENTENCES, 200 unless given]
"""

import sys

import numpy as np
import torch

from isthmus.decoding.timestamps import align_words, load_ctc
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.synthesis import draw_texts, random_voice, speak

SEED = 72


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    ctc = load_ctc("isthmus/tiny-conformer")
    errors: list[float] = []
    for index, text in enumerate(draw_texts(count, seed=SEED)):
        rng = np.random.default_rng((SEED, index))
        speech, spoken = speak(text, random_voice(rng, held_out=True))
        lead, tail = (int(SAMPLE_RATE * rng.uniform(0.05, 0.5)) for _ in range(2))
        waveform = np.pad(speech, (lead, tail))
        with torch.inference_mode():
            frames, _ = ctc(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
            words = align_words(ctc.log_probs(frames)[0], text, ctc, waveform)
        true = [word.start + lead / SAMPLE_RATE for word in spoken]
        errors += [abs(word.start - start) for word, start in zip(words, true, strict=True)]
    shares = np.quantile(errors, [0.5, 0.9, 0.99]) * 1000
    print(f"{len(errors)} words: median {shares[0]:.1f} ms, 90 % within {shares[1]:.1f} ms", end="")
    print(f", 99 % within {shares[2]:.1f} ms")


if __name__ == "__main__":
    main()

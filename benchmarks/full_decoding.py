"""How fast the full-size system decodes on a GPU: `full_size.py --decode`.

Random weights never end a text: each utterance has a limit of tokens, as in `decoding.py`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from decoding import BEAMS, Found, Sizes, Utterance, batches, generate, ours, utterances
from torch import Tensor

from isthmus.model.speech_llm import SpeechLLM
from isthmus.speech.audio import SAMPLE_RATE

RTFX_FLOOR, TIMES_FLOOR = 500.0, 4.0


@torch.inference_mode()
def measure_decoding(
    model: SpeechLLM, seconds: Sequence[float], limits: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """Encoder, projector and search over noise of these lengths, sorted, against `generate`.

    The search of each is timed on the same prompts; the encoder's time is in both totals.
    """
    device = next(model.projector.parameters()).device
    order = sorted(range(len(seconds)), key=lambda index: seconds[index])
    spent = {"encoder": 0.0, "ours": 0.0, "generate": 0.0}
    texts: dict[str, Found] = {"ours": [], "generate": []}
    parts = batches(order, batch_size)
    for number, part in enumerate([parts[0], *parts]):  # the first once more: it warms up
        waveforms = [noise(index, seconds[index]).to(device) for index in part]
        took, prompts = timed(partial(prompts_of, model, waveforms), device)
        batch = [Utterance(p, limits[i]) for p, i in zip(prompts, part, strict=True)]
        times = {"encoder": took}
        for name, way in (("ours", ours), ("generate", generate)):
            times[name], found = timed(partial(way, model.llm, batch), device)
            texts[name] += found if number else []
        if number:
            spent = {name: spent[name] + times[name] for name in spent}
    same = sum(a == b for a, b in zip(texts["ours"], texts["generate"], strict=True))
    audio, total = sum(seconds), spent["encoder"] + spent["ours"]
    return {
        "utterances": len(seconds),
        "batch_size": batch_size,
        "beams": BEAMS,
        "audio_seconds": audio,
        "seconds": spent,
        "rtfx": {"floor": RTFX_FLOOR, "measured": audio / total},
        "times_generate": {"floor": TIMES_FLOOR, "measured": spent["generate"] / spent["ours"]},
        "same_texts": same,
    }


def lengths(count: int, scale: float) -> tuple[list[float], list[int]]:
    """Seconds and tokens as in LibriSpeech's test-clean."""
    drawn = utterances(replace(Sizes(), hidden=1, utterances=count))
    limits = [one.limit for one in drawn]
    return [max(0.1, scale * len(one.prompt) / 10) for one in drawn], limits


def prompts_of(model: SpeechLLM, waveforms: Sequence[Tensor]) -> list[Tensor]:
    """Decoding prompts (L, E) of waveforms (S,)."""
    num_samples = torch.tensor([len(one) for one in waveforms], device=waveforms[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True)
    audio = model.embed_audio(padded, num_samples)
    return [model.sequence(embeddings)[0] for embeddings in audio]


def noise(index: int, seconds: float) -> Tensor:
    rng = np.random.default_rng(index)
    return torch.from_numpy(rng.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    started = clock(device)
    found = work()
    return clock(device) - started, found


def clock(device: torch.device) -> float:
    """Wall time, the device having finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

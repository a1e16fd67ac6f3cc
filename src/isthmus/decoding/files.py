"""Transcription of files named on a command line: one that is bad does not stop the others."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from isthmus.decoding.transcriber import load
from isthmus.errors import IsthmusError
from isthmus.speech.audio import SAMPLE_RATE, load_audio


def transcribe_files(
    names: Sequence[str], run: str, *, beam_size: int | None = None, batch_size: int | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Transcripts and faults, each by file name."""
    waveforms: dict[str, np.ndarray] = {}
    faults: dict[str, str] = {}
    for name in names:
        try:
            waveforms[name] = load_audio(name)
        except IsthmusError as error:
            faults[name] = str(error)
    if not waveforms:
        return {}, faults
    transcriber = load(run, beam_size=beam_size, batch_size=batch_size)
    limit = transcriber.model.encoder.max_seconds
    for name in list(waveforms):
        seconds = len(waveforms[name]) / SAMPLE_RATE
        if limit is not None and seconds > limit:
            faults[name] = (
                f"{name} is {seconds:.1f} s long, the encoder takes {limit:g} s. Cut it into parts."
            )
            del waveforms[name]
    found = transcriber.transcribe_waveforms(list(waveforms.values()))
    results = {name: {"file": name, **asdict(t)} for name, t in zip(waveforms, found, strict=True)}
    return results, faults

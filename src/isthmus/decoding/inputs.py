"""What is to be transcribed, looked at before anything is loaded that takes seconds."""

from collections.abc import Sequence
from pathlib import Path

from isthmus.errors import IsthmusError
from isthmus.speech.audio import AudioError, Recording, audio_info
from isthmus.speech.formats import recognise
from isthmus.speech.utterances import find_corpus

LONGEST_SECONDS = 24 * 3600.0  # of a recording; a small file can unpack to years


def is_corpus(name: str) -> bool:
    """Whether this names a manifest or a folder to transcribe as a job, not a recording."""
    try:
        return bool(recognise(find_corpus(name)))
    except IsthmusError:
        return False


def are_corpora(names: Sequence[str]) -> bool:
    """Whether all of these are corpora; raises IsthmusError where only some are."""
    kinds = {is_corpus(name) for name in names}
    if len(kinds) > 1:
        raise IsthmusError("Give corpora or recordings, not both at once.")
    return True in kinds


def recording_seconds(audio: str | Path | bytes | Recording) -> float:
    """Its length by its header or an estimate; raises AudioError for what cannot be transcribed."""
    seconds = audio_info(audio, exact=False).duration
    if seconds > LONGEST_SECONDS:
        name = audio if isinstance(audio, Recording) else Recording(audio)
        raise AudioError(
            "too_long",
            f"{name}: unpacks to {seconds / 3600:.0f} hours; a recording has "
            f"{LONGEST_SECONDS / 3600:.0f} at most. Cut it up.",
        )
    return seconds


def audio_faults(audio: Sequence[str | bytes | Recording]) -> dict[int, AudioError]:
    """What is wrong with recordings by their headers, by their place in `audio`."""
    faults: dict[int, AudioError] = {}
    for index, one in enumerate(audio):
        try:
            recording_seconds(one)
        except AudioError as error:
            faults[index] = error
    return faults

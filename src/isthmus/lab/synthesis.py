"""Synthetic speech: espeak-ng through ctypes, and corpora of it with word timings.

espeak-ng (GPL-3) comes with the `synth` extra and is loaded by `speak`, never on import. It is
global to the process and not thread-safe: call `speak` from one thread only.
"""
# ruff: noqa: SIM905  # long lists of words are easier to read and edit as text

import _ctypes
import ctypes
import io
import itertools
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from isthmus.errors import IsthmusError, suggest
from isthmus.files import write_atomic
from isthmus.lab.sentences import sentence
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.foreign import ENGLISH, VOICES, check_language, short_text

Augmenter = Callable[[np.ndarray, np.random.Generator], np.ndarray]

SILENCE_SECONDS = (0.05, 0.5)  # at either end of an utterance of a corpus

ACCENTS = ("en-us",) * 4 + (  # the most usual accent is drawn most often
    "en-gb",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
# espeak-ng's voice variants that sound like people: no whispers, robots or demons, and none with
# its breath noise, which reads uninitialised memory and so never sounds twice the same.
VARIANTS = tuple(
    """f1 f4 m1 m2 m4 m5 m6 m8 Alex Andrea Andy Annie Denis Gene Henrique Hugo Jacky Lee Mario
    Michael Nguyen adam antonio aunty benjamin boris david ed edward grandma ian john linda
    marcelo max miguel norbert pablo quincy rob steph travis zac""".split()
)
HELD_OUT_VARIANTS = tuple("m3 m7 Diogo Marco Mike belinda paul pedro robert shelby".split())


class SynthesisError(IsthmusError):
    """espeak-ng refused a voice or a text."""


class Word(NamedTuple):
    """One spoken word; `start` and `end` in seconds from the beginning of the waveform."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Voice:
    """A speaker of espeak-ng."""

    name: str  # accent, or accent+variant, such as en-us+f3
    rate: int = 175  # words a minute, 80..450
    pitch: int = 50  # 0..99
    pitch_range: int = 50  # 0..99, 0 is monotone
    word_gap: int = 0  # extra pause between words, units of 10 ms


DEFAULT_VOICE = Voice("en-us")


def random_voice(
    rng: np.random.Generator, held_out: bool = False, language: str = ENGLISH
) -> Voice:
    """Draw a voice; held-out voices and training voices have no variant in common."""
    variants = HELD_OUT_VARIANTS if held_out else VARIANTS
    accents = ACCENTS if language == ENGLISH else VOICES[language]
    return Voice(
        name=f"{accents[rng.integers(len(accents))]}+{variants[rng.integers(len(variants))]}",
        rate=int(rng.integers(95, 191)),
        pitch=int(rng.integers(15, 86)),
        pitch_range=int(rng.integers(20, 86)),
        word_gap=int(rng.choice([0, 0, 0, 0, 1, 2, 4])),
    )


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # of the first character, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


class _Properties(ctypes.Structure):
    """espeak_VOICE of speak_lib.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
_SYNCHRONOUS = 2
_LIST_END, _WORD = 0, 1  # event types
_RATE, _VOLUME, _PITCH, _RANGE, _WORD_GAP = 1, 2, 3, 4, 7  # parameters
_UTF8, _PHONEMES = 0x1, 0x100  # flags; the second allows phonemes in [[ ]]
_LETTER_A = "[['eI]]"  # among other letters, espeak-ng takes a for the article
_DIGITS = frozenset("zero one two three four five six seven eight nine oh".split())


class _Engine:
    """One freshly loaded espeak-ng, good for one utterance.

    The library keeps its oscillators' phases and its random state from one utterance to the next
    and has no call to reset them. Loaded anew (3 ms), its speech depends on text and voice alone.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "speech synthesis needs espeak-ng: pip install 'isthmus[synth]'", name=error.name
            ) from error
        self.espeak = ctypes.CDLL(espeakng_loader.get_library_path())
        self.data = Path(espeakng_loader.get_data_path())
        data = str(self.data).encode()
        self.sample_rate: int = self.espeak.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self.sample_rate <= 0:
            raise SynthesisError(f"espeak-ng could not start with its data in {self.data}")
        self.callback = _CALLBACK(self._gather)  # kept: the library holds a bare pointer to it
        self.espeak.espeak_SetSynthCallback(self.callback)
        self.chunks: list[np.ndarray] = []
        self.starts: list[tuple[int, float]] = []  # (position in the text, seconds) of each word

    def close(self) -> None:
        self.espeak.espeak_Terminate()
        _ctypes.dlclose(self.espeak._handle)  # ctypes itself never unloads

    def _gather(self, samples: Any, num_samples: int, events: Any) -> int:
        if samples and num_samples > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        for index in itertools.count():
            event = events[index]
            if event.type == _LIST_END:
                return 0
            if event.type == _WORD:
                self.starts.append((event.text_position - 1, event.audio_position / 1000))
        raise AssertionError("unreachable")

    def set_voice(self, voice: Voice) -> None:
        name = voice.name.encode()
        _, _, variant = voice.name.partition("+")
        variants = self.data / "voices" / "!v"
        if variant and not (variants / variant).is_file():  # espeak-ng would pass over it silently
            known = sorted(path.name for path in variants.iterdir())
            raise SynthesisError(
                f"espeak-ng has no variant {variant!r} of a voice.{suggest(variant, known)}"
            )
        if self.espeak.espeak_SetVoiceByName(name) != 0:
            properties = _Properties(languages=name)
            if self.espeak.espeak_SetVoiceByProperties(ctypes.byref(properties)) != 0:
                raise SynthesisError(
                    f"espeak-ng has no voice {voice.name!r}; names look like en-us or en-gb+f4"
                )
        settings = {
            _RATE: voice.rate,
            _VOLUME: 25,  # of 100; from 50 the loudest variants clip
            _PITCH: voice.pitch,
            _RANGE: voice.pitch_range,
            _WORD_GAP: voice.word_gap,
        }
        for parameter, value in settings.items():
            self.espeak.espeak_SetParameter(parameter, value, 0)

    def say(self, spoken: str) -> None:
        encoded = spoken.encode()
        size = ctypes.c_size_t(len(encoded) + 1)
        code = self.espeak.espeak_Synth(encoded, size, 0, 0, 0, _UTF8 | _PHONEMES, None, None)
        if code != 0 or not any(chunk.any() for chunk in self.chunks):
            raise SynthesisError(f"espeak-ng made no sound of {spoken!r} (code {code})")


def speak(text: str, voice: Voice = DEFAULT_VOICE) -> tuple[np.ndarray, list[Word]]:
    """Say a text of words separated by spaces.

    English letters are spoken by their names; `a` too, if another letter follows or if the text
    holds nothing but letters and digits.

    Returns:
        the waveform (S,), float32 in [-1, 1] at 16 kHz, and one `Word` for each word of the text; a
        word ends where the next one starts.

    Raises:
        ModuleNotFoundError: the `synth` extra is not installed.
        SynthesisError: the text is empty, or espeak-ng does not know the voice or makes no sound.
    """
    words = text.split()
    if not words:
        raise SynthesisError("there is nothing to say in an empty text; give at least one word")
    english = voice.name.startswith(ENGLISH)
    spelled = all(len(word) == 1 or word in _DIGITS for word in words)
    spoken = [
        _LETTER_A if english and word in ("a", "A") and (spelled or len(following) == 1) else word
        for word, following in zip(words, [*words[1:], ""], strict=True)  # also a m and a c
    ]
    engine = _Engine()
    try:
        ctypes.CDLL(None).srand(1)  # some variants draw their jitter from the C library
        engine.set_voice(voice)
        engine.say(" ".join(spoken))
    finally:
        engine.close()
    samples = np.concatenate(engine.chunks).astype(np.float32) / 32768
    waveform = soxr.resample(samples, engine.sample_rate, SAMPLE_RATE).clip(-1, 1)
    return waveform, _timings(words, spoken, engine.starts, len(waveform) / SAMPLE_RATE)


def _timings(
    words: Sequence[str],
    spoken: Sequence[str],
    starts: Sequence[tuple[int, float]],
    duration: float,
) -> list[Word]:
    """Give every word its span; words run together share theirs by their characters."""
    offsets = np.cumsum([0, *(len(word) + 1 for word in spoken)])  # of each word, and of the end
    known_offsets, known_starts = [0], [0.0]
    for position, start in starts:
        index = int(np.searchsorted(offsets, position, side="right")) - 1
        if offsets[index] > known_offsets[-1] and start >= known_starts[-1]:
            known_offsets.append(int(offsets[index]))
            known_starts.append(min(start, duration))
    known_offsets.append(int(offsets[-1]))
    known_starts.append(duration)
    edges = np.interp(offsets, known_offsets, known_starts)
    return [
        Word(word, round(float(start), 3), round(float(end), 3))
        for word, start, end in zip(words, edges, edges[1:], strict=False)
    ]


def draw_texts(
    count: int, seed: int, domains: Mapping[str, float] | None = None, language: str = ENGLISH
) -> list[str]:
    """Texts to speak; text i depends on the other arguments and i alone.

    Raises IsthmusError for a language that is not known, and for domains of any but English.
    """
    check_language(language)
    if language == ENGLISH:
        return [sentence(np.random.default_rng([seed, i]), domains) for i in range(count)]
    if domains:
        raise IsthmusError(
            f"Domains ({', '.join(domains)}) are kinds of English text, and the language is "
            f"{language}. Leave one of them out."
        )
    return [short_text(np.random.default_rng([seed, i]), language) for i in range(count)]


def synthesise_corpus(
    folder: Path,
    texts: Sequence[str],
    seed: int,
    *,
    held_out: bool = False,
    workers: int = 1,
    augmentation: Augmenter | None = None,
    language: str = ENGLISH,
) -> Path:
    """Speak `texts` by random voices into `folder`/audio (FLAC, 16 bit, 16 kHz mono).

    Utterance i depends on (seed, i, text, held_out, augmentation, language) alone, whatever the
    number of workers. `augmentation` must be picklable when there are several. The manifest is
    written last, in one step, so a folder with a manifest is complete.

    Returns:
        the path of the manifest, one JSON object a line: id, audio (relative to the manifest),
        duration (seconds), sample_rate, text, speaker, language, words [[word, start, end], …].

    Raises:
        IsthmusError: `folder` has a manifest already, or the language is not known.
    """
    check_language(language)
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        raise IsthmusError(f"{manifest} exists already. Remove it, or write to another folder.")
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    make = partial(_utterance, folder, seed, held_out, augmentation, language)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            entries = list(pool.map(make, range(len(texts)), texts, chunksize=32))
    else:
        entries = [make(index, text) for index, text in enumerate(texts)]
    write_atomic(
        manifest, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    )
    return manifest


def _utterance(
    folder: Path,
    seed: int,
    held_out: bool,
    augmentation: Augmenter | None,
    language: str,
    index: int,
    text: str,
) -> dict[str, object]:
    """Synthesise and write utterance `index`; return its line of the manifest."""
    rng = np.random.default_rng((seed, index))
    voice = random_voice(rng, held_out, language)
    speech, words = speak(text, voice)
    lead, tail = (int(SAMPLE_RATE * rng.uniform(*SILENCE_SECONDS)) for _ in range(2))
    waveform = np.pad(speech, (lead, tail))
    stretch = 1.0
    if augmentation is not None:
        augmented = augmentation(waveform, rng)
        stretch = len(augmented) / len(waveform)  # a change of speed moves the words too
        waveform = augmented
    name = "synthetic" if language == ENGLISH else f"synthetic_{language}"
    utterance_id = f"{name}_{seed}_{index:06d}"
    audio = f"audio/{utterance_id}.flac"
    content = io.BytesIO()  # libsndfile has no words for a full disk
    soundfile.write(content, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    (folder / audio).write_bytes(content.getvalue())
    shift = lead / SAMPLE_RATE
    return {
        "id": utterance_id,
        "audio": audio,
        "duration": len(waveform) / SAMPLE_RATE,
        "sample_rate": SAMPLE_RATE,
        "text": text,
        "speaker": f"{voice.name}-r{voice.rate}-p{voice.pitch}",
        "language": language,
        "words": [
            [word, round((start + shift) * stretch, 3), round((end + shift) * stretch, 3)]
            for word, start, end in words
        ],
    }

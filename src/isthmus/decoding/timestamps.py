"""When each word was said: a transcript laid over audio by a CTC model and the sound itself.

The best path through the CTC trellis (Graves et al., 2006, section 4.1; Kürzinger et al., 2020)
says in which order and about when letters are spelled. A model with a wide view spells them late,
the outermost far from the speech, so words are then bounded by what can be heard: by the quietest
moment near where their letters meet, the first and the last word by the ends of the sound.

Shapes: S samples, T labels of the CTC head, V its units, W words of the transcript, L their letters
(units), U = 2 L + 1 states (a gap before each letter and after the last), N frames of loudness.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from isthmus.decoding.transcript import Word, words_of
from isthmus.errors import IsthmusError
from isthmus.model.ctc_head import CTCHead, LogProbs
from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.parts import model_type, resolve
from isthmus.model.spelling import WILDCARD
from isthmus.settings.encoders import ConformerSettings, SelfSupervisedSettings
from isthmus.speech.audio import SAMPLE_RATE

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

FLOOR = -1e4  # log-probability that stands for none, so that every path has a finite score

PRICE = 4.0  # dB that the square of 40 ms costs a moment near that meeting
REACH = 16  # frames of loudness: at that price none farther off can be quiet enough
OUTER_REACH = 1.0  # seconds; sound farther than this from the outermost letters is not of theirs
SHORTEST_WORD = 0.04  # seconds, where there is room
SHORTEST_PAUSE = 0.15  # seconds; shorter silence, such as before a plosive, belongs to a word
WINDOW, HOP = SAMPLE_RATE // 40, SAMPLE_RATE // 100  # samples of a frame of loudness
RANGE_DB = 60.0  # below the loudest frame is silence
LOUD = 0.25  # of the way from the quietest to the loudest frame, in dB, begins sound
CTC_TYPES = ("wav2vec2", "hubert", "wavlm", "parakeet_ctc")


def load_ctc(path: str, revision: str | None = None) -> Encoder:
    """An encoder whose CTC head can spell: of `isthmus pretrain-ctc`, or one of transformers.

    Those are wav2vec 2.0, HuBERT, WavLM and Parakeet, with their own tokenizers.
    Raises IsthmusError.
    """
    folder = resolve(path, revision)
    kind = model_type(folder)
    if kind not in CTC_TYPES:
        raise IsthmusError(
            f"{path} is a {kind!r} model, which cannot spell by CTC. Name a CTC model: "
            f"{', '.join(CTC_TYPES)}, or one of `isthmus pretrain-ctc`."
        )
    settings: ConformerSettings | SelfSupervisedSettings
    if kind == "parakeet_ctc":
        settings = ConformerSettings(path=path, revision=revision)
    else:
        settings = SelfSupervisedSettings.model_validate(
            {"type": kind, "path": path, "revision": revision}
        )
    encoder = build_encoder(settings)
    if encoder.ctc is None:
        raise IsthmusError(
            f"{path} cannot be used: it has no CTC head right behind its encoder (architectures in "
            "config.json names none, or add_adapter an adapter between). Name a CTC model."
        )
    if encoder.ctc.tokenizer is None:
        raise IsthmusError(
            f"{path} cannot spell: the files of its tokenizer are missing in {folder} or have too "
            "few tokens. Download it again."
        )
    return encoder.eval()


def align_words(
    log_probs: LogProbs, text: str, ctc: CTCHead, waveform: np.ndarray, delay: float | None = None
) -> tuple[Word, ...]:
    """The words of `text` (see `words_of`) with the times they were said at.

    `log_probs` (T, V) are what `ctc` makes of `waveform` (S,), 16 kHz, `delay` seconds late (the
    head's own unless given). Words come in the order of the text, never overlap and lie within the
    audio. A word's confidence is the mean probability of its letters in the frames that spell
    them. A text of more letters than there are frames for is spread over the audio by its letters,
    with confidence 0.
    """
    words = words_of(text)
    if not words:
        return ()
    spelled = ctc.spell(text, [word.span() for word in words])
    found = label_times(log_probs, spelled, ctc)
    if found is None:
        letters = np.cumsum([0, *map(len, spelled)])
        edges = letters / letters[-1] * len(waveform) / SAMPLE_RATE
        first, last, confidences = edges[:-1], edges[1:], np.zeros(len(words))
    else:
        late = ctc.delay if delay is None else delay
        first, last, confidences = found[0] - late, found[1] - late, found[2]
    starts, ends = heard(first, last, waveform)
    times = zip(words, starts.tolist(), ends.tolist(), confidences.tolist(), strict=True)
    return tuple(Word(word.group(), *rest) for word, *rest in times)


def meetings(log_probs: LogProbs, text: str, ctc: CTCHead) -> Floats:
    """When the labels (T, V) of each word of `text` and of the next one meet, in seconds (W - 1,).

    Empty where there are too few labels. How much later that is than it is heard, in the median,
    is the head's delay.
    """
    spelled = ctc.spell(text, [word.span() for word in words_of(text)])
    found = label_times(log_probs, spelled, ctc) if spelled else None
    return np.empty(0) if found is None else (found[1][:-1] + found[0][1:]) / 2


def label_times(
    log_probs: LogProbs, spelled: Sequence[Sequence[int]], ctc: CTCHead
) -> tuple[Floats, Floats, Floats] | None:
    """Seconds from which and to which labels (T, V) spell each word, given its units, (W,) each.

    And the mean probability of its letters then. None if there are too few labels for all.
    """
    labels = np.array([unit for units in spelled for unit in units])
    owners = np.repeat(np.arange(len(spelled)), [len(units) for units in spelled])  # of a letter
    table, columns = trellis(log_probs, labels, owners, ctc)
    path = best_path(table, columns, skippable(labels))
    if path is None:
        return None
    assert ctc.frame_rate is not None
    frames = np.flatnonzero(path % 2)  # those that spell
    said, index = owners[path[frames] // 2], np.arange(len(spelled))
    found = np.exp(table[frames, columns[path[frames]]])
    first = frames[np.searchsorted(said, index)]
    last = frames[np.searchsorted(said, index, "right") - 1] + 1
    confidences = np.bincount(said, found) / np.bincount(said)
    return first / ctc.frame_rate, last / ctc.frame_rate, confidences


def trellis(
    log_probs: LogProbs, labels: Integers, owners: Integers, ctc: CTCHead
) -> tuple[Floats, Integers]:
    """Log-probabilities (T, C) of all that a text may pass, and the column (U,) of each state.

    Between words a gap is the blank or the model's own word separator, within them the blank.
    """
    gaps = torch.tensor([ctc.blank, ctc.blank if ctc.separator is None else ctc.separator])
    units, places = np.unique(labels, return_inverse=True)
    known = torch.from_numpy(units[units != WILDCARD])
    parts = [log_probs[:, gaps[:1]], log_probs[:, gaps].amax(dim=1, keepdim=True)]
    if WILDCARD in units:  # the first of them
        others = torch.ones(log_probs.shape[1]).index_fill(0, gaps, 0).nonzero()[:, 0]
        parts.append(log_probs[:, others].nan_to_num(nan=FLOOR).amax(dim=1, keepdim=True))
    table = torch.cat([*parts, log_probs[:, known]], dim=1).double()
    columns = np.empty(2 * len(labels) + 1, np.int64)
    columns[1::2] = 2 + places
    columns[0::2] = np.concatenate([[True], owners[1:] != owners[:-1], [True]])
    return table.nan_to_num(nan=FLOOR, neginf=FLOOR).numpy(), columns


def skippable(labels: Integers) -> NDArray[np.bool_]:
    """States (U,) that may follow the last but one: letters unlike the letter before."""
    skips = np.zeros(2 * len(labels) + 1, np.bool_)
    skips[3::2] = (labels[1:] != labels[:-1]) | (labels[1:] == WILDCARD)
    return skips


def best_path(table: Floats, columns: Integers, skips: NDArray[np.bool_]) -> Integers | None:
    """State (T,) of each frame on the likeliest path; None if there are too few frames for one.

    `table` (T, C) has log-probabilities, `columns` (U,) says which each state takes.
    """
    num_frames, num_states = len(table), len(columns)
    scores = np.full(num_states + 2, -np.inf)  # two states in front that nothing ever is in
    scores[2] = 0.0  # as if a gap came before
    steps = np.zeros((num_frames, num_states), np.int8)  # states moved on to get here
    for frame in range(num_frames):
        stay, one = scores[2:], scores[1:-1]
        two = np.where(skips, scores[:-2], -np.inf)
        best = np.maximum(stay, one)
        steps[frame] = np.where(two > best, 2, one > stay)
        scores[2:] = np.maximum(best, two) + table[frame, columns]
    state = num_states - 1 if scores[-1] >= scores[-2] else num_states - 2
    if scores[state + 2] == -np.inf:
        return None
    path = np.empty(num_frames, np.int64)
    for frame in reversed(range(num_frames)):
        path[frame] = state
        state -= int(steps[frame, state])
    return path


def heard(first: Floats, last: Floats, waveform: np.ndarray) -> tuple[Floats, Floats]:
    """Starts and ends, in seconds, of words whose letters are spelled from `first` to `last`.

    Neighbours meet at the quietest moment near the middle between the last letter of the one and
    the first of the other. The first word begins, and the last ends, with the sound around them.
    Pauses belong to no word.
    """
    levels = loudness(waveform)
    times = (np.arange(len(levels)) * HOP + WINDOW / 2) / SAMPLE_RATE
    times = np.minimum(times, len(waveform) / SAMPLE_RATE)
    sounds = times[levels >= levels.min() + LOUD * np.ptp(levels)]
    begin = sounds[min(np.searchsorted(sounds, first[0] - OUTER_REACH), len(sounds) - 1)]
    finish = sounds[max(np.searchsorted(sounds, last[-1] + OUTER_REACH) - 1, 0)]
    finish = max(begin, finish)
    meetings = ((last[:-1] + first[1:]) / 2).clip(begin, finish)
    near = np.searchsorted(times, meetings)[:, np.newaxis] + np.arange(-REACH, REACH + 1)
    near = near.clip(0, len(times) - 1)
    cost = levels[near] + PRICE * ((times[near] - meetings[:, np.newaxis]) / 0.04) ** 2
    # the silence around the sound is quieter than any moment in it
    cost[(times[near] < begin) | (times[near] > finish)] = np.inf
    quietest = times[np.take_along_axis(near, cost.argmin(axis=1, keepdims=True), axis=1)[:, 0]]
    bounds = np.concatenate([[begin], quietest.clip(begin, finish), [finish]])
    bounds, shortest = _apart(bounds)
    after = sounds[np.searchsorted(sounds, bounds).clip(max=len(sounds) - 1)]
    before = sounds[(np.searchsorted(sounds, bounds, "right") - 1).clip(min=0)]
    pause = after - before > SHORTEST_PAUSE
    starts = np.where(pause, after, bounds)[:-1].clip(max=bounds[1:] - shortest)
    starts = starts.clip(min=bounds[:-1])
    ends = np.where(pause, before, bounds)[1:].clip(min=starts + shortest).clip(max=bounds[1:])
    return starts, ends.clip(min=starts)


def _apart(bounds: Floats) -> tuple[Floats, float]:
    """Rising bounds between words, and how long each word is at least: as room allows."""
    shortest = min(SHORTEST_WORD, float(bounds[-1] - bounds[0]) / (len(bounds) - 1))
    steps = shortest * np.arange(len(bounds))
    rising = np.maximum.accumulate(bounds - steps) + steps
    return np.minimum(rising, bounds[-1] - steps[::-1]), shortest


def loudness(waveform: np.ndarray) -> Floats:
    """Level (N,) of each 25 ms window, in dB, every 10 ms."""
    samples = np.pad(waveform.astype(np.float64), (0, max(0, WINDOW - len(waveform))))
    energy = np.concatenate([[0.0], np.cumsum((samples - samples.mean()) ** 2)])
    power = (energy[WINDOW:] - energy[:-WINDOW])[::HOP].clip(min=1e-10)
    levels: Floats = 10.0 * np.log10(power)
    return levels.clip(min=levels.max() - RANGE_DB)

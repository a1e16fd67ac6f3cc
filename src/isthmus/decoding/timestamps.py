"""When each word was said: a transcript laid over audio by a CTC model and the sound itself.

The best path through the CTC trellis (Graves et al., 2006, section 4.1; Kürzinger et al., 2020)
says in which order and about when letters are spelled. A model with a wide view spells them late,
the outermost far from the speech, so words are then bounded by what can be heard: by the quietest
moment near where their letters meet, the first and the last word by the ends of the sound.

Shapes: S samples, T frames of the CTC model, V its units, L letters of the transcript, U = 2 L + 1
states (a gap before each letter and after the last), N frames of loudness.
"""

import itertools
import unicodedata
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCTC, AutoTokenizer

from isthmus.decoding.transcript import Word, words_of
from isthmus.errors import IsthmusError
from isthmus.model.conformer import FRONT_END_FILE, ConformerCTC, best_paths, label_log_probs
from isthmus.model.encoder import ParakeetEncoder, SelfSupervisedEncoder, load_extractor
from isthmus.model.parts import load_network, loading, model_type, resolve
from isthmus.speech.audio import SAMPLE_RATE

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

WILDCARD = -1  # stands for a letter that the CTC model cannot spell: the likeliest of its own
FLOOR = -1e4  # log-probability that stands for none, so that every path has a finite score

# How much later than a word ends its last letter and the next word's first meet in the shipped
# Conformer: the median over 245 boundaries of 84 synthetic voices, by which the numbers below were
# chosen too. It is taken for every Conformer of isthmus; models of transformers have none.
CONFORMER_DELAY = 0.16  # seconds
PRICE = 4.0  # dB that the square of 40 ms costs a moment near that meeting
REACH = 16  # frames of loudness: at that price none farther off can be quiet enough
OUTER_REACH = 1.0  # seconds; sound farther than this from the outermost letters is not of theirs
SHORTEST_WORD = 0.04  # seconds, where there is room
SHORTEST_PAUSE = 0.15  # seconds; shorter silence, such as before a plosive, belongs to a word
WINDOW, HOP = SAMPLE_RATE // 40, SAMPLE_RATE // 100  # samples of a frame of loudness
RANGE_DB = 60.0  # below the loudest frame is silence
LOUD = 0.25  # of the way from the quietest to the loudest frame, in dB, begins sound


class PretrainedCTC(nn.Module):
    """A CTC model of transformers with the members of ConformerCTC that alignment needs."""

    def __init__(
        self,
        encoder: SelfSupervisedEncoder | ParakeetEncoder,
        head: Any,
        tokenizer: Any,
        blank: int,
    ):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.tokenizer = tokenizer
        self.blank = blank
        self.frame_rate = encoder.frame_rate

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B, S) with their lengths to frames (B, T, D) with theirs."""
        found: tuple[Tensor, Tensor] = self.encoder(waveforms, num_samples)
        return found

    def log_probs(self, frames: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) of the units, the blank among them."""
        return label_log_probs(self.head, frames)

    def greedy(self, log_probs: Tensor, num_frames: Tensor) -> list[str]:
        """Best path: repeats joined, blanks dropped."""
        paths = best_paths(log_probs, num_frames, self.blank)
        # whose own joining would take the second of two letters, now that no blank parts them
        return [str(self.tokenizer.decode(one, group_tokens=False)).strip() for one in paths]


CTCModel: TypeAlias = ConformerCTC | PretrainedCTC
CTC_TYPES = ("wav2vec2", "hubert", "wavlm", "parakeet_ctc")


def load_ctc(path: str, revision: str | None = None) -> CTCModel:
    """A CTC model to spell or align with: of `isthmus pretrain-ctc`, or one of transformers.

    Those are wav2vec 2.0, HuBERT, WavLM and Parakeet, with their own tokenizers.
    Raises IsthmusError.
    """
    folder = resolve(path, revision)
    if (folder / FRONT_END_FILE).is_file():
        return ConformerCTC.load(folder).eval()
    kind = model_type(folder)
    if kind not in CTC_TYPES:
        raise IsthmusError(
            f"{path} is a {kind!r} model, which cannot spell by CTC. Name a CTC model: "
            f"{', '.join(CTC_TYPES)}, or one of `isthmus pretrain-ctc`."
        )
    network = load_network(AutoModelForCTC, folder, path)
    if getattr(network.config, "add_adapter", False):
        raise IsthmusError(
            f"{path} cannot be used: it has an adapter behind its encoder (add_adapter in "
            "config.json). Name a CTC model without one."
        )
    extractor, tokenizer = load_processor(folder, path, network)
    encoder: SelfSupervisedEncoder | ParakeetEncoder
    if kind == "parakeet_ctc":
        encoder, head = ParakeetEncoder(network.encoder, extractor), network.ctc_head
    else:
        encoder = SelfSupervisedEncoder(network.base_model, bool(extractor.do_normalize))
        head = network.lm_head
    return PretrainedCTC(encoder, head, tokenizer, int(network.config.pad_token_id)).eval()


def load_processor(folder: Path, path: str, network: Any) -> tuple[Any, Any]:
    """The feature extractor and the tokenizer of a recogniser; raises IsthmusError."""
    extractor = load_extractor(folder, path)
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    known, written = len(tokenizer), int(network.config.get_text_config(decoder=True).vocab_size)
    if 2 * known < written:  # transformers makes an empty one where there are no files
        raise IsthmusError(
            f"{path}: its tokenizer knows {known} of the {written} tokens that the model writes. "
            f"The files of the tokenizer are missing in {folder}: download it again."
        )
    return extractor, tokenizer


def align_words(
    log_probs: Tensor, text: str, ctc: CTCModel, waveform: np.ndarray
) -> tuple[Word, ...]:
    """The words of `text` (see `words_of`) with the times they were said at.

    `log_probs` (T, V) are what `ctc` makes of `waveform` (S,), 16 kHz. Words come in the order of
    the text, never overlap and lie within the audio. A word's confidence is the mean probability
    of its letters in the frames that spell them. A text of more letters than there are frames for
    is spread over the audio by its letters, with confidence 0.
    """
    words = [word[0] for word in words_of(text)]
    if not words:
        return ()
    spelled = [spell(word, ctc.tokenizer) for word in words]
    labels = np.array([unit for units in spelled for unit in units])
    owners = np.repeat(np.arange(len(words)), [len(units) for units in spelled])  # word of a letter
    table, columns = trellis(log_probs, labels, owners, ctc)
    path = best_path(table, columns, skippable(labels))
    index = np.arange(len(words))
    if path is None:
        letters = np.append(np.searchsorted(owners, index), len(owners))
        edges = letters / len(owners) * len(waveform) / SAMPLE_RATE
        first, last, confidences = edges[:-1], edges[1:], np.zeros(len(words))
    else:
        frames = np.flatnonzero(path % 2)  # those that spell
        said = owners[path[frames] // 2]
        found = np.exp(table[frames, columns[path[frames]]])
        confidences = np.bincount(said, found) / np.bincount(said)
        late = lateness(ctc)
        first = frames[np.searchsorted(said, index)] / ctc.frame_rate - late
        last = (frames[np.searchsorted(said, index, "right") - 1] + 1) / ctc.frame_rate - late
    starts, ends = heard(first, last, waveform)
    times = zip(words, starts.tolist(), ends.tolist(), confidences.tolist(), strict=True)
    return tuple(Word(*word) for word in times)


def lateness(ctc: CTCModel) -> float:
    """Seconds by which the frames of a model run behind the sound."""
    if isinstance(ctc, ConformerCTC):  # its front end begins with silence of its own
        return ctc.log_mel.margin / SAMPLE_RATE + CONFORMER_DELAY
    return 0.0


def spell(word: str, tokenizer: Any) -> list[int]:
    """Units of a word, at least one: of its spelling with the fewest letters unknown.

    Tried are the word as it is, in small and in capital letters, and these without accents.
    Punctuation that the model does not know is left out. A run of unknown letters (digits,
    another script) is one wildcard.
    """
    vocabulary = tokenizer.get_vocab()
    decomposed = unicodedata.normalize("NFKD", word)
    bare = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    forms = dict.fromkeys(  # each once
        "".join(letter for letter in form if letter.isalnum() or letter in vocabulary)
        for base in (word, bare)
        for form in (base, base.lower(), base.upper())
    )
    unknown = tokenizer.unk_token_id
    spellings = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    best = min(spellings, key=lambda units: (not units, units.count(unknown)))
    runs = itertools.groupby(WILDCARD if unit == unknown else unit for unit in best)
    units = [unit for unit, run in runs for _ in ([unit] if unit == WILDCARD else run)]
    return units or [WILDCARD]


def trellis(
    log_probs: Tensor, labels: Integers, owners: Integers, ctc: CTCModel
) -> tuple[Floats, Integers]:
    """Log-probabilities (T, V + 2) with columns for a wildcard and for a gap between words, and
    the column (U,) of each state.

    Between words a gap is the blank or the model's own word separator, within them the blank.
    """
    table = log_probs.double().nan_to_num(nan=FLOOR, neginf=FLOOR).cpu().numpy()
    num_units = table.shape[1]
    delimiter = getattr(ctc.tokenizer, "word_delimiter_token", None) or " "
    gaps = [ctc.blank, ctc.tokenizer.get_vocab().get(delimiter, ctc.blank)]
    gap = table[:, gaps].max(axis=1)
    wildcard = np.delete(table, gaps, axis=1).max(axis=1, initial=FLOOR)
    columns = np.empty(2 * len(labels) + 1, np.int64)
    columns[1::2] = np.where(labels == WILDCARD, num_units, labels)
    between = np.concatenate([[True], owners[1:] != owners[:-1], [True]])
    columns[0::2] = np.where(between, num_units + 1, ctc.blank)
    return np.column_stack([table, wildcard, gap]), columns


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

"""Do tokens find their sound in the order in which they were spoken, more than by chance?

Each utterance's transcript is aligned with its own audio, and as a control with that of another
utterance of like length that says something else. Whatever order there is without listening (from
positions, from how long tokens take) is in both; what the own audio has above the other's is heard.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.lab.alignment import (
    Alignment,
    audio_directions,
    compare,
    monotonicity,
    token_directions,
)
from isthmus.lab.figures import DASH, between
from isthmus.lab.report import page
from isthmus.lab.svg import heat_map
from isthmus.scoring.error_rate import Interval, percentile_interval, resampled_rates
from isthmus.speech.audio import SAMPLE_RATE

if TYPE_CHECKING:
    from lhotse.cut import Cut
    from numpy.typing import NDArray

    from isthmus.model.speech_llm import SpeechLLM

RESAMPLES = 1000
EXPLAINED = (
    "Cosine similarity between what the projector makes of the audio and the language model’s own "
    "embeddings of the transcript’s tokens. A diagonal means that the tokens find their sound in "
    "the order in which they were spoken. Beside it, as a control, the same tokens with the audio "
    "of another utterance of like length."
)


@dataclass(frozen=True)
class Spoken:
    """An utterance to be aligned."""

    id: str
    waveform: "NDArray[np.float32]"  # (S,) 16 kHz
    text: str


@dataclass(frozen=True)
class Mean:
    """A mean over utterances and its 95 % interval, by drawing utterances anew."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class UtteranceOrder:
    """Monotonicity of one utterance with its own audio, and with that of another."""

    id: str
    own: float
    other: float
    other_id: str


@dataclass(frozen=True)
class Order:
    """Monotonicity of a corpus; 1 is perfect order, 0 the order of chance."""

    utterances: tuple[UtteranceOrder, ...]
    drawings: tuple[tuple[Alignment, Alignment], ...]  # own and other audio, of the first ones

    @property
    def means(self) -> dict[str, Mean]:
        """Of own audio, of the other's, and of the difference of each pair."""
        own = np.array([one.own for one in self.utterances])
        other = np.array([one.other for one in self.utterances])
        return {"own": _mean(own), "control": _mean(other), "difference": _mean(own - other)}

    def to_dict(self) -> dict[str, Any]:
        means = {name: asdict(mean) for name, mean in self.means.items()}
        return means | {"utterances": [asdict(one) for one in self.utterances]}


def pick_spoken(model: "SpeechLLM", cuts: Sequence["Cut"], number: int, seed: int) -> list[Spoken]:
    """At most `number` of utterances, by chance, that the model can take.

    Raises IsthmusError when there is none.
    """
    from isthmus.speech.corpora import load_cut
    from isthmus.speech.cuts import (
        transcript,
    )

    found: list[Spoken] = []
    for place in np.random.default_rng(seed).permutation(len(cuts)).tolist():
        cut, text = cuts[place], transcript(cuts[place])
        fault = model.fault(cut.duration)
        if len(found) < number and text.strip() and fault is None:
            found.append(Spoken(cut.id, load_cut(cut), text))
    if not found:
        raise IsthmusError(f"None of {len(cuts)} utterances can be aligned: too long, or no text.")
    return found


def measure_order(
    model: "SpeechLLM",
    spoken: Sequence[Spoken],
    *,
    seed: int = 0,
    drawn: int = 0,
    on_utterance: Callable[[int, int], None] = lambda done, total: None,
) -> Order:
    """Monotonicity of utterances under a model, with the control; the first `drawn` are kept.

    Raises IsthmusError as `align` and `strangers` do.
    """
    others = strangers([len(one.waveform) for one in spoken], [one.text for one in spoken], seed)
    said = [token_directions(model, one.text) for one in spoken]
    heard = []
    for done, one in enumerate(spoken, start=1):
        heard.append(audio_directions(model, one.waveform))
        on_utterance(done, len(spoken))
    found, drawings = [], []
    for place, (one, other) in enumerate(zip(spoken, others, strict=True)):
        pair = [
            compare(heard[of], said[place], one.text, len(spoken[of].waveform) / SAMPLE_RATE)
            for of in (place, other)
        ]
        own, control = (monotonicity(item.similarity, seed=seed) for item in pair)
        found.append(UtteranceOrder(one.id, own, control, spoken[other].id))
        if place < drawn:
            drawings.append((pair[0], pair[1]))
    return Order(tuple(found), tuple(drawings))


def strangers(lengths: Sequence[int], texts: Sequence[str], seed: int) -> list[int]:
    """For each utterance another one, each taken once, that says something else and is as long.

    Neighbours in length are swapped; where two of them say the same, the nearest that can are.

    Raises:
        IsthmusError: there is no such order, as when most say the same.
    """
    tie = np.random.default_rng(seed).random(len(lengths))
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], tie[place]))
    partner = {}
    for first in range(0, len(order) - len(order) % 2, 2):
        one, other = order[first : first + 2]
        partner[one], partner[other] = other, one
    if len(order) % 2:  # the last three in a ring
        last = order[-1]
        before = order[-2] if len(order) > 1 else last
        partner[last], partner[before] = partner.get(before, last), last

    def bad(one: int, other: int) -> bool:
        return one == other or texts[one].split() == texts[other].split()

    for one in order:
        if not bad(one, partner[one]):
            continue
        able = [
            other
            for other in order
            if not bad(one, partner[other]) and not bad(other, partner[one])
        ]
        if not able:
            raise IsthmusError(
                f"There is no control for {len(order)} utterances: too many of them say "
                f"{texts[one][:60]!r}. Give more that say something else."
            )
        nearest = min(able, key=lambda other: abs(lengths[partner[other]] - lengths[one]))
        partner[one], partner[nearest] = partner[nearest], partner[one]
    return [partner[place] for place in range(len(lengths))]


def _mean(values: "NDArray[np.float64]") -> Mean:
    ones = np.ones((1, len(values)))
    rates = resampled_rates(values[None], ones, seed=0, resamples=RESAMPLES)
    return Mean(float(values.mean()), percentile_interval(rates[0]))


def mean_text(mean: Mean) -> str:
    """As people read it."""
    low, high = mean.interval or (mean.value, mean.value)
    return f"{mean.value:.3f} ({low:.3f} to {high:.3f})"


def write_order(order: Order, title: str, file: Path) -> None:
    """A page with the figures, and a heat map of each utterance that was kept."""
    names = {
        "own": "With its own audio",
        "control": "With that of another",
        "difference": "Difference",
    }
    figures = "".join(
        f'<div><dt>{names[name]}</dt><dd><span class="value">{mean.value:.2f}</span>'
        f'<span class="note">95 % interval <span>{_interval(mean)}</span></span></dd></div>'
        for name, mean in order.means.items()
    )
    head = (
        f'<header><h1>{escape(title)}</h1><p class="lead">{EXPLAINED}</p>'
        f'<dl class="figures">{figures}</dl></header>'
    )
    note = (
        f'<p class="note">Order over {len(order.utterances):,} utterances: 1 where the tokens find '
        "their audio perfectly in order, about 0 by chance. Of each drawing the highest quarter "
        "of the cells is shown.</p>"
    )
    pairs = zip(order.utterances, order.drawings, strict=False)
    drawn = "".join(
        f'<section><h2>{escape(own.text)}</h2><div class="pair">'
        + _figure(own, f"its own audio ({one.id}): order {one.own:.2f}")
        + _figure(other, f"audio of another ({one.other_id}): order {one.other:.2f}")
        + "</div></section>"
        for one, (own, other) in pairs
    )
    write_atomic(file, page(title, [head, note, drawn]))


def _interval(mean: Mean) -> str:
    return DASH if mean.interval is None else between(*mean.interval, digits=2)


def _figure(item: Alignment, caption: str) -> str:
    drawing = heat_map(
        item.similarity, item.tokens, item.seconds, label=f"Similarity of audio and {item.text}"
    )
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"

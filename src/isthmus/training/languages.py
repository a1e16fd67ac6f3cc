"""Which languages are trained on, and how often each is drawn.

With a temperature T, a language with the share s of the utterances is drawn with a probability
proportional to s^(1/T): 1 leaves the shares as they are, and the higher it is, the more alike the
languages become.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from lhotse.cut import Cut

from isthmus.errors import IsthmusError, suggest
from isthmus.speech.cuts import language


def chosen(cuts: Sequence[Cut], languages: Collection[str] | None, where: str) -> list[Cut]:
    """The utterances in one of `languages`, or all.

    Raises IsthmusError for a language without utterances; `where` is the setting they came from.
    """
    if languages is None:
        return list(cuts)
    check_spoken("data.languages", languages, cuts, where)
    return [cut for cut in cuts if language(cut) in languages]


def check_spoken(setting: str, names: Collection[str], cuts: Sequence[Cut], where: str) -> None:
    """Raise IsthmusError for a language of a setting in which no utterance is."""
    spoken = sorted({language(cut) for cut in cuts} - {""})
    for name in names:
        if name not in spoken:
            raise IsthmusError(
                f"{setting} names {name!r}, but no utterance of {where} is in it."
                f"{suggest(name, spoken)} They are in: {', '.join(spoken) or 'none that they name'}"
                ". Correct it, or give the utterances of the manifest their `language`."
            )


def check_named(cuts: Sequence[Cut]) -> None:
    """Raise IsthmusError for utterances without a language, of which no share can be drawn."""
    nameless = [cut.id for cut in cuts if not language(cut)]
    if nameless:
        raise IsthmusError(
            f"data.language_temperature needs the language of each utterance, and {len(nameless)} "
            f"of {len(cuts)} name none, such as {nameless[0]!r}. Give them a `language` in the "
            "manifest, or leave the setting out."
        )


def allotment(counts: Mapping[str, int], temperature: float) -> dict[str, int]:
    """How many utterances of each language an epoch has, as many in all as there are.

    Raises no language above its due by more than one utterance (largest remainders).
    """
    total = sum(counts.values())
    weights = {name: (count / total) ** (1 / temperature) for name, count in counts.items()}
    due = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    found = {name: int(share) for name, share in due.items()}
    rest = sorted(due, key=lambda name: (found[name] - due[name], name))
    for name in rest[: total - sum(found.values())]:
        found[name] += 1
    return found


def draw(languages: Sequence[str], temperature: float, *, seed: int, epoch: int) -> list[int]:
    """Utterances of an epoch: a pure function of its arguments.

    Of each language the utterances follow one another in an endless row of shuffled rounds, from
    which every epoch takes the next: after any number of epochs none was drawn more than once more
    often than another. The n-th time (from 0) that utterance i comes in an epoch it is called
    i + n * len(languages), so that it can be augmented otherwise.
    """
    own: dict[str, list[int]] = {}
    for index, name in enumerate(languages):
        own.setdefault(name, []).append(index)
    wanted = allotment({name: len(indices) for name, indices in own.items()}, temperature)
    drawn: list[int] = []
    for number, name in enumerate(sorted(own)):
        indices = own[name]
        first, end = epoch * wanted[name], (epoch + 1) * wanted[name]
        rounds = range(first // len(indices), -(-end // len(indices)))
        row = [i for one in rounds for i in _shuffled(indices, [seed, number, one, 4])]
        start = first % len(indices)
        drawn += row[start : start + wanted[name]]
    times: Counter[int] = Counter()
    found = []
    for index in drawn:
        found.append(index + times[index] * len(languages))
        times[index] += 1
    return found


def _shuffled(indices: Sequence[int], key: Sequence[int]) -> list[int]:
    order = np.random.default_rng(key).permutation(len(indices))
    return [indices[place] for place in order.tolist()]

"""Two systems on the same utterances: which is the better one, by how much, and is it luck?"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from isthmus.errors import IsthmusError
from isthmus.scoring.error_rate import Score, score_sets
from isthmus.scoring.significance import PairedResult, paired_bootstrap
from isthmus.scoring.texts import read_pair, read_texts

Texts: TypeAlias = dict[str, str]  # by utterance id
Sets: TypeAlias = dict[str, tuple[Texts, Texts]]  # references and hypotheses by set


@dataclass(frozen=True)
class PairedScores:
    """Systems a and b on the same utterances."""

    a: Score
    b: Score
    paired: PairedResult

    @property
    def wins(self) -> int:
        """Utterances in which a has fewer word errors than b."""
        return sum(a < b for a, b in self._errors)

    @property
    def losses(self) -> int:
        """Utterances in which a has more word errors than b."""
        return sum(a > b for a, b in self._errors)

    @property
    def ties(self) -> int:
        """Utterances in which both have as many."""
        return len(self.a.utterances) - self.wins - self.losses

    @property
    def _errors(self) -> Iterator[tuple[int, int]]:
        pairs = zip(self.a.utterances, self.b.utterances, strict=True)
        return ((one.counts.errors, other.counts.errors) for one, other in pairs)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them; rates are fractions, the difference is a minus b."""
        return {
            "wer_a": self.a.wer,
            "wer_b": self.b.wer,
            "difference": self.paired.difference,
            "difference_interval": list(self.paired.interval),
            "p_value": self.paired.p_value,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "utterances": len(self.a.utterances),
        }


@dataclass(frozen=True)
class Comparison:
    """Two systems on each set, and on all utterances together.

    `absent` are the utterances, as set/id, that each side lacks and another has: they are left out.
    """

    sets: Mapping[str, PairedScores]
    pooled: PairedScores
    absent: Mapping[str, tuple[str, ...]]

    @property
    def left_out(self) -> str | None:
        """A line about the utterances that not all sides have; None where all have all."""
        if not any(self.absent.values()):
            return None
        parts = [
            f"{len(ids)} not in {side}: {', '.join(ids[:3])}{', …' * (len(ids) > 3)}"
            for side, ids in self.absent.items()
            if ids
        ]
        return f"left out are the utterances that not all have ({'; '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """The figures of all utterances together, and under `sets` those of each by name."""
        return self.pooled.to_dict() | {
            "normaliser": self.pooled.a.normaliser,
            "absent": {side: list(ids) for side, ids in self.absent.items()},
            "sets": {name: one.to_dict() for name, one in self.sets.items()},
        }


def compare(
    a: str | Path,
    b: str | Path,
    reference: str | Path | None = None,
    *,
    normaliser: str = "basic",
    seed: int = 0,
    resamples: int = 10_000,
) -> Comparison:
    """Systems a and b by what they wrote; intervals and p-values are those of `paired_bootstrap`.

    With a `reference`, `a` and `b` are files of hypotheses, in any form of `read_pair`. Without
    one they are manifests that `isthmus evaluate --output-dir` wrote, which hold the reference too,
    or folders of such manifests, in which sets are paired by the names of the files.

    Raises:
        IsthmusError: a file is not of its form, no reference stands beside the transcripts, or the
            two have no utterance in common, or another reference for one.
        OSError: a file cannot be read.
    """
    if reference is None:
        systems = [_decoded(Path(path)) for path in (a, b)]
        if Path(a).is_file() and Path(b).is_file():  # one set, whatever each calls it
            systems[1] = dict(zip(systems[0], systems[1].values(), strict=True))
    else:
        systems = [{Path(reference).stem: read_pair(reference, path)[:2]} for path in (a, b)]
    holders = {str(path): _ids(sets, 1) for path, sets in zip((a, b), systems, strict=True)}
    if reference is not None:
        holders[str(reference)] = _ids(systems[0], 0)
    common = set.intersection(*holders.values())
    if not common:
        raise IsthmusError(f"{', '.join(holders)}: no utterance id is in all of them.")
    every = set.union(*holders.values())
    absent = {side: tuple(map("/".join, sorted(every - ids))) for side, ids in holders.items()}
    order = {  # of both, for in the order of a file its utterances are drawn
        name: [id for id in texts if (name, id) in common]
        for name, (texts, _) in systems[0].items()
    }
    scores = [
        score_sets(
            {
                name: ({id: sets[name][0][id] for id in ids}, {id: sets[name][1][id] for id in ids})
                for name, ids in order.items()
                if ids
            },
            normaliser=normaliser,
            resamples=0,
        )
        for sets in systems
    ]

    def paired(one: Score, other: Score) -> PairedScores:
        found = paired_bootstrap(one, other, seed=seed, resamples=resamples)
        return PairedScores(one, other, found)

    first, second = scores
    found = {name: paired(score, second.sets[name]) for name, score in first.sets.items()}
    alone = next(iter(found.values())) if len(found) == 1 else None
    return Comparison(found, alone or paired(first.pooled, second.pooled), absent)


def _ids(sets: Sets, side: int) -> set[tuple[str, str]]:
    """Set and id of the utterances that have a reference (`side` 0) or a hypothesis (1)."""
    return {(name, id) for name, texts in sets.items() for id in texts[side]}


def _decoded(path: Path) -> Sets:
    """What `isthmus evaluate` decoded: one manifest, or those in a folder among other files."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found = {
        file.stem: (read_texts(file, role="reference"), read_texts(file, role="hypothesis"))
        for file in files
        if _is_decoded(file)
    }
    if not found:
        raise IsthmusError(
            f"{path}: no transcripts beside their references. Add --reference REF, or name what "
            "`isthmus evaluate -o` wrote."
        )
    return found


def _is_decoded(file: Path) -> bool:
    """Whether the first line of a file has a reference and a hypothesis."""
    with file.open("rb") as stream:
        first = stream.readline()
    try:
        item = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(item, dict) and "text" in item and bool({"pred_text", "hypothesis"} & {*item})

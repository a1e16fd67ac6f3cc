"""The verdicts on claims are fair: equal test sets, enough of a difference, and no more."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.lab.sweep import Claim, make_plan
from isthmus.lab.sweep_table import Table, _notes, judge

SWEEP = """
title: A small table
source: A paper, table 4
scales:
  tiny:
    recipe: tiny/sweep
    test: {one: one.jsonl, two: two.jsonl}
    rows:
      - name: wide
      - {name: narrow, set: {projector.hidden: 4}}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of two rows, to be judged and not to be run."""
    file = tmp_path / "small.yaml"
    file.write_text(SWEEP)
    return file


def made_of(sweep: Path, wide: list[int], narrow: list[int], jumps: Mapping[str, Any]) -> Table:
    """A table of results with these errors in utterances of ten words."""
    results = {
        name: {
            "sets": {"one": {"errors": {str(n): [e, 10] for n, e in enumerate(errors)}}},
            "all": {"normaliser": "basic", "wer": sum(errors) / len(errors) / 10},
            "test": {"one": "digest"},
            "emergence": jumps.get(name) and {"step": jumps[name]},
        }
        for name, errors in (("wide", wide), ("narrow", narrow))
    }
    return Table(make_plan(str(sweep), "tiny", sweep.parent), results, {})


@pytest.mark.parametrize(
    ("wide", "narrow", "verdict"),
    [
        ([1] * 40, [3] * 40, "reproduced"),
        ([3] * 40, [1] * 40, "not reproduced"),
        ([1, 3] * 20, [3, 1] * 20, "cannot be seen at this size"),
        ([1] * 40, [1] * 40, "cannot be seen at this size"),
        ([9] * 40, [17] * 40, "cannot be seen at this size"),
        ([8] * 40, [17] * 40, "reproduced"),  # one of them reads a little
        ([17] * 40, [8] * 40, "not reproduced"),
    ],
)
def test_claims_on_errors(sweep: Path, wide: list[int], narrow: list[int], verdict: str) -> None:
    claim = Claim(says="So.", lower="wide", than="narrow")
    found, figures = judge(made_of(sweep, wide, narrow, {}), claim)
    assert found == verdict
    assert f"wide {10 * np.mean(wide):.2f} %" in figures
    assert figures.startswith("neither reads") == (min(*wide, *narrow) >= 9)


@pytest.mark.parametrize(
    ("jumps", "verdict"),
    [
        ({"wide": 10, "narrow": 20}, "reproduced"),
        ({"wide": 20, "narrow": 10}, "not reproduced"),
        ({"wide": 20}, "reproduced"),
        ({"narrow": 20}, "not reproduced"),
        ({}, "cannot be seen at this size"),
    ],
)
def test_claims_on_emergence(sweep: Path, jumps: dict[str, int], verdict: str) -> None:
    claim = Claim(says="So.", earlier="wide", than="narrow")
    assert judge(made_of(sweep, [1], [1], jumps), claim)[0] == verdict


def test_only_the_same_test_sets_are_compared(sweep: Path) -> None:
    table = made_of(sweep, [1] * 40, [3] * 40, {})
    other = {**table.results["narrow"], "test": {"one": "of other references"}}
    table = replace(table, results={**table.results, "narrow": other})
    verdict, why = judge(table, Claim(says="So.", lower="wide", than="narrow"))
    assert verdict == "cannot be seen at this size"
    assert "not tested on the same" in why
    assert table.compared["narrow"] is None


def test_all_sets_are_pooled_or_averaged(sweep: Path) -> None:
    """A long set in which wide is worse, and a short one in which it is far better."""
    errors = {"wide": ([3, 1] * 30, [0] * 6), "narrow": ([1, 1] * 30, [9, 10] * 3)}
    results = {
        row: {
            "sets": {
                name: {
                    "errors": {str(n): [e, 10] for n, e in enumerate(values)},
                    "wer": sum(values) / len(values) / 10,
                    "cer": 0.5,
                }
                for name, values in zip(("one", "two"), sets, strict=True)
            },
            "all": {"normaliser": "basic", "wer": sum(map(sum, sets)) / 660, "interval": None},
            "test": {},
        }
        for row, sets in errors.items()
    }
    claim = Claim(says="So.", lower="wide", than="narrow")
    pooled = Table(make_plan(str(sweep), "tiny", sweep.parent), results, {})
    sweep.write_text(SWEEP.replace("    rows:\n", "    average: sets\n    rows:\n"))
    averaged = Table(make_plan(str(sweep), "tiny", sweep.parent), results, {})
    assert pooled.rates("wide", "all")["wer"] == pytest.approx(120 / 660)
    assert averaged.rates("wide", "all")["wer"] == pytest.approx((0.2 + 0) / 2)
    low, high = averaged.rates("wide", "all")["interval"]
    assert 0.08 < low < 0.1 < high < 0.12
    pair = averaged.compare("wide", "narrow")
    assert pair is not None
    assert pair.difference == pytest.approx(((0.2 - 0.1) + (0 - 0.95)) / 2)
    assert pair.interval[0] < pair.difference < pair.interval[1] < 0
    assert judge(averaged, claim)[0] == "reproduced"
    assert "wide 10.00 %" in judge(averaged, claim)[1]
    assert judge(pooled, claim)[0] == "cannot be seen at this size"


def test_notes_tell_what_was_not_scored_or_not_heard(sweep: Path) -> None:
    table = made_of(sweep, [1], [1], {})
    for name, missing in (("wide", 0), ("narrow", 3)):
        scores = table.results[name]["sets"]["one"]
        scores |= {"left_out": {"no_text": 2} if missing else {}, "missing": missing}
        table.results[name]["environment"] = {}
    notes = "\n".join(_notes(table))
    assert "Left out of one in row narrow: 2 no_text" in notes
    assert "deleted in one, row narrow: the words of 3 recordings" in notes
    assert "row wide" not in notes


def test_claims_wait_for_both_rows(sweep: Path) -> None:
    table = made_of(sweep, [1], [1], {})
    half = replace(table, results={"wide": table.results["wide"]})
    claim = Claim(says="So.", lower="wide", than="narrow")
    assert judge(half, claim) == ("not measured yet", "")

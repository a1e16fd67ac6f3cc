"""A sweep's table: what the paper has beside what came out, as Markdown, HTML and JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.lab.figures import DASH, count_text, duration_text, interval_text, rate_text
from isthmus.lab.report import html_note, html_section, html_table, page
from isthmus.lab.svg import RunCurve, runs_chart
from isthmus.lab.sweep import Claim, Plan, Row
from isthmus.scoring.error_rate import (
    ErrorCounts,
    Score,
    UtteranceScore,
    percentile_interval,
    resampled_rates,
)
from isthmus.scoring.significance import PairedResult, paired_mean

ALL = "all"
RESAMPLES = 2000
PERPLEXITIES = {
    "perplexity": "perplexity",
    "perplexity_without_end": "without the end",
    "perplexity_slam_llm": "by the authors' script",
}
Result = Mapping[str, Any]
Cells = list[str]


@dataclass(frozen=True)
class Table:
    """Results by row, as far as there are any, and why others failed."""

    plan: Plan
    results: Mapping[str, Result]
    failed: Mapping[str, str]

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.plan.scale.rows

    @property
    def sets(self) -> list[str]:
        """All test sets together where there are several, and each."""
        names = list(self.plan.scale.test)
        return [ALL, *names] if len(names) > 1 else names

    @property
    def against(self) -> str:
        return self.plan.scale.against or self.rows[0].name

    def rates(self, row: str, name: str) -> Result:
        """Error rates of a row on a test set, or on all; empty without a result."""
        result = self.results.get(row)
        if result is None:
            return {}
        found: Result = self.overall[row] if name == ALL else result["sets"][name]
        return found

    @cached_property
    def overall(self) -> dict[str, Result]:
        """Rates of each row on all test sets together."""
        if self.plan.scale.average == "words":
            return {name: result["all"] for name, result in self.results.items()}
        return {
            name: _mean_rates(self.scores[name], list(result["sets"].values()))
            for name, result in self.results.items()
        }

    @cached_property
    def scores(self) -> dict[str, list[Score]]:
        average = self.plan.scale.average
        return {name: _scores(result, average) for name, result in self.results.items()}

    def compare(self, row: str, other: str) -> PairedResult | None:
        """A row's errors less another's, on the same utterances of all test sets."""
        if row == other or not {row, other} <= self.results.keys():
            return None
        if self.results[row]["test"] != self.results[other]["test"]:
            return None
        try:
            pairs = list(zip(self.scores[row], self.scores[other], strict=True))
            return paired_mean(pairs, resamples=RESAMPLES)
        except IsthmusError:  # not the same utterances: some could not be decoded
            return None

    @cached_property
    def compared(self) -> dict[str, PairedResult | None]:
        return {row.name: self.compare(row.name, self.against) for row in self.rows}

    @cached_property
    def verdicts(self) -> list[tuple[Claim, str, str]]:
        """Each claim, the verdict on it, and the figures behind that."""
        return [(claim, *judge(self, claim)) for claim in self.plan.scale.claims]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON; rates are fractions, expected ones are in percent."""
        plan = self.plan
        return {
            "sweep": plan.name,
            "title": plan.sweep.title,
            "source": plan.sweep.source,
            "folder": str(plan.folder),
            "against": self.against,
            "rows": [self._row(row) for row in self.rows],
            "claims": [
                {**claim.model_dump(exclude_none=True), "verdict": verdict, "figures": figures}
                for claim, verdict, figures in self.verdicts
            ],
            "failed": dict(self.failed),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        result = self.results.get(row.name)
        found: dict[str, Any] = {"name": row.name, "expected": row.expected, "printed": row.printed}
        if result is None:
            return found | {"wer": None}
        pair = self.compared[row.name]
        kept = ("parameters", "emergence", "steps", "best_loss", "training_seconds", "perplexity")
        return (
            found
            | {"wer": {name: self.rates(row.name, name)["wer"] for name in self.sets}}
            | {"interval": {name: self.rates(row.name, name)["interval"] for name in self.sets}}
            | {"cer": {name: self.rates(row.name, name)["cer"] for name in self.sets}}
            | {name: result.get(name) for name in kept}
            | {
                "against": pair
                and {"difference": pair.difference, "interval": pair.interval, "p": pair.p_value}
            }
        )


def judge(table: Table, claim: Claim) -> tuple[str, str]:
    """A verdict made of the numbers only, and these."""
    if not {claim.row, claim.than} <= table.results.keys():
        return "not measured yet", ""
    verdict, figures = _judge_lower(table, claim) if claim.lower else _judge_earlier(table, claim)
    rates = [table.overall[name]["wer"] for name in (claim.row, claim.than)]
    if all(rate is not None and rate >= UNREAD for rate in rates):
        return UNSEEN, f"neither reads; {figures}"
    return verdict, figures


UNREAD = 0.9  # a WER from which on hardly a word is right, and which row has more is chance
REPRODUCED, OTHERWISE, UNSEEN = "reproduced", "not reproduced", "cannot be seen at this size"


def _judge_lower(table: Table, claim: Claim) -> tuple[str, str]:
    pair = table.compare(claim.row, claim.than)
    if pair is None:
        return UNSEEN, "the two were not tested on the same utterances"
    low, high = pair.interval
    verdict = REPRODUCED if high < 0 else OTHERWISE if low > 0 else UNSEEN
    rows = (claim.row, claim.than)
    rates = [f"{name} {rate_text(table.overall[name]['wer'])} %" for name in rows]
    return verdict, (
        f"{', '.join(rates)}: difference {100 * pair.difference:+.2f} points, 95 % interval "
        f"{100 * low:+.2f} to {100 * high:+.2f}, {_p_text(pair)}"
    )


def _judge_earlier(table: Table, claim: Claim) -> tuple[str, str]:
    jumps = [table.results[name]["emergence"] for name in (claim.row, claim.than)]
    steps = [jump["step"] if jump else None for jump in jumps]
    figures = ", ".join(
        f"{name} {f'at step {step:,}' if step else 'shows no jump'}"
        for name, step in zip((claim.row, claim.than), steps, strict=True)
    )
    first, second = (float("inf") if step is None else step for step in steps)
    verdict = REPRODUCED if first < second else OTHERWISE if first > second else UNSEEN
    return verdict, f"{figures}; one run of each"


def write_tables(table: Table) -> list[Path]:
    """The three files beside the runs."""
    contents = {
        "md": markdown(table),
        "html": html(table),
        "json": json.dumps(table.to_dict(), indent=1, ensure_ascii=False) + "\n",
    }
    files = []
    for kind, content in contents.items():
        files.append(table.plan.folder / f"{table.plan.name}.{kind}")
        write_atomic(files[-1], content)
    return files


def markdown(table: Table) -> str:
    parts = [f"# {table.plan.sweep.title}", table.plan.sweep.source + "."]
    for titles, rows in (_error_rates(table), _training(table)):
        lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
        cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        parts.append("\n".join(f"| {line} |" for line in cells))
    if table.verdicts:
        parts.append(
            "\n".join(
                f"- {claim.says} **{verdict.capitalize()}.** {figures}"
                for claim, verdict, figures in table.verdicts
            )
        )
    return "\n\n".join([*parts, *_notes(table)]) + "\n"


def html(table: Table) -> str:
    sweep = table.plan.sweep
    sections = [
        f"<header><h1>{escape(sweep.title)}</h1>"
        f'<p class="lead">{escape(sweep.source)}, scale “{table.plan.folder.name}”</p></header>'
    ]
    for title, (titles, rows) in (
        ("Error rates", _error_rates(table)),
        ("Models and training", _training(table)),
    ):
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        drawn = html_table("sweep", [escape(one) for one in titles], body)
        sections.append(html_section(title, f'<div class="wide">{drawn}</div>'))
    if table.verdicts:
        items = "".join(
            f"<p>{escape(claim.says)} <strong>{verdict.capitalize()}.</strong> "
            f"{escape(figures)}</p>"
            for claim, verdict, figures in table.verdicts
        )
        sections.append(html_section("What the paper concluded", items))
    if sweep.figure:
        sections.append(_curves(table))
    sections.append(html_section("Notes", "".join(html_note(escape(n)) for n in _notes(table))))
    return page(sweep.title, sections, str(table.plan.folder))


def _error_rates(table: Table) -> tuple[Cells, list[Cells]]:
    """WER in percent with 95 % intervals: the paper's, ours, and the difference of all sets."""
    compares = len(table.rows) > 1
    titles = ["Row"]
    for place, name in enumerate(table.sets):
        titles += [f"{name}: paper"] if _has_expected(table, name) else []
        titles.append(name)
        titles += [f"less {table.against}", "p"] if compares and place == 0 else []
    rows = []
    for row in table.rows:
        cells = [row.name]
        for place, name in enumerate(table.sets):
            if _has_expected(table, name):
                cells.append(f"{row.expected[name]:.2f}" if name in row.expected else DASH)
            rates = table.rates(row.name, name)
            cells.append(_with(rate_text(rates.get("wer")), interval_text(rates.get("interval"))))
            cells += _pair_cells(table.compared[row.name]) if compares and place == 0 else []
        rows.append(cells)
    return titles, rows


def brief(table: Table) -> tuple[Cells, list[Cells]]:
    """For a terminal: WER, behind it the paper's, and whether a row differs from the one row."""
    sets = [f"{name} (paper)" if _has_expected(table, name) else name for name in table.sets]
    titles = ["Row", *sets, f"p ({table.against})"]
    rows = []
    for row in table.rows:
        cells = [row.name]
        for name in table.sets:
            expected = f" ({row.expected[name]:.2f})" if name in row.expected else ""
            cells.append(rate_text(table.rates(row.name, name).get("wer")) + expected)
        rows.append([*cells, _pair_cells(table.compared[row.name])[-1]])
    return titles, rows


def _has_expected(table: Table, name: str) -> bool:
    return any(name in row.expected for row in table.rows)


def _with(value: str, interval: str) -> str:
    return value if interval in ("", DASH) else f"{value} ({interval})"


def _pair_cells(pair: PairedResult | None) -> Cells:
    if pair is None:
        return [DASH, DASH]
    low, high = pair.interval
    within = f"{100 * low:+.1f} to {100 * high:+.1f}"
    p_text = _p_text(pair).removeprefix("p = ").removeprefix("p ")
    return [f"{100 * pair.difference:+.2f} ({within})", p_text]


def _p_text(pair: PairedResult) -> str:
    return "p < 0.001" if pair.p_value < 0.001 else f"p = {pair.p_value:.3f}"


def _training(table: Table) -> tuple[Cells, list[Cells]]:
    """Sizes, emergence, loss and time; then what else the paper prints of the rows."""
    printed = list(dict.fromkeys(name for row in table.rows for name in row.printed))
    tests = list(table.plan.scale.test) if "perplexity" in table.plan.sweep.measure else []
    titles = ["Row", "encoder", "projector", "LLM", "trained", "emergence at step", "to accuracy"]
    titles += ["steps", "best loss", "training"]
    titles += [f"{name}: {title}" for name in tests for title in PERPLEXITIES.values()]
    rows = []
    for row in table.rows:
        result = table.results.get(row.name)
        cells = _figures(result, tests) if result else [DASH] * (len(titles) - 1)
        rows.append([row.name, *cells, *(row.printed.get(name, DASH) for name in printed)])
    return [*titles, *(f"paper: {name}" for name in printed)], rows


def _figures(result: Result, tests: Sequence[str]) -> Cells:
    sizes, jump, loss = result["parameters"], result["emergence"], result["best_loss"]
    counts = [sizes[one] for one in ("encoder", "projector", "llm", "trained")]
    cells = [DASH if count is None else count_text(count) for count in counts]
    cells += [f"{jump['step']:,}", f"{100 * jump['after']:.0f} %"] if jump else [DASH, DASH]
    cells += [f"{result['steps']:,}", DASH if loss is None else f"{loss:.3f}"]
    cells.append(duration_text(result["training_seconds"]))
    for name in tests:
        values = result.get("perplexity", {}).get(name, {})
        found = [values.get(key) for key in PERPLEXITIES]
        cells += [DASH if one is None else f"{one:,.2f}" for one in found]
    return cells


def _notes(table: Table) -> Iterator[str]:
    """What one must know to read the figures."""
    results = table.results
    if results:
        names = sorted({result["all"]["normaliser"] for result in results.values()})
        yield (
            f"WER in percent, texts compared after the normaliser “{', '.join(names)}”. Intervals "
            "come from drawing the utterances anew, differences and p from the same draws for "
            "both rows (matched pairs): few utterances or speakers make them too narrow."
        )
    measured = [one for result in results.values() for one in result.get("perplexity", {}).values()]
    if precisions := sorted({one["precision"] for one in measured if "precision" in one}):
        yield (
            f"Perplexity a word, of weights in {', '.join(precisions)}, the end token counted, and "
            "not; the authors' script weights each text's mean over its tokens by its words."
        )
    if table.plan.scale.average == "sets":
        yield "All test sets together: the mean of their rates, each set weighing the same."
    missing = [row.name for row in table.rows if row.name not in {*results, *table.failed}]
    if missing:
        yield f"Not finished: {', '.join(missing)}."
    for name, why in table.failed.items():
        yield f"Failed: {name}. {why}"
    for name, result in results.items():
        for test, scores in result["sets"].items():
            if scores["left_out"]:
                reasons = ", ".join(f"{n} {reason}" for reason, n in scores["left_out"].items())
                yield f"Left out of {test} in row {name}: {reasons}."
            if scores["missing"]:
                yield (
                    f"Counted as deleted in {test}, row {name}: the words of {scores['missing']} "
                    "recordings that could not be heard."
                )
    made: dict[str, Cells] = {}
    for name, result in results.items():
        facts = {k: v for k, v in result["environment"].items() if isinstance(v, str)}
        made.setdefault(", ".join(f"{k} {v}" for k, v in facts.items()), []).append(name)
    if len(made) > 1:
        yield "The rows were not all made by the same code or on the same kind of machine:"
    for facts_text, names in made.items():
        yield f"{', '.join(names) if len(made) > 1 else 'Made'} with {facts_text}."


def _curves(table: Table) -> str:
    """Next-token accuracy of all rows that have it."""
    curves = []
    for row in table.rows:
        result = table.results.get(row.name)
        if result is not None:
            steps, accuracy = zip(*result["accuracy"], strict=True)
            jump = result["emergence"]
            note = f"step {jump['step']:,}" if jump else "no jump"
            curves.append(RunCurve(row.name, note, steps, accuracy, jump and jump["step"]))
    chart = runs_chart(curves, label="Next-token accuracy by training step")
    note = html_note("Dashed: where accuracy jumped from one level to another.")
    return html_section("Next-token accuracy", f"<figure>{chart}</figure>{note}") if curves else ""


def _scores(result: Result, average: str) -> list[Score]:
    """Errors and words of each utterance for pairing: of all sets in one, or of each.

    References are not at hand: that they are the same is seen by the digests of the test sets.
    """
    normaliser = result["all"]["normaliser"]
    sets = [
        tuple(
            UtteranceScore(
                f"{name}/{id}", "", "", (), ErrorCounts(sub=errors, words=words, utterances=1)
            )
            for id, (errors, words) in scores["errors"].items()
        )
        for name, scores in sorted(result["sets"].items())  # in one order for all rows
    ]
    groups = sets if average == "sets" else [sum(sets, ())]
    return [Score(group, normaliser, None, None) for group in groups]


def _mean_rates(scores: Sequence[Score], sets: Sequence[Result]) -> Result:
    """The mean of the sets' rates, each of which is drawn by itself for the interval."""
    drawn = []
    for number, score in enumerate(scores):
        counts = [(one.counts.errors, one.counts.words) for one in score.utterances]
        errors, words = np.array(counts, dtype=np.int64).reshape(-1, 2).T[:, None]  # (1, N) each
        drawn.append(resampled_rates(errors, words, seed=number, resamples=RESAMPLES))
    number = min(rates.shape[1] for rates in drawn)  # as draws without words have no rate
    found: dict[str, Any] = {
        "interval": percentile_interval(np.mean([rates[0, :number] for rates in drawn], axis=0))
    }
    for kind in ("wer", "cer"):
        values = [one[kind] for one in sets]
        found[kind] = None if None in values else float(np.mean(values))
    return found

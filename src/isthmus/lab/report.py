"""One page about one run: figures, model, curves, examples, alignments, and what to do next.

The page is a single HTML file: no script, nothing loaded from anywhere. Every number on it was
passed in or counted from what was; a section without data is left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from isthmus.decoding.calibration import Calibration
from isthmus.lab.alignment import Alignment, monotonicity
from isthmus.lab.emergence import Emergence
from isthmus.lab.figures import DASH, count_text, duration_html, interval_text, rate_text
from isthmus.lab.svg import Series, heat_map, line_chart, moving_mean, reliability_chart
from isthmus.scoring import Score, SetScores, score

STYLE = Path(__file__).with_suffix(".css")
# Even if a text slipped through unescaped, the browser would load nothing and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TREND = 30  # windows of the moving mean in a curve
NOTHING = '<span class="none">nothing</span>'


@dataclass(frozen=True)
class Part:
    """One part of the model, in the order in which speech passes through."""

    role: str  # "Encoder", "Projector", "LLM"
    name: str
    parameters: int
    trained: int  # parameters that training moved
    output: str = ""  # what it hands on, such as "25 frames a second × 144"


@dataclass(frozen=True)
class Curves:
    """What training measured, by step; the dev values stand where there was a validation."""

    steps: Sequence[int]
    loss: Sequence[float]
    accuracy: Sequence[float]
    dev_steps: Sequence[int] = ()
    dev_loss: Sequence[float] = ()
    dev_accuracy: Sequence[float] = ()
    emergence: Emergence | None = None

    @classmethod
    def read(
        cls, metrics: Sequence[Mapping[str, float]], emergence: Emergence | None = None
    ) -> "Curves":
        """From lines of metrics as training writes them, without steps of no finite loss."""
        lines = [line for line in metrics if math.isfinite(line["loss"])]
        dev = [line for line in metrics if math.isfinite(line.get("dev_loss", math.nan))]
        return cls(
            [int(line["step"]) for line in lines],
            [line["loss"] for line in lines],
            [line["accuracy"] for line in lines],
            [int(line["step"]) for line in dev],
            [line["dev_loss"] for line in dev],
            [line["dev_accuracy"] for line in dev],
            emergence,
        )


@dataclass(frozen=True)
class Example:
    """What was said and what was heard, both as scored."""

    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Report:
    """All that a page may say; what is empty or None is not spoken of."""

    title: str
    summary: str = ""
    parts: Sequence[Part] = ()
    scores: SetScores | None = None
    curves: Curves | None = None
    training_seconds: float | None = None
    calibration: Calibration | None = None
    examples: Sequence[Example] = ()
    alignments: Sequence[Alignment] = ()
    transcripts: Mapping[str, str] | None = None  # of the user's own files, by name
    settings: str = ""  # the resolved recipe
    commands: Mapping[str, str] | None = None  # what each next command does, by command
    files: str = ""  # where the run lies


def pick_examples(scored: Score, number: int = 8) -> tuple[Example, ...]:
    """Utterances spread evenly from the fewest errors a word to the most: a fair sample."""
    rates = {item: item.counts.errors / max(1, item.counts.words) for item in scored.utterances}
    ranked = sorted(rates, key=lambda item: (rates[item], item.id))
    last, count = len(ranked) - 1, min(number, len(ranked))
    chosen = [ranked[round(place * last / max(1, count - 1))] for place in range(count)]
    return tuple(Example(item.reference, item.hypothesis) for item in chosen)


def render(report: Report) -> str:
    """The page as HTML."""
    sections = [
        _head(report),
        _model(report.parts),
        _curves(report.curves),
        _scores(report.scores),
        _calibration(report.calibration),
        _examples(report.examples),
        _alignments(report.alignments),
        _transcripts(report.transcripts or {}),
        _commands(report.commands or {}),
        _settings(report.settings),
    ]
    return page(report.title, sections, report.files)


def page(title: str, sections: Sequence[str], files: str = "") -> str:
    """An HTML page of sections, those that are empty left out; `files` is where its data lies."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by isthmus. {escape(files)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    summary = f'<p class="lead">{escape(report.summary)}</p>' if report.summary else ""
    figures = "".join(
        f'<div><dt>{name}</dt><dd><span class="value">{value}</span>'
        f'<span class="note">{note}</span></dd></div>'
        for name, value, note in _figures(report)
    )
    figures = f'<dl class="figures">{figures}</dl>' if figures else ""
    return f"<header><h1>{escape(report.title)}</h1>{summary}{figures}</header>"


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    """Name, value and note of each headline figure, as HTML."""
    if report.scores is not None:
        pooled = report.scores.pooled
        rates = {
            "wer": ("Word error rate", pooled.wer, pooled.interval),
            "cer": ("Character error rate", pooled.cer, pooled.cer_interval),
        }
        for key in sorted(rates, key=lambda key: key != pooled.primary):
            name, rate, interval = rates[key]
            value = DASH if rate is None else f"{100 * rate:.1f}<small>%</small>"
            within = interval_text(interval)
            yield name, value, f"95 % interval <span>{within} %</span>" if within != DASH else ""
    if report.training_seconds is not None:
        yield "Training time", duration_html(report.training_seconds), ""
    if report.parts:
        trained = sum(part.trained for part in report.parts)
        total = sum(part.parameters for part in report.parts)
        share = f"{100 * trained / total:.2g} % of {count_text(total)}" if total else ""
        number, _, unit = count_text(trained).partition(" ")
        yield "Trained parameters", f"{number}<small>{unit}</small>", share


def _model(parts: Sequence[Part]) -> str:
    if not parts:
        return ""
    steps = ['<li class="end">audio</li>', '<li class="carries">16 kHz, mono</li>']
    for part in parts:
        state = "frozen" if not part.trained else "trained"
        if 0 < part.trained < part.parameters:
            state = f"{count_text(part.trained)} of them trained"
        steps.append(
            f'<li class="part{" trained" if part.trained else ""}">'
            f'<span class="role">{escape(part.role)}</span><strong>{escape(part.name)}</strong>'
            f'<span class="unit">{count_text(part.parameters)} parameters</span>'
            f'<span class="badge">{state}</span></li>'
        )
        steps.append(f'<li class="carries">{escape(part.output)}</li>')
    steps.append('<li class="end">text</li>')
    shares = "".join(
        f'<i{kind} style="flex-grow:{number}"></i>'
        for part in parts
        for number, kind in (
            (part.parameters - part.trained, ""),
            (part.trained, ' class="trained"'),
        )
        if number
    )
    note = "The bar shows what share of all parameters each part has; orange was trained."
    path = f'<ol class="path">{"".join(steps)}</ol><div class="shares">{shares}</div>'
    return html_section("From audio to text", path + html_note(note))


def _curves(curves: Curves | None) -> str:
    if curves is None or not curves.steps:
        return ""
    found = curves.emergence
    window = max(1, len(curves.steps) // TREND)
    drawn = [
        ("Next-token accuracy", curves.accuracy, curves.dev_accuracy, True),
        ("Loss, nats a token", curves.loss, curves.dev_loss, False),
    ]
    figures = ""
    for title, train, dev, percent in drawn:
        mark = (found.step, f"step {found.step:,}" if percent else "") if found else None
        series = [
            Series("train", curves.steps, train),
            Series("trend", curves.steps, moving_mean(train, window)),
            Series("dev", curves.dev_steps, dev),
        ]
        chart = line_chart(series, label=f"{title} by training step", percent=percent, mark=mark)
        figures += f"<figure><h3>{title}</h3>{chart}</figure>"
    text = "The accuracy shows no jump from one level to another."
    if found:
        text = (
            f"At step {found.step:,} next-token accuracy jumped from {100 * found.before:.0f} % to "
            f"{100 * found.after:.0f} %: the sign that the language model began to listen."
        )
    dots = '<span class="dev">validation</span>' if curves.dev_steps else ""
    body = (
        f'<p>{text}</p><div class="pair">{figures}</div>'
        f'<p class="chart-key"><span>training, mean of {window} steps</span> {dots}</p>'
    )
    return html_section("Learning to listen", body)


def _scores(scores: SetScores | None) -> str:
    if scores is None:
        return ""
    every = {**scores.sets, "all": scores.pooled} if len(scores.sets) > 1 else scores.sets
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{item.counts.utterances:,}</td>"
        f"<td>{item.counts.words:,}</td><td>{rate_text(item.wer)}</td>"
        f"<td>{interval_text(item.interval)}</td><td>{rate_text(item.cer)}</td></tr>"
        for name, item in every.items()
    )
    pooled = scores.pooled
    note = (
        f"Texts were compared after the normaliser “{pooled.normaliser}”. The intervals come from "
        "drawing the utterances anew; few speakers make them too narrow."
    )
    if pooled.primary == "cer":
        note += " Most of the reference has no spaces between words: read CER, not WER."
    if pooled.missing:
        note += f" {len(pooled.missing):,} utterances without a hypothesis count as empty."
    titles = ("Set", "Utterances", "Words", "WER %", "95 % interval", "CER %")
    return html_section("Error rates", html_table("scores", titles, rows) + html_note(escape(note)))


def _calibration(found: Calibration | None) -> str:
    if found is None:
        return ""
    points = [(one.confidence, one.right, one.words) for one in found.bins]
    chart = reliability_chart(points, label="Share of right words by their confidence")
    text = (
        f"The confidence of a word is the probability of its tokens. Over {found.words:,} words it "
        f"is off by {100 * found.error:.1f} % on average (expected calibration error); on the line "
        "it would be right as often as it says. A larger dot stands for more words."
    )
    drawn = f'<figure class="single">{chart}</figure>'
    return html_section("How sure, how right", drawn + html_note(escape(text)))


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    numbered = {str(number): example for number, example in enumerate(examples)}
    aligned = score(
        {number: example.reference for number, example in numbered.items()},
        {number: example.hypothesis for number, example in numbered.items()},
        normaliser="none",
        resamples=0,
    )
    rows = "".join(
        f'<tr><td data-name="said">{_marked(utterance.alignment, 0)}</td>'
        f'<td data-name="heard">{_marked(utterance.alignment, 1)}</td></tr>'
        for utterance in aligned.utterances
    )
    table = html_table("texts", ("Said (reference)", "Heard (hypothesis)"), rows)
    return html_section("Examples", table + html_note("Words that differ are underlined."))


def _marked(alignment: Sequence[tuple[str, str]], side: int) -> str:
    """The words of one side of an alignment, those that differ marked, as HTML."""
    words = [
        escape(pair[side]) if pair[0] == pair[1] else f"<mark>{escape(pair[side])}</mark>"
        for pair in alignment
        if pair[side]
    ]
    return f"<span>{' '.join(words) or NOTHING}</span>"


def _alignments(alignments: Sequence[Alignment]) -> str:
    if not alignments:
        return ""
    figures = ""
    for item in alignments:
        label = f"Similarity of audio and tokens: {item.text}"
        drawing = heat_map(item.similarity, item.tokens, item.seconds, label=label)
        caption = f"“{escape(item.text)}”, order {monotonicity(item.similarity):.2f}"
        figures += f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"
    text = (
        "<p>Cosine similarity between what the projector makes of the audio and the language "
        "model’s own embeddings of the transcript’s tokens. A diagonal means that the tokens find "
        "their sound in the order in which they were spoken.</p>"
    )
    note = (
        "Only the highest quarter of the cells is drawn. Order is 1 where tokens find their audio "
        "perfectly in order, about 0 by chance."
    )
    body = f'{text}<div class="pair">{figures}</div>{html_note(note)}'
    return html_section("What each token resembles", body)


def _transcripts(transcripts: Mapping[str, str]) -> str:
    if not transcripts:
        return ""
    rows = {escape(name): escape(text) or NOTHING for name, text in transcripts.items()}
    return html_section("Your recordings", _definitions("own", rows))


def _commands(commands: Mapping[str, str]) -> str:
    if not commands:
        return ""
    rows = {escape(what): f"<code>{escape(line)}</code>" for line, what in commands.items()}
    return html_section("What to type next", _definitions("next", rows))


def _settings(settings: str) -> str:
    if not settings:
        return ""
    summary = "<summary>All settings of this run</summary>"
    return f"<details>{summary}<pre>{escape(settings)}</pre></details>"


def html_table(kind: str, titles: Sequence[str], rows: str) -> str:
    """A table of rows that are HTML already; `kind` is a class of report.css."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<table class="{kind}">{body}</table>'


def html_note(text: str) -> str:
    """Small print, HTML already."""
    return f'<p class="note">{text}</p>'


def _definitions(kind: str, rows: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    return f'<dl class="{kind}">{items}</dl>'


def html_section(title: str, body: str) -> str:
    """A section of the page; both are HTML already."""
    return f"<section><h2>{title}</h2>{body}</section>"

"""The page: complete, safe, self-contained, and silent about what it was not told."""

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from isthmus.decoding.calibration import Bin, Calibration
from isthmus.lab.alignment import Alignment
from isthmus.lab.emergence import Emergence
from isthmus.lab.figures import count_text, duration_html
from isthmus.lab.report import Curves, Example, Part, Report, pick_examples, render
from isthmus.scoring import score, score_sets

VOID = {"meta", "link", "br"}
HOSTILE = '<script>alert("it\'s")</script>&'
REFERENCES = {"a": "turn the lights on", "b": "two small latte", "c": "stop", "d": "go up"}
HYPOTHESES = {"a": "turn lights on please", "b": "two tall latte", "c": "stop", "d": ""}


class Page(HTMLParser):
    """What a browser would see; fails on tags that do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.marked: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} runs {value}"
            if name in ("src", "href", "data", "action", "xlink:href", "srcset"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "mark" in self.open:
            self.marked.append(data)


def metrics(number: int = 1000) -> list[dict[str, float]]:
    return [
        {"step": step, "loss": 4 / step, "accuracy": step / number}
        | ({"dev_loss": 0.5, "dev_accuracy": 0.5} if step % 100 == 0 else {})
        for step in range(1, number + 1)
    ]


def report(words: str = "plain") -> Report:
    """Everything a page can hold, with `words` in all places that hold words."""
    texts = ({words: REFERENCES["a"]}, {words: HYPOTHESES["a"]})
    similarity = np.eye(6, 3)
    return Report(
        title=words,
        summary=words,
        parts=(Part(words, words, 3_000_000, 0, words), Part("P", words, 447_000, 447_000, words)),
        scores=score_sets({words: texts, "digits": (REFERENCES, HYPOTHESES)}),
        curves=Curves.read(metrics(), Emergence(321, 0.38, 0.91)),
        training_seconds=287.4,
        calibration=Calibration((Bin(3, 0.55, 0.5), Bin(40, 0.97, 0.95)), 0.0212, 43, 0),
        examples=(Example(f"{words} one", f"{words} two"), Example("", words), Example(words, "")),
        alignments=(Alignment(words, (words, " b", "\n"), similarity, 2.0),),
        transcripts={words: words, "silence.wav": ""},
        settings=f"name: {words}",
        commands={f"isthmus {words}": words},
        files=words,
    )


def test_the_page_holds_what_it_was_given() -> None:
    page = Page(render(report()))
    assert page.tags["h1"] == page.tags["main"] == page.tags["details"] == 1
    assert page.tags["svg"] == 4
    pooled = score_sets({"plain": (REFERENCES, HYPOTHESES)}).pooled
    assert pooled.wer is not None
    for words in (
        "95 % interval",
        "4min 47s",
        "447k",
        "3 M parameters",
        "frozen",
        "At step 321 next-token accuracy jumped from 38 % to 91 %",
        "isthmus plain",
        "name: plain",
        "silence.wav",
    ):
        assert words in page.text


def test_the_headline_is_the_pooled_rate() -> None:
    scores = score_sets({"plain": (REFERENCES, HYPOTHESES)})
    text = Page(render(Report("run", scores=scores))).text
    # a: THE deleted, PLEASE inserted; b: one substituted; d: two deleted; of ten words
    assert "Word error rate50.0%" in text
    bounds = scores.pooled.interval
    assert bounds is not None
    assert f"95 % interval {100 * bounds[0]:.1f}–{100 * bounds[1]:.1f} %" in text


def test_the_rate_to_read_comes_first() -> None:
    chinese = score_sets({"zh": ({"a": "你好世界"}, {"a": "你好时界"})})
    text = Page(render(Report("run", scores=chinese))).text
    assert 0 < text.index("Character error rate") < text.index("Word error rate")
    assert "read CER, not WER" in text
    assert text.index("Word error rate") < len(Page(render(report())).text)


def test_texts_cannot_become_markup() -> None:
    plain, hostile = Page(render(report())), Page(render(report(HOSTILE)))
    assert hostile.tags == plain.tags
    assert hostile.tags["script"] == 0
    assert hostile.text.count(HOSTILE) >= 15
    assert "<script" not in render(report(HOSTILE))


@pytest.mark.parametrize("module", ["report", "svg"])
def test_unescaped_texts_would_be_seen(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"isthmus.lab.{module}.escape", str)
    assert "<script" in render(report(HOSTILE))


def test_nothing_is_loaded_and_nothing_runs() -> None:
    html = render(report())
    page = Page(html)
    assert page.links == ["data:,"]
    assert page.tags["script"] == page.tags["img"] == page.tags["iframe"] == 0
    assert not re.search(r"url\(|@import|@font-face|expression\(", html)
    assert set(re.findall(r"https?://[^\s\"<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html


def test_the_page_is_light_and_dark_and_prints() -> None:
    html = render(report())
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "width=device-width" in html


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def test_nothing_given_nothing_claimed() -> None:
    page = Page(render(Report("run")))
    assert numbers(page.text) == []
    assert page.tags["section"] == page.tags["svg"] == page.tags["details"] == 0


SECTIONS = {
    "parts": ("From audio to text", "Trained parameters"),
    "scores": ("Error rates", "Word error rate"),
    "curves": ("Learning to listen",),
    "training_seconds": ("Training time",),
    "examples": ("Examples",),
    "alignments": ("What each token resembles",),
    "transcripts": ("Your recordings",),
    "commands": ("What to type next",),
    "settings": ("All settings",),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_what_is_not_given_is_left_out(name: str) -> None:
    whole = report()
    default = next(field.default for field in dataclasses.fields(Report) if field.name == name)
    without = Page(render(dataclasses.replace(whole, **{name: default}))).text
    for words in SECTIONS[name]:
        assert words in Page(render(whole)).text
        assert words not in without


def test_without_a_jump_none_is_claimed() -> None:
    page = render(Report("run", curves=Curves.read(metrics())))
    assert "no jump" in page
    assert 'class="mark"' not in page
    assert 'class="mark"' in render(report())


def test_words_that_differ_are_marked() -> None:
    pairs = tuple(Example(REFERENCES[id], HYPOTHESES[id]) for id in REFERENCES)
    page = Page(render(Report("run", examples=pairs)))
    assert page.marked == ["the", "please", "small", "tall", "go", "up"]
    assert Page(render(Report("run", examples=pairs[2:3]))).marked == []
    assert "nothing" in page.text


def test_curves_have_at_most_400_points() -> None:
    html = render(Report("run", curves=Curves.read(metrics(25_000))))
    paths = re.findall(r'class="line tr\w+" d="M([^"]*)"', html)
    assert [len(path.split("L")) for path in paths] == [400] * 4
    assert "mean of 833 steps" in html
    assert len(html) < 80_000


def test_curves_read_skips_what_is_not_finite() -> None:
    lines = [
        {"step": 1, "loss": 2.0, "accuracy": 0.1},
        {"step": 2, "loss": float("nan"), "accuracy": 0.0},
        {"step": 3, "loss": 1.0, "accuracy": 0.3, "dev_loss": 1.5, "dev_accuracy": 0.2},
    ]
    assert Curves.read(lines) == Curves([1, 3], [2.0, 1.0], [0.1, 0.3], [3], [1.5], [0.2])


def test_examples_span_best_to_worst() -> None:
    scored = score(REFERENCES, HYPOTHESES)
    best, worst = pick_examples(scored, 2)
    assert (best.reference, worst.reference) == ("stop", "go up")
    assert len(pick_examples(scored, 99)) == 4
    assert pick_examples(scored, 1)[0].reference == "stop"
    assert pick_examples(score({}, {}), 3) == ()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (412, "412"), (999_600, "1 M"), (17_310_000, "17.3 M"), (6_740_000_000, "6.74 B")],
)
def test_counts_are_short(number: int, text: str) -> None:
    assert count_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1min"), (61, "1min 1s"), (3600, "1h"), (7_380, "2h 3min")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert re.sub("<[^>]*>", "", duration_html(seconds)) == text


def test_rendering_needs_no_torch() -> None:
    program = (
        "import sys, isthmus.lab.report; "
        "sys.exit(bool({'torch', 'transformers', 'lhotse'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

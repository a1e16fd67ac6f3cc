"""Synthetic text: what it looks like, what it can say, and that a generator determines it."""

import re
from collections import Counter

import numpy as np
import pytest

from isthmus.lab import vocabulary as lexicon
from isthmus.lab.sentences import DOMAINS, cardinal, sentence, vocabulary

PLAIN = re.compile(r"[a-z']+( [a-z']+)*")


def draw(domain: str, number: int = 2000, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [DOMAINS[domain](rng) for _ in range(number)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_are_plain_and_depend_on_the_generator_alone(domain: str) -> None:
    texts = draw(domain)
    assert [text for text in texts if not PLAIN.fullmatch(text)] == []
    assert draw(domain) == texts
    assert draw(domain, seed=1) != texts


@pytest.mark.parametrize("domain", sorted(set(DOMAINS) - {"pseudo"}))
def test_vocabulary_holds_every_word(domain: str) -> None:
    said = {word for text in draw(domain, 5000) for word in text.split()}
    assert said - vocabulary() == set()


def test_vocabulary_is_rich() -> None:
    assert len(vocabulary()) >= 1500
    said = {word for text in draw("short", 20_000) for word in text.split()}
    assert len(said) >= 1500


@pytest.mark.parametrize(
    ("domain", "least", "most"),
    [
        ("digit", 1, 1),
        ("digits", 2, 6),
        ("letter", 1, 1),
        ("spelling", 2, 5),
        ("command", 1, 1),
        ("words", 1, 6),
        ("pseudo", 1, 3),
    ],
)
def test_lengths_in_words(domain: str, least: int, most: int) -> None:
    lengths = Counter(len(text.split()) for text in draw(domain))
    assert min(lengths) == least
    assert max(lengths) == most


def test_short_sentences_have_3_to_14_words() -> None:
    lengths = Counter(len(text.split()) for text in draw("short", 20_000))
    assert set(lengths) == set(range(3, 15))


def test_digits_letters_and_commands_are_complete() -> None:
    assert set(draw("digit")) == set(lexicon.DIGITS)
    assert set(draw("letter")) == set("abcdefghijklmnopqrstuvwxyz")
    assert set(draw("command", 5000)) == set(lexicon.COMMANDS)
    assert {"yes", "no", "backward", "marvin", "visual", "zero"} <= set(lexicon.COMMANDS)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (10, "ten"),
        (21, "twenty one"),
        (90, "ninety"),
        (100, "one hundred"),
        (305, "three hundred five"),
        (1000, "one thousand"),
        (9999, "nine thousand nine hundred ninety nine"),
    ],
)
def test_cardinal(number: int, words: str) -> None:
    assert cardinal(number) == words


def test_cardinals_differ() -> None:
    assert len({cardinal(number) for number in range(10_000)}) == 10_000
    with pytest.raises(ValueError, match="10000"):
        cardinal(10_000)


def test_orders_have_the_right_article() -> None:
    orders = " . ".join(draw("order"))
    assert re.search(r"\ban (eight|iced|americano|espresso)\b", orders)
    assert not re.search(r"\ba (eight|iced|americano|espresso)\b", orders)
    assert not re.search(r"\ban (?!eight|iced|americano|espresso)", orders)


def test_orders_vary_in_the_order_of_their_details() -> None:
    orders = draw("order")
    assert any(re.search(r"shot .*roast", order) for order in orders)
    assert any(re.search(r"roast .*shot", order) for order in orders)
    assert any(re.search(r"milk and .*sugar", order) for order in orders)
    assert any(re.search(r"sugar and .*milk", order) for order in orders)


def test_weights_choose_the_domains() -> None:
    rng = np.random.default_rng(0)
    texts = [sentence(rng, {"digit": 3.0, "letter": 1.0, "short": 0.0}) for _ in range(2000)]
    letters = sum(len(text) == 1 for text in texts)
    assert 400 < letters < 600
    assert all(" " not in text for text in texts)
    assert len({len(sentence(rng).split()) for _ in range(300)}) > 8  # all domains by default


@pytest.mark.parametrize("weights", [{}, {"digit": 0.0}, {"digit": -1.0}, {"digit": float("nan")}])
def test_useless_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        sentence(np.random.default_rng(0), weights)


def test_an_unknown_domain_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        sentence(np.random.default_rng(0), {"digitss": 1.0})


@pytest.mark.parametrize(
    ("entry", "forms"),
    [
        ("walk", "walk walks walked walked walking"),
        ("carry", "carry carries carried carried carrying"),
        ("drop", "drop drops dropped dropped dropping"),
        ("open", "open opens opened opened opening"),
        ("die", "die dies died died dying"),
        ("agree", "agree agrees agreed agreed agreeing"),
        ("forget/forgot/forgotten", "forget forgets forgot forgotten forgetting"),
        ("sit/sat", "sit sits sat sat sitting"),
        ("fix", "fix fixes fixed fixed fixing"),
    ],
)
def test_verbs_are_inflected(entry: str, forms: str) -> None:
    assert " ".join(lexicon.verb(entry)) == forms


def test_a_particle_follows_each_form_of_its_verb() -> None:
    assert lexicon.verb("think_of/thought_of").gerund == "thinking of"
    assert lexicon.verb("think_of/thought_of").participle == "thought of"


def test_nouns_have_their_plural() -> None:
    plurals = [lexicon.noun(entry).plural for entry in ("box", "city", "boy", "mouse/mice")]
    assert plurals == ["boxes", "cities", "boys", "mice"]

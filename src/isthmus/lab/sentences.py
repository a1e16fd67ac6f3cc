"""English text of our own for synthetic speech: commands, numbers, orders, spelling, sentences.

Every text is lower case letters, apostrophes and single spaces; numbers are words. A text is a pure
function of the numpy Generator that draws it.
"""
# ruff: noqa: SIM905  # long lists of words are easier to read and edit as text

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from isthmus.errors import IsthmusError, suggest
from isthmus.lab.vocabulary import (
    ADJECTIVES,
    ADVERBS,
    ANIMALS,
    CARD_RANKS,
    CARD_SUITS,
    COMMANDS,
    DAYS,
    DIGITS,
    DRINKS,
    EXCLAMATIONS,
    INTRANSITIVE,
    KEYWORDS,
    LETTERS,
    MILKS,
    MONTHS,
    NAMES,
    ORDINALS,
    PEOPLE,
    PLACES,
    PREPOSITIONS,
    SAYING,
    STUFF,
    SWEETENERS,
    TENS,
    THINGS,
    TIMES,
    TRANSITIVE,
    UNITS,
    Noun,
    Verb,
    noun,
    verb,
    words_of,
)

Rng = np.random.Generator
Item = TypeVar("Item")

_PEOPLE = [noun(entry) for entry in PEOPLE]
_ANIMALS = [noun(entry) for entry in ANIMALS]
_THINGS = [noun(entry) for entry in THINGS]
_TRANSITIVE = [verb(entry) for entry in TRANSITIVE]
_INTRANSITIVE = [verb(entry) for entry in INTRANSITIVE]
_SAYING = [verb(entry) for entry in SAYING]
_SINGULAR_PRONOUNS = "he she it somebody everyone nobody".split()
_PLURAL_PRONOUNS = "i you we they".split()
_OBJECT_PRONOUNS = "me you him her it us them".split()
_OWNERS = "my your his her its our their".split()
_MODALS = """can could will would should must may might can't couldn't won't wouldn't shouldn't
    used_to ought_to""".split()
_FUTURES = "i'll you'll he'll she'll we'll they'll i'd you'd he'd she'd we'd they'd".split()
_BEINGS = "i'm you're he's she's it's we're they're that's there's".split()
_HAVINGS = "i've you've we've they've he's she's".split()
_MANY = "some many few several most all these those no more other".split()
_LINKS = "and but because when while if before after until so as though or since".split()
_PLACE_PREPOSITIONS = """across around at behind below beside between by down from in inside into
    near on over past through to toward under with without""".split()
_MEASURES = ["", "", "", "some", "a bit of", "a little bit of", "a lot of", "lots of"]
_WHEELS = "single double triple".split()
_FUNCTION_WORDS = """
    the this that each every another a an is are was were be been isn't aren't wasn't weren't do
    does did don't doesn't didn't have has had haven't hasn't hadn't not very too quite than as
    there here what where when why who whose how which let's let out of please never even only
    much such what's who's where's hers mine yours ours theirs myself himself herself itself
    themselves something anything nothing everything
""".split()


def _pick(rng: Rng, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]  # rng.choice would first copy items to an array


def _maybe(rng: Rng, probability: float) -> bool:
    return bool(rng.random() < probability)


def _join(*parts: str) -> str:
    """Join what is not empty; `_` stands for a space within a list's entry."""
    return " ".join(part for part in parts if part).replace("_", " ")


def _article(phrase: str) -> str:
    """Put a or an before a phrase, by sound as far as the spelling tells."""
    silent_h = phrase.startswith(("hour", "honest", "honor"))
    consonant_sound = phrase.startswith(("uni", "use", "usu", "one", "eu"))
    vowel = (phrase[0] in "aeiou" and not consonant_sound) or silent_h
    return f"{'an' if vowel else 'a'} {phrase}"


# Numbers


def cardinal(number: int) -> str:
    """Say 0..9999 as words: `twelve hundred` is never said, `one thousand two hundred` is."""
    if not 0 <= number <= 9999:
        raise ValueError(f"cardinal says 0..9999, not {number}")
    if number < 20:
        return UNITS[number]
    if number < 100:
        return _join(TENS[number // 10 - 2], UNITS[number % 10] if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = cardinal(number % size) if number % size else ""
    return _join(cardinal(number // size), name, rest)


def _ordinal(number: int) -> str:
    """Say 1..31 as an ordinal."""
    if number <= 20:
        return ORDINALS[number - 1]
    return "thirtieth" if number == 30 else f"{TENS[number // 10 - 2]} {ORDINALS[number % 10 - 1]}"


def _year(rng: Rng) -> str:
    year = int(rng.integers(1100, 2100))
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return cardinal(year)
    if rest == 0:
        return f"{cardinal(century)} hundred" if century != 20 else "two thousand"
    return _join(cardinal(century), "oh" if rest < 10 else "", cardinal(rest))


def _clock_time(rng: Rng) -> str:
    hour = UNITS[int(rng.integers(1, 13))]
    minute = int(rng.integers(1, 60))
    shape = int(rng.integers(5))
    if shape == 0:
        return f"{hour} o'clock"
    if shape == 1:
        return f"{_pick(rng, ['half past', 'quarter past', 'a quarter to', 'quarter to'])} {hour}"
    if shape == 2:
        side = _pick(rng, ["past", "to"])
        return f"{_pick(rng, ['five', 'ten', 'twenty', 'twenty five'])} {side} {hour}"
    half = _pick(rng, ["", "", "a m", "p m", "in the morning", "in the afternoon"])
    return _join(hour, "oh" if minute < 10 else "", cardinal(minute), half)


def _date(rng: Rng) -> str:
    day, month = _ordinal(int(rng.integers(1, 32))), _pick(rng, MONTHS)
    weekday = _pick(rng, DAYS) if _maybe(rng, 0.3) else ""
    year = _year(rng) if _maybe(rng, 0.3) else ""
    if _maybe(rng, 0.5):
        return _join(weekday, "the", day, "of", month, year)
    return _join(weekday, month, day, year)


def _number(rng: Rng) -> str:
    shape = int(rng.integers(8))
    if shape < 4:  # as many short numbers as long ones
        return cardinal(int(rng.integers(10 ** int(rng.integers(1, 5)))))
    if shape == 4:
        return _join(*(cardinal(int(rng.integers(100))) for _ in range(rng.integers(2, 4))))
    return (_year, _clock_time, _date)[shape - 5](rng)


# Words and letters


def _several(items: Sequence[str], least: int, most: int) -> Callable[[Rng], str]:
    """Make a domain of `least` to `most` items in a row."""

    def draw(rng: Rng) -> str:
        return _join(*(_pick(rng, items) for _ in range(rng.integers(least, most + 1))))

    return draw


_ONSETS = """b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sc sh sk sl sm
    sn sp st str sw t th tr tw v w wh y z""".split()
_VOWELS = "a e i o u a e i o u ai ay ea ee ie oa oo ou ow au oi".split()
_INNER_CODAS = "l m n r s t".split()
_CODAS = """b ck d ft g l ld ll lt m mp n nd ng nk nt p r rd rk rm rn rt s sh sk ss st t th
    x""".split()


def _pseudo_word(rng: Rng) -> str:
    syllables = int(rng.integers(1, 4))
    word = ""
    for remaining in range(syllables - 1, -1, -1):
        word += _pick(rng, _ONSETS) if _maybe(rng, 0.95) else ""
        word += _pick(rng, _VOWELS)
        if _maybe(rng, 0.3 if remaining else 0.7):
            word += _pick(rng, _INNER_CODAS if remaining else _CODAS)
    return word if len(word) > 2 else word + "n"


def _pseudo(rng: Rng) -> str:
    return _join(*(_pseudo_word(rng) for _ in range(rng.integers(1, 4))))


# Orders and cards


def _order(rng: Rng) -> str:
    carrier = _pick(
        rng,
        ["can i get", "can i have", "may i have", "i'd like", "i want", "make me", "brew"]
        + (["i'll have", "give me", "could i get", "i would like"] if _maybe(rng, 0.3) else []),
    )
    size = f"{_pick(rng, ['eight', 'twelve', 'sixteen', 'twenty'])} ounce"
    if _maybe(rng, 0.4):
        size = _pick(rng, ["small", "medium", "large"])
    roast = _pick(rng, ["light roast", "medium roast", "dark roast"])
    shots = f"{_pick(rng, _WHEELS)} shot"
    details = [detail for detail in (size, roast, shots) if _maybe(rng, 0.45)]
    rng.shuffle(details)
    drink = _join(*details, _pick(rng, DRINKS))
    additions = [
        _join(_pick(rng, _MEASURES), _pick(rng, items))
        for items in (MILKS, SWEETENERS)
        if _maybe(rng, 0.5)
    ]
    rng.shuffle(additions)
    drink = drink if _maybe(rng, 0.1) else _article(drink)
    return _join(carrier, drink, "with" if additions else "", " and ".join(additions))


def _card(rng: Rng) -> str:
    if _maybe(rng, 0.04):
        return _pick(rng, ["joker", "red joker", "black joker"])
    cards = [f"{_pick(rng, CARD_RANKS)} of {_pick(rng, CARD_SUITS)}" for _ in range(2)]
    prefix = "the" if _maybe(rng, 0.15) else ""
    return _join(prefix, " and ".join(cards) if _maybe(rng, 0.1) else cards[0])


# Short sentences


def _adjective(rng: Rng) -> str:
    return _pick(rng, ADJECTIVES)


def _head(rng: Rng, people: float = 0.2) -> Noun:
    """Draw a noun, a person with the given probability."""
    if _maybe(rng, people):
        return _pick(rng, _PEOPLE)
    return _pick(rng, _ANIMALS) if _maybe(rng, 0.15) else _pick(rng, _THINGS)


def _singular(rng: Rng, people: float = 0.2) -> str:
    """Draw a noun phrase that takes a verb in -s."""
    if _maybe(rng, 0.12):
        return _pick(rng, NAMES) if _maybe(rng, 0.85) else _pick(rng, PLACES)
    qualified = _adjective(rng) if _maybe(rng, 0.35) else ""
    if _maybe(rng, 0.12):
        return _join("the" if _maybe(rng, 0.5) else "", qualified, _pick(rng, STUFF))
    phrase = _join(qualified, _head(rng, people).singular)
    determiner = int(rng.integers(10))
    if determiner < 4:
        return f"the {phrase}"
    if determiner < 7:
        return _article(phrase)
    if determiner < 9:
        return f"{_pick(rng, _OWNERS)} {phrase}"
    return f"{_pick(rng, ['this', 'that', 'each', 'every', 'another', 'one'])} {phrase}"


def _plural(rng: Rng, people: float = 0.2) -> str:
    """Draw a noun phrase that takes a verb without -s."""
    if _maybe(rng, 0.1):
        return f"{_pick(rng, NAMES)} and {_pick(rng, NAMES)}"
    determiner = _pick(rng, ["the", "", _pick(rng, _MANY), _pick(rng, _OWNERS)])
    if _maybe(rng, 0.2):
        determiner = _pick(rng, UNITS[2:13])
    return _join(determiner, _adjective(rng) if _maybe(rng, 0.4) else "", _head(rng, people).plural)


def _object(rng: Rng) -> str:
    if _maybe(rng, 0.2):
        return _pick(rng, _OBJECT_PRONOUNS)
    return _singular(rng) if _maybe(rng, 0.7) else _plural(rng)


def _place(rng: Rng) -> str:
    preposition = _pick(rng, _PLACE_PREPOSITIONS)
    return _join(preposition, _singular(rng, 0.1) if _maybe(rng, 0.75) else _plural(rng, 0.1))


def _ending(rng: Rng) -> str:
    """Draw what may follow a clause: a place, a time, a manner, or mostly nothing."""
    shape = int(rng.integers(8))
    if shape < 2:
        return _place(rng)
    return {2: _pick(rng, TIMES), 3: _pick(rng, ADVERBS)}.get(shape, "")


def _predicate(rng: Rng, form: Callable[[Verb], str]) -> str:
    """Draw a verb in a form with its object or place."""
    if _maybe(rng, 0.55):
        return _join(form(_pick(rng, _TRANSITIVE)), _object(rng))
    return _join(form(_pick(rng, _INTRANSITIVE)), _place(rng) if _maybe(rng, 0.6) else "")


def _subject(rng: Rng) -> tuple[str, bool]:
    """Draw a subject; tell whether it is a third person singular."""
    shape = int(rng.integers(10))
    if shape < 3:
        return _pick(rng, _SINGULAR_PRONOUNS), True
    if shape < 6:
        return _pick(rng, _PLURAL_PRONOUNS), False
    return (_singular(rng, 0.7), True) if shape < 9 else (_plural(rng, 0.7), False)


def _is(subject: str, singular: bool, past: bool) -> str:
    if past:
        return "was" if singular or subject == "i" else "were"
    return "is" if singular else "am" if subject == "i" else "are"


def _verbal_clause(rng: Rng) -> str:
    subject, singular = _subject(rng)
    adverb = _pick(rng, ADVERBS) if _maybe(rng, 0.12) else ""
    shape = int(rng.integers(8))
    if shape < 3:
        return _join(subject, adverb, _predicate(rng, lambda verb: verb.past))
    if shape < 5:
        return _join(
            subject, adverb, _predicate(rng, lambda verb: verb.third if singular else verb.base)
        )
    if shape == 5:
        return _join(subject, _pick(rng, _MODALS), adverb, _predicate(rng, lambda verb: verb.base))
    if shape == 6:
        has = _pick(rng, ["had", "has" if singular else "have", "hadn't"])
        return _join(subject, has, adverb, _predicate(rng, lambda verb: verb.participle))
    is_ = _is(subject, singular, _maybe(rng, 0.5))
    return _join(subject, is_, _predicate(rng, lambda verb: verb.gerund))


def _contracted_clause(rng: Rng) -> str:
    shape = int(rng.integers(5))
    if shape == 0:
        return _join(_pick(rng, _FUTURES), _predicate(rng, lambda verb: verb.base))
    if shape == 1:
        degree = _pick(rng, ["", "not", "very", "too", "quite", "never", "only"])
        return _join(_pick(rng, _BEINGS[:-1]), degree, _adjective(rng))
    if shape == 2:
        return _join(_pick(rng, _HAVINGS), _predicate(rng, lambda verb: verb.participle))
    if shape == 3:
        subject, singular = _subject(rng)
        helper = _pick(rng, ["doesn't" if singular else "don't", "didn't", "did not"])
        return _join(subject, helper, _predicate(rng, lambda verb: verb.base))
    return _join(_pick(rng, _BEINGS), _singular(rng))


def _being_clause(rng: Rng) -> str:
    subject, singular = _subject(rng)
    is_ = _is(subject, singular, _maybe(rng, 0.6))
    shape = int(rng.integers(4))
    if shape == 0:
        return _join(subject, is_, _place(rng))
    if shape == 1 and singular:
        return _join(subject, is_, _article(_join(_adjective(rng), _head(rng, 0.5).singular)))
    degree = _pick(rng, ["", "", "not", "very", "too", "quite", "so", "rather"])
    return _join(subject, is_, degree, _adjective(rng))


def _question(rng: Rng) -> str:
    subject, singular = _subject(rng)
    shape = int(rng.integers(5))
    if shape == 0:
        does = _pick(rng, ["does" if singular else "do", "did"])
        return _join(does, subject, _predicate(rng, lambda verb: verb.base))
    if shape == 1:
        what = _pick(rng, ["what", "where", "when", "why", "how", "who"])
        does = _pick(rng, ["does" if singular else "do", "did"])
        return _join(what, does, subject, _pick(rng, _TRANSITIVE).base)
    if shape == 2:
        return _join(_pick(rng, ["who's", "what's", "where's"]), _singular(rng))
    if shape == 3:
        return _join(_is(subject, singular, _maybe(rng, 0.5)), subject, _adjective(rng))
    modal = _pick(rng, ["can", "could", "will", "would", "may", "must", "can't", "won't"])
    return _join(modal, subject, _predicate(rng, lambda verb: verb.base))


def _request(rng: Rng) -> str:
    opening = _pick(
        rng, ["", "", "please", "don't", "let's", "never", "let us", "always", "do not"]
    )
    return _join(opening, _predicate(rng, lambda verb: verb.base))


def _existence(rng: Rng) -> str:
    if _maybe(rng, 0.6):
        opening = _pick(rng, ["there is", "there was", "there's", "here is", "that was", "this is"])
        return _join(opening, _article(_join(_adjective(rng), _head(rng).singular)), _place(rng))
    return _join(_pick(rng, ["there are", "there were", "these are"]), _plural(rng))


def _clause(rng: Rng) -> str:
    shapes = (_verbal_clause, _verbal_clause, _contracted_clause, _being_clause)
    return _pick(rng, shapes)(rng)


def _statement(rng: Rng) -> str:
    shape = int(rng.integers(20))
    if shape == 0:
        return _join(_pick(rng, EXCLAMATIONS), _clause(rng))
    if shape == 1:
        reply = _pick(rng, _SAYING[:1]).past
        return _join(_clause(rng), reply, _pick(rng, NAMES))
    if shape == 2:
        return _join(_pick(rng, _PLURAL_PRONOUNS), _pick(rng, _SAYING).past, _clause(rng))
    if shape == 3:
        return _join(_singular(rng), _place(rng))
    if shape == 4:
        return _join(_adjective(rng), "and", _adjective(rng))
    if shape == 5:
        return _join(_pick(rng, TIMES), _clause(rng))
    if shape < 9:
        return _join(_clause(rng), _pick(rng, _LINKS), _clause(rng))
    makers = {9: _question, 10: _question, 11: _request, 12: _request, 13: _existence}
    if shape in makers:
        return makers[shape](rng)
    return _join(_clause(rng), _ending(rng))


def _short(rng: Rng) -> str:
    while True:
        text = _statement(rng)
        if 3 <= text.count(" ") + 1 <= 14:
            return text


def _collect_vocabulary() -> frozenset[str]:
    words = words_of(
        [
            *(UNITS + TENS + ORDINALS + MONTHS + DAYS + LETTERS + COMMANDS + KEYWORDS + DRINKS),
            *(MILKS + SWEETENERS + CARD_RANKS + CARD_SUITS + NAMES + PLACES + STUFF + ADJECTIVES),
            *(ADVERBS + TIMES + PREPOSITIONS + EXCLAMATIONS + _SINGULAR_PRONOUNS + _MANY + _LINKS),
            *(_PLURAL_PRONOUNS + _OBJECT_PRONOUNS + _OWNERS + _MODALS + _FUTURES + _BEINGS),
            *(_HAVINGS + _PLACE_PREPOSITIONS + _MEASURES + _WHEELS + _FUNCTION_WORDS),
            *(form for word in _PEOPLE + _ANIMALS + _THINGS for form in word),
            *(form for word in _TRANSITIVE + _INTRANSITIVE + _SAYING for form in word),
            "hundred thousand oh afternoon o'clock half past quarter thirtieth am rather us",
            "can i get have may i'd like want make me brew i'll give could would ounce medium",
            "large roast shot with joker red black",
        ]
    )
    return frozenset(words)


_VOCABULARY = _collect_vocabulary()
_ALL_WORDS = [*sorted(word for word in _VOCABULARY if len(word) > 1), "a", "i"]


def vocabulary() -> frozenset[str]:
    """Return every word that the domains but `pseudo` can say."""
    return _VOCABULARY


DOMAINS: dict[str, Callable[[Rng], str]] = {
    "digit": _several(DIGITS, 1, 1),
    "digits": _several(DIGITS, 2, 6),
    "number": _number,
    "letter": _several(LETTERS, 1, 1),
    "spelling": _several(LETTERS, 2, 5),
    "command": _several(COMMANDS, 1, 1),
    "keyword": _several(KEYWORDS, 1, 1),
    "order": _order,
    "card": _card,
    "short": _short,
    "words": _several(_ALL_WORDS, 1, 6),
    "pseudo": _pseudo,
}


def sentence(rng: Rng, domains: Mapping[str, float] | None = None) -> str:
    """Draw one text.

    Args:
        domains: weight of each domain by its name in `DOMAINS`; all of the same weight if None.
    """
    weights = dict.fromkeys(DOMAINS, 1.0) if domains is None else domains
    for name in weights:
        if name not in DOMAINS:
            raise IsthmusError(
                f"there is no domain of text {name!r}.{suggest(name, DOMAINS)} "
                f"Known domains: {', '.join(DOMAINS)}"
            )
    cumulative = np.cumsum(list(weights.values()))
    if not weights or min(weights.values()) < 0 or not 0 < cumulative[-1] < np.inf:
        raise IsthmusError(
            f"weights of domains are >= 0 and finite with a positive sum, not {dict(weights)}"
        )
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return DOMAINS[list(weights)[index]](rng)

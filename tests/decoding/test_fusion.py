"""Words that scorers speak of are told from tokens, and nothing is given for what was not said."""

import gzip
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from isthmus.decoding.beam import SearchOptions, beam_search
from isthmus.decoding.fusion import (
    FLOOR,
    Hotwords,
    NGram,
    NGramFusion,
    TokenScorer,
    read_arpa,
)
from isthmus.errors import IsthmusError
from isthmus.model.llm import LLM, character_tokenizer

END = 2
ARPA = """some words before

\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-1.0 <unk> -0.1
-99 <s> -0.2
-1.5 </s>
-0.5 red -0.3
-0.7\tfox\t-0.4

\\2-grams:
-0.2 <s> red -0.25
-0.3 red fox
-0.6 fox </s>

\\3-grams:
-0.05 <s> red fox

\\end\\
"""
BIGRAM = "\\data\\\n\\1-grams:\n-1 CAT -0.5\n-2 </s>\n\\2-grams:\n-0.1 CAT CAT\n\\end\\\n"


def subwords(prefix: bool = False) -> PreTrainedTokenizerFast:
    """Pieces as of SentencePiece; with `prefix` texts begin with a space, as in Llama 2."""
    names = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz'", "▁new", "new", "▁york", "ers", "▁in"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [
        (one[:cut], one[cut:])
        for one in ("▁n", "▁ne", "▁new", "ne", "new", "▁y", "▁yo", "▁yor", "▁york", "er", "ers")
        for cut in (len(one) - 1,)
    ] + [("▁", "i"), ("▁i", "n")]
    for left, right in merges:
        for name in (left, right, left + right):
            vocabulary.setdefault(name, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    scheme: Any = "always" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "characters": character_tokenizer,
    "subwords": subwords,
    "with prefix": lambda: subwords(prefix=True),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def total(scorer: TokenScorer, text: str) -> float:
    """What a scorer adds in all, asked as the search asks."""
    added, states = 0.0, [scorer.start(0)]
    for token in scorer.encode(text):
        added += float(scorer.score(states, torch.tensor([[token, 3]]))[0, 0])
        states = list(scorer.extend(states, [token]))
    return added + float(scorer.finish(states)[0])


def length(tokenizer: Any, phrase: str, before: str = "in ") -> int:
    """Tokens of a phrase behind other text."""
    whole, rest = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in (before + phrase, before.strip())
    )
    return len(whole) - len(rest)


def test_a_phrase_said_earns_its_tokens(tokenizer: Any) -> None:
    hotwords = Hotwords(["new york"], tokenizer, bonus=0.5)
    earned = 0.5 * length(tokenizer, "new york")
    assert total(hotwords, "in new york") == pytest.approx(earned)
    assert total(hotwords, "in new york in new york") == pytest.approx(2 * earned)
    first = 0.5 * len(hotwords.encode("new york"))
    assert total(hotwords, "new york in") == pytest.approx(first)
    assert total(Hotwords([], tokenizer), "new york") == 0.0


@pytest.mark.parametrize(
    "text", ["in new yorkers", "renew york", "new new", "in newyork", "", "in new", "york new yor"]
)
def test_a_phrase_not_said_leaks_nothing(tokenizer: Any, text: str) -> None:
    assert total(Hotwords(["new york"], tokenizer, bonus=0.5), text) == pytest.approx(0.0)


def test_the_bonus_comes_token_by_token(tokenizer: Any) -> None:
    hotwords = Hotwords(["new york"], tokenizer, bonus=0.5)
    states = [hotwords.start(0)]
    for token in hotwords.encode("new york"):
        assert float(hotwords.score(states, torch.tensor([[token]]))) == pytest.approx(0.5)
        states = hotwords.extend(states, [token])
    assert float(hotwords.finish(states)) == 0.0


def test_phrases_within_phrases() -> None:
    tokenizer = character_tokenizer()
    hotwords = Hotwords(["new", "new york", "york", "york inn"], tokenizer)
    assert total(hotwords, "a new inn") == pytest.approx(4)
    assert total(hotwords, "a newt") == pytest.approx(0)
    assert total(hotwords, "a york") == pytest.approx(5)
    assert total(hotwords, "a york inn") == pytest.approx(9)  # "york" begins it
    assert total(hotwords, "a new york") == pytest.approx(9 + 5)  # "york" ends it
    assert total(hotwords, "a new yorker") == pytest.approx(4)
    assert total(Hotwords(["art", "artist"], tokenizer), "an artist") == pytest.approx(7)


def test_random_texts_earn_what_is_found_in_them() -> None:
    tokenizer, choose = character_tokenizer(), random.Random(0)
    phrases = ["a b", "ab", "b a b", "ba ab"]
    hotwords = Hotwords(phrases, tokenizer)
    for _ in range(300):
        text = " a" + "".join(choose.choice("ab  ") for _ in range(12))
        padded = text + " "
        expected = sum(
            len(phrase) + 1
            for phrase in phrases
            for place in range(len(text))
            if padded.startswith(f" {phrase} ", place)
        )
        assert total(hotwords, text) == pytest.approx(expected), text


def test_hotwords_without_words_are_refused() -> None:
    with pytest.raises(IsthmusError, match="Leave it out"):
        Hotwords(["new york", "  "], character_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NGram:
    path = tmp_path_factory.mktemp("arpa") / "lm.arpa"
    path.write_text(ARPA)
    return read_arpa(path)


def test_arpa(model: NGram, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(ARPA)
    assert read_arpa(tmp_path / "lm.arpa.gz") == model
    decimal = {
        ("<s>",): {"red": -0.2, "fox": -0.2 - 0.7},
        ("<s>", "red"): {"fox": -0.05, "red": -0.25 - 0.3 - 0.5},
        ("red", "fox"): {"</s>": -0.6, "red": -0.4 - 0.5, "blue": -0.4 - 1.0},
        ("red", "red", "fox"): {"</s>": -0.6},
        (): {"red": -0.5},
    }
    for context, words in decimal.items():
        for word, value in words.items():
            assert model.log_prob(context, word) == pytest.approx(value * math.log(10))
    assert NGram(1, {"red": -1.0}, {}).log_prob([], "blue") == FLOOR


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nothing of the kind", "cut short"),
        (ARPA.replace("\\end\\", ""), "cut short"),
        (ARPA.replace("-0.3 red fox", "-0.3 red"), "line 17 is no 2-gram"),
        (ARPA.replace("-0.3 red fox", "red fox jumps"), "red"),
        ("\\data\\\n\\1-grams:\n\\end\\\n", "no n-grams"),
    ],
)
def test_files_that_are_no_arpa(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(text)
    with pytest.raises(IsthmusError, match=complaint):
        read_arpa(tmp_path / "lm.arpa")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "lm.gz").write_bytes(gzip.compress(ARPA.encode())[:-12])
    for name in ("lm.gz", "none.arpa"):
        with pytest.raises(IsthmusError, match="Cannot read"):
            read_arpa(tmp_path / name)


def expected_score(model: NGram, words: list[str], weight: float, bonus: float) -> float:
    context, found = ["<s>"], 0.0
    for word in words:
        found += weight * model.log_prob(context, word) + bonus
        context.append(word if word in model.log_probs else "<unk>")
    return found + weight * model.log_prob(context, "</s>")


@pytest.mark.parametrize("text", ["red fox", "red  foxes fox red", ""])
def test_words_are_judged_one_by_one(model: NGram, tokenizer: Any, text: str) -> None:
    fusion = NGramFusion(model, tokenizer, weight=0.7, word_bonus=0.25)
    expected = expected_score(model, text.split(), 0.7, 0.25)
    assert total(fusion, text) == pytest.approx(expected)


def test_punctuation_is_no_part_of_words(model: NGram) -> None:
    fusion = NGramFusion(model, character_tokenizer(), weight=0.7)
    expected = expected_score(model, ["red", "fox"], 0.7, 0.0)
    for text in ("Red, fox.", "red - fox", '"Red" FOX!'):
        assert total(fusion, text) == pytest.approx(expected)


def test_a_word_counts_when_the_next_begins(model: NGram, tokenizer: Any) -> None:
    fusion = NGramFusion(model, tokenizer, weight=1.0)
    red, both = (fusion.encode(text) for text in ("red", "red fox"))
    states = [fusion.start(0)]
    for place, token in enumerate(both):
        added = float(fusion.score(states, torch.tensor([[token]])))
        expected = model.log_prob(["<s>"], "red") if place == len(red) else 0.0
        assert added == pytest.approx(expected)
        states = fusion.extend(states, [token])


def test_the_letter_case_is_the_models(tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text(BIGRAM)
    fusion = NGramFusion(read_arpa(tmp_path / "lm.arpa"), character_tokenizer(), weight=1.0)
    assert total(fusion, "cat cat") == pytest.approx(math.log(10) * (-1 - 0.1 - 0.5 - 2))


def test_letters_of_several_tokens(load_llm: Callable[..., LLM]) -> None:
    tokenizer = load_llm("qwen2").tokenizer  # a token a byte
    word = "caf\u00e9"
    fusion = NGramFusion(NGram(1, {word: -1.0, "</s>": -3.0}, {}), tokenizer, weight=1.0)
    assert total(fusion, f"{word} {word}") == pytest.approx(-5.0)
    assert total(Hotwords(["caf"], tokenizer), f"a {word}") == pytest.approx(0.0)


def texts(llm: LLM, prompts: list[Tensor], *scorers: TokenScorer) -> list[str]:
    options = SearchOptions(candidates=100, repetition_guard=False)
    found = beam_search(llm, prompts, [16] * len(prompts), [END], options=options, scorers=scorers)
    return [llm.tokenizer.decode(hypotheses[0].tokens) for hypotheses in found]


def test_in_the_search(llm: LLM, model: NGram) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(length, llm.dim, generator=generator) for length in (5, 9)]
    free = texts(llm, prompts)
    assert not any("red" in text for text in free)
    hotwords = Hotwords(["red fox"], llm.tokenizer, bonus=9.0)
    assert all("red fox" in text for text in texts(llm, prompts, hotwords))
    never = Hotwords(["red fox"], llm.tokenizer, bonus=0.0)
    assert texts(llm, prompts, never, NGramFusion(model, llm.tokenizer, weight=0.0)) == free
    liked = texts(llm, prompts, NGramFusion(model, llm.tokenizer, 3.0, word_bonus=30.0))
    assert all(len(text.split()) > 4 for text in liked)

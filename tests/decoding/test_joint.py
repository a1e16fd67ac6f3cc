"""What CTC adds in the search is the sum over all of its alignments, whatever the tokens."""

import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Wav2Vec2CTCTokenizer

from isthmus.build import build_model
from isthmus.decoding import joint as module
from isthmus.decoding.beam import SearchOptions, beam_search
from isthmus.decoding.forced import Given, forced_hypotheses
from isthmus.decoding.fusion import Hotwords
from isthmus.decoding.joint import UNSPELLABLE, CTCPrefixScorer, TextSpelling, TokenSpelling
from isthmus.decoding.recogniser import Speech
from isthmus.decoding.timestamps import FLOOR
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.decoding.transcript import words_of
from isthmus.errors import IsthmusError
from isthmus.model.ctc_head import CTCHead, TransformersHead
from isthmus.model.llm import LLM, character_tokenizer
from isthmus.model.spelling import WILDCARD, learn_units, letter_tokenizer
from isthmus.recipe import Recipe, change_settings
from isthmus.scoring import score
from isthmus.settings.conformers import SentencePieceUnits
from isthmus.speech.corpora import read_corpus
from isthmus.speech.cuts import (
    transcript,
)
from tests.conftest import WAV2VEC2_UNITS

END = 2
BLANK = 0
LETTERS = letter_tokenizer("ab ")  # blank, unknown, a, b, space
TEXTS = ["", "a", "b", "ab", "aa", "a b", "aab", "ab a", "b a b", "aaa", "b b"]
SPEECH = Path(os.environ.get("ISTHMUS_SPEECH", "absent"))


def pieces(*names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words and parts of words, as SentencePiece's; spaces belong to words."""
    every = ["<blank>", "<unk>", *dict.fromkeys([*"▁abc7.", *names])]
    merges = [(name[:-1], name[-1]) for name in names]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(every)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<blank>", unk_token="<unk>"
    )


def of_bytes() -> PreTrainedTokenizerFast:
    """A token for each byte, as where a byte-level tokenizer knows no better."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "characters": character_tokenizer,
    "words": lambda: pieces("▁a", "▁ab", "ab", "▁b"),
    "bytes": of_bytes,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def posteriors(num_frames: int, num_units: int = 5, seed: int = 0) -> Tensor:
    """Log-probabilities (T, V) of noise."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_frames, num_units, generator=generator)).double().log_softmax(dim=1)


def head_of(units: Any) -> CTCHead:
    """A head with these units; nothing is asked but how they spell."""
    return TransformersHead(torch.nn.Identity(), units.pad_token_id, 50.0, units)


def spelling(tokenizer: Any, units: Any = LETTERS) -> TextSpelling:
    return TextSpelling(tokenizer, head_of(units))


def encoded(scorer: CTCPrefixScorer, text: str) -> list[int]:
    assert isinstance(scorer.spelling, TextSpelling)
    return scorer.spelling.encode(text)


def said(scorer: CTCPrefixScorer, text: str, utterance: int = 0) -> tuple[float, float]:
    """What a scorer adds in all, asked as the search asks: before the end, and with it."""
    added, states = 0.0, [scorer.start(utterance)]
    other = scorer.start(utterance)  # a hypothesis beside it
    for token in encoded(scorer, text):
        asked = torch.tensor([[token, 3, token], [4, token, 3]])
        added += float(scorer.score([*states, other], asked)[0, 2])
        states = scorer.extend([*states, other], [token, 5])[:1]
    return added, added + float(scorer.finish([*states, other])[0])


def by_torch(log_probs: Tensor, units: list[int], blank: int) -> float:
    """log p(units) of an utterance (T, V)."""
    target, lengths = (
        torch.tensor([units]),
        (torch.tensor([len(log_probs)]), torch.tensor([len(units)])),
    )
    loss = torch.nn.functional.ctc_loss(log_probs[:, None], target, *lengths, blank, "sum")
    return -float(loss)


@lru_cache(1)
def alignments(seed: int) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of units, from every path there is."""
    rows, found = posteriors(6, seed=seed).tolist(), defaultdict[tuple[int, ...], float](float)
    for path in itertools.product(range(5), repeat=len(rows)):
        units = tuple(unit for unit, _ in itertools.groupby(path) if unit != BLANK)
        found[units] += math.exp(sum(row[unit] for row, unit in zip(rows, path, strict=True)))
    return found


def units_of(text: str) -> tuple[int, ...]:
    return tuple(LETTERS(text)["input_ids"])


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_sum_over_all_alignments(tokenizer: Any, seed: int) -> None:
    scorer = CTCPrefixScorer(spelling(tokenizer), [posteriors(6, seed=seed)], weight=0.5)
    every = alignments(seed)
    for text in TEXTS:
        units = units_of(text)
        begun = sum(p for path, p in every.items() if path[: len(units)] == units)
        assert said(scorer, text) == pytest.approx(
            (0.5 * math.log(begun), 0.5 * math.log(every[units])), abs=1e-6
        )


def test_a_long_text_has_what_torch_gives_it() -> None:
    log_probs = posteriors(300, num_units=30)
    text = "all that is said to be so is not so for all who hear"
    units = letter_tokenizer()
    scorer = CTCPrefixScorer(spelling(character_tokenizer(), units), [log_probs], weight=1.0)
    expected = by_torch(log_probs, units(text)["input_ids"], BLANK)
    assert said(scorer, text)[1] == pytest.approx(expected, abs=1e-5)


def test_beginnings_share_what_their_beginning_has() -> None:
    """The probability of a prefix is that of the text itself and of all that may follow."""
    scorer = CTCPrefixScorer(spelling(character_tokenizer()), [posteriors(40)], weight=1.0)
    for text in ("", "a", "ab", "a b"):
        # no text asks for the unknown unit, but CTC may spell it
        state = scorer.start(0)
        for token in encoded(scorer, text):
            [state] = scorer.extend([state], [token])
        following = [module.Step((unit,)) for unit in range(1, 5)]
        shares = scorer._prefixes([state] * 4, following).exp().sum()
        whole = (scorer.finish([state]) + state.prefix).exp()
        assert float(shares + whole) == pytest.approx(math.exp(state.prefix), rel=1e-9)


def test_company_changes_nothing() -> None:
    short, long, texts = posteriors(9), posteriors(30, seed=1), [*TEXTS, "abababababab", "aaaaaaa"]
    speller = spelling(character_tokenizer())
    alone = CTCPrefixScorer(speller, [short], weight=0.3)
    together = CTCPrefixScorer(speller, [long, short], weight=0.3)
    for text in texts:
        assert said(together, text, utterance=1) == pytest.approx(said(alone, text), abs=1e-9)


def test_a_text_with_too_few_frames_goes_on() -> None:
    scorer = CTCPrefixScorer(spelling(character_tokenizer()), [posteriors(3)], weight=1.0)
    assert said(scorer, "abab") == (FLOOR, FLOOR)
    assert said(scorer, "ababab") == (FLOOR, FLOOR)
    assert said(scorer, "aab")[1] == FLOOR  # it needs a blank between
    assert said(scorer, "bab")[1] > FLOOR


@pytest.mark.parametrize(
    ("text", "spelled", "runs"),
    [
        ("a b.", "a b", 0),
        ("A. - B!", "a b", 0),
        ("a 77 b 7", "a b", 2),
        ("a7b", "ab", 1),
        ("ä b", "a b", 0),
        ("  a \n b  ", "a b", 0),
        ("...", "", 0),
        ("中文", "", 1),
        ("a 🎉 b", "a b", 0),
    ],
)
def test_what_cannot_be_spelled(text: str, spelled: str, runs: int) -> None:
    scorer = CTCPrefixScorer(spelling(of_bytes()), [posteriors(9)], weight=0.5)
    plain = said(scorer, spelled)
    # letter by letter each digit is a run of its own
    runs = sum(map(str.isdigit, text)) or len(text) * runs
    cost = 0.5 * UNSPELLABLE * runs
    assert said(scorer, text) == pytest.approx([one + cost for one in plain], abs=1e-9)


def test_units_of_several_letters_are_spelled_by_whole_words(tokenizer: Any) -> None:
    units = pieces("▁a", "▁ab", "ab", "▁b")
    log_probs = posteriors(8, num_units=len(units))
    scorer = CTCPrefixScorer(spelling(tokenizer, units), [log_probs], weight=1.0)
    for text in ("ab", "ab b", "a ab ba"):
        expected = by_torch(log_probs, units(text)["input_ids"], BLANK)
        assert said(scorer, text)[1] == pytest.approx(expected, abs=1e-6)
    assert said(scorer, "ab")[0] == 0.0  # it may become "abb" yet
    assert said(scorer, "ab b")[0] == said(scorer, "ab a")[0] < 0


def test_tokens_that_are_units_are_not_spelled() -> None:
    """One step for each, one unit, the same again after a blank; and nothing at the end."""
    blank, every = 4, defaultdict[tuple[int, ...], float](float)
    log_probs = posteriors(6).roll(4, dims=1)  # its blank is the last
    for units, probability in alignments(0).items():
        every[tuple(unit - 1 for unit in units)] += probability
    head = head_of(LETTERS)
    head.blank = blank
    scorer = CTCPrefixScorer(TokenSpelling(head), [log_probs.float()], weight=0.5)
    for tokens in ((), (0,), (3, 3), (0, 1, 1), (2, 0, 2, 1)):
        added, states = 0.0, [scorer.start(0)]
        for token in tokens:
            added += float(scorer.score(states, torch.tensor([[token, 1]]))[0, 0])
            states = scorer.extend(states, [token])
        begun = sum(p for path, p in every.items() if path[: len(tokens)] == tokens)
        assert added == pytest.approx(0.5 * math.log(begun), abs=1e-5)
        assert added + float(scorer.finish(states)[0]) == pytest.approx(
            0.5 * math.log(every[tokens]), abs=1e-5
        )


def test_of_a_large_vocabulary_no_table_is_copied() -> None:
    """What is kept is a column, the blank's; the rest is looked up when it is asked about."""
    log_probs = [posteriors(frames, num_units=20_000).float() for frames in (90, 30)]
    head = head_of(LETTERS)
    scorer = CTCPrefixScorer(TokenSpelling(head), log_probs, weight=1.0)
    kept = [value for value in vars(scorer).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in kept) == 2 * (90 + 1)
    assert all(one is other for one, other in zip(scorer.log_probs, log_probs, strict=True))
    for utterance, own in enumerate(log_probs):
        tokens = [7, 19_999, 19_999, 500]
        states = [scorer.start(utterance)]
        for token in tokens:
            states = scorer.extend(states, [token])
        found = states[0].prefix + float(scorer.finish(states)[0])
        assert found == pytest.approx(by_torch(own.double(), tokens, BLANK), abs=1e-3)


WAV2VEC2 = {unit: place for place, unit in enumerate(WAV2VEC2_UNITS)}


@pytest.fixture(scope="module")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of wav2vec2-base-960h."""
    folder = tmp_path_factory.mktemp("capitals")
    (folder / "vocab.json").write_text(json.dumps(WAV2VEC2))
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


@pytest.fixture(scope="module")
def sentence_pieces() -> Any:
    """Such as those of Parakeet, of lower-case letters."""
    texts = ["the cat sat on the mat", "that is the thing", "don't stop at the end", "i sat there"]
    return learn_units(SentencePieceUnits(type="sentencepiece", size=40), texts)


@pytest.mark.parametrize("text", ["Don't stop", "the mat, is THERE.", "that cat", "it"])
def test_capitals_with_bars_and_pieces_are_spelled(
    tokenizer: Any, capitals: Any, sentence_pieces: Any, text: str
) -> None:
    """Whatever the tokens are: the units, the head's own text, and the sum over alignments."""
    if isinstance(tokenizer, type(pieces("▁a"))) and "▁a" in tokenizer.get_vocab():
        tokenizer = character_tokenizer()  # the toy pieces know three letters only
    plain = "".join(letter for letter in text if letter not in ",.")
    expected = {
        id(capitals): [WAV2VEC2[letter] for letter in plain.upper().replace(" ", "|")],
        id(sentence_pieces): sentence_pieces(plain.lower(), add_special_tokens=False)["input_ids"],
    }
    for units in (capitals, sentence_pieces):
        head, own = head_of(units), expected[id(units)]
        spans = [word.span() for word in words_of(text)]
        assert head.text(own).lower() == plain.lower()
        spelled = head.spell(text, spans)
        separator = [] if head.separator is None else [head.separator]
        joined = [unit for word in spelled for unit in [*separator, *word]][len(separator) :]
        assert joined == own
        log_probs = posteriors(60, num_units=len(units))
        scorer = CTCPrefixScorer(spelling(tokenizer, units), [log_probs], weight=1.0)
        assert said(scorer, text)[1] == pytest.approx(
            by_torch(log_probs, own, units.pad_token_id), abs=1e-5
        )


def test_digits_have_no_units_of_their_own(capitals: Any, sentence_pieces: Any) -> None:
    for units in (capitals, sentence_pieces):
        head = head_of(units)
        word, number = head.spell("cat 42", [(0, 3), (4, 6)])
        assert number[-1] == WILDCARD
        assert WILDCARD not in word


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma"])
def test_given_texts_score_as_the_search_scores_them(
    family: str, load_llm: Callable[..., LLM]
) -> None:
    """What the search has found, given; in any company and order, with all that scores beside."""
    model = load_llm(family, dtype="float32")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randn(length, model.dim, generator=generator) for length in (4, 9, 6)]
    log_probs = [posteriors(frames, seed=frames).float() for frames in (9, 14, 5)]
    scorers = [
        CTCPrefixScorer(spelling(model.tokenizer), log_probs, 0.05),
        Hotwords(["ab a"], model.tokenizer, 0.5),
    ]
    ends = list(range(10, 95, 2))
    beams = beam_search(
        model, prompts, [12, 16, 12], ends, beam_size=16, scorers=scorers, length_penalty=0.7
    )
    # the best first: of those that differ in their end token alone, the one with the likeliest
    ended = {
        (place, tuple(one.tokens)): one
        for place, own in enumerate(beams)
        for one in reversed(own)
        if one.finish_reason == "stop"
    }
    assert len(ended) > 3
    assert any(tokens for _, tokens in ended)
    given = [Given(place, list(tokens)) for place, tokens in ended]
    for group in (given, given[::-1], *([one] for one in given)):
        found = forced_hypotheses(model, prompts, group, ends, scorers=scorers, length_penalty=0.7)
        for one, asked in zip(found, group, strict=True):
            expected = ended[asked.utterance, tuple(asked.tokens)]
            assert (one.tokens, one.finish_reason) == (expected.tokens, "stop")
            assert one.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
            assert one.score == pytest.approx(expected.score, abs=1e-4)


def test_in_the_search(llm: LLM) -> None:
    """A language model that knows nothing writes what CTC hears."""
    texts = ["abba", "bba"]
    heard = []
    for text in texts:
        path = [unit for letter in units_of(text) for unit in (letter, letter, BLANK)]
        heard.append((8.0 * torch.nn.functional.one_hot(torch.tensor(path), 5)).log_softmax(dim=1))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randn(length, llm.dim, generator=generator) for length in (5, 9)]

    # marks and spaces cost CTC nothing: to keep them out is the part of a model that knows texts
    mute = tuple(set(range(len(llm.tokenizer))) - {END, *llm.tokenizer.encode("abc")})
    search = partial(
        *(beam_search, llm, prompts, [16, 16], [END]),
        length_penalty=0.0,
        options=SearchOptions(forbidden=mute),
    )

    def written(*scorers: CTCPrefixScorer) -> list[str]:
        return [llm.tokenizer.decode(one[0].tokens) for one in search(scorers=scorers)]

    free, speller = written(), spelling(llm.tokenizer)
    assert written(CTCPrefixScorer(speller, heard, 20.0)) == texts
    assert written(CTCPrefixScorer(speller, heard, 0.0)) == free != texts


Build = Callable[..., Transcriber]


@pytest.fixture
def build(model_folder: Callable[[str], Path]) -> Build:
    """A transcriber of tiny parts; its projector is random."""

    def transcriber(encoder: str = "conformer", tune: str = "frozen", **decode: Any) -> Transcriber:
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "encoder": {"type": encoder, "path": str(model_folder(encoder)), "tune": tune},
                "projector": {"downsample_rate": 2, "hidden": 16},
                "llm": {"path": str(model_folder("llama"))},
                "decode": {"tokens_per_second": 4, "extra_tokens": 6, "gate": "none", **decode},
            }
        )
        torch.manual_seed(0)
        return Transcriber(build_model(recipe), recipe.decode)

    return transcriber


@pytest.mark.parametrize("strict", [True, False])
def test_the_text_depends_on_nothing_but_the_utterance(
    build: Build, waves: Callable[..., Tensor], strict: bool
) -> None:
    transcriber = build(ctc_weight=0.3, strict=strict)
    speech = [Speech(waves(size, seed=size).numpy()) for size in (9_000, 24_000, 5_000)]
    together = transcriber._hear([*speech, *speech], words=False)
    for one, *copies in zip(speech, together[:3], together[3:], strict=True):
        [alone] = transcriber._hear([one], words=False)
        for copy in copies:
            if strict:
                assert copy == alone
            assert copy.text == alone.text
            assert copy.score == pytest.approx(alone.score, abs=1e-5)
    free = build(strict=strict)._hear(speech, words=False)
    assert [one.score for one in free] != [one.score for one in together[:3]]


def test_greedy_search_too_asks_ctc(build: Build, waves: Callable[..., Tensor]) -> None:
    transcriber = build(ctc_weight=0.3, beam_size=1)
    assert not transcriber.drafts
    assert build(beam_size=1).drafts
    heard, free = (
        one.transcribe(waves(9_000).numpy()) for one in (transcriber, build(beam_size=1))
    )
    assert heard.score != free.score


@pytest.mark.parametrize(("encoder", "tune"), [("whisper", "frozen"), ("conformer", "full")])
def test_an_encoder_that_cannot_spell_is_one_clear_error(
    build: Build, encoder: str, tune: str
) -> None:
    with pytest.raises(IsthmusError, match=r"decode\.ctc_weight is 0\.3, but .*CTC head.*to 0"):
        build(encoder, tune, ctc_weight=0.3)
    assert build(encoder, tune).joint is None


@pytest.mark.skipif(not SPEECH.is_dir(), reason="set ISTHMUS_SPEECH to the speech folder")
def test_the_shipped_system_leaves_out_less() -> None:
    orders = list(read_corpus(str(SPEECH / "en_barista" / "dev.jsonl")))[8:13]
    shipped = load("tiny")

    def errors(weight: float) -> int:
        settings = change_settings(shipped.settings, {"ctc_weight": weight})
        found = Transcriber(shipped.model, settings).transcribe(orders)
        hypotheses = {cut.id: one.text for cut, one in zip(orders, found, strict=True)}
        return score({cut.id: transcript(cut) for cut in orders}, hypotheses).counts.errors

    assert errors(0.3) < errors(0.0)

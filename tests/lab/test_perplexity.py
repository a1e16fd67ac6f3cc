"""Perplexity a word: by hand, in any company, with and without a beginning of sequence."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from isthmus.errors import IsthmusError
from isthmus.lab import perplexity
from isthmus.lab.perplexity import Likelihood, Perplexity, perplexity_text, word_perplexity
from isthmus.model.llm import LLM, build_llm
from isthmus.settings.llms import LLMSettings

LoadLLM = Callable[..., LLM]
TEXTS = ["go left", "stop", "one two three", "yes", "go back"]


def by_hand(llm: LLM, ids: list[int]) -> float:
    """Nats of tokens behind the first, a step at a time."""
    nats = 0.0
    for place in range(1, len(ids)):
        logits = llm.network(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        nats -= float(logits.float().log_softmax(dim=0)[ids[place]])
    return nats


@torch.no_grad()
def test_it_is_what_one_gets_by_hand(load_llm: LoadLLM, llm_name: str) -> None:
    llm = load_llm(llm_name)
    tokenizer = llm.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = word_perplexity(llm, TEXTS)
    for text, likelihood in zip(TEXTS, found.texts, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = by_hand(llm, [start, *ids, tokenizer.eos_token_id])
        assert likelihood.nats == pytest.approx(expected, rel=1e-4)
        without = by_hand(llm, [start, *ids])
        assert likelihood.nats - likelihood.end_nats == pytest.approx(without, rel=1e-4)
        assert (likelihood.words, likelihood.tokens) == (len(text.split()), len(ids) + 1)
    assert (found.words, found.tokens) == (9, sum(map(len, TEXTS)) + len(TEXTS))
    assert found.value == pytest.approx(math.exp(found.nats / 9))


def test_the_words_count_not_the_tokens() -> None:
    found = Perplexity(
        (Likelihood(math.log(8), 2, 9, math.log(2)), Likelihood(math.log(2), 2, 2, 0.0)), "float32"
    )
    assert found.value == pytest.approx(2.0)
    assert found.without_end == pytest.approx(8**0.25)
    theirs = (2 * math.log(4) / 8 + 2 * math.log(2) / 1) / 4
    assert found.slam_llm == pytest.approx(math.exp(theirs))


@pytest.mark.parametrize("at_once", [10**9, 1])
def test_company_makes_no_difference(
    load_llm: LoadLLM, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load_llm("llama")
    alone = [word_perplexity(llm, [text]).nats for text in TEXTS]
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", at_once)
    together = word_perplexity(llm, [*TEXTS[::-1], "a much longer text than all of the others"])
    assert [one.nats for one in together.texts][4::-1] == pytest.approx(alone, rel=1e-6)


def test_a_text_without_words_counts_for_nothing(load_llm: LoadLLM) -> None:
    llm = load_llm("llama")
    assert word_perplexity(llm, ["", "stop", "  "]) == word_perplexity(llm, ["stop"])
    with pytest.raises(IsthmusError, match="all texts are empty"):
        word_perplexity(llm, ["", " "])


def test_the_names_of_special_tokens_are_spelt_out(load_llm: LoadLLM) -> None:
    assert word_perplexity(load_llm("llama"), ["a </s>"]).tokens == 7


def test_a_text_too_long_is_named(load_llm: LoadLLM) -> None:
    llm = load_llm("llama")
    assert word_perplexity(llm, ["a" * 254]).tokens == 255
    with pytest.raises(IsthmusError, match=r"'aaa.* takes 257 positions, .* has 256"):
        word_perplexity(llm, ["a" * 255])


def test_a_tokenizer_without_an_end_is_refused(load_llm: LoadLLM) -> None:
    llm = load_llm("llama")
    llm.tokenizer.eos_token = None
    with pytest.raises(IsthmusError, match="no end token"):
        word_perplexity(llm, TEXTS)


def test_the_model_is_left_as_it_was(load_llm: LoadLLM) -> None:
    llm = load_llm("llama").train()
    word_perplexity(llm, ["stop"])
    assert llm.training


def test_more_than_a_number_holds_is_infinite() -> None:
    found = Perplexity((Likelihood(1e4, 1, 9, 0.0),), "float32")
    assert found.value == math.inf
    assert found.to_dict()["perplexity"] is None


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    folder.mkdir()
    for place, text in enumerate(("Go LEFT.", "stop")):
        soundfile.write(folder / f"u{place}.wav", np.zeros(1600), 16000)
        (folder / f"u{place}.txt").write_text(text)
    return folder


def test_the_verb_reads_corpora_and_text_files(
    isthmus: Callable[..., tuple[int, str, str]],
    model_folder: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("go left\n\nstop\n")
    folder = model_folder("llama")
    code, out, _ = isthmus("analyse", "perplexity", folder, corpus, lines, "--json")
    assert code == 0
    sets: dict[str, Any] = json.loads(out)["sets"]
    expected = word_perplexity(build_llm(LLMSettings(path=str(folder))), ["go left", "stop"])
    assert sets[str(corpus)] == sets[str(lines)] == expected.to_dict()
    code, out, _ = isthmus("analyse", "perplexity", folder, corpus)
    assert f"perplexity {perplexity_text(expected.value)} a word" in out
    assert f"{perplexity_text(expected.without_end)} without the end token" in out
    assert "(3 words, float32)" in out
    raw = isthmus("analyse", "perplexity", folder, corpus, "--normaliser", "none", "--json")[1]
    assert json.loads(raw)["sets"][str(corpus)]["tokens"] == expected.tokens + 1  # the full stop


def test_the_precision_is_that_of_the_weights(load_llm: LoadLLM) -> None:
    llm = load_llm("llama")
    assert word_perplexity(llm, TEXTS).precision == "float32"
    llm.store(torch.bfloat16)
    assert word_perplexity(llm, TEXTS).to_dict()["precision"] == "bfloat16"


@torch.no_grad()
def test_the_authors_script_by_their_own_loss(load_llm: LoadLLM) -> None:
    """exp of the network's own mean loss of each text, weighted by its words."""
    llm = load_llm("llama")
    tokenizer, total, words = llm.tokenizer, 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        loss = llm.network(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        total, words = total + float(loss) * len(text.split()), words + len(text.split())
    assert word_perplexity(llm, TEXTS).slam_llm == pytest.approx(math.exp(total / words), rel=1e-4)


def test_what_is_no_text_is_refused(isthmus: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = isthmus("analyse", "perplexity", "isthmus/tiny-llama", "nowhere.txt")
    assert code == 1
    assert "No text 'nowhere.txt': neither a manifest nor a text file." in err

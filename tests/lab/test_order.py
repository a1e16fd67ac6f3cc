"""Order in own audio against order in another's: seen where it is heard, and not by chance."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from isthmus.decoding import transcriber
from isthmus.errors import IsthmusError
from isthmus.lab.figures import between, interval_text
from isthmus.lab.order import Spoken, measure_order, strangers, write_order
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import LLM
from isthmus.model.projector import Projector
from isthmus.model.prompt import PaperPrompt, plain_tokens
from isthmus.model.speech_llm import SpeechLLM
from isthmus.settings.encoders import FBankSettings

SAMPLES = 1600  # a letter
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FRAMES = SAMPLES // 160


class Hearing(Projector):
    """Gives each letter's embedding for the loudness in which it is spoken; or deaf, any at all."""

    def __init__(self, llm: LLM, deaf: bool):
        super().__init__()
        table = llm.embed(torch.tensor(plain_tokens(llm.tokenizer, LETTERS))).detach()
        self.table = torch.nn.Parameter(table)
        self.deaf = deaf

    def output_length(self, num_frames: int) -> int:
        return -(-num_frames // FRAMES)

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        loudness = frames.mean(dim=-1)[:, FRAMES // 2 :: FRAMES]
        ranks = loudness.argsort(dim=1).argsort(dim=1)
        if self.deaf:
            ranks = ranks.sort(dim=1).values  # order without listening
        return self.table[ranks % len(LETTERS)], -(-num_frames // FRAMES)


@pytest.fixture
def hearing(load_llm: Callable[..., LLM]) -> Callable[[bool], SpeechLLM]:
    def build(deaf: bool) -> SpeechLLM:
        llm = load_llm("llama")
        encoder = build_encoder(FBankSettings())
        return SpeechLLM(encoder, Hearing(llm, deaf), llm, PaperPrompt())

    return build


def speak(number: int, length: int = 12) -> list[Spoken]:
    """Each letter as noise of its own loudness; every text has the first letters, in some order."""
    spoken = []
    for place in range(number):
        generator = np.random.default_rng(place)
        order = generator.permutation(length)
        volume = np.repeat(10.0 ** (order / 4 - 4), SAMPLES)
        wave = (volume * generator.normal(size=len(volume))).astype(np.float32)
        spoken.append(Spoken(f"u{place}", wave, "".join(LETTERS[letter] for letter in order)))
    return spoken


def test_what_is_heard_is_more_than_chance(hearing: Callable[[bool], SpeechLLM]) -> None:
    order = measure_order(hearing(False), speak(16), drawn=2)
    own, control, difference = (order.means[n] for n in ("own", "control", "difference"))
    assert own.value > 0.9
    assert abs(control.value) < 0.25
    assert difference.value == pytest.approx(own.value - control.value)
    assert difference.interval is not None
    assert difference.interval[0] > 0.5
    assert len(order.drawings) == 2
    assert order.drawings[0][0].similarity.shape == order.drawings[0][1].similarity.shape


def test_order_without_listening_is_no_difference(hearing: Callable[[bool], SpeechLLM]) -> None:
    """The inverse: audio that says nothing, in an order of its own."""
    order = measure_order(hearing(True), speak(16))
    assert order.means["difference"].value == pytest.approx(0.0)
    assert order.means["difference"].interval == (0.0, 0.0)


@pytest.mark.parametrize("number", [2, 3, 7, 40])
def test_strangers_are_a_derangement_of_like_lengths(number: int) -> None:
    generator = np.random.default_rng(number)
    lengths = generator.integers(1, 1000, number).tolist()
    texts = [str(place) for place in range(number)]
    found = strangers(lengths, texts, seed=1)
    assert sorted(found) == list(range(number))
    assert all(place != other for place, other in enumerate(found))
    ranks = np.argsort(np.argsort(lengths, kind="stable"))
    assert max(abs(ranks[p] - ranks[o]) for p, o in enumerate(found)) <= 2
    assert strangers(lengths, texts, seed=1) == found


def test_strangers_say_something_else() -> None:
    texts = ["yes"] * 5 + ["no"] * 3 + ["maybe", "so"]
    found = strangers([10] * 10, texts, seed=0)
    assert sorted(found) == list(range(10))
    assert all(texts[place] != texts[other] for place, other in enumerate(found))
    with pytest.raises(IsthmusError, match="too many of them say 'yes'"):
        strangers([10] * 9, ["yes"] * 5 + ["no"] * 4, seed=0)
    with pytest.raises(IsthmusError, match="no control for 1 utterances"):
        strangers([10], ["yes"], seed=0)


def test_the_page_stands_alone(hearing: Callable[[bool], SpeechLLM], tmp_path: Path) -> None:
    spoken = speak(3)
    page = tmp_path / "page.html"
    order = measure_order(hearing(False), spoken, drawn=2)
    write_order(order, "Order <&>", page)
    text = page.read_text()
    assert "Order &lt;&amp;&gt;" in text
    assert text.count("<svg") == 4
    assert f"{order.means['difference'].value:.2f}" in text
    assert not re.findall(r'(?:src|href)="(?!data:,)', text)


def test_the_verb(
    isthmus: Callable[..., tuple[int, str, str]], tmp_path: Path, speech_like: Path
) -> None:
    page = tmp_path / "page.html"
    arguments: list[Any] = ["tiny", speech_like, "--utterances", 3, "-o", page]
    code, out, _ = isthmus("analyse", "alignment", *arguments, "--json")
    assert code == 0
    report = json.loads(out)
    assert len(report["utterances"]) == 3
    low, high = report["difference"]["interval"]
    assert low <= report["difference"]["value"] <= high
    assert page.is_file()
    code, out, _ = isthmus("analyse", "alignment", "tiny", speech_like)
    assert code == 0
    assert "order of 4 utterances" in out
    assert isthmus("analyse", "alignment", "tiny", speech_like, "-o", "x.svg")[0] == 1
    page.write_text("mine")
    code, _, err = isthmus("analyse", "alignment", "tiny", speech_like, "-o", page)
    assert (code, page.read_text()) == (1, "mine")
    assert "page.html exists. Name another file with --output" in err


def test_data_are_looked_up_before_the_model(
    isthmus: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("minutes, for nothing")

    monkeypatch.setattr(transcriber, "load", never)
    code, _, err = isthmus("analyse", "alignment", "tiny", tmp_path / "absent.jsonl")
    assert code == 1
    assert "absent.jsonl" in err


@pytest.fixture
def speech_like(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    folder.mkdir()
    for place, text in enumerate(("go left", "stop", "one two", "yes please")):
        sound = 0.2 * np.random.default_rng(place).normal(size=12_000 + 500 * place)
        soundfile.write(folder / f"u{place}.wav", sound, 16_000)
        (folder / f"u{place}.txt").write_text(text)
    return folder


def test_a_bound_below_zero_stands_beside_no_dash() -> None:
    assert between(0.06, 0.2, digits=2) == "0.06–0.20"
    assert between(-0.2, -0.06, digits=2) == "-0.20 to -0.06"
    assert interval_text((-0.001, 0.02)) == "-0.1 to 2.0"

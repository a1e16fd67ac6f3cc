"""Similarity of audio embeddings and tokens, and how far it is in order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.lab.alignment import align, monotonicity
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import LLM
from isthmus.model.projector import Projector
from isthmus.model.prompt import PaperPrompt, plain_tokens
from isthmus.model.speech_llm import SpeechLLM

TEXT = "two words"
STRETCH = 3  # audio embeddings a token


class Copying(Projector):
    """Gives the embeddings of a text's tokens, each three times, whatever it hears."""

    def __init__(self, llm: LLM, text: str):
        super().__init__()
        tokens = torch.tensor(plain_tokens(llm.tokenizer, text))
        rows = 2.5 * llm.embed(tokens).detach().repeat_interleave(STRETCH, dim=0)
        self.rows = torch.nn.Parameter(rows)  # (A, E)

    def output_length(self, num_frames: int) -> int:
        return len(self.rows)

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows.expand(len(frames), -1, -1), torch.full_like(num_frames, len(self.rows))


@pytest.fixture
def copying(
    encoder_settings: Callable[[str], Any], load_llm: Callable[..., LLM]
) -> Callable[[str], SpeechLLM]:
    def build(text: str) -> SpeechLLM:
        llm = load_llm("llama")
        encoder = build_encoder(encoder_settings("fbank"))
        return SpeechLLM(encoder, Copying(llm, text), llm, PaperPrompt())

    return build


SECOND = np.zeros(16_000, dtype=np.float32)


def test_a_copy_is_a_diagonal(copying: Callable[[str], SpeechLLM]) -> None:
    found = align(copying(TEXT), SECOND, TEXT)
    assert found.tokens == tuple(TEXT)
    assert (found.text, found.seconds) == (TEXT, 1.0)
    assert found.similarity.shape == (STRETCH * len(TEXT), len(TEXT))
    places = np.arange(len(found.similarity))
    assert found.similarity[places, places // STRETCH] == pytest.approx(1.0, abs=1e-5)
    assert found.similarity.max() <= 1 + 1e-5  # cosines: the projector's scale is no matter
    assert monotonicity(found.similarity) == pytest.approx(1.0)


def test_other_words_are_not_in_order(copying: Callable[[str], SpeechLLM]) -> None:
    backwards = align(copying(TEXT[::-1]), SECOND, TEXT)
    assert monotonicity(backwards.similarity) < 0.5


def test_the_names_of_special_tokens_are_spelt_out(copying: Callable[[str], SpeechLLM]) -> None:
    assert align(copying("</s>"), SECOND, "</s>").tokens == ("<", "/", "s", ">")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(copying: Callable[[str], SpeechLLM], training: bool) -> None:
    model = copying(TEXT).train(training)
    align(model, SECOND, TEXT)
    assert (model.training, model.projector.training) == (training, training)
    assert not model.llm.training


def test_a_text_without_tokens_is_refused(copying: Callable[[str], SpeechLLM]) -> None:
    with pytest.raises(IsthmusError, match="has no tokens"):
        align(copying(TEXT), SECOND, "")


def test_audio_without_embeddings_is_refused(copying: Callable[[str], SpeechLLM]) -> None:
    model = copying(TEXT)
    model.projector.rows = torch.nn.Parameter(torch.empty(0, model.llm.dim))
    with pytest.raises(IsthmusError, match="too short"):
        align(model, SECOND, TEXT)


def diagonal(audio: int, tokens: int, blur: float = 0.05, noise: float = 0.1) -> np.ndarray:
    generator = np.random.default_rng(5)
    apart = np.subtract.outer(np.arange(audio) / audio, np.arange(tokens) / tokens)
    return np.exp(-((apart / blur) ** 2)) + generator.normal(0, noise, apart.shape)


def test_order_is_seen_through_noise_and_stretching() -> None:
    assert monotonicity(diagonal(40, 20)) > 0.95
    bent = diagonal(60, 20)[np.sort(np.random.default_rng(0).integers(0, 60, 50))]
    assert monotonicity(bent) > 0.9


def test_shuffled_columns_are_chance() -> None:
    matrix = diagonal(40, 20)
    generator = np.random.default_rng(1)
    shuffled = [monotonicity(matrix[:, generator.permutation(20)]) for _ in range(60)]
    assert np.mean(shuffled) == pytest.approx(0.0, abs=0.05)
    assert max(shuffled) < 0.5


def test_noise_is_chance() -> None:
    generator = np.random.default_rng(2)
    random = [monotonicity(generator.normal(size=(30, 15))) for _ in range(60)]
    assert np.mean(random) == pytest.approx(0.0, abs=0.05)


def test_backwards_is_worse_than_chance() -> None:
    assert monotonicity(diagonal(40, 20)[::-1]) < -0.1


def test_tokens_that_come_twice_may_stand_at_either_place() -> None:
    matrix = diagonal(40, 20, noise=0.0)
    matrix[:, 3] = matrix[:, 15] = np.maximum(matrix[:, 3], matrix[:, 15])
    assert monotonicity(matrix) == pytest.approx(1.0)


def test_audio_that_resembles_everything_is_no_order() -> None:
    matrix = diagonal(40, 20)
    loud = matrix.copy()
    loud[7] += 5
    assert monotonicity(loud) == pytest.approx(monotonicity(matrix), abs=0.01)


@pytest.mark.parametrize("shape", [(10, 1), (10, 4), (1, 4)])
def test_no_order_is_zero(shape: tuple[int, int]) -> None:
    assert monotonicity(np.full(shape, 0.3)) == 0.0


@pytest.mark.parametrize("matrix", [np.zeros(4), np.zeros((0, 3)), np.full((2, 2), np.nan)])
def test_what_is_no_matrix_is_refused(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"finite matrix \(A, L\)"):
        monotonicity(matrix)

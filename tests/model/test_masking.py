"""Hidden transcript tokens, and prompts drawn from several: the same packed and padded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.llm import LLM
from isthmus.model.projector import build_projector
from isthmus.model.prompt import BarePrompt, ChatPrompt, PaperPrompt, Prompt, SlamPrompt
from isthmus.model.speech_llm import IGNORE, SpeechLLM
from isthmus.settings.projectors import LinearProjectorSettings
from isthmus.speech.augment import SpecAugment

LoadLLM = Callable[..., LLM]
TEXTS = ["the first of three", "a", "and one that is a good deal longer than the others"]
PROMPTS = ("Say it.", "", "Write down what you hear.")


@pytest.fixture
def join(encoder_settings: Callable[[str], Any], load_llm: LoadLLM) -> Callable[..., SpeechLLM]:
    def build(prompt: Prompt | None = None) -> SpeechLLM:
        torch.manual_seed(3)
        encoder, llm = build_encoder(encoder_settings("conformer")), load_llm("llama")
        projector = LinearProjectorSettings(downsample_rate=2, hidden=32)
        model = SpeechLLM(encoder, build_projector(projector, encoder, llm), llm, prompt or BARE)
        return model.eval()

    return build


BARE = BarePrompt()


def heard(model: SpeechLLM, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4 + i, model.llm.dim, generator=generator) for i in range(count)]


def test_nothing_but_the_transcript_is_hidden(join: Callable[..., SpeechLLM]) -> None:
    model = join(PaperPrompt())
    plain = model.row(heard(model), TEXTS)
    hidden = model.row(heard(model), TEXTS, masking=[1.0, 1.0, 1.0])
    assert hidden.labels.equal(plain.labels)
    assert hidden.lengths == plain.lengths
    mean = model.llm.network.get_input_embeddings().weight.detach().mean(dim=0)
    ends = torch.tensor(plain.lengths).cumsum(0) - 1
    inside = plain.labels != IGNORE
    inside[ends] = False  # the end token, which predicts nothing
    torch.testing.assert_close(
        hidden.embeddings[inside], mean.expand(int(inside.sum()), -1), atol=1e-6, rtol=1e-5
    )
    assert hidden.embeddings[~inside].equal(plain.embeddings[~inside])


@pytest.mark.parametrize("fraction", [0.125, 0.5])
def test_the_share_that_is_hidden(fraction: float, join: Callable[..., SpeechLLM]) -> None:
    model = join()
    texts = ["ab cd ef gh " * 8] * 2
    (audio,) = heard(model, 1)
    torch.manual_seed(0)
    changed = total = 0
    for _ in range(20):
        row = model.row([audio, audio], texts, masking=[fraction, 0.0])
        plain = model.row([audio, audio], texts)
        first, second = (row.embeddings != plain.embeddings).any(dim=1).split(row.lengths)
        changed, total = changed + int(first.sum()), total + len(texts[0])
        assert not second.any()  # each utterance has a share of its own
    deviation = (total * fraction * (1 - fraction)) ** 0.5
    assert abs(changed - total * fraction) < 4 * deviation


@pytest.mark.parametrize("prompt", [PaperPrompt(), SlamPrompt(), ChatPrompt()])
def test_packed_is_padded(prompt: Prompt, join: Callable[..., SpeechLLM]) -> None:
    model = join(prompt.model_copy(update={"instruction": PROMPTS}))
    audio = [row.requires_grad_() for row in heard(model)]

    def loss(seed: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        found = model.transcript_loss(audio, TEXTS, prompts=model.prompts, **options)
        return found.total, torch.autograd.grad(found.total, audio[2])[0]

    masked = {"masking": [0.5, 0.5, 0.3]}
    padded, unmasked, other = loss(**masked), loss(), loss(seed=6, **masked)
    assert "packed" in model.pack()
    torch.testing.assert_close(loss(**masked), padded, rtol=1e-4, atol=1e-5)
    assert (padded[0] - unmasked[0]).abs() > 1e-3
    assert (padded[0] - other[0]).abs() > 1e-3


def test_each_utterance_has_its_own_prompt(join: Callable[..., SpeechLLM]) -> None:
    model = join(PaperPrompt(instruction=PROMPTS))
    row = model.row(heard(model), TEXTS, prompts=model.prompts[::-1])
    audio = heard(model)
    alone = [
        join(PaperPrompt(instruction=words)).row([one], [text]).embeddings
        for words, one, text in zip(PROMPTS[::-1], audio, TEXTS, strict=True)
    ]
    assert row.embeddings.equal(torch.cat(alone))
    first = model.sequence(audio[0], prompt=model.prompts[2])[0]
    assert first.equal(alone[0][: len(first)])


def test_the_longest_prompt_is_counted(join: Callable[..., SpeechLLM]) -> None:
    model = join(PaperPrompt(instruction=PROMPTS))
    letters = "USER: " + " Write down what you hear." + " ASSISTANT: "
    assert model.prompt_tokens == 1 + len(letters)  # a token each, after the beginning
    assert model.positions(1.0, 5) == 1 + len(letters) + model.audio_tokens(1.0) + 5


@pytest.mark.parametrize("name", ["conformer", "parakeet"])
def test_masks_on_features_reach_the_encoder_in_training_alone(
    name: str, encoder_settings: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: Encoder = build_encoder(encoder_settings(name))
    features, lengths = torch.ones(2, 50, 40), torch.tensor([50, 20])

    def masked(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return encoder.masked(features, lengths)

    assert masked(0) is features  # none is asked for
    encoder.spec_augment = SpecAugment()
    assert encoder.eval().masked(features, lengths) is features
    encoder.train()
    assert not masked(0).equal(features)
    assert masked(0).equal(masked(0))
    assert not masked(0).equal(masked(1))
    encoder.eval()
    waveforms = torch.randn(1, 16_000)
    plain = encoder(waveforms, torch.tensor([16_000]))[0]
    monkeypatch.setattr(encoder, "masked", lambda features, lengths: features * 0)
    assert not encoder(waveforms, torch.tensor([16_000]))[0].equal(plain)

"""The joined model: what is trained, what is not, and what carries loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.llm import LLM
from isthmus.model.projector import build_projector
from isthmus.model.prompt import BarePrompt, ChatPrompt, PaperPrompt, Prompt, SlamPrompt
from isthmus.model.speech_llm import IGNORE, SpeechLLM
from isthmus.settings.base import Tune
from isthmus.settings.projectors import LinearProjectorSettings

LoadLLM = Callable[..., LLM]
Waves = Callable[..., Tensor]
Join = Callable[..., SpeechLLM]
TEXTS = ["", "two words", "a", "the third one is longer"]
LENGTHS = [900, 16_000, 4_000, 9_999]


@pytest.fixture
def join(encoder_settings: Callable[[str], Any], load_llm: LoadLLM) -> Join:
    """A model of tiny parts; its projector is random."""

    def build(
        llm: LLM | str = "llama",
        encoder: Encoder | str = "conformer",
        prompt: Prompt | None = None,
        tune: dict[str, Tune] | None = None,
    ) -> SpeechLLM:
        torch.manual_seed(3)
        encoder = build_encoder(encoder_settings(encoder)) if isinstance(encoder, str) else encoder
        llm = load_llm(llm) if isinstance(llm, str) else llm
        settings = LinearProjectorSettings(downsample_rate=2, hidden=32)
        projector = build_projector(settings, encoder, llm)
        return SpeechLLM(encoder, projector, llm, prompt or PaperPrompt(), tune)

    return build


def batch_of(waves: Waves, rows: list[int]) -> tuple[Tensor, Tensor, list[str]]:
    """Utterances of LENGTHS and TEXTS; what is behind them is noise."""
    num_samples = torch.tensor([LENGTHS[row] for row in rows])
    waveforms = torch.randn(len(rows), int(num_samples.max()))
    for place, row in enumerate(rows):
        waveforms[place, : LENGTHS[row]] = waves(LENGTHS[row], seed=row)
    return waveforms, num_samples, [TEXTS[row] for row in rows]


def assert_batch_is_sum(model: SpeechLLM, waves: Waves) -> None:
    """The loss of a batch is that of its utterances alone."""
    model.eval()
    with torch.no_grad():
        total, tokens, correct = model.loss(*batch_of(waves, [0, 1, 2, 3]))
        alone = [model.loss(*batch_of(waves, [row])) for row in range(4)]
    assert tokens == sum(count for _, count, _ in alone) == sum(len(text) + 1 for text in TEXTS)
    assert correct == sum(count for *_, count in alone)
    torch.testing.assert_close(total, sum(loss for loss, *_ in alone), atol=1e-4, rtol=1e-6)
    assert total > 0


def test_the_summary_counts_as_papers_do(join: Join) -> None:
    model = join(encoder="whisper")
    every, sinusoids = (
        sum(value.numel() for value in part.parameters())
        for part in (model.encoder, model.encoder.network.embed_positions)
    )
    first, second, *_ = model.summary()
    assert first == f"encoder: {every - sinusoids:,} parameters, 0 of them trained"
    projector = sum(value.numel() for value in model.projector.parameters())
    assert second == f"projector: {projector:,} parameters, {projector:,} of them trained"


def test_loss_of_each_encoder(encoder: Encoder, join: Join, waves: Waves) -> None:
    assert_batch_is_sum(join("bloom", encoder), waves)  # which takes any length


def test_loss_of_each_llm(llm_name: str, join: Join, waves: Waves) -> None:
    assert_batch_is_sum(join(llm_name), waves)


@pytest.mark.parametrize("prompt", [PaperPrompt(), SlamPrompt(), BarePrompt(), ChatPrompt()])
def test_loss_of_each_prompt(prompt: Prompt, join: Join, waves: Waves) -> None:
    assert_batch_is_sum(join(prompt=prompt), waves)


def test_loss_is_cross_entropy_of_transcript_and_end_token(join: Join, waves: Waves) -> None:
    model = join().eval()
    waveforms, num_samples, _ = batch_of(waves, [1])
    with torch.no_grad():
        (audio,) = model.embed_audio(waveforms, num_samples)
        embeddings, labels = model.sequence(audio, "hi")
        prompt, ignored = model.sequence(audio)
        logits = model.llm.network(inputs_embeds=embeddings[None]).logits[0].log_softmax(dim=-1)
        total, tokens, _ = model.loss(waveforms, num_samples, ["hi"])
    reply = [*model.llm.tokenizer.encode("hi", add_special_tokens=False), model.end_token]
    assert labels.tolist() == [IGNORE] * len(prompt) + reply
    assert ignored.tolist() == [IGNORE] * len(prompt)
    torch.testing.assert_close(embeddings[: len(prompt)], prompt, atol=0, rtol=0)
    start = len(prompt) - 1
    expected = -sum(logits[start + place, token] for place, token in enumerate(reply))
    torch.testing.assert_close(total, expected)
    assert tokens == 3


def test_end_token_carries_loss_even_if_it_is_the_padding(
    load_llm: LoadLLM, join: Join, waves: Waves
) -> None:
    llm = load_llm("llama")
    llm.tokenizer.pad_token = llm.tokenizer.eos_token
    assert_batch_is_sum(join(llm), waves)


def train(model: SpeechLLM, waves: Waves, steps: int = 3) -> None:
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    model.train(True)
    for _ in range(steps):
        optimiser.zero_grad()
        loss, *_ = model.loss(*batch_of(waves, [1, 3]))
        loss.backward()
        optimiser.step()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    after = module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("llm", ["llama", "llama-tied"])
def test_frozen_means_frozen(llm: str, join: Join, waves: Waves) -> None:
    model = join(llm)
    before = state(model)
    train(model, waves)
    for part in (model.encoder, model.llm):
        assert not any(module.training for module in part.modules())
        assert all(parameter.grad is None for parameter in part.parameters())
    assert model.projector.training
    names = {name for name in before if name.startswith("projector.")}
    assert changed(model, before) == names == set(model.trainable()) == set(model.trained_state())


def test_training_lowers_the_loss(join: Join, waves: Waves) -> None:
    model = join()
    with torch.no_grad():
        before, *_ = model.loss(*batch_of(waves, [1, 3]))
    train(model, waves, steps=30)
    with torch.no_grad():
        after, *_ = model.loss(*batch_of(waves, [1, 3]))
    assert after < 0.9 * before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_and_projector(
    dtype: str, load_llm: LoadLLM, join: Join, waves: Waves
) -> None:
    model = join(load_llm("llama", tune="lora", dtype=dtype), tune={"llm": "lora"})
    before = state(model)
    train(model, waves)
    trained = model.trained_state()
    assert changed(model, before) == set(trained)
    adapters = {name for name in trained if not name.startswith("projector.")}
    assert adapters == {name for name in before if "lora_" in name}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    if dtype == "float32":
        assert_batch_is_sum(model, waves)


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_tune_full_trains_the_whole_part(part: str, join: Join, waves: Waves) -> None:
    model = join(tune={part: "full"})
    assert getattr(model.train(), part).training
    before = state(model)
    train(model, waves)
    different = changed(model, before)
    assert different <= set(model.trained_state()) | {"llm.network.lm_head.weight"}
    assert {name.partition(".")[0] for name in different} == {part, "projector"}
    if part == "encoder":  # batch norm's statistics are trained too
        assert any(name.endswith("running_mean") for name in model.trained_state())


def test_weights_in_training_are_in_full_precision(load_llm: LoadLLM, join: Join) -> None:
    frozen = join(load_llm("llama", dtype="bfloat16"))
    assert frozen.llm.dtype == torch.bfloat16
    trained = join(load_llm("llama", dtype="bfloat16"), tune={"llm": "full"})
    assert trained.llm.dtype == torch.float32


def test_a_frozen_encoder_knows_no_autocast(join: Join, waves: Waves) -> None:
    """Its frames are the same in training, for the feature cache and in decoding."""
    for tune in ("frozen", "full"):
        model = join(encoder="whisper", tune={"encoder": tune}).eval()
        plain = model.encode_alone(waves(16_000))
        with torch.autocast("cpu", torch.bfloat16):
            found = model.encode_alone(waves(16_000))
        assert torch.equal(found, plain) == (tune == "frozen")


def test_an_encoder_in_half_precision_can_be_trained_whole(
    encoder_settings: Callable[[str], Any], join: Join, waves: Waves
) -> None:
    half = build_encoder(encoder_settings("conformer")).to(torch.bfloat16)
    model = join(encoder=half, tune={"encoder": "full"})
    dtypes = {value.dtype for value in model.encoder.buffers() if value.is_floating_point()}
    assert dtypes == {torch.float32}
    train(model, waves, steps=1)


def test_loss_in_half_precision(load_llm: LoadLLM, join: Join, waves: Waves) -> None:
    exact, *_ = join().eval().loss(*batch_of(waves, [1, 3]))
    rough, *_ = join(load_llm("llama", dtype="bfloat16")).eval().loss(*batch_of(waves, [1, 3]))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, *_ = join().eval().loss(*batch_of(waves, [1, 3]))
    torch.testing.assert_close(mixed, exact, rtol=0.03, atol=0)


def test_longer_than_the_llm_takes(join: Join, waves: Waves) -> None:
    model = join()
    waveforms, num_samples, _ = batch_of(waves, [1, 2])
    long = "so many words " * 20
    with pytest.raises(
        IsthmusError, match=r"\d+ positions, the language model takes 256.*'so many.*280 letters"
    ):
        model.loss(waveforms, num_samples, ["short", long])


def test_fault_says_what_would_be_too_much(join: Join) -> None:
    model = join(encoder="whisper")
    assert model.fault(1.0, 10) is None
    assert "30.1 s of audio are more than the 30 s" in str(model.fault(30.1))
    prompt = len(model.sequence(torch.zeros(0, model.llm.dim))[1])
    room = 256 - prompt - model.audio_tokens(1.0)
    assert model.fault(1.0, room) is None
    assert model.fault(1.0, room + 1) == "it takes 257 positions, the language model has 256"


def test_padding_that_is_kept_fills_the_same_positions(join: Join, waves: Waves) -> None:
    model = join("bloom", "whisper-kept").eval()
    (audio,) = model.embed_audio(waves(8_000)[None], torch.tensor([8_000]))
    assert len(audio) == model.audio_tokens(0.5) == model.audio_tokens(30.0) == 750
    assert model.positions(0.5, 3) == model.positions(30.0, 3)
    assert model.fault(0.5) is None
    assert "256" in str(join("llama", "whisper-kept").fault(0.5))


def test_too_short_for_an_embedding(join: Join, waves: Waves) -> None:
    model = join(encoder="hubert-group").eval()
    waveforms = waves(100)[None]
    (audio,) = model.embed_audio(waveforms, torch.tensor([100]))
    assert audio.shape == (0, model.llm.dim)
    total, tokens, _ = model.loss(waveforms, torch.tensor([100]), ["a"])
    assert total > 0
    assert tokens == 2


def test_audio_tokens_of_a_duration(join: Join, waves: Waves) -> None:
    model = join(encoder="wav2vec2-group")
    (audio,) = model.embed_audio(waves(40_000)[None], torch.tensor([40_000]))
    assert model.audio_tokens(2.5) == len(audio)

"""The projectors' contract, over all of them, and the papers' parameter counts."""

import copy
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.llm import LLM, build_llm
from isthmus.model.projector import Projector, build_projector, check_projector
from isthmus.model.prompt import PaperPrompt
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.units import Units
from isthmus.settings.encoders import FBankSettings
from isthmus.settings.llms import LLMSettings
from isthmus.settings.projectors import LinearProjectorSettings, ProjectorSettings

D, E = 16, 16  # widths of the tiny models
LENGTHS = [0, 1, 2, 4, 5, 6, 7, 10, 11, 24, 61]
SMALL = {"heads": 2, "hidden": 8}
PROJECTORS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "downsample_rate": 3, "hidden": 8},
    "linear-single": {"type": "linear", "downsample_rate": 4, "hidden": None},
    "linear-stride": {"type": "linear", "stride_ms": 80, "hidden": 8},
    "conv1d": {"type": "conv1d", "downsample_rate": 4, "kernel_size": 5, "hidden": 8},
    "conv1d-narrow": {"type": "conv1d", "downsample_rate": 5, "kernel_size": 5, "hidden": 8},
    "conv1d-all": {"type": "conv1d", "downsample_rate": 1, "kernel_size": 3, "hidden": 8},
    "qformer": {"type": "qformer", **SMALL, "window_seconds": 0.2},
    "qformer-segments": {
        "type": "qformer",
        **SMALL,
        "queries": 3,
        "window_seconds": 1.0,
        "segment_positions": True,
    },
    "transformer": {"type": "transformer", "downsample_rate": 3, **SMALL},
    "ctc": {"type": "ctc", "hidden": 8},
    "ctc-drop": {"type": "ctc", "mode": "drop", "hidden": 8},
    "ctc-posterior": {
        "type": "ctc-posterior",
        "inner": {"type": "linear", "downsample_rate": 1, "hidden": 8},
    },
    "units": {"type": "units"},
    "units-all": {"type": "units", "deduplicate": False},
}
Build = Callable[..., Any]
Settings = Callable[[str], Any]


def adapter() -> TypeAdapter[Any]:
    union: Any = ProjectorSettings
    return TypeAdapter(union)


def ears(dim: int = D, frame_rate: float = 25.0, limit: float | None = None) -> Encoder:
    """No encoder but in what it states."""
    return cast(Encoder, SimpleNamespace(dim=dim, frame_rate=frame_rate, max_seconds=limit))


def tongue(dim: int) -> LLM:
    """No LLM but in its width."""
    return cast(LLM, SimpleNamespace(dim=dim))


@pytest.fixture(scope="session")
def units_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("units") / "units.safetensors"
    generator = torch.Generator().manual_seed(0)
    Units(torch.randn(7, D, generator=generator), "random", "none").save(file)
    return file


@pytest.fixture
def settings_of(units_file: Path) -> Settings:
    """Settings of a name in PROJECTORS."""

    def settings(name: str) -> Any:
        values = PROJECTORS[name]
        path = {"path": str(units_file)} if values["type"] == "units" else {}
        return adapter().validate_python(values | path)

    return settings


@pytest.fixture(scope="module")
def conformer(encoder_settings: Callable[[str], Any]) -> Encoder:
    """Not to be changed."""
    built: Encoder = build_encoder(encoder_settings("conformer")).eval()
    return built


@pytest.fixture(scope="module")
def llama(model_folder: Callable[[str], Path]) -> LLM:
    """Not to be changed."""
    return build_llm(LLMSettings(path=str(model_folder("llama")))).eval()


@pytest.fixture(params=PROJECTORS)
def projector(
    request: pytest.FixtureRequest,
    settings_of: Settings,
    conformer: Encoder,
    llama: LLM,
) -> Projector:
    """Each projector in turn, behind the tiny Conformer (25 frames a second)."""
    torch.manual_seed(0)
    built: Projector = build_projector(settings_of(request.param), conformer, llama)
    for value in built.parameters():  # norms and biases with a say
        value.data.add_(0.1 * torch.randn_like(value))
    return built


def test_every_projector_is_tested() -> None:
    known = {part.model_fields["type"].default for part in typing.get_args(ProjectorSettings)}
    assert {values["type"] for values in PROJECTORS.values()} == known


def alone(projector: Projector, frames: Tensor) -> Tensor:
    embeddings, (count,) = projector(frames[None], torch.tensor([len(frames)]))
    assert embeddings.shape == (1, count, E)
    return embeddings[0]


@torch.no_grad()
def test_lengths_are_those_stated(projector: Projector) -> None:
    for length in LENGTHS:
        count = len(alone(projector, torch.randn(length, D)))
        stated = projector.output_length(length)
        assert count == stated if projector.exact else min(1, length) <= count <= stated


@torch.no_grad()
def assert_company_is_nothing(projector: Projector, padding: float) -> None:
    """Each utterance gives what it gives alone; `padding` is the scale of what is behind it."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(length, D, generator=generator) for length in [*LENGTHS, 3, 61]]
    batch = padding * torch.randn(len(rows), 70, D, generator=generator)
    for place, row in zip(batch, rows, strict=True):
        place[: len(row)] = row
    embeddings, counts = projector(batch, torch.tensor([len(row) for row in rows]))
    for row, found, count in zip(rows, embeddings, counts.tolist(), strict=True):
        assert found[:count].isfinite().all()
        torch.testing.assert_close(found[:count], alone(projector, row), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("padding", "training"), [(0.0, True), (100.0, True), (100.0, False)])
def test_neither_padding_nor_company_changes_anything(
    projector: Projector, padding: float, training: bool
) -> None:
    projector.train(training)  # transformers take other ways in evaluation mode
    assert_company_is_nothing(projector, padding)


@pytest.mark.parametrize("name", ["conv1d", "qformer", "transformer"])
def test_without_masks_padding_would_be_heard(
    name: str,
    settings_of: Settings,
    conformer: Encoder,
    llama: LLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    projector = build_projector(settings_of(name), conformer, llama)
    for module in ("projector", "qformer"):
        monkeypatch.setattr(
            f"isthmus.model.{module}.within",
            lambda lengths, longest: torch.ones(len(lengths), longest, dtype=torch.bool),
        )
    with pytest.raises(AssertionError):
        assert_company_is_nothing(projector, 100.0)


def test_gradients_reach_every_parameter(projector: Projector) -> None:
    lengths = torch.tensor([30, 0, 1, 12])  # also beside utterances too short for an embedding
    embeddings, counts = projector(torch.randn(4, 30, D), lengths)
    rows = [row[:count] for row, count in zip(embeddings, counts.tolist(), strict=True)]
    loss = torch.cat(rows).sin().sum()
    if projector.ctc is not None:  # which learns what is blank
        heard, _ = projector.spoken(torch.randn(1, 30, D), torch.tensor([30]))
        loss = loss + projector.ctc.loss([heard[0]], [[3, 4]])[0]
    loss.backward()
    for name, value in projector.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        assert value.grad.abs().sum() > 0, name


def test_nothing_of_its_neighbours_is_a_part_of_it(
    projector: Projector, conformer: Encoder
) -> None:
    own = sum(value.numel() for value in projector.parameters())
    assert own < 20_000
    assert not any(part is one for one in conformer.modules() for part in projector.modules())
    assert projector.state_dict().keys() == dict(projector.named_parameters()).keys()


@pytest.mark.parametrize("name", sorted({values["type"] for values in PROJECTORS.values()}))
def test_learns_four_utterances(
    name: str, settings_of: Settings, conformer: Encoder, load_llm: Callable[..., LLM]
) -> None:
    """By heart, and by ear: with the audio exchanged it is wrong."""
    torch.manual_seed(0)
    llm = load_llm("llama", tune="full")
    projector = build_projector(settings_of(name), conformer, llm)
    model = SpeechLLM(conformer, projector, llm, PaperPrompt(), {"llm": "full"})
    frames = [torch.randn(length, D) + 2 * torch.randn(D) for length in (30, 25, 41, 27)]
    texts = ["a", "b", "c", "d"]
    optimiser = torch.optim.Adam(model.trainable().values(), lr=0.01)
    losses = []
    for _ in range(50):
        found = model.transcript_loss(model.project(frames), texts).total
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        losses.append(float(found.detach()))
    exchanged = model.transcript_loss(model.project(frames[1:] + frames[:1]), texts).total
    assert losses[-1] < 0.1 * losses[0]
    assert exchanged > 0.5 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("name", PROJECTORS)
def test_moves_and_copies_with_the_model(
    name: str, settings_of: Settings, conformer: Encoder, llama: LLM
) -> None:
    encoder = copy.deepcopy(conformer)
    model = SpeechLLM(
        encoder, build_projector(settings_of(name), encoder, llama), llama, PaperPrompt()
    )
    frames = torch.randn(20, D)
    (expected,) = model.project([frames])
    model.encoder.store(torch.bfloat16)  # the CTC head too, which must still be understood
    copied = copy.deepcopy(model)
    if not name.startswith("ctc"):  # a rounded head may hear something else
        torch.testing.assert_close(copied.project([frames])[0], expected)
    assert copied.project([frames])[0].shape[1] == E


def test_audio_tokens_are_the_most_there_can_be(
    projector: Projector, conformer: Encoder, llama: LLM, waves: Any
) -> None:
    model = SpeechLLM(conformer, projector, llama, PaperPrompt())
    (audio,) = model.embed_audio(waves(40_000)[None], torch.tensor([40_000]))
    stated = model.audio_tokens(2.5)
    assert len(audio) == stated if projector.exact else len(audio) <= stated
    reason = model.fault(20.0)
    if projector.output_length(500) > 200:
        assert reason is not None
        assert ("may take" in reason) != projector.exact


# --- linear


def millions(encoder_dim: int, llm_dim: int, downsample_rate: int) -> float:
    """Parameters of the projector, in millions as the paper rounds them."""
    with torch.device("meta"):
        settings = LinearProjectorSettings(downsample_rate=downsample_rate)
        projector = build_projector(settings, ears(encoder_dim), tongue(llm_dim))
    counted = sum(parameter.numel() for parameter in projector.parameters())
    exact = downsample_rate * encoder_dim * 2048 + 2048 + 2048 * llm_dim + llm_dim
    assert counted == exact
    return round(counted / 1e6, 2)


@pytest.mark.parametrize(("llm_dim", "expected"), [(2048, 17.31), (2560, 18.35), (4096, 21.50)])
def test_parameters_of_slam_asr_table_3(llm_dim: int, expected: float) -> None:
    assert millions(1280, llm_dim, 5) == expected


@pytest.mark.parametrize(
    ("encoder_dim", "downsample_rate", "expected"),
    [
        (80, 10, 10.03),
        (384, 5, 12.33),
        (512, 5, 13.64),
        (768, 5, 16.26),
        (1024, 5, 18.88),
        (1280, 5, 21.50),
    ],
)
def test_parameters_of_slam_asr_table_4(
    encoder_dim: int, downsample_rate: int, expected: float
) -> None:
    assert millions(encoder_dim, 4096, downsample_rate) == expected


def test_is_the_formula_of_the_paper() -> None:
    projector = build_projector(
        LinearProjectorSettings(downsample_rate=2, hidden=8), ears(3), tongue(5)
    )
    frames = torch.randn(1, 4, 3)
    embeddings, _ = projector(frames, torch.tensor([4]))
    assert projector.linear2 is not None
    stacked = torch.cat([frames[0, 2], frames[0, 3]])
    hidden = (projector.linear1.weight @ stacked + projector.linear1.bias).relu()
    expected = projector.linear2.weight @ hidden + projector.linear2.bias
    torch.testing.assert_close(embeddings[0, 1], expected)


def test_without_hidden_it_is_one_linear_layer() -> None:
    projector = build_projector(
        LinearProjectorSettings(downsample_rate=3, hidden=None), ears(4), tongue(6)
    )
    assert {name: value.shape for name, value in projector.named_parameters()} == {
        "linear1.weight": (6, 12),
        "linear1.bias": (6,),
    }
    frames = torch.randn(1, 3, 4)
    expected = projector.linear1.weight @ frames.flatten() + projector.linear1.bias
    torch.testing.assert_close(projector(frames, torch.tensor([3]))[0][0, 0], expected)


def test_stride_in_milliseconds() -> None:
    settings = LinearProjectorSettings(stride_ms=240)
    assert build_projector(settings, ears(frame_rate=12.5), tongue(4)).downsample_rate == 3
    assert build_projector(settings, ears(frame_rate=100.0), tongue(4)).downsample_rate == 24
    for rate, near in ((25 / 4, "160, 320, 480"), (25.0, "40, 80, 120"), (50.0, "20, 40, 60")):
        wrong = LinearProjectorSettings(stride_ms=30 if rate > 20 else 170)
        with pytest.raises(IsthmusError, match=rf"projector\.stride_ms is .*{near}"):
            check_projector(wrong, ears(frame_rate=rate), FBankSettings())


def test_one_stride_is_given() -> None:
    assert LinearProjectorSettings().downsample_rate == 5
    assert LinearProjectorSettings(stride_ms=80).downsample_rate is None
    again = LinearProjectorSettings.model_validate(LinearProjectorSettings().model_dump())
    assert again == LinearProjectorSettings()
    with pytest.raises(ValidationError, match="give one of"):
        LinearProjectorSettings(stride_ms=80, downsample_rate=2)


# --- what others refuse


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "conv1d", "downsample_rate": 7, "kernel_size": 5}, "kernel_size 5 is less"),
        ({"type": "qformer", "hidden": 10, "heads": 4}, "hidden 10 is not a multiple of heads 4"),
        ({"type": "transformer", "hidden": 10, "heads": 4}, "hidden 10 is not a multiple"),
        ({"type": "ctc", "mode": "skip"}, "'average' or 'drop'"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        adapter().validate_python(values)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [(0.03, "shorter than a frame.*from 0.04"), (31.0, r"longer than this encoder.*to 30 s")],
)
def test_windows_that_cannot_be(seconds: float, message: str) -> None:
    settings = adapter().validate_python({"type": "qformer", "window_seconds": seconds})
    with pytest.raises(IsthmusError, match=rf"projector\.window_seconds is .*{message}"):
        check_projector(settings, ears(limit=30.0), FBankSettings())


def test_windows_of_salmonn() -> None:
    """17 frames of Whisper, 30 s in 89 windows."""
    projector = adapter().validate_python({"type": "qformer", "heads": 2, "hidden": 8})
    assert build_projector(projector, ears(frame_rate=50.0), tongue(4)).window == 17
    long = adapter().validate_python(
        {"type": "qformer", "window_seconds": 30, "queries": 80, "heads": 2, "hidden": 8}
    )
    built = build_projector(long, ears(frame_rate=50.0, limit=30.0), tongue(4))
    assert built.output_length(1500) == built.output_length(20) == 80

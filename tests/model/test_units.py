"""The compressor by CTC and discrete units, whose embeddings depend on what is heard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.model.compressor import CTCProjector
from isthmus.model.ctc_head import TransformersHead
from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.llm import LLM
from isthmus.model.parts import sources
from isthmus.model.projector import build_projector, check_projector
from isthmus.model.units import UnitProjector, Units, files_digest, nearest
from isthmus.settings.encoders import ConformerSettings
from isthmus.settings.projectors import CTCMode, CTCProjectorSettings, UnitProjectorSettings

SettingsOf = Callable[[str], Any]


class Head(TransformersHead):
    """Labels a frame by its largest number."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), 0, 50.0, None)

    def log_probs(self, frames: Tensor) -> Tensor:
        return frames.log_softmax(dim=-1)


def compress(mode: CTCMode, labels: list[int]) -> Tensor:
    """What the compressor makes of frames with these labels, before its linear layers."""
    projector = CTCProjector(Head(), (3, 3), 4, mode)
    frames = nn.functional.one_hot(torch.tensor(labels), 3).float()
    frames = frames * torch.arange(1, len(labels) + 1)[:, None]  # each frame its own
    with torch.no_grad():
        return projector._compress(frames)


def test_frames_of_one_label_are_averaged() -> None:
    found = compress("average", [0, 0, 1, 1, 1, 0, 2])
    expected = [[1.5, 0, 0], [0, 4, 0], [6, 0, 0], [0, 0, 7]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_frames_of_the_blank_are_dropped() -> None:
    found = compress("drop", [0, 0, 1, 1, 0, 2])
    torch.testing.assert_close(found, torch.tensor([[0.0, 3, 0], [0, 4, 0], [0, 0, 6]]))


@pytest.mark.parametrize("mode", ["average", "drop"])
def test_nothing_but_blanks_is_one_embedding(mode: CTCMode) -> None:
    torch.testing.assert_close(compress(mode, [0, 0, 0]), torch.tensor([[2.0, 0, 0]]))


@pytest.mark.parametrize("name", ["conformer", "parakeet", "wav2vec2-ctc"])
def test_labels_are_those_of_the_encoders_head(
    name: str, encoder_settings: SettingsOf, load_llm: Callable[..., LLM], waves: Any
) -> None:
    encoder = build_encoder(encoder_settings(name)).eval()
    settings = CTCProjectorSettings(hidden=8)
    check_projector(settings, encoder, encoder_settings(name))
    projector = build_projector(settings, encoder, load_llm("llama"))
    with torch.no_grad():
        frames, lengths = encoder(waves(40_000)[None], torch.tensor([40_000]))
        path = encoder.ctc.log_probs(frames)[0].argmax(dim=1)[: int(lengths)]
        assert projector(frames, lengths)[1].tolist() == [len(path.unique_consecutive())]
    assert len(path.unique_consecutive()) > 1
    assert {part.partition(".")[0] for part in projector.state_dict()} == {"linear1", "linear2"}


def test_an_encoder_without_a_head_is_refused(encoder_settings: SettingsOf) -> None:
    settings = encoder_settings("whisper")
    with pytest.raises(IsthmusError, match=r"no CTC head.*pretrain-ctc"):
        check_projector(CTCProjectorSettings(), build_encoder(settings), settings)


def test_a_head_that_is_left_behind_warns(encoder_settings: SettingsOf) -> None:
    settings = encoder_settings("conformer").model_copy(update={"tune": "full"})
    with pytest.warns(UserWarning, match=r"encoder\.tune is full: its CTC head"):
        check_projector(CTCProjectorSettings(), build_encoder(settings), settings)


# --- units


def units_of(settings: ConformerSettings, file: Path, **changes: Any) -> UnitProjectorSettings:
    """Random units of an encoder, in a file."""
    sha256 = changes.get("sha256", files_digest(sources(settings)))
    Units(torch.randn(5, changes.get("dim", 16)), settings.path, sha256).save(file)
    return UnitProjectorSettings(path=str(file))


def test_units_are_the_nearest_centroids() -> None:
    centroids, frames = torch.randn(9, 4), torch.randn(50, 4)
    distances = (frames[:, None] - centroids).square().sum(dim=2)
    assert torch.equal(nearest(frames, centroids), distances.argmin(dim=1))


def test_repeats_count_once() -> None:
    centroids, table = torch.eye(3), torch.randn(3, 5)
    frames = centroids[[0, 0, 2, 2, 2, 0, 1]][None]
    lengths = torch.tensor([6])  # the last is padding
    embeddings, counts = UnitProjector(centroids, table, True)(frames, lengths)
    assert counts.tolist() == [3]
    torch.testing.assert_close(embeddings[0], table[[0, 2, 0]])
    embeddings, counts = UnitProjector(centroids, table, False)(frames, lengths)
    assert counts.tolist() == [6]
    torch.testing.assert_close(embeddings[0], table[[0, 0, 2, 2, 2, 0]])


def test_the_table_is_like_the_llms_embeddings(
    encoder_settings: SettingsOf, load_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    settings, llm = encoder_settings("conformer"), load_llm("llama")
    with torch.no_grad():
        llm.network.get_input_embeddings().weight.mul_(0.1).add_(7.0)
    units = units_of(settings, tmp_path / "u.safetensors")
    table = build_projector(units, build_encoder(settings), llm).units.weight
    assert (table - 7.0).abs().mean() < 0.2
    assert 0.01 < table.std() < 0.1


def test_units_of_another_encoder_are_refused(
    encoder_settings: SettingsOf, load_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    settings, file = encoder_settings("conformer"), tmp_path / "u.safetensors"
    encoder: Encoder = build_encoder(settings)
    check_projector(units_of(settings, file), encoder, settings)
    with pytest.raises(IsthmusError, match=r"projector\.path: .*another SHA-256"):
        check_projector(units_of(settings, file, sha256="0" * 64), encoder, settings)
    with pytest.raises(IsthmusError, match=r"frames 7 wide.*frames 16 wide"):
        build_projector(units_of(settings, file, dim=7), encoder, load_llm("llama"))
    trained = settings.model_copy(update={"tune": "full"})
    with pytest.raises(IsthmusError, match=r"encoder\.tune"):
        check_projector(units_of(settings, file), encoder, trained)


def test_a_file_that_is_none_of_units(tmp_path: Path) -> None:
    file = tmp_path / "u.safetensors"
    with pytest.raises(IsthmusError, match=r"there is no file .*isthmus units RECIPE --output"):
        sources(UnitProjectorSettings(path=str(file)))
    file.write_bytes(b"\0" * 100)
    with pytest.raises(IsthmusError, match=r"cannot be read as a file of units.*isthmus units"):
        Units.load(file)
    Units(torch.zeros(3), "an encoder", "0" * 64).save(file)
    with pytest.raises(IsthmusError, match="1 dimensions, not 2"):
        Units.load(file)
    save_file({"centroids": torch.zeros(2, 2)}, file)  # by somebody who does not say of what
    with pytest.raises(IsthmusError, match="cannot be read as a file of units"):
        Units.load(file)

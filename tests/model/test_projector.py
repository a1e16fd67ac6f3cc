"""The projector's contract, and the papers' parameter counts."""

import pytest
import torch

from isthmus.model.projector import LinearProjectorSettings


def millions(encoder_dim: int, llm_dim: int, downsample_rate: int) -> float:
    """Parameters of the projector, in millions as the paper rounds them."""
    with torch.device("meta"):
        settings = LinearProjectorSettings(downsample_rate=downsample_rate)
        projector = settings.build(encoder_dim, llm_dim)
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


@pytest.mark.parametrize("k", [1, 3, 5])
def test_lengths_and_the_remainder(k: int) -> None:
    projector = LinearProjectorSettings(downsample_rate=k, hidden=8).build(4, 6)
    frames = torch.randn(3, 11, 4)
    lengths = torch.tensor([11, 7, k - 1])
    embeddings, counts = projector(frames, lengths)
    assert embeddings.shape == (3, 11 // k, 6)
    assert counts.tolist() == [projector.output_length(int(n)) for n in lengths]
    assert counts.tolist()[2] == 0
    alone, _ = projector(frames[1:2, : 7 // k * k], torch.tensor([7 // k * k]))
    torch.testing.assert_close(embeddings[1, : int(counts[1])], alone[0])


def test_is_the_formula_of_the_paper() -> None:
    projector = LinearProjectorSettings(downsample_rate=2, hidden=8).build(3, 5)
    frames = torch.randn(1, 4, 3)
    embeddings, _ = projector(frames, torch.tensor([4]))
    stacked = torch.cat([frames[0, 2], frames[0, 3]])
    hidden = (projector.linear1.weight @ stacked + projector.linear1.bias).relu()
    expected = projector.linear2.weight @ hidden + projector.linear2.bias
    torch.testing.assert_close(embeddings[0, 1], expected)


def test_fewer_frames_than_one_embedding_takes() -> None:
    projector = LinearProjectorSettings(downsample_rate=5, hidden=8).build(4, 6)
    embeddings, counts = projector(torch.randn(1, 3, 4), torch.tensor([3]))
    assert embeddings.shape == (1, 0, 6)
    assert counts.tolist() == [0]

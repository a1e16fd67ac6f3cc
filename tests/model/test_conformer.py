"""The Conformer with its CTC head: spelling, and its folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.model.conformer import FRONT_END_FILE, ConformerCTC, label_log_probs
from isthmus.model.spelling import letter_tokenizer
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings


@pytest.fixture
def conformer(model_folder: Callable[[str], Path]) -> ConformerCTC:
    return ConformerCTC.load(model_folder("conformer")).eval()


def test_saved_is_loaded(
    conformer: ConformerCTC, waves: Callable[..., Tensor], tmp_path: Path
) -> None:
    conformer.save(tmp_path)
    again = ConformerCTC.load(tmp_path).eval()
    assert again.log_mel.settings == conformer.log_mel.settings
    assert again.blank == conformer.blank
    waveforms, num_samples = waves(8000)[None], torch.tensor([8000])
    with torch.no_grad():
        expected, _ = conformer(waveforms, num_samples)
        frames, _ = again(waveforms, num_samples)
    torch.testing.assert_close(frames, expected, atol=0, rtol=0)


def test_log_probs_are_those_of_the_letters(
    conformer: ConformerCTC, waves: Callable[..., Tensor]
) -> None:
    with torch.no_grad():
        frames, num_frames = conformer(waves(8000)[None], torch.tensor([8000]))
        log_probs = conformer.log_probs(frames)
    assert log_probs.shape == (1, int(num_frames), len(conformer.tokenizer))
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(1, int(num_frames)))


def test_greedy_joins_repeats_and_drops_blanks(conformer: ConformerCTC) -> None:
    spelt = {letter: conformer.tokenizer.convert_tokens_to_ids(letter) for letter in "abc "}
    paths = [
        [spelt["a"], spelt["a"], 0, spelt["a"], spelt["b"], 0, spelt[" "], spelt["c"]],
        [spelt["c"], 0, 0, spelt["b"], *[spelt["a"]] * 4],
    ]
    log_probs = torch.nn.functional.one_hot(torch.tensor(paths), len(conformer.tokenizer)).float()
    assert conformer.blank == 0
    assert conformer.greedy(log_probs, torch.tensor([8, 4])) == ["aab c", "cb"]


def test_letters_are_units() -> None:
    tokenizer = letter_tokenizer("abc' ")
    ids = tokenizer.encode("a b'c?", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", " ", "b", "'", "c", "<unk>"]
    assert tokenizer.decode(ids[:-1]) == "a b'c"


def test_margins_give_room_for_short_words() -> None:
    architecture = ConformerArchitecture(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, subsampling_factor=4
    )
    without, with_margins = (
        ConformerCTC.initial(
            architecture, letter_tokenizer(), LogMelSettings(margin_seconds=margin)
        )
        for margin in (0.0, 0.12)
    )
    assert with_margins.output_length(1600) - without.output_length(1600) == 6  # 0.24 s at 25 Hz


def test_front_end_and_network_must_fit(conformer: ConformerCTC) -> None:
    with pytest.raises(IsthmusError, match="takes 40 mel bins, its front end gives 80"):
        ConformerCTC(conformer.network, conformer.tokenizer, LogMelSettings(num_mels=80))


def test_a_parakeet_of_the_hub_is_no_such_folder(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(IsthmusError, match=f"no {FRONT_END_FILE}"):
        ConformerCTC.load(model_folder("parakeet"))


def test_damaged_front_end(conformer: ConformerCTC, tmp_path: Path) -> None:
    conformer.save(tmp_path)
    (tmp_path / FRONT_END_FILE).write_text('{"num_mels": "many"}')
    with pytest.raises(IsthmusError, match="damaged"):
        ConformerCTC.load(tmp_path)


def test_a_head_of_the_oldest_transformers_gives_the_same() -> None:
    """There it is a bare convolution, with time behind the width."""

    class Turned(torch.nn.Conv1d):
        def forward(self, frames: Tensor) -> Tensor:
            return super().forward(frames.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    turned, bare, frames = Turned(4, 3, 1), torch.nn.Conv1d(4, 3, 1), torch.randn(2, 5, 4)
    bare.load_state_dict(turned.state_dict())
    found = label_log_probs(bare, frames)
    assert found.shape == (2, 5, 3)
    torch.testing.assert_close(found, label_log_probs(turned, frames))

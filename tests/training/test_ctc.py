"""CTC on a tiny Conformer: its random masks, and where its targets lie."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from isthmus.model.conformer import ConformerCTC
from isthmus.model.spelling import letter_tokenizer
from isthmus.recipe import CTCRecipe
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings
from isthmus.settings.datasets import CTCDataSettings
from isthmus.speech.augment import SpecAugment
from isthmus.speech.corpora import read_corpus
from isthmus.training.batches import SpeechData
from isthmus.training.ctc import CTCTask


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    (tmp_path / "a.txt").write_text("a bee")
    return tmp_path


def task(corpus: Path, seed: int, device: str = "cpu") -> CTCTask:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = ConformerArchitecture(
        **sizes, intermediate_size=16, subsampling_conv_channels=4, dropout=0, attention_dropout=0
    )
    model = ConformerCTC.initial(architecture, letter_tokenizer("abe "), LogMelSettings())
    data = SpeechData(list(read_corpus(corpus)), seed=seed)
    recipe = CTCRecipe(name="masks", seed=seed, data=CTCDataSettings(spec_augment=SpecAugment()))
    return CTCTask(model.to(device).eval(), data, None, recipe)


def loss_of(made: CTCTask, epoch: int) -> torch.Tensor:
    return made.loss(made.load([(0,)], epoch)).total


def test_masks_are_drawn_by_seed_and_epoch(corpus: Path) -> None:
    def loss(seed: int, epoch: int) -> float:
        return loss_of(task(corpus, seed), epoch).item()

    assert loss(1, 0) == loss(1, 0)
    assert len({loss(1, 0), loss(2, 0), loss(1, 1)}) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_loss_on_the_gpu_is_that_on_the_cpu(corpus: Path) -> None:
    here, there = (loss_of(task(corpus, 0, device), 0) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)

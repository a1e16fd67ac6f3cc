"""Models compute where they are asked to, and what is not there is one line, said early."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import isthmus as package
from isthmus.errors import IsthmusError
from isthmus.model.device import choose_device, on_device
from isthmus.training.parallel import Ranks

Isthmus = Callable[..., tuple[int, str, str]]
NO_DATA = ("data.train=[]", "data.dev=[]")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch believes in two GPUs; of which of them became the current one."""
    current: list[int] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_what_is_asked_for_is_chosen_and_only_there(two_gpus: list[int]) -> None:
    assert choose_device() == torch.device("cuda")
    for name in ("cpu", "cuda", "cuda:1"):
        with on_device(name):
            assert choose_device() == torch.device(name)
            with on_device(None):
                assert choose_device() == torch.device(name)
        assert choose_device() == torch.device("cuda")
    assert two_gpus == [1]


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "--device cuda:2 is not there: torch sees 2 of them. Choose"),
        ("gpu", "--device gpu: give auto, cpu, cuda, cuda:0 and so on, or mps"),
        ("cuda:", "--device cuda:: give auto"),
    ],
)
def test_what_is_not_there_is_refused(name: str, message: str, two_gpus: list[int]) -> None:
    with pytest.raises(IsthmusError, match=message), on_device(name):
        pass


def test_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(IsthmusError, match=r"cuda is not there: torch .* built without CUDA"):
        package.load("tiny", device="cuda")


def test_a_model_is_loaded_where_it_is_asked_to(two_gpus: list[int]) -> None:
    transcriber = package.load("tiny", device="cpu", gate="energy")
    assert {value.device.type for value in transcriber.model.parameters()} == {"cpu"}


def test_training_computes_where_it_is_asked_to(
    isthmus: Isthmus, monkeypatch: pytest.MonkeyPatch, two_gpus: list[int]
) -> None:
    found: list[torch.device] = []

    def job(*arguments: Any, **options: Any) -> None:
        found.append(Ranks().device)
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.lab.plateau.train_watched", job)
    for name in ("cpu", "auto", "cuda:1"):
        isthmus("train", "tiny/projector", *NO_DATA, "--device", name)
    assert found == [torch.device("cpu"), torch.device("cuda"), torch.device("cuda:1")]
    code, _, err = isthmus("train", "tiny/projector", *NO_DATA, "--device", "cuda:3")
    assert code == 1
    assert err.endswith("--device cuda:3 is not there: torch sees 2 of them. Choose auto or cpu.\n")


def test_of_several_processes_each_has_its_own(
    monkeypatch: pytest.MonkeyPatch, two_gpus: list[int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with on_device("cuda:1"), pytest.raises(IsthmusError, match="each of several has its own GPU"):
        Ranks()

"""Known models have the sizes that are published of them, and are built without a download."""

import socket
from typing import Any

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.lab.sizes import preset_parameters
from isthmus.model.device import choose_device
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import build_llm
from isthmus.model.parts import resolve
from isthmus.model.presets import PRESETS, find_preset, on_meta, stand_in_tokenizer
from isthmus.model.prompt import ChatPrompt, PaperPrompt, tokenise
from isthmus.settings.encoders import ConformerSettings, WhisperSettings
from isthmus.settings.llms import LLMSettings

# Of model cards and of the papers that present the models; Whisper without its fixed positions.
PUBLISHED = {
    "openai/whisper-tiny": 7_632_384,
    "openai/whisper-large-v3": 635_048_960,
    "microsoft/wavlm-large": 315_453_120,
    "facebook/wav2vec2-base": 94_371_712,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "huggyllama/llama-7b": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "microsoft/phi-2": 2_779_683_840,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-1b1": 1_065_314_304,
    "bigscience/bloom-1b7": 1_722_408_960,
    "bigscience/bloom-3b": 3_002_557_440,
    "bigscience/bloom-7b1": 7_069_016_064,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "google/gemma-2b": 2_506_172_416,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    assert preset_parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize(("layers", "name"), [(18, "conformer:18"), (36, "conformer:36")])
def test_a_conformer_of_ones_own(layers: int, name: str) -> None:
    with on_meta():
        encoder = build_encoder(ConformerSettings(path=name))
    assert encoder.dim == 512
    assert encoder.frame_rate == 12.5
    assert encoder.ctc is not None
    assert encoder.ctc.encoder_config.num_hidden_layers == layers


def test_no_weight_is_held() -> None:
    with on_meta():
        llm = build_llm(LLMSettings(path="lmsys/vicuna-13b-v1.5"))
        whisper = build_encoder(WhisperSettings(path="openai/whisper-large-v2"))
        assert choose_device() == torch.device("meta")
    assert {value.device.type for value in llm.parameters()} == {"meta"}
    assert {value.device.type for value in whisper.parameters()} == {"meta"}
    assert llm.dtype == torch.float16  # as it is stored


def test_plans_end_with_their_block(tmp_path: Any) -> None:
    with on_meta():
        folder = resolve("microsoft/phi-2")
        assert (folder / "config.json").is_file()
    assert not folder.exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IsthmusError, match="no weights"):
        resolve(str(tmp_path))
    assert choose_device().type != "meta"


def test_a_folder_needs_no_weights_in_a_plan(model_folder: Any, tmp_path: Any) -> None:
    for file in model_folder("llama").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with on_meta():
        llm = build_llm(LLMSettings(path=str(tmp_path)))
    assert llm.dim == 16
    with pytest.raises(IsthmusError, match="no weights"):
        build_llm(LLMSettings(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lmsys/vicuna-7b", r"Near it: lmsys/vicuna-7b-v1\.5"),
        ("openai/whisper-largev2", "openai/whisper-large-v2"),
        ("xyzzy", "known name in its place.*`isthmus presets`"),
        ("Qwen/Qwen-7B", r"never run.*Qwen/Qwen1\.5-7B"),
    ],
)
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(IsthmusError, match=hint), on_meta():
        build_llm(LLMSettings(path=name))


def test_names_are_of_two_kinds() -> None:
    assert {preset.kind for preset in PRESETS.values()} == {"encoder", "llm"}
    assert find_preset("microsoft/phi-2").config["model_type"] == "phi"


def test_a_tokenizer_stands_in() -> None:
    tokenizer = stand_in_tokenizer()
    text = "transcribe speech to text and nothing else but what was said"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(text) / 5.5 < len(tokens) < len(text) / 3
    for prompt in (PaperPrompt(), ChatPrompt()):
        pieces = tokenise(prompt, tokenizer, text)
        assert [piece.tokens for piece in pieces].count(None) == 1
        assert pieces[-1].tokens == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "google/gemma-2b", "bigscience/bloom-560m"])
def test_it_stands_in_for_every_family(name: str) -> None:
    with on_meta():
        llm = build_llm(LLMSettings(path=name))
    assert len(llm.tokenizer.encode("hello to you", add_special_tokens=False)) == 4

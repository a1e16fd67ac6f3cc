"""A language model in one GGUF file: read, unpacked, named by its sum; and files that are none."""

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.model.llm import LLM, build_llm
from isthmus.model.parts import sources
from isthmus.model.presets import on_meta
from isthmus.model.weights import sha256
from isthmus.settings.llms import LLMSettings
from tests.layouts import dequantised, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in blocks of eight bits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def folder(file: Path, tmp_path: Path) -> Path:
    return dequantised(file, tmp_path / "dequantised")


def state_of(llm: LLM) -> dict[str, torch.Tensor]:
    return dict(llm.network.state_dict())


@pytest.mark.parametrize("quantise", [True, False])
def test_it_is_its_dequantised_folder(tmp_path: Path, quantise: bool) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, quantise=quantise)
    found = build_llm(LLMSettings(path=str(file)))
    expected = build_llm(LLMSettings(path=str(dequantised(file, tmp_path / "folder"))))
    assert found.dtype == torch.float32
    assert state_of(found).keys() == state_of(expected).keys()
    assert all(torch.equal(v, state_of(expected)[name]) for name, v in state_of(found).items())
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert found.tokenizer.tokenize("the cat") == ["th", "e", "\u0120", "c", "a", "t"]
    assert found.end_tokens(3) == expected.end_tokens(3) == [3, 258]


def test_either_way_to_name_it(file: Path) -> None:
    settings = [
        LLMSettings(path=str(file)),
        LLMSettings(path=str(file.parent), gguf=file.name),
    ]
    for one in settings:
        (source,) = sources(one).values()
        assert source.sha256 == {"tiny.gguf": sha256(file)}
        assert source.name == str(file)
        assert build_llm(one).rows == 259


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({"dtype": "bfloat16"}, torch.bfloat16), ({"tune": "lora"}, torch.float32)],
)
def test_it_is_a_model_like_others(file: Path, changes: dict[str, str], dtype: torch.dtype) -> None:
    llm = build_llm(LLMSettings.model_validate({"path": str(file), **changes}))
    assert llm.dtype == dtype
    llm.store(torch.bfloat16)
    assert llm.dtype == torch.bfloat16
    assert any(p.requires_grad for p in llm.parameters())


def test_it_is_planned_with(file: Path) -> None:
    with on_meta():
        llm = build_llm(LLMSettings(path=str(file)))
    assert next(llm.parameters()).is_meta
    assert llm.dim == 32


def fault(settings: LLMSettings) -> str:
    with pytest.raises(IsthmusError) as caught:
        build_llm(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["bert", "unheard-of"])
def test_another_kind_of_model(architecture: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", architecture=architecture)
    said = fault(LLMSettings(path=str(tmp_path / "other.gguf")))
    assert "other.gguf cannot be loaded" in said
    assert "kind" in said


@pytest.mark.parametrize("architecture", ["t5", "t5encoder"])
def test_an_encoder_is_no_causal_model(
    architecture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "t5.gguf", architecture=architecture)
    said = fault(LLMSettings(path=str(tmp_path / "t5.gguf")))
    assert "t5" in said.lower()
    assert "no causal language model" in said
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("lacking", "rows", "words"),
    [("blk.0.ffn_up", 0, ["lacks 1 weights", "up_proj"]), ("", 300, ["(259, 32)", "(300, 32)"])],
)
def test_weights_that_do_not_fit(
    lacking: str, rows: int, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "odd.gguf", lacking=lacking, rows=rows)
    said = fault(LLMSettings(path=str(tmp_path / "odd.gguf")))
    assert all(word in said for word in words)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("length", [0, 20, 3000, -2000, -40])
def test_a_file_that_is_cut_short(length: int, file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:length])
    said = fault(LLMSettings(path=str(tmp_path / "cut.gguf")))
    assert "cut.gguf cannot be loaded" in said
    assert "damaged" in said


def test_a_quantisation_that_is_unknown(file: Path, tmp_path: Path) -> None:
    tensor = gguf.GGUFReader(file).tensors[0]
    kind = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4])
    content = bytearray(file.read_bytes())
    struct.pack_into("<I", content, kind, 99)
    (tmp_path / "new.gguf").write_bytes(content)
    assert "99" in fault(LLMSettings(path=str(tmp_path / "new.gguf")))


def test_a_file_that_is_not_there(file: Path) -> None:
    assert "no file" in fault(LLMSettings(path=str(file.parent / "other.gguf")))
    assert "no file other.gguf" in fault(LLMSettings(path=str(file.parent), gguf="other.gguf"))
    assert "llm.gguf" in fault(LLMSettings(path="someone/llama/tiny.gguf"))


def test_without_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec: Callable[[str], object] = importlib.util.find_spec

    def missing(name: str) -> object:
        return None if name == "gguf" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert "isthmus[gguf]" in fault(LLMSettings(path=str(file)))

"""Language models of many families behind one class."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.model.llm import LLM, LLMArchitecture, LLMSettings, character_tokenizer, save_llm

LoadLLM = Callable[..., LLM]


@torch.no_grad()
def test_embeddings_say_what_tokens_say(llm_name: str, load_llm: LoadLLM) -> None:
    llm = load_llm(llm_name)
    tokens = torch.tensor([llm.tokenizer.encode("hello world", add_special_tokens=False)])
    mask = torch.ones_like(tokens)
    keep = torch.tensor([3, 10])
    expected = llm.network(input_ids=tokens, attention_mask=mask).logits[:, keep]
    found = llm.logits(llm.embed(tokens), mask, keep)
    assert found.shape == (1, 2, len(llm.tokenizer))
    assert llm.embed(tokens).shape == (1, 11, llm.dim)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_longest_sequence(llm_name: str, load_llm: LoadLLM) -> None:
    assert load_llm(llm_name).max_tokens == (None if llm_name == "bloom" else 256)


def test_end_tokens_are_those_of_prompt_and_model(load_llm: LoadLLM) -> None:
    llm = load_llm("llama")
    for stated, expected in ((None, [7]), (2, [2, 7]), ([2, 3, 7], [2, 3, 7])):
        llm.network.generation_config.eos_token_id = stated
        assert llm.end_tokens(7) == expected


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_dtype(load_llm: LoadLLM, dtype: str) -> None:
    expected = torch.float32 if dtype == "auto" else torch.bfloat16
    assert load_llm("llama", dtype=dtype).dtype == expected


def test_saved_in_half_precision_is_loaded_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = LLMArchitecture(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    llm = architecture.build(character_tokenizer(chat=True))
    save_llm(llm, tmp_path)
    assert capsys.readouterr().err == ""  # no progress bar
    again = LLMSettings(path=str(tmp_path)).build()
    assert again.dtype == torch.float32
    assert again.tokenizer.chat_template == llm.tokenizer.chat_template
    assert again.tokenizer.encode("Say </s>") == llm.tokenizer.encode("Say </s>")
    for name, value in again.network.named_parameters():
        expected = llm.network.get_parameter(name).half().float()
        torch.testing.assert_close(value, expected, atol=0, rtol=0)


def test_lora_trains_adapters_only(load_llm: LoadLLM) -> None:
    llm = load_llm("llama", tune="lora", lora={"targets": ["q_proj", "v_proj"], "rank": 2})
    trainable = [name for name, p in llm.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2  # layers, targets, A and B
    assert all("lora_" in name for name in trainable)


@torch.no_grad()
def test_lora_starts_where_the_model_is(load_llm: LoadLLM) -> None:
    tokens = torch.tensor([[10, 20, 30]])
    logits = []
    for llm in (load_llm("llama"), load_llm("llama", tune="lora")):
        logits.append(llm.logits(llm.embed(tokens), torch.ones_like(tokens), torch.arange(3)))
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt-neox", "query_key_value"), ("gpt2", "c_attn"), ("phi", "q_proj")]
)
def test_lora_in_other_families(load_llm: LoadLLM, name: str, targets: str) -> None:
    llm = load_llm(name, tune="lora", lora={"targets": [targets]})
    assert any(p.requires_grad for p in llm.parameters())


@pytest.mark.parametrize("targets", [["query"], ["q_proj", "query"]])
def test_lora_in_layers_that_are_not_there(load_llm: LoadLLM, targets: list[str]) -> None:
    with pytest.raises(IsthmusError, match=r"no layers query\. Its linear layers are .*k_proj"):
        load_llm("llama", tune="lora", lora={"targets": targets})


def test_lora_settings_that_are_ignored_warn(load_llm: LoadLLM) -> None:
    with pytest.warns(UserWarning, match=r"llm\.lora is ignored with tune: frozen"):
        load_llm("llama", lora={"rank": 2})


def test_folder_without_tokenizer(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(model_folder("llama"), folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(IsthmusError, match="cannot be loaded"):
        LLMSettings(path=str(folder)).build()


def test_folder_of_another_kind(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(IsthmusError, match="cannot be loaded"):
        LLMSettings(path=str(model_folder("wav2vec2-group"))).build()

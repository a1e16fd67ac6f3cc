"""Language models of many families behind one class."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import LLM, build_llm, character_tokenizer, new_llm, save_llm
from isthmus.model.parts import model_type
from isthmus.model.projector import build_projector
from isthmus.model.prompt import ChatPrompt, PaperPrompt
from isthmus.model.speech_llm import SpeechLLM
from isthmus.settings.llms import LLMArchitecture, LLMSettings
from isthmus.settings.projectors import LinearProjectorSettings

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
    llm = new_llm(architecture, character_tokenizer(chat=True))
    save_llm(llm, tmp_path)
    assert capsys.readouterr().err == ""  # no progress bar
    again = build_llm(LLMSettings(path=str(tmp_path)))
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
    with pytest.raises(IsthmusError, match="cannot be loaded") as caught:
        build_llm(LLMSettings(path=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma"])
def test_a_tokenizer_without_its_files(
    name: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers makes one of the special tokens alone, and says nothing."""
    shutil.copytree(model_folder(name), tmp_path / "llm")
    for file in (tmp_path / "llm").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(IsthmusError, match=r"llm\.path.* entries and none for text"):
        build_llm(LLMSettings(path=str(tmp_path / "llm")))


@pytest.mark.parametrize("name", ["wav2vec2-group", "whisper", "parakeet"])
def test_folder_of_another_kind(name: str, model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(IsthmusError, match=r"llm\.path: .*no causal language model") as caught:
        build_llm(LLMSettings(path=str(model_folder(name))))
    assert "\n" not in str(caught.value)


def declare(folder: Path, target: Path, **changes: object) -> str:
    """A copy of a model folder whose configuration says something else."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return str(target)


@pytest.mark.parametrize(
    ("declared", "fits"),
    [
        (["LlamaForCausalLM"], True),
        (["LLaMAForCausalLM"], True),  # as the first conversions have it
        (None, True),
        ([], True),
        (["LlamaForSequenceClassification"], False),
        (["LlamaModel"], False),
    ],
)
def test_what_a_model_says_it_is(
    declared: list[str] | None, fits: bool, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = declare(model_folder("llama"), tmp_path / "llm", architectures=declared)
    if fits:
        assert build_llm(LLMSettings(path=path)).dim == 16
    else:
        with pytest.raises(IsthmusError, match=f"is a {(declared or [''])[0]}, no causal"):
            build_llm(LLMSettings(path=path))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "JSON"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ('{"model_type": ["llama"]}', "model_type"),
        ('{"model_type": "llama", "architectures": "LlamaForCausalLM"}', "architectures"),
    ],
)
def test_a_broken_configuration(
    config: str, word: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(config)
    settings = LLMSettings(path=str(tmp_path / "llm"))
    for read in (lambda: build_llm(settings), lambda: model_type(tmp_path / "llm")):
        with pytest.raises(IsthmusError, match=rf"config\.json.*{word}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_an_embedding_that_lacks_rows(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = load_file(model_folder("llama") / "model.safetensors")["model.embed_tokens.weight"].shape
    path = declare(model_folder("llama"), tmp_path / "llm", vocab_size=rows[0] + 2)
    with pytest.raises(IsthmusError, match=r"embed_tokens|lm_head") as caught:
        build_llm(LLMSettings(path=path))
    assert f"{tuple(rows)}, and not ({rows[0] + 2}, {rows[1]})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "REPORT" not in capfd.readouterr().err


def with_tokens(folder: Path, target: Path, *tokens: AddedToken) -> LLMSettings:
    """A copy of a model whose tokenizer has more tokens than its network has rows."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(target)
    return LLMSettings(path=str(target))


def test_special_tokens_without_rows_matter_where_they_are_used(
    model_folder: Callable[[str], Path], tmp_path: Path, encoder_settings: Callable[[str], Any]
) -> None:
    settings = with_tokens(
        model_folder("llama"), tmp_path / "llm", AddedToken("<|audio|>", special=True)
    )
    llm = build_llm(settings)
    assert len(llm.tokenizer) == llm.rows + 1
    encoder = build_encoder(encoder_settings("fbank"))
    projector = build_projector(LinearProjectorSettings(), encoder, llm)
    SpeechLLM(encoder, projector, llm, PaperPrompt())
    llm.tokenizer.chat_template = "<|audio|>" + llm.tokenizer.chat_template
    with pytest.raises(IsthmusError, match=r"prompt\.template uses '<\|audio\|>'.*101 .* 100 rows"):
        SpeechLLM(encoder, projector, llm, ChatPrompt())


def test_ordinary_tokens_without_rows_are_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = with_tokens(
        model_folder("llama"), tmp_path / "llm", AddedToken("hello"), AddedToken("world")
    )
    with pytest.raises(IsthmusError, match=r"'hello', 'world'.*102 tokens, the model 100 rows"):
        build_llm(settings)


def test_more_rows_than_tokens(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As models have it whose rows are a round number."""
    network = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    network.resize_token_embeddings(128)
    shutil.copytree(model_folder("llama"), tmp_path / "llm")
    network.save_pretrained(tmp_path / "llm")
    llm = build_llm(LLMSettings(path=str(tmp_path / "llm")))
    assert (llm.rows, len(llm.tokenizer)) == (128, 100)


def test_letters_that_cannot_be_spelt(load_llm: LoadLLM) -> None:
    texts = ["käse über", "plain", "", "über"]
    assert load_llm("llama").unspelt(texts) == (2, ["ä", "ü"])
    assert load_llm("qwen2").unspelt(texts) == (0, [])  # it has all bytes


def test_letters_known_within_words_alone(load_llm: LoadLLM) -> None:
    llm = load_llm("llama")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "go": 1, "left": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    llm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert llm.unspelt(["go left", "go right"]) == (1, list("ghiort"))

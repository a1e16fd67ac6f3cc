"""Tiny random models, written as the Hugging Face hub holds them."""

import gc
import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    ParakeetFeatureExtractor,
    Qwen2Tokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from isthmus.cli import main
from isthmus.model.conformer import ConformerCTC
from isthmus.model.encoder import Encoder, build_encoder
from isthmus.model.llm import CHAT_TEMPLATE, LLM, build_llm, character_tokenizer
from isthmus.model.spelling import letter_tokenizer
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings
from isthmus.settings.encoders import (
    ConformerSettings,
    FBankSettings,
    PairSettings,
    SelfSupervisedSettings,
    WhisperSettings,
)
from isthmus.settings.llms import LLMSettings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub ...
os.environ.setdefault("ISTHMUS_OFFLINE", "1")  # ... or an index, but those that are about it

WIDTH = 16
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def scramble(network: nn.Module) -> None:
    """Weights large enough that every part of the network has a say in what comes out."""
    with torch.no_grad():
        for value in network.parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
            else:
                value.add_(0.1 * torch.randn_like(value))
        for name, value in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 1.5)


def write_whisper(folder: Path) -> None:
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=20,
        num_mel_bins=80,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    network = WhisperForConditionalGeneration(config)
    scramble(network)
    network.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)


def write_self_supervised(kind: str, norm: str, folder: Path, *, batch_norm: bool = False) -> None:
    """The base sizes have `norm` "group" and normalise afterwards, the large ones "layer"."""
    large = norm == "layer"
    config = AutoConfig.for_model(
        kind,
        **SIZES,
        conv_dim=[8] * 7,  # kernels and strides are the real ones
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=large,
        vocab_size=20,
        **({"conv_pos_batch_norm": True} if batch_norm else {}),
    )
    network = AutoModel.from_config(config)
    scramble(network)
    network.save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=large)
    extractor.save_pretrained(folder)


# of wav2vec2-base-960h, in its order
WAV2VEC2_UNITS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]


def write_spelling(kind: str, folder: Path) -> None:
    """A self-supervised model that was fine-tuned to spell, with capital letters."""
    config = AutoConfig.for_model(
        kind,
        **SIZES,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        vocab_size=len(WAV2VEC2_UNITS),
        pad_token_id=0,
    )
    network = AutoModelForCTC.from_config(config)
    scramble(network)
    network.save_pretrained(folder)
    places = {unit: place for place, unit in enumerate(WAV2VEC2_UNITS)}
    (folder / "vocab.json").write_text(json.dumps(places))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def write_parakeet(folder: Path) -> None:
    encoder = AutoConfig.for_model(
        "parakeet_encoder",
        **SIZES,
        num_mel_bins=80,
        conv_kernel_size=5,
        subsampling_conv_channels=8,
        subsampling_factor=8,
    )
    config = AutoConfig.for_model(
        "parakeet_ctc", encoder_config=encoder, vocab_size=20, pad_token_id=19
    )
    network = AutoModelForCTC.from_config(config)
    scramble(network)
    network.save_pretrained(folder)
    ParakeetFeatureExtractor(feature_size=80).save_pretrained(folder)


def write_conformer(folder: Path) -> None:
    architecture = ConformerArchitecture(
        **SIZES, conv_kernel_size=5, subsampling_factor=4, subsampling_conv_channels=8
    )
    front_end = LogMelSettings(num_mels=40, normalise="peak", margin_seconds=0.1)
    model = ConformerCTC.initial(architecture, letter_tokenizer("abcdefgh "), front_end)
    scramble(model.network)
    model.save(folder)


Writer = Callable[[Path], None]
ENCODERS: dict[str, tuple[Writer | None, dict[str, Any]]] = {
    "fbank": (None, {"type": "fbank"}),
    "whisper": (write_whisper, {"type": "whisper"}),
    "whisper-kept": (write_whisper, {"type": "whisper", "keep_padding": True}),
    "whisper-unpadded": (write_whisper, {"type": "whisper", "pad_to_30s": False}),
    "conformer": (write_conformer, {"type": "conformer"}),
    "parakeet": (write_parakeet, {"type": "conformer"}),
    **{
        f"{kind}-{norm}": (partial(write_self_supervised, kind, norm), {"type": kind})
        for kind in ("wav2vec2", "hubert", "wavlm")
        for norm in ("group", "layer")
    },
    "hubert-batch-norm": (
        partial(write_self_supervised, "hubert", "layer", batch_norm=True),
        {"type": "hubert"},
    ),
    **{
        f"{kind}-ctc": (partial(write_spelling, kind), {"type": kind})
        for kind in ("wav2vec2", "hubert", "wavlm")
    },
    "pair": (None, {"type": "pair", "first": "conformer", "second": "wav2vec2-group"}),
}
SETTINGS = {
    "fbank": FBankSettings,
    "whisper": WhisperSettings,
    "conformer": ConformerSettings,
    "pair": PairSettings,
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), SelfSupervisedSettings),
}

LLAMA = SIZES | {"max_position_embeddings": 256}
LLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", LLAMA | {"num_key_value_heads": 1}),
    "gpt-neox": ("gpt_neox", LLAMA),
    "gpt2": ("gpt2", {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "bloom": ("bloom", {"hidden_size": WIDTH, "n_layer": 2, "n_head": 2}),
    "phi": ("phi", LLAMA),
    "gemma": ("gemma", LLAMA | {"num_key_value_heads": 1, "head_dim": 8}),
}


def write_llm(name: str, folder: Path) -> None:
    """A language model over characters; Qwen's over bytes, as transformers insists on its class."""
    kind, sizes = LLMS[name]
    tokenizer = byte_tokenizer() if kind == "qwen2" else character_tokenizer(chat=True)
    config = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = AutoModelForCausalLM.from_config(config)
    scramble(network)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer without merges: no token begins a sequence, and padding ends one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


ModelFolder = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What isthmus keeps for later goes with the tests."""
    folder = tmp_path_factory.mktemp("user-cache")
    os.environ["ISTHMUS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def parts() -> Path:
    """Real pretrained parts: $ISTHMUS_PARTS, or the user's cache."""
    folder = Path(os.environ.get("ISTHMUS_PARTS", "~/.cache/isthmus-parts")).expanduser()
    if not (folder / "whisper-base").is_dir():
        pytest.skip(f"no real parts in {folder}: set ISTHMUS_PARTS to a folder of them")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The folder of the tiny model of a name in ENCODERS or LLMS; written once, never to change."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            writer = partial(write_llm, name) if name in LLMS else ENCODERS[name][0]
            assert writer is not None
            writer(folder)
            folders[name] = folder
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def encoder_settings(model_folder: ModelFolder) -> Callable[[str], Any]:
    """Settings of the tiny encoder of a name in ENCODERS."""

    def settings_of(name: str) -> Any:
        writer, values = ENCODERS[name]
        if values["type"] == "pair":
            parts = {place: settings_of(values[place]) for place in ("first", "second")}
            return PairSettings(**parts)
        path = {} if writer is None else {"path": str(model_folder(name))}
        return SETTINGS[values["type"]].model_validate(values | path)

    return settings_of


@pytest.fixture(scope="session")
def encoder_names() -> list[str]:
    return list(ENCODERS)


@pytest.fixture(scope="session", params=ENCODERS)
def encoder_name(request: pytest.FixtureRequest) -> str:
    """Each encoder in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def encoder(encoder_name: str, encoder_settings: Callable[[str], Any]) -> Encoder:
    """Each encoder in turn, from its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Whisper without padding
        built: Encoder = build_encoder(encoder_settings(encoder_name))
    return built.eval()


@pytest.fixture(scope="session", params=LLMS)
def llm_name(request: pytest.FixtureRequest) -> str:
    """Each family of language models in turn."""
    return str(request.param)


@pytest.fixture
def load_llm(model_folder: ModelFolder) -> Callable[..., LLM]:
    """A fresh tiny language model of a name in LLMS, with settings such as `tune`."""

    def load(name: str, **values: Any) -> LLM:
        return build_llm(LLMSettings(path=str(model_folder(name)), **values)).eval()

    return load


@pytest.fixture(scope="session")
def waves() -> Callable[..., Tensor]:
    """Noise (S,) under a slow envelope, somewhat like speech; the same for the same arguments."""

    def make(num_samples: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_samples, generator=generator)
        envelope = torch.sin(torch.arange(num_samples) / 1500.0).square()
        return 0.1 * noise * envelope + 0.001 * noise

    return make


@pytest.fixture
def isthmus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["isthmus", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        gc.unfreeze()  # a command has its process to itself, but for here
        out, err = capsys.readouterr()
        return code, out, err

    return run

"""The sizes of known models, by Hugging Face name, so that they can be planned with offline.

A preset is a model folder without weights: its configuration, its front end or a tokenizer in the
place of its own. What is not said here is the default of transformers.
"""

import difflib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from isthmus.errors import IsthmusError
from isthmus.model.conformer import FRONT_END_FILE
from isthmus.model.device import META, on_device
from isthmus.model.fetch import FETCHED, GIVEN, PARTS
from isthmus.model.llm import CHAT_TEMPLATE
from isthmus.model.parts import StandIns, stand_ins
from isthmus.model.spelling import letter_tokenizer
from isthmus.settings.conformers import ConformerArchitecture, LogMelSettings

Config = Mapping[str, Any]
LETTERS_A_TOKEN = 4  # of the tokenizer that stands in: about what those of LLMs make of English


@dataclass(frozen=True)
class Preset:
    """What a model is built from."""

    kind: Literal["encoder", "llm"]
    config: Config  # of transformers, `model_type` among it
    note: str = ""


def _whisper(
    width: int, layers: int, heads: int, *, decoder_layers: int | None = None, newest: bool = False
) -> Preset:
    """Sizes of the table in arXiv 2212.04356, appendix; those since large-v3 hear finer."""
    return Preset(
        "encoder",
        {
            "model_type": "whisper",
            "d_model": width,
            "encoder_layers": layers,
            "decoder_layers": layers if decoder_layers is None else decoder_layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": 4 * width,
            "decoder_ffn_dim": 4 * width,
            "vocab_size": 51866 if newest else 51865,
            "num_mel_bins": 128 if newest else 80,
            "dtype": "float16" if newest else "float32",
        },
    )


LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
EXTRA_LARGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


def _self_supervised(model_type: str, *sizes: Config, conv_bias: bool = False) -> Preset:
    config: dict[str, Any] = {"model_type": model_type, "conv_bias": conv_bias}
    for values in sizes:
        config |= values
    return Preset("encoder", config)


def _parakeet(layers: int) -> Preset:
    encoder = {"model_type": "parakeet_encoder", "num_hidden_layers": layers}
    return Preset(
        "encoder",
        {
            "model_type": "parakeet_ctc",
            "encoder_config": encoder,
            "vocab_size": 1025,
            "pad_token_id": 1024,
        },
    )


def _conformer(layers: int) -> Preset:
    """What `isthmus pretrain-ctc` makes of its default sizes, in so many layers."""
    architecture = ConformerArchitecture(num_hidden_layers=layers).model_dump()
    encoder = {"model_type": "parakeet_encoder", "num_mel_bins": 80} | architecture
    letters = letter_tokenizer()
    return Preset(
        "encoder",
        {
            "model_type": "parakeet_ctc",
            "encoder_config": encoder,
            "vocab_size": len(letters),
            "pad_token_id": letters.pad_token_id,
        },
        "of `isthmus pretrain-ctc`; there are no weights of it to load",
    )


def _llm(
    model_type: str, width: int, layers: int, heads: int, inner: int, more: Config | None = None
) -> Preset:
    sizes = {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "dtype": "float16",
    }
    return Preset("llm", sizes | dict(more or {}))


def _bloom(width: int, layers: int, heads: int) -> Preset:
    return Preset(
        "llm",
        {
            "model_type": "bloom",
            "hidden_size": width,
            "n_layer": layers,
            "n_head": heads,
            "vocab_size": 250_880,
            "dtype": "float16",
        },
    )


def _qwen(width: int, layers: int, heads: int, inner: int, keys: int, small: bool) -> Preset:
    """Qwen1.5 to 2.5. The small ones have one table of embeddings for both ends."""
    return _llm(
        "qwen2",
        width,
        layers,
        heads,
        inner,
        {
            "num_key_value_heads": keys,
            "vocab_size": 151_936 if small else 152_064,
            "tie_word_embeddings": small,
            "dtype": "bfloat16",
        },
    )


def _pythia(width: int, layers: int, heads: int, vocab_size: int = 50_304) -> Preset:
    return _llm("gpt_neox", width, layers, heads, 4 * width, {"vocab_size": vocab_size})


def _tiny_llama(dtype: str) -> Preset:
    return _llm("llama", 2048, 22, 32, 5632, {"num_key_value_heads": 4, "dtype": dtype})


LLAMA_2_7B = _llm("llama", 4096, 32, 32, 11008, {"max_position_embeddings": 4096})
QWEN_2_5 = {
    "0.5B": _qwen(896, 24, 14, 4864, 2, small=True),
    "1.5B": _qwen(1536, 28, 12, 8960, 2, small=True),
    "3B": _qwen(2048, 36, 16, 11008, 2, small=True),
    "7B": _qwen(3584, 28, 28, 18944, 4, small=False),
    "14B": _qwen(5120, 48, 40, 13824, 8, small=False),
    "32B": _qwen(5120, 64, 40, 27648, 8, small=False),
    "72B": _qwen(8192, 80, 64, 29568, 8, small=False),
}
PRESETS: dict[str, Preset] = {
    "openai/whisper-tiny": _whisper(384, 4, 6),
    "openai/whisper-base": _whisper(512, 6, 8),
    "openai/whisper-small": _whisper(768, 12, 12),
    "openai/whisper-medium": _whisper(1024, 24, 16),
    "openai/whisper-large": _whisper(1280, 32, 20),
    "openai/whisper-large-v2": _whisper(1280, 32, 20),
    "openai/whisper-large-v3": _whisper(1280, 32, 20, newest=True),
    "openai/whisper-large-v3-turbo": _whisper(1280, 32, 20, decoder_layers=4, newest=True),
    "facebook/hubert-base-ls960": _self_supervised("hubert"),
    **{
        f"facebook/hubert-{name}": _self_supervised("hubert", sizes, LAYER_NORM, conv_bias=True)
        for size, sizes in (("large", LARGE), ("xlarge", EXTRA_LARGE))
        for name in (f"{size}-ll60k", f"{size}-ls960-ft")
    },
    "microsoft/wavlm-base": _self_supervised("wavlm"),
    "microsoft/wavlm-base-plus": _self_supervised("wavlm"),
    "microsoft/wavlm-large": _self_supervised("wavlm", LARGE, LAYER_NORM),
    "facebook/wav2vec2-base": _self_supervised("wav2vec2"),
    "facebook/wav2vec2-large": _self_supervised("wav2vec2", LARGE),
    "facebook/wav2vec2-large-lv60": _self_supervised("wav2vec2", LARGE, LAYER_NORM, conv_bias=True),
    "nvidia/parakeet-ctc-0.6b": _parakeet(24),
    "nvidia/parakeet-ctc-1.1b": _parakeet(42),
    "conformer:18": _conformer(18),
    "conformer:24": _conformer(24),
    "conformer:36": _conformer(36),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _tiny_llama("float32"),
    "TinyLlama/TinyLlama-1.1B-Chat-v0.4": _tiny_llama("float32"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _tiny_llama("bfloat16"),
    "huggyllama/llama-7b": _llm("llama", 4096, 32, 32, 11008),
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_2_7B,
    "lmsys/vicuna-7b-v1.5": LLAMA_2_7B,
    "lmsys/vicuna-13b-v1.5": _llm("llama", 5120, 40, 40, 13824, {"max_position_embeddings": 4096}),
    "microsoft/phi-2": _llm("phi", 2560, 32, 32, 10240, {"vocab_size": 51_200}),
    "bigscience/bloom-560m": _bloom(1024, 24, 16),
    "bigscience/bloom-1b1": _bloom(1536, 24, 16),
    "bigscience/bloom-1b7": _bloom(2048, 24, 16),
    "bigscience/bloom-3b": _bloom(2560, 30, 32),
    "bigscience/bloom-7b1": _bloom(4096, 30, 32),
    "Qwen/Qwen1.5-7B": _llm(
        "qwen2", 4096, 32, 32, 11008, {"vocab_size": 151_936, "dtype": "bfloat16"}
    ),
    **{f"Qwen/Qwen2-{size}": QWEN_2_5[size] for size in ("0.5B", "1.5B", "7B")},
    **{f"Qwen/Qwen2.5-{size}": preset for size, preset in QWEN_2_5.items()},
    **{f"Qwen/Qwen2.5-{size}-Instruct": preset for size, preset in QWEN_2_5.items()},
    "google/gemma-2b": _llm(
        "gemma",
        2048,
        18,
        8,
        16384,
        {"num_key_value_heads": 1, "head_dim": 256, "dtype": "bfloat16"},
    ),
    "EleutherAI/pythia-70m": _pythia(512, 6, 8),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "EleutherAI/pythia-1.4b": _pythia(2048, 24, 16),
    "EleutherAI/pythia-2.8b": _pythia(2560, 32, 32),
    "EleutherAI/pythia-6.9b": _pythia(4096, 32, 32, 50_432),
    "EleutherAI/pythia-12b": _pythia(5120, 36, 40, 50_688),
    **{
        path: Preset(
            "encoder" if "whisper" in PARTS[name].given else "llm",
            json.loads((GIVEN / name / "config.json").read_text(encoding="utf-8")),
        )
        for path, name in FETCHED.items()
    },
}
FOREIGN_CODE = {"Qwen/Qwen-7B": "Qwen/Qwen1.5-7B", "Qwen/Qwen-7B-Chat": "Qwen/Qwen1.5-7B"}
"""Models that are code of their own, which is never run; the nearest that is not."""


def find_preset(name: str) -> Preset:
    """Raises IsthmusError for a model that is not known here, with the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    if name in FOREIGN_CODE:
        raise IsthmusError(
            f"{name} is made of code that its repository brings along, and such code is never run. "
            f"The nearest model without is {FOREIGN_CODE[name]}."
        )
    if name.count("/") != 1:
        raise IsthmusError(
            f"{name}: there is no such folder. Train what it is to hold first, or plan with a "
            "known name in its place, such as conformer:18. `isthmus presets` lists them."
        )
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
    hint = f" Near it: {', '.join(near)}." if near else ""
    raise IsthmusError(
        f"{name} is not known offline: give a folder with its config.json, or a known name.{hint} "
        "`isthmus presets` lists them."
    )


def write_preset(name: str, folder: Path) -> None:
    """Fill `folder` with all of model `name` but its weights; raises IsthmusError if unknown.

    An LLM's tokenizer is one that stands in for it: a token for every four letters of a word. The
    front end of an encoder is its kind's usual one; of it only the mel bins matter to sizes.
    """
    preset = find_preset(name)
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**preset.config)
    config.save_pretrained(folder)
    match config.model_type:
        case "whisper":
            WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
        case "hubert" | "wavlm" | "wav2vec2":
            Wav2Vec2FeatureExtractor().save_pretrained(folder)
        case "parakeet_ctc" if name.startswith("conformer:"):
            letter_tokenizer().save_pretrained(folder)
            (folder / FRONT_END_FILE).write_text(LogMelSettings().model_dump_json())
        case "parakeet_ctc":
            ParakeetFeatureExtractor(feature_size=80).save_pretrained(folder)
        case _:
            stand_in_tokenizer().save_pretrained(folder)


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """Counts tokens about as an LLM's own does; what they are it does not know."""
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>")
    )
    piece = Regex(rf"\s*\S{{1,{LETTERS_A_TOKEN}}}|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(piece, "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@contextmanager
def on_meta() -> Iterator[None]:
    """Parts that are built within have their sizes and no weights: their networks are on torch's
    meta device. A Hugging Face name is looked up here; nothing is downloaded.
    """
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, on_device(META):
        token = stand_ins.set(StandIns(Path(folder), write_preset))
        try:
            yield
        finally:
            stand_ins.reset(token)

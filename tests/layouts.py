"""Models as repositories hold them: pickles, shards, GGUF, tokenizers of one file."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def without_weights(folder: Path, target: Path) -> Path:
    """A copy of a model folder, its weights left out."""
    kept = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json")
    shutil.copytree(folder, target, ignore=kept)
    return target


def state_of(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder under all their names, tied ones in the same memory."""
    weights = load_file(folder / SAFE)
    if "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def write_layout(folder: Path, target: Path, layout: str) -> Path:
    """A copy of a model folder with its weights in `bin` or `safetensors`, `sharded-` or not."""
    without_weights(folder, target)
    state = state_of(folder)
    pickled, single = layout.endswith("bin"), PICKLED if layout.endswith("bin") else SAFE
    if not pickled:
        state = load_file(folder / SAFE)
    if not layout.startswith("sharded"):
        _write(state, target / single)
        return target
    stem, suffix = single.split(".")
    places: dict[str, str] = {}
    for number in (1, 2, 3):
        name = f"{stem}-{number:05d}-of-00003.{suffix}"
        part = {key: state[key] for key in list(state)[number - 1 :: 3]}
        _write(part, target / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (target / f"{single}.index.json").write_text(json.dumps(index))
    return target


def _write(state: Mapping[str, Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(dict(state), file)
    else:
        save_file({name: value.clone() for name, value in state.items()}, file, {"format": "pt"})


class Trap:
    """Makes a folder when a pickle with it is opened."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def write_gguf(
    file: Path,
    *,
    architecture: str = "llama",
    quantise: bool = True,
    seed: int = 0,
    lacking: str = "",
    rows: int = 0,
) -> None:
    """A tiny random language model over bytes in one GGUF file, with its tokenizer.

    It may lack a weight, or say that it has other `rows` of embeddings than it has.
    """
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    width, inner, heads = 32, 64, 4
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he", "<|endoftext|>"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(rows or len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{part}": (inner, width) for part in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (width, inner)}
    shapes.pop(lacking, None)
    for name, shape in shapes.items():
        values = rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantise else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantised(file: Path, target: Path) -> Path:
    """The folder that transformers makes of a GGUF file, in float32."""
    from transformers import AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.load_state_dict(read.state_dict())
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)
    return target


def write_sentencepiece(folder: Path) -> int:
    """A tokenizer as Llama 2 and Vicuna have it, `tokenizer.model` alone; how many tokens it has.

    BPE over letters with bytes to fall back to.
    """
    unknown, control, byte, normal = 2, 3, 6, 1
    pieces = [("<unk>", unknown), ("<s>", control), ("</s>", control)]
    pieces += [(f"<0x{number:02X}>", byte) for number in range(256)]
    words = ["\u2581t", "he", "\u2581the", *"\u2581abcdefghijklmnopqrstuvwxyz"]
    pieces += [(word, normal) for word in words]
    model = b"".join(
        _message(
            1,
            _message(1, text.encode())
            + _field(2, 5, struct.pack("<f", -float(number)))
            + _field(3, 0, _varint(kind)),
        )
        for number, (text, kind) in enumerate(pieces)
    )
    model += _message(2, _field(3, 0, _varint(2)) + _field(35, 0, _varint(1)))  # BPE, bytes
    model += _message(3, _message(1, b"identity") + _field(3, 0, _varint(1)))  # a space before
    (folder / "tokenizer.model").write_bytes(model)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    values = {"tokenizer_class": "LlamaTokenizer", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return len(pieces)


def _varint(number: int) -> bytes:
    """As protocol buffers write it: seven bits a byte, the lowest first."""
    more = number >> 7
    return bytes([number & 127 | (128 if more else 0)]) + (_varint(more) if more else b"")


def _field(number: int, wire: int, content: bytes) -> bytes:
    return _varint(number << 3 | wire) + content


def _message(number: int, content: bytes) -> bytes:
    return _field(number, 2, _varint(len(content)) + content)

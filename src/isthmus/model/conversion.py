"""Foreign files to model folders: Whisper of the hub or of CTranslate2, a llama of GGUF.

What comes out depends on weights, vocabulary and merges alone: all else of a folder is given, and
each file is written here, so that it has the same bytes whatever the source and the library.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from isthmus.files import write_file

GGUF = ".gguf"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
CTRANSLATE2 = "model.bin"
CTRANSLATE2_VERSION = 6
DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their number in the file
TIMESTAMPS = 1501  # tokens of Whisper: each 20 ms of 30 s

# Names of CTranslate2 to those of transformers; several share the rows of one matrix.
WHISPER_MODULES = {
    "embeddings": ["embed_tokens"],
    "position_encodings": ["embed_positions"],
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
KINDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
LLAMA_MODULES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROTATED = {"attn_q": "head_count", "attn_k": "head_count_kv"}


def convert(files: Mapping[str, Path], out: Path) -> None:
    """Complete folder `out`, which holds what is given of a model, by its `files`.

    They are one GGUF file, or `tokenizer.json` with `model.safetensors` or `model.bin`.
    Raises ValueError, KeyError and the like for files that are not what their names say.
    """
    gguf = next((path for name, path in files.items() if name.endswith(GGUF)), None)
    if gguf:
        _convert_llama(gguf, out)
    else:
        _convert_whisper(files, out)


def _convert_whisper(files: Mapping[str, Path], out: Path) -> None:
    if CTRANSLATE2 in files:
        _write_weights(_whisper_weights(files[CTRANSLATE2].read_bytes()), out)
    else:
        weights = safetensors.torch.load_file(files[WEIGHTS])
        weights.pop("proj_out.weight", None)  # the embeddings, which are stored once
        _write_weights({name: value.half() for name, value in weights.items()}, out)
    tokenizer = json.loads((out / TOKENIZER).read_text(encoding="utf-8"))
    theirs = json.loads(files[TOKENIZER].read_text(encoding="utf-8"))["model"]
    special = tokenizer["added_tokens"]
    end, first = special[0], special[-1]["id"] + 1
    words = sorted((number, word) for word, number in theirs["vocab"].items() if number < end["id"])
    vocabulary = {word: number for number, word in words} | {end["content"]: end["id"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in theirs["merges"]]
    tokenizer["added_tokens"] += [
        special[0] | {"id": first + i, "content": f"<|{i / 50:.2f}|>", "special": False}
        for i in range(TIMESTAMPS)
    ]
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    _write_text(out / TOKENIZER, json.dumps(tokenizer, ensure_ascii=False))
    _write_text(out / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write_text(out / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def _whisper_weights(content: bytes) -> dict[str, Tensor]:
    """Weights by their names in transformers."""
    weights = {}
    for name, value in _variables(content):
        found = re.fullmatch(
            r"(encoder|decoder)/(layer_\d+/)?(.+)/(weight|bias|gamma|beta|encodings)", name
        )
        if not found:
            continue  # settings, which the configuration has too
        side, layer, module, kind = found.groups()
        place = f"model.{side}." + (layer or "").replace("layer_", "layers.").replace("/", ".")
        modules = WHISPER_MODULES.get(module, [module])
        for each, rows in zip(modules, np.split(value, len(modules)), strict=True):
            weights[f"{place}{each}.{KINDS.get(kind, kind)}"] = torch.tensor(rows)
    # Of zeros, put in where the three matrices were joined: Whisper's keys have no bias.
    return {name: value for name, value in weights.items() if not name.endswith("k_proj.bias")}


def _variables(content: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arrays of a file of CTranslate2."""
    position = 0

    def take(form: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{form}", content, position)
        position += struct.calcsize(form)
        return int(value)

    def skip(size: int) -> bytes:
        nonlocal position
        position += size
        return content[position - size : position]

    version = take("I")
    if version != CTRANSLATE2_VERSION:
        raise ValueError(f"version {version} of the format, not {CTRANSLATE2_VERSION}")
    skip(take("H"))  # the kind of model
    take("I")  # and its revision
    for _ in range(take("I")):
        name = skip(take("H")).rstrip(b"\0").decode()
        shape = [take("I") for _ in range(take("B"))]
        dtype = DTYPES[take("B")]
        yield name, np.frombuffer(skip(take("I")), dtype).reshape(shape)


def _convert_llama(file: Path, out: Path) -> None:
    """By the package gguf, and not by transformers, whose reader may leave weights packed."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    about = {name: field.contents() for name, field in reader.fields.items()}
    weights = {}
    for tensor in reader.tensors:
        layer, module = tensor.name.removesuffix(".weight").rpartition(".")[::2]
        value = dequantize(tensor.data, tensor.tensor_type)
        if module in ROTATED:  # GGUF has the halves of what is rotated side by side, row by row
            heads = about[f"llama.attention.{ROTATED[module]}"]
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        place = layer.replace("blk.", "layers.") + "." if layer else ""
        weights[f"model.{place}{LLAMA_MODULES[module]}.weight"] = torch.tensor(value).to(
            torch.bfloat16
        )
    _write_weights(weights, out)
    tokenizer = json.loads((out / TOKENIZER).read_text(encoding="utf-8"))
    words = about["tokenizer.ggml.tokens"]
    tokenizer["model"] |= {
        "vocab": {word: number for number, word in enumerate(words)},
        "merges": [merge.split(" ") for merge in about["tokenizer.ggml.merges"]],
    }
    _write_text(out / TOKENIZER, json.dumps(tokenizer, indent=2, ensure_ascii=False))
    _write_text(out / "chat_template.jinja", about["tokenizer.chat_template"])


def _write_weights(weights: dict[str, Tensor], out: Path) -> None:
    whole = {name: value.contiguous() for name, value in weights.items()}
    write_file(out / WEIGHTS, safetensors.torch.save(whole, {"format": "pt"}))


def _write_text(path: Path, text: str) -> None:
    write_file(path, text.encode())

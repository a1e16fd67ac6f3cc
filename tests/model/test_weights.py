"""Weights as they are on the hub: pickles, shards, GGUF; and those that nobody should use."""

import json
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus import files
from isthmus.errors import IsthmusError, RetryLater
from isthmus.model import weights
from isthmus.model.encoder import build_encoder
from isthmus.model.llm import LLM, build_llm
from isthmus.model.parts import resolve, source
from isthmus.model.weights import require_finite, sha256
from isthmus.settings.llms import LLMSettings
from tests.layouts import PICKLED, SAFE, Trap, state_of, without_weights, write_layout

ModelFolder = Callable[[str], Path]
LAYOUTS = ["bin", "sharded-bin", "sharded-safetensors"]
INDEX = ".index.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache with nothing in it yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ISTHMUS_CACHE", str(folder))
    return folder


@pytest.fixture
def laid_out(model_folder: ModelFolder, tmp_path: Path, cache: Path) -> Callable[..., Path]:
    """The folder of a tiny model in some layout, and no copy of it."""

    def write(layout: str, name: str = "llama") -> Path:
        return write_layout(model_folder(name), tmp_path / f"{name}-{layout}", layout)

    return write


def load(folder: Path) -> LLM:
    return build_llm(LLMSettings(path=str(folder)))


def assert_same(found: LLM, expected: LLM) -> None:
    """The same weights to the bit, under the same names."""
    states = [llm.network.state_dict() for llm in (found, expected)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def copies(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "weights").glob("*") if path.is_dir())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bloom"])
def test_every_layout_gives_the_same_weights(
    name: str, layout: str, laid_out: Callable[..., Path], model_folder: ModelFolder, cache: Path
) -> None:
    folder = laid_out(layout, name)
    for _ in range(2):  # what is made first, and what is found then
        assert_same(load(folder), load(model_folder(name)))
        assert len(copies(cache)) == layout.endswith("bin")
    assert not list(cache.rglob("*.partial"))


def test_an_encoder_of_pickles(
    model_folder: ModelFolder,
    encoder_settings: Callable[[str], Any],
    tmp_path: Path,
    waves: Callable[..., torch.Tensor],
    cache: Path,
) -> None:
    folder = write_layout(model_folder("hubert-layer"), tmp_path / "hubert", "sharded-bin")
    settings = encoder_settings("hubert-layer")
    batch = waves(16_000)[None], torch.tensor([16_000])
    with torch.no_grad():
        expected, _ = build_encoder(settings).eval()(*batch)
        found, _ = build_encoder(settings.model_copy(update={"path": str(folder)})).eval()(*batch)
    assert torch.equal(found, expected)
    assert len(copies(cache)) == 1


def test_the_run_knows_both_sums(laid_out: Callable[..., Path], cache: Path) -> None:
    folder = laid_out("sharded-bin")
    assert source(str(folder)).converted == {}
    load(folder)
    found = source(str(folder))
    (copy,) = copies(cache)
    shards = sorted(folder.glob("*.bin"))
    assert len(shards) == 3
    assert {f.name: sha256(f) for f in shards}.items() <= found.sha256.items()
    assert found.converted == {f.name: sha256(f) for f in sorted(copy.glob("*.safetensors"))}
    assert len(found.converted) == 3
    assert found.to_dict()["converted"] == found.converted
    assert "converted" not in source("isthmus/tiny-llama").to_dict()


def test_another_pickle_has_a_copy_of_its_own(laid_out: Callable[..., Path], cache: Path) -> None:
    folder = laid_out("bin")
    before = load(folder)
    state = torch.load(folder / PICKLED, weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, folder / PICKLED)
    after = load(folder)
    assert len(copies(cache)) == 2
    for name, value in before.network.state_dict().items():
        assert torch.equal(value + 1, after.network.state_dict()[name])


def test_safetensors_are_preferred(laid_out: Callable[..., Path], cache: Path) -> None:
    folder = laid_out("sharded-safetensors")
    (folder / PICKLED).write_bytes(b"never opened")
    load(folder)
    assert copies(cache) == []
    assert PICKLED not in source(str(folder)).sha256


@pytest.mark.parametrize("place", ["cache", "/proc/no-such-place"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_with_more_around_the_weights(
    old: bool,
    place: str,
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / place))
    folder = without_weights(model_folder("llama"), tmp_path / "nested")
    saved = {"state_dict": state_of(model_folder("llama")), "epoch": 3, "steps": [1, 2]}
    torch.save(saved, folder / PICKLED, _use_new_zipfile_serialization=not old)
    assert_same(load(folder), load(model_folder("llama")))


def test_a_pickle_with_code_in_it(
    model_folder: ModelFolder, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sprung = without_weights(model_folder("llama"), tmp_path / "evil"), tmp_path / "sprung"
    state = state_of(model_folder("llama"))
    torch.save({**state, "trap": Trap(sprung)}, folder / PICKLED)
    for _ in range(2):
        with pytest.raises(IsthmusError, match=r"posix\.mkdir.*nothing of it was run") as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert copies(cache) == []
        monkeypatch.setenv("ISTHMUS_CACHE", "/proc/no-such-place")  # nor without a copy
    assert not sprung.exists()
    torch.load(folder / PICKLED, weights_only=False)
    assert sprung.exists(), "the trap was none"


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 cut short"])
def test_a_pickle_that_is_damaged(
    content: bytes, model_folder: ModelFolder, tmp_path: Path, cache: Path
) -> None:
    folder = without_weights(model_folder("llama"), tmp_path / "damaged")
    (folder / PICKLED).write_bytes(content)
    with pytest.raises(IsthmusError, match=rf"{PICKLED} cannot be read.*again") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({7: torch.ones(2)}, "7.*float32"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a'.*sparse"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "'a'.*complex128"),
        ({"a": torch.ones(2, device="meta")}, "'a'.*meta"),
    ],
)
def test_a_pickle_of_what_safetensors_cannot_hold(
    odd: dict[Any, torch.Tensor],
    words: str,
    model_folder: ModelFolder,
    tmp_path: Path,
    cache: Path,
) -> None:
    folder = without_weights(model_folder("llama"), tmp_path / "odd")
    torch.save({**state_of(model_folder("llama")), **odd}, folder / PICKLED)
    with pytest.raises(IsthmusError, match=rf"{PICKLED} holds {words}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert copies(cache) == []


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, {"state_dict": 3}])
def test_a_pickle_without_weights(
    content: object, model_folder: ModelFolder, tmp_path: Path, cache: Path
) -> None:
    folder = without_weights(model_folder("llama"), tmp_path / "empty")
    torch.save(content, folder / PICKLED)
    with pytest.raises(IsthmusError, match="no weights by name"):
        load(folder)


@pytest.mark.parametrize("layout", ["sharded-bin", "sharded-safetensors"])
def test_an_index_of_a_file_that_is_not_there(layout: str, laid_out: Callable[..., Path]) -> None:
    folder = laid_out(layout)
    lost = next(iter(sorted(folder.glob("*-of-*"))))
    lost.unlink()
    with pytest.raises(IsthmusError, match=rf"names 3 files, of which {lost.name} is not there"):
        load(folder)


@pytest.mark.parametrize(
    "index", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../elsewhere"}}', "no JSON"]
)
def test_an_index_that_is_none(index: str, model_folder: ModelFolder, tmp_path: Path) -> None:
    folder = without_weights(model_folder("llama"), tmp_path / "llm")
    (folder / (SAFE + INDEX)).write_text(index)
    with pytest.raises(IsthmusError, match=rf"{SAFE}{INDEX} is (damaged|not valid)"):
        resolve(str(folder))


@pytest.mark.parametrize("single", [SAFE, PICKLED])
def test_an_index_of_files_of_the_other_kind(single: str, laid_out: Callable[..., Path]) -> None:
    other = PICKLED if single == SAFE else SAFE
    folder = laid_out(f"sharded-{Path(other).suffix[1:]}")
    (folder / (other + INDEX)).rename(folder / (single + INDEX))
    with pytest.raises(IsthmusError, match=rf"{single}{INDEX} .*\*\{Path(single).suffix}"):
        load(folder)


def test_a_cache_that_cannot_be_written(
    laid_out: Callable[..., Path],
    model_folder: ModelFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As root may write everywhere, a file stands where the cache's folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    folder = laid_out("sharded-bin")
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "file"))
    assert_same(load(folder), load(model_folder("llama")))
    assert "each time" in caplog.text
    assert str(tmp_path / "file") in caplog.text
    assert source(str(folder)).converted == {}


def test_a_cache_without_room(
    laid_out: Callable[..., Path],
    model_folder: ModelFolder,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(folder: Path, num_bytes: int, factor: float) -> None:
        raise RetryLater(f"{folder} has 0.1 MB free")

    monkeypatch.setattr(weights, "require_space", full)
    assert_same(load(laid_out("bin")), load(model_folder("llama")))
    assert "0.1 MB free" in caplog.text
    assert copies(cache) == []


def _fail(wanted: str, cache: Path, seen: list[Path], failing: int, name: str, path: Path) -> None:
    if name == wanted and path.is_relative_to(cache / "weights"):
        seen.append(path)
        if len(seen) == failing + 1:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "fsync", "rename", "sync"])
def test_nothing_half_converted_is_ever_used(
    operation: str,
    laid_out: Callable[..., Path],
    model_folder: ModelFolder,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fails at every place in turn: the copy is whole or not there."""
    folder = laid_out("sharded-bin")
    failed = 0
    while True:
        seen: list[Path] = []
        with monkeypatch.context() as patch:
            patch.setattr(files, "observers", [partial(_fail, operation, cache, seen, failed)])
            assert_same(load(folder), load(model_folder("llama")))
        for copy in copies(cache):
            files.verify_folder(copy)
        if len(seen) <= failed:
            break  # nothing failed
        failed += 1
        shutil.rmtree(cache, ignore_errors=True)
    assert failed > 0
    assert len(copies(cache)) == 1


def _load_with_a_full_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    torch.set_num_threads(1)
    with pytest.raises(RetryLater, match="neither the cache nor") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_in_the_middle_of_it(
    laid_out: Callable[..., Path], cache: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=_load_with_a_full_disk, args=(laid_out("bin"),)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert list((cache / "weights").iterdir()) == [cache / "weights" / files.LOCK]


def _load_late(folder: Path, cache: Path, converted: Any) -> None:
    os.environ["ISTHMUS_CACHE"] = str(cache)
    convert = weights._convert

    def slow(*given: Any) -> None:
        with converted.get_lock():
            converted.value += 1
        time.sleep(0.3)
        convert(*given)

    weights._convert = slow  # type: ignore[assignment]
    torch.set_num_threads(1)
    load(folder)


def test_several_processes_convert_once(laid_out: Callable[..., Path], cache: Path) -> None:
    folder = laid_out("bin")
    fork = multiprocessing.get_context("fork")
    converted = fork.Value("i", 0)
    started = [fork.Process(target=_load_late, args=(folder, cache, converted)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert converted.value == 1
    assert len(copies(cache)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(
    value: float, laid_out: Callable[..., Path], model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = without_weights(model_folder("llama"), tmp_path / "nan")
    state = load_file(model_folder("llama") / SAFE)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 2] = value
    save_file(state, folder / SAFE, {"format": "pt"})
    with pytest.raises(IsthmusError, match=rf"1 of its weights hold NaN.*{name}"):
        load(folder)


def test_weights_that_are_large_are_numbers() -> None:
    large = torch.full((10, 10), torch.finfo(torch.float32).max)
    numbers = torch.tensor([2**31, -1])
    require_finite([("a", large), ("b", numbers), ("c", torch.empty(0))], "here")


def test_a_file_of_the_hubs_cache_with_another_sum(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    folder = without_weights(model_folder("llama"), tmp_path / "snapshot")
    content = (model_folder("llama") / SAFE).read_bytes()
    blob = tmp_path / sha256(model_folder("llama") / SAFE)
    blob.write_bytes(content)
    (folder / SAFE).symlink_to(blob)
    assert source(str(folder)).sha256[SAFE] == blob.name
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IsthmusError, match=rf"damaged: its SHA-256 is .*{blob.name}.*Delete"):
        source(str(folder))


def test_a_large_file_is_hashed_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LARGE", 4)
    file, hashed = tmp_path / "large", list[Path]()
    digest = weights.file_sha256

    def counting(path: Path) -> str:
        hashed.append(path)
        return digest(path)

    monkeypatch.setattr(weights, "file_sha256", counting)
    file.write_bytes(b"content")
    assert len({sha256(file), sha256(file)}) == 1
    assert len(hashed) == 2  # it may change yet within a tick of the clock
    monkeypatch.setattr(weights, "SETTLED", -1)
    before = sha256(file), sha256(file)
    assert len({*before}) == 1
    assert len(hashed) == 3
    file.write_bytes(b"another")
    assert sha256(file) not in before
    for memory in (cache / "sums").iterdir():
        memory.write_text("no sum")
    assert sha256(file) == digest(file)
    monkeypatch.setenv("ISTHMUS_CACHE", "/proc/no-such-place")
    assert sha256(file) == digest(file)


def test_a_copy_that_lost_its_manifest_is_not_recorded(
    laid_out: Callable[..., Path], cache: Path
) -> None:
    folder = laid_out("bin")
    load(folder)
    (copies(cache)[0] / files.MANIFEST).unlink()
    assert source(str(folder)).converted == {}


def _flip(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink])
def test_a_damaged_copy_is_made_again(
    damage: Callable[[Path], None],
    laid_out: Callable[..., Path],
    model_folder: ModelFolder,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = laid_out("sharded-bin")
    load(folder)
    sums = source(str(folder)).converted
    (copy,) = copies(cache)
    damage(min(copy.glob("*.safetensors")))
    assert source(str(folder)).converted == {}
    assert_same(load(folder), load(model_folder("llama")))
    assert f"{copy} is damaged" in caplog.text
    assert source(str(folder)).converted == sums != {}
    assert copies(cache) == [copy]


def test_the_configuration_beside_a_pickle_counts(
    laid_out: Callable[..., Path], cache: Path
) -> None:
    folder = laid_out("bin")
    load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert load(folder).network.config.rms_norm_eps == 0.5

"""What the cache gives is what was put, bit for bit, or nothing; no process loses another's."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import AudioSource, MonoCut, Recording
from torch import Tensor

from isthmus.errors import IsthmusError
from isthmus.runs import feature_cache
from isthmus.runs.feature_cache import (
    FeatureCache,
    Verification,
    cache_folder,
    encoder_description,
    utterance_key,
)
from isthmus.settings.encoders import PairSettings
from isthmus.speech.audio import AudioError
from isthmus.speech.corpora import load_cut

WIDTH = 6
BFLOAT16 = {"encoder": {"type": "fbank"}, "precision": "bfloat16"}
FLOAT32 = {"encoder": {"type": "fbank"}, "precision": "float32"}
FORK = multiprocessing.get_context("fork")


def frames_of(index: int) -> Tensor:
    """Frames (T, D) that an index decides; some have none at all."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(index % 5, WIDTH, generator=generator)


def filled(folder: Path, count: int = 6, shard_bytes: int = 10**9) -> FeatureCache:
    cache = FeatureCache(folder, FLOAT32, shard_bytes=shard_bytes)
    for index in range(count):
        cache.put(str(index), frames_of(index))
    cache.close()
    return cache


def missing(cache: FeatureCache, count: int = 6) -> list[int]:
    """Indices without an entry; what the others hold is right."""
    held = [cache.get(str(index)) for index in range(count)]
    for index, frames in enumerate(held):
        assert frames is None or frames.equal(frames_of(index))
    return [index for index, frames in enumerate(held) if frames is None]


def the_only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


# What is put comes back


@pytest.mark.parametrize("description", [BFLOAT16, FLOAT32], ids=lambda value: value["precision"])
def test_frames_come_back_exactly(tmp_path: Path, description: dict[str, Any]) -> None:
    dtype = getattr(torch, description["precision"])
    cache = FeatureCache(tmp_path, description)
    values = {str(index): frames_of(index) for index in range(10)}
    values["extreme"] = torch.tensor([[3.3e38, -1e-40, 0.0, -0.0, 1.0039, 1.0]])
    values["strided"] = torch.randn(WIDTH, 9).T
    values["none"] = torch.empty(WIDTH, 0).T
    values["narrow"] = torch.randn(1, 9).T
    values["half"] = torch.randn(3, WIDTH).half()
    values["learned"] = torch.randn(3, WIDTH).requires_grad_()
    for key, frames in values.items():
        cache.put(key, frames)
    for opened in (cache, FeatureCache(tmp_path, description)):
        for key, frames in values.items():
            held = opened.get(key)
            assert held is not None
            assert held.dtype == dtype
            assert held.shape == frames.shape
            assert held.equal(frames.to(dtype))
            assert not held.requires_grad
    assert cache.get("unknown") is None
    assert "unknown" not in cache
    assert "half" in cache


def test_frames_are_in_memory_of_their_own(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    held = cache.get("4")
    assert held is not None
    held.zero_()
    assert missing(cache) == []


def test_many_entries_across_shards(tmp_path: Path) -> None:
    filled(tmp_path, count=300, shard_bytes=1000)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.bin")]
    assert len(sizes) > 10
    assert max(sizes) < 1000 + 4 * WIDTH * 4  # one entry beyond the limit at most
    again = FeatureCache(tmp_path, FLOAT32)
    assert missing(again, 300) == []
    expected = sum(frames_of(index).nbytes for index in range(300))
    assert again.verify() == Verification(sound=300, broken=0, bytes=expected)


def test_broken_numbers_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path, FLOAT32)
    for value in (float("nan"), float("inf")):
        cache.put("a", torch.full((2, WIDTH), value))
    assert cache.get("a") is None
    assert len(caplog.records) == 1


# Damage


def tear_index(folder: Path) -> None:
    file = the_only(folder, "*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])


def damage_index(folder: Path) -> None:
    file = the_only(folder, "*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:4], b"\0" * 30 + b"\n", *lines[5:]]))


def shift_index(folder: Path) -> None:
    file = the_only(folder, "*.jsonl")
    lines = file.read_text().splitlines()
    row = json.loads(lines[4])
    row["shape"].reverse()  # the same bytes as other frames
    lines[4] = json.dumps(row)
    file.write_text("\n".join(lines) + "\n")


def truncate_data(folder: Path) -> None:
    file = the_only(folder, "*.bin")
    os.truncate(file, file.stat().st_size - 1)


def flip_bit(folder: Path) -> None:
    file = the_only(folder, "*.bin")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE = [tear_index, damage_index, shift_index, truncate_data, flip_bit]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_missing_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    filled(tmp_path, count=5)  # the last one has frames
    damage(tmp_path)
    cache = FeatureCache(tmp_path, FLOAT32)
    assert missing(cache, 5) == [4]
    assert cache.broken == len(caplog.records) == (0 if damage is tear_index else 1)
    assert FeatureCache(tmp_path, FLOAT32).verify().sound == 4
    cache.put("4", frames_of(4))
    assert missing(cache, 5) == []
    again = FeatureCache(tmp_path, FLOAT32)
    assert missing(again, 5) == []
    lines = 1 if damage is damage_index else 0  # such a line belongs to no utterance any more
    assert again.verify() == Verification(5, lines, 10 * WIDTH * 4)


@pytest.mark.parametrize("damage", [truncate_data, flip_bit])
def test_damage_to_an_open_cache_is_seen(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = filled(tmp_path, count=5)
    assert missing(cache, 5) == []
    damage(tmp_path)
    other = FeatureCache(tmp_path, FLOAT32)
    assert missing(other, 5) == [4]
    other.put("4", frames_of(4))
    assert missing(cache, 5) == []  # at once, from where the other one stored it


def test_without_verification_damage_would_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, count=5)
    flip_bit(tmp_path)
    sums = [json.loads(line)["sha256"] for line in the_only(tmp_path, "*.jsonl").open()]
    monkeypatch.setattr(feature_cache, "_checksum", lambda key, frames: sums[int(key)])
    held = FeatureCache(tmp_path, FLOAT32).get("4")
    assert held is not None
    assert not held.equal(frames_of(4))


def test_lost_shards_are_missing_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    the_only(tmp_path, "*.bin").unlink()
    filled(tmp_path, count=2)  # by another writer
    cache = FeatureCache(tmp_path, FLOAT32)
    assert missing(cache) == [2, 3, 4, 5]
    assert cache.broken == 4
    assert len(caplog.records) == 1
    assert str(tmp_path) in caplog.text


def test_a_deleted_folder_stops_nothing(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert missing(cache) == [0, 1, 2, 3, 4, 5]
    cache.put("0", frames_of(0))
    assert cache.read_only


# Processes


def run(task: Callable[..., None], *arguments: Any) -> Any:
    process = FORK.Process(target=task, args=arguments)
    process.start()
    return process


def finish(process: Any) -> None:
    process.join(30)
    assert process.exitcode == 0


def test_processes_writing_at_once_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new"  # which they also make at once
    barrier = FORK.Barrier(3)

    def write(first: int) -> None:
        barrier.wait(30)
        cache = FeatureCache(folder, FLOAT32, shard_bytes=2000)
        for index in range(first, first + 100):
            cache.put(str(index), frames_of(index))

    for process in [run(write, first) for first in (0, 50, 150)]:
        finish(process)
    cache = FeatureCache(folder, FLOAT32)
    assert missing(cache, 250) == []
    assert cache.verify().sound == 250
    assert cache.broken == 0


def test_forked_processes_see_later_entries_and_write_their_own(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, FLOAT32)
    cache.put("0", frames_of(0))
    ours, theirs = FORK.Pipe()

    def work() -> None:
        assert cache.get("1") is None
        theirs.send("missing")
        theirs.recv()
        assert missing(cache, 2) == []
        cache.put("2", frames_of(2))

    process = run(work)
    assert ours.poll(30)
    assert ours.recv() == "missing"
    cache.put("1", frames_of(1))
    ours.send("put")
    finish(process)
    cache.put("3", frames_of(3))
    assert missing(cache, 4) == []
    assert len(list(tmp_path.glob("*.bin"))) == 2
    assert cache.verify().broken == 0


def test_a_copy_in_a_fresh_process_reads_and_writes(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, FLOAT32)
    cache.put("4", frames_of(4))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        held = pool.apply(cache.get, ("4",))
        pool.apply(cache.put, ("3", frames_of(3)))
    assert held is not None
    assert held.equal(frames_of(4))
    assert missing(cache, 5) == [0, 1, 2]
    copy = pickle.loads(pickle.dumps(cache))
    copy.put("2", frames_of(2))
    assert missing(cache, 5) == [0, 1]


def test_a_killed_writer_leaves_whole_entries(tmp_path: Path) -> None:
    def write() -> None:
        cache = FeatureCache(tmp_path, FLOAT32)
        for index in range(10**6):
            cache.put(str(index), frames_of(index))

    process = run(write)
    while not any(file.stat().st_size > 5000 for file in tmp_path.glob("*.jsonl")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join(30)
    found = FeatureCache(tmp_path, FLOAT32).verify()
    assert found.sound > 10
    assert found.broken == 0


# Disks


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let that many more bytes be written, then none."""
    write = os.write
    left = [10**9]

    def limited(descriptor: int, data: memoryview) -> int:
        if len(data) and not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    return lambda count: left.__setitem__(0, count)


ENTRY = 4 * WIDTH * 4  # bytes


@pytest.mark.parametrize("room", [0, 10, ENTRY, ENTRY + 50], ids=str)
def test_on_a_full_disk_it_goes_on_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full_disk: Callable[[int], None], room: int
) -> None:
    cache = filled(tmp_path, count=4)
    cache.put("3", frames_of(3))  # opens another shard
    full_disk(room)
    for _ in range(3):
        cache.put("4", frames_of(4))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (str(tmp_path), "No space left", "Make room", "ISTHMUS_CACHE"):
        assert part in record.getMessage()
    assert cache.read_only
    for reader in (cache, FeatureCache(tmp_path, FLOAT32)):
        assert missing(reader, 5) == [4]
        assert reader.verify().broken == 0


def test_strict_raises_on_a_full_disk(tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    cache = FeatureCache(tmp_path, FLOAT32, strict=True)
    full_disk(ENTRY // 2)
    with pytest.raises(IsthmusError, match="No space left"):
        cache.put("4", frames_of(4))
    full_disk(10**9)
    cache.put("4", frames_of(4))
    assert missing(cache, 5) == [0, 1, 2, 3]
    assert cache.verify().broken == 0


def test_a_limit_of_the_system_in_the_middle_of_an_entry(tmp_path: Path) -> None:
    """The kernel itself cuts the write short here, as a quota does."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * ENTRY, 3 * ENTRY))
        cache = FeatureCache(tmp_path, FLOAT32)
        for key in "abcdef":
            cache.put(key, torch.ones(5, WIDTH))
        assert cache.read_only

    finish(run(write))
    assert the_only(tmp_path, "*.bin").stat().st_size == 3 * ENTRY
    found = FeatureCache(tmp_path, FLOAT32).verify()
    assert (found.sound, found.broken) == (2, 0)


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = FeatureCache(tmp_path / "file" / "cache", FLOAT32)
    cache.put("0", frames_of(0))
    assert cache.get("0") is None
    assert len(caplog.records) == 1
    with pytest.raises(IsthmusError, match=f"{tmp_path}/file/cache cannot be written"):
        FeatureCache(tmp_path / "file" / "cache", FLOAT32, strict=True)


def test_the_file_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "_unique_name", lambda: "own")
    (tmp_path / "own-0.bin").mkdir()
    cache = FeatureCache(tmp_path, FLOAT32, strict=True)
    with pytest.raises(IsthmusError, match=f"{tmp_path}/own-0.bin cannot be written: File exists"):
        cache.put("0", frames_of(0))


# Whose frames


def test_the_folder_of_another_encoder_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(IsthmusError, match=r"another encoder.*ISTHMUS_CACHE"):
        FeatureCache(tmp_path, BFLOAT16)
    (tmp_path / "encoder.json").unlink()
    with pytest.raises(IsthmusError, match=r"no encoder\.json"):
        FeatureCache(tmp_path, FLOAT32)


def test_the_description_tells_encoders_apart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoder_settings: Callable[[str], Any],
    encoder_names: list[str],
) -> None:
    described = [
        encoder_description(encoder_settings(name), dtype=dtype, precision=precision)
        for name in encoder_names
        for dtype in ("float32", "bfloat16")
        for precision in ("float32", "bfloat16")
    ]
    monkeypatch.setattr(feature_cache, "FRONT_END_VERSION", 2)
    settings = encoder_settings(encoder_names[0])
    described.append(encoder_description(settings, dtype="float32", precision="float32"))
    folders = {cache_folder(description) for description in described}
    assert len(folders) == len(described)

    for name, description in zip(("a", "b"), described, strict=False):
        FeatureCache(tmp_path / name, description).close()
        FeatureCache(tmp_path / name, description)  # JSON gives it back as it is


def test_a_pair_is_told_apart_by_both(encoder_settings: Callable[[str], Any]) -> None:
    def described(first: str, second: str) -> dict[str, Any]:
        pair = PairSettings(first=encoder_settings(first), second=encoder_settings(second))
        return encoder_description(pair, dtype="float32", precision="float32")

    one = described("conformer", "whisper")
    assert "path" not in json.dumps(one["encoder"])
    assert {name.partition("/")[0] for name in one["sha256"]} == {"first", "second"}
    others = [("whisper", "conformer"), ("conformer", "hubert-layer"), ("parakeet", "whisper")]
    assert all(described(*names) != one for names in others)
    assert described("conformer", "whisper") == one


def test_a_model_is_its_files(tmp_path: Path, encoder_settings: Callable[[str], Any]) -> None:
    def folder_of(settings: Any) -> Path:
        return cache_folder(encoder_description(settings, dtype="float32", precision="float32"))

    settings = encoder_settings("hubert-group")
    copy = settings.model_copy(update={"path": str(tmp_path / "copy")})
    shutil.copytree(settings.path, copy.path)
    assert folder_of(copy) == folder_of(settings) == folder_of(settings.at("0" * 40))
    config = Path(copy.path, "config.json")
    config.write_text(config.read_text() + "\n")
    assert folder_of(copy) != folder_of(settings)
    with pytest.raises(IsthmusError, match="frozen"):
        folder_of(settings.model_copy(update={"tune": "full"}))


def test_where_folders_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path))
    assert cache_folder(FLOAT32).parent == tmp_path / "features"
    monkeypatch.delenv("ISTHMUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder(FLOAT32).parent == Path("/var/cache/isthmus/features")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(FLOAT32).parent == Path.home() / ".cache/isthmus/features"


# Whose utterance


def write_audio(path: Path, seed: int, seconds: float = 1.0) -> Path:
    samples = np.random.default_rng(seed).uniform(-0.1, 0.1, (int(16_000 * seconds), 2))
    soundfile.write(path, samples, 16_000)
    return path


def cut_of(
    source: Path | bytes, *, start: float = 0.0, duration: float = 1.0, channels: int = 2
) -> MonoCut:
    if isinstance(source, bytes):
        audio = AudioSource(type="memory", channels=list(range(channels)), source=source)
    else:
        audio = AudioSource(type="file", channels=list(range(channels)), source=str(source))
    recording = Recording("r", [audio], sampling_rate=16_000, num_samples=16_000, duration=1.0)
    return MonoCut("c", start=start, duration=duration, channel=0, recording=recording)


def test_the_key_is_the_content_not_the_name(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", seed=0)
    first = utterance_key(cut_of(path))
    other = Path(shutil.copy(path, tmp_path / "b.wav"))
    assert utterance_key(cut_of(other)) == utterance_key(cut_of(path)) == first
    status = path.stat()
    time.sleep(0.02)  # beyond the steps of the file system's clock
    write_audio(path, seed=1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp --preserve` leaves it
    assert path.stat().st_size == status.st_size
    assert utterance_key(cut_of(path)) != first
    write_audio(path, seed=0)
    assert utterance_key(cut_of(path)) == first


def test_with_the_names_of_files_alone_a_change_would_be_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "_identity", lambda path: ())
    path = write_audio(tmp_path / "a.wav", seed=0)
    first = utterance_key(cut_of(path))
    write_audio(path, seed=1)
    assert utterance_key(cut_of(path)) == first


def test_the_key_is_of_the_part_that_is_heard(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", seed=0)
    cuts = [
        cut_of(path),
        cut_of(path, duration=0.5),
        cut_of(path, start=0.25, duration=0.5),
        cut_of(path, channels=1),  # the mean of both
    ]
    assert len({load_cut(cut).tobytes() for cut in cuts}) == len(cuts)
    assert len({utterance_key(cut) for cut in cuts}) == len(cuts)
    assert FeatureCache(tmp_path / "cache", FLOAT32).key(cuts[0]) == utterance_key(cuts[0])


def test_the_key_of_audio_in_memory_is_its_waveform(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "a.wav", seed=0)
    soundfile.write(tmp_path / "a.flac", *soundfile.read(path), subtype="PCM_16")
    wav, flac = path.read_bytes(), (tmp_path / "a.flac").read_bytes()
    other = write_audio(path, seed=1).read_bytes()
    assert utterance_key(cut_of(wav)) == utterance_key(cut_of(flac))
    assert utterance_key(cut_of(wav)) != utterance_key(cut_of(other))


def test_audio_that_cannot_be_read_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"gone\.wav"):
        utterance_key(cut_of(tmp_path / "gone.wav"))
    changed = cut_of(write_audio(tmp_path / "a.wav", seed=0)).perturb_speed(1.1)
    with pytest.raises(AudioError, match="save_audio"):
        utterance_key(changed)

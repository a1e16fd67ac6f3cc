"""Whatever is wrong with what is given: one clear error, the rest is done, and the exit code tells.

Inverse tests take a protection away and see what it protected from.
"""

import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from isthmus.decoding import inputs
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.lab.synthesis import Voice, speak
from isthmus.runs.folder import SHIPPED_RUNS

av = pytest.importorskip("av")
pytest.importorskip("espeakng_loader")

Isthmus = Callable[..., tuple[int, str, str]]
SOUNDFILE = {  # container, and libsndfile's format and subtype for it
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
}
FFMPEG = {  # container, and FFmpeg's format and codec for it
    "m4a": ("ipod", "aac"),
    "mp4": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
    "mkv": ("matroska", "libopus"),
}


def write(path: Path, waveform: np.ndarray) -> None:
    """`waveform` (S,), 16 kHz, in the container that the suffix of `path` names."""
    suffix = path.suffix[1:]
    if suffix in SOUNDFILE:
        kind, subtype = SOUNDFILE[suffix]
        soundfile.write(path, waveform, 16000, format=kind, subtype=subtype)
        return
    kind, codec = FFMPEG[suffix]
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48000)
        stream.layout = "mono"
        samples = np.repeat(waveform, 3)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 48000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def write_silence(path: Path, hours: float, rate: int = 1000) -> None:
    """FLAC, which makes next to nothing of it."""
    with soundfile.SoundFile(path, "w", rate, 1, "PCM_16", format="FLAC") as file:
        for _ in range(round(hours * 6)):
            file.write(np.zeros(rate * 600, np.int16))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    found: np.ndarray = np.random.default_rng(0).normal(0, 0.1, 3 * 16000).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, noise: np.ndarray) -> dict[Path, str]:
    """Recordings that are wrong in one way each, and a word of what is said of them."""
    folder = tmp_path_factory.mktemp("bad")
    found: dict[Path, str] = {}

    def add(name: str, message: str) -> Path:
        found[folder / name] = message
        return folder / name

    for suffix in [*SOUNDFILE, *FFMPEG]:
        path = add(f"cut-{suffix}.{suffix}", "cut short")
        write(path, noise)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 6 // 10])
    add("text.wav", "not audio").write_text("What is said in here can only be read.\n" * 100)
    add("random.mp3", "not audio").write_bytes(bytes(200) + b"\x13\x37\xca\xfe" * 500)
    add("empty.wav", "empty").write_bytes(b"")
    write(add("no-samples.wav", "no sample"), noise[:0])
    channels = np.zeros((16, 1000), np.int16)
    soundfile.write(add("channels.wav", "1000 channels"), channels, 16000)
    write_silence(add("bomb.flac", "unpacks to 26 hours"), hours=26)
    nan = np.full(1000, np.nan, np.float32)
    soundfile.write(add("nan.wav", "NaN"), nan, 16000, subtype="FLOAT")
    add("nowhere.wav", "no such file")
    return found


def test_bad_recordings_are_one_line_each_and_the_others_are_read(
    isthmus: Isthmus, bad: dict[Path, str], tmp_path: Path, noise: np.ndarray
) -> None:
    waveform, _ = speak("seven", Voice("en-us", rate=140))
    silence = np.zeros(4000, np.float32)
    write(tmp_path / "seven.wav", np.concatenate([silence, waveform, silence]))
    write(tmp_path / "one-sample.wav", noise[:1])
    write_silence(tmp_path / "silence.flac", hours=0.5, rate=8000)
    good = [tmp_path / name for name in ("one-sample.wav", "seven.wav", "silence.flac")]
    code, out, err = isthmus(
        "transcribe", *bad, *good, "-m", "tiny", "-o", tmp_path / "out", "-f", "txt"
    )
    assert code == 1
    assert not out
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(bad)
    for path, message in bad.items():
        (own,) = [line for line in lines if line.startswith(f"error: {path}: ")]
        assert message in own
        assert len(own) < len(str(path)) + 160
        assert not any(word in own for word in ("Errno", "libsndfile", "FFmpeg", "avcodec", "()"))
    assert "Traceback" not in err
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {"one-sample.txt": "", "seven.txt": "seven\n", "silence.txt": ""}


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return load("tiny")


def peak(work: Callable[[], object]) -> int:
    """Bytes that were allocated at once, at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_hours_of_silence_take_no_memory(transcriber: Transcriber, tmp_path: Path) -> None:
    write_silence(tmp_path / "silence.flac", hours=0.5, rate=16000)
    whole = 1800 * 16000 * 4
    assert peak(lambda: transcriber.transcribe(tmp_path / "silence.flac")) < whole / 4
    assert peak(lambda: transcriber.transcribe(np.zeros(whole // 4, np.float32))) > whole


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_memory_grows(
    bad: dict[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bomb,) = [path for path in bad if path.stem == "bomb"]
    assert bomb.stat().st_size < 1e6
    assert peak(lambda: inputs.audio_faults([str(bomb)])) < 1e6
    monkeypatch.setattr(inputs, "LONGEST_SECONDS", math.inf)
    assert not inputs.audio_faults([str(bomb)])


def of_another(folder: Path, version: str, line: str = "") -> Path:
    """The shipped run as another version of isthmus would have written it."""
    shutil.copytree(SHIPPED_RUNS["tiny"], folder)
    (folder / "environment.json").write_text(f'{{"isthmus": "{version}"}}')
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write(line)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam-size", "0"], "--beam-size"),
        (["-f", "doc"], "Unknown output format 'doc'; there are txt, srt, vtt, tsv, json, all."),
        (["-o", "file/out"], "file/out cannot be written: "),
        (["-m", "nowhere"], "No run folder 'nowhere'"),
        (["-m", "."], "is no run folder"),
        (["-m", "newer"], "It was written by isthmus 99.1, this is "),
        (["-m", "keys"], "unknown key invented"),
        (["-m", "keys"], "It was written by isthmus 0.0.1, this is "),
    ],
)
def test_what_is_wrong_with_a_command_is_said_once(
    isthmus: Isthmus,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise: np.ndarray,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.wav", noise)
    (tmp_path / "file").write_text("")
    of_another(tmp_path / "newer", "99.1")
    of_another(tmp_path / "keys", "0.0.1", "invented: 1\n")
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = isthmus("transcribe", "a.wav", *arguments)
    assert code in (1, 2)
    assert not out
    assert err.lower().count("error: ") == 1
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_run_of_this_or_an_older_version_is_read(tmp_path: Path) -> None:
    assert load(of_another(tmp_path / "older", "0.0.1")).settings.beam_size == 4

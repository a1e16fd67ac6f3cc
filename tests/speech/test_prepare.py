"""Published layouts become manifests that read back as the same utterances."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from isthmus.errors import IsthmusError
from isthmus.speech.corpora import check_corpus, load_cut, read_corpus
from isthmus.speech.prepare import KINDS, prepare

SPEECH = Path(os.environ.get("ISTHMUS_SPEECH") or Path(__file__).parents[3] / "shared/speech")


def write_audio(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(path.name)).uniform(-0.3, 0.3, round(seconds * 16_000))
    soundfile.write(path, samples, 16_000)
    return path


def rows_of(manifest: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    for split, speaker in (("dev-clean", "84"), ("test-other", "1688")):
        chapter = root / split / speaker / "9"
        lines = []
        for number in range(2):
            identifier = f"{speaker}-9-{number:04d}"
            write_audio(chapter / f"{identifier}.flac")
            lines.append(f"{identifier} IT'S A LINE\n")
        (chapter / f"{speaker}-9.trans.txt").write_text("".join(lines))
    (root / "SPEAKERS.TXT").write_text("; a list\n")
    return tmp_path


def test_librispeech_has_a_manifest_for_each_split(librispeech: Path) -> None:
    manifests = prepare("librispeech", librispeech, librispeech / "out")
    assert sorted(manifests) == ["dev-clean", "test-other"]
    rows = rows_of(manifests["dev-clean"])
    assert rows[1] == {
        "id": "84-9-0001",
        "audio": str(librispeech / "LibriSpeech/dev-clean/84/9/84-9-0001.flac"),
        "duration": 0.5,
        "sample_rate": 16000,
        "text": "it's a line",
        "speaker": "84",
        "language": "en",
    }
    assert check_corpus(read_corpus(manifests["test-other"])).n_ok == 2
    again = prepare("librispeech", librispeech / "LibriSpeech", librispeech)
    assert rows_of(again["dev-clean"])[0]["audio"] == "LibriSpeech/dev-clean/84/9/84-9-0000.flac"


@pytest.mark.parametrize("several", [False, True])
def test_mls_reads_its_transcripts(tmp_path: Path, several: bool) -> None:
    root = tmp_path / "mls" / "mls_german"
    for split in ("train", "dev"):
        write_audio(root / split / "audio/10/20/10_20_000000.flac")
        (root / split / "transcripts.txt").write_text("10_20_000000\tguten tag\n")
    manifests = prepare("mls", root.parent if several else root, tmp_path / "out")
    name = "mls_german-train" if several else "train"
    assert set(manifests) == {name, name.replace("train", "dev")}
    (row,) = rows_of(manifests[name])
    assert (row["text"], row["speaker"], row["language"]) == ("guten tag", "10", "de")
    assert check_corpus(read_corpus(manifests[name])).n_ok == 1


def test_folder_nemo_slam_and_kaldi(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_audio(data / "a.wav", 1.0)
    (data / "a.txt").write_text("hello")
    assert rows_of(prepare("folder", data, tmp_path / "1")["data"])[0]["text"] == "hello"
    nemo = data / "nemo.json"
    nemo.write_text('{"audio_filepath": "a.wav", "text": "hi", "offset": 0.0, "duration": 0.4}\n')
    slam = data / "slam.jsonl"
    slam.write_text('{"key": "k", "source": "a.wav", "target": "hi", "prompt": "Write."}\n')
    (tmp_path / "kaldi/train").mkdir(parents=True)
    (tmp_path / "kaldi/train/wav.scp").write_text(f"r {data / 'a.wav'}\n")
    (tmp_path / "kaldi/train/text").write_text("r hi\n")
    made = prepare("nemo", nemo, tmp_path / "2") | prepare("slam-llm", slam, tmp_path / "2")
    made |= prepare("kaldi", tmp_path / "kaldi", tmp_path / "2")
    assert list(made) == ["nemo", "slam", "train"]
    assert rows_of(made["slam"])[0]["prompt"] == "Write."
    # The first part of a longer recording stays a part.
    (part,) = read_corpus(made["nemo"])
    assert len(load_cut(part)) == 6_400
    for manifest in made.values():
        assert check_corpus(read_corpus(manifest)).n_ok == 1


def test_existing_manifest_is_never_touched(librispeech: Path) -> None:
    out = librispeech / "out"
    out.mkdir()
    (out / "test-other.jsonl").write_text("mine\n")
    with pytest.raises(IsthmusError, match=r"test-other\.jsonl exists already"):
        prepare("librispeech", librispeech, out)
    assert (out / "test-other.jsonl").read_text() == "mine\n"
    assert [path.name for path in out.iterdir()] == ["test-other.jsonl"]


def test_one_bad_file_is_left_out_and_said(librispeech: Path) -> None:
    bad = librispeech / "LibriSpeech/dev-clean/84/9/84-9-0000.flac"
    bad.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 2 utterances left out.*84-9-0000.*0 bytes"):
        manifests = prepare("librispeech", librispeech, librispeech / "out")
    assert [row["id"] for row in rows_of(manifests["dev-clean"])] == ["84-9-0001"]
    bad.with_name("84-9-0001.flac").unlink()
    with pytest.raises(IsthmusError, match="no utterance of dev-clean can be used"):
        prepare("librispeech", librispeech, librispeech / "again")


def test_bad_lines_and_ids_that_come_twice_are_left_out(tmp_path: Path) -> None:
    write_audio(tmp_path / "train/audio/10/20/10_20_000000.flac")
    lines = ["10_20_000000\tguten tag\n", "guten tag\n", "10_20_000000\tgute nacht\n"]
    (tmp_path / "train/transcripts.txt").write_text("".join(lines))
    with pytest.warns(UserWarning, match=r"2 of 3 .*transcripts\.txt:2: 'guten tag' is no line"):
        manifests = prepare("mls", tmp_path, tmp_path / "out")
    assert [row["text"] for row in rows_of(manifests["train"])] == ["guten tag"]


def test_interrupted_preparation_leaves_no_manifest(
    librispeech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        prepare("librispeech", librispeech, librispeech / "out")
    assert list((librispeech / "out").iterdir()) == []


def test_wrong_kind_or_source_is_explained(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match="Did you mean 'librispeech'"):
        prepare("libri-speech", tmp_path, tmp_path / "out")
    for kind in KINDS:
        with pytest.raises(IsthmusError, match=str(tmp_path)):
            prepare(kind, tmp_path, tmp_path / "out")
    write_audio(tmp_path / "a.wav")
    with pytest.raises(IsthmusError, match="this is folder, not kaldi"):
        prepare("kaldi", tmp_path, tmp_path / "out")


def real(folder: str, count: int = 2) -> list[tuple[str, bytes]]:
    """Transcripts and FLAC files of real speech."""
    if not (SPEECH / folder / "dev.jsonl").is_file():
        pytest.skip(f"no speech data at {SPEECH}; set ISTHMUS_SPEECH")
    rows = rows_of(SPEECH / folder / "dev.jsonl")[:count]
    return [(str(row["text"]), (SPEECH / folder / str(row["audio"])).read_bytes()) for row in rows]


def test_several_languages_of_mls_with_real_speech(tmp_path: Path) -> None:
    spoken = {"english": "en_kathleen", "german": "de_kerstin", "dutch": "nl_nathalie"}
    for name, folder in spoken.items():
        split = tmp_path / "mls" / f"mls_{name}" / "train"
        lines = []
        for number, (text, audio) in enumerate(real(folder)):
            file = split / "audio" / "7" / "8" / f"7_8_{number:06d}.flac"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(audio)
            lines.append(f"{file.stem}\t{text}\n")
        (split / "transcripts.txt").write_text("".join(lines), encoding="utf-8")
    manifests = prepare("mls", tmp_path / "mls", tmp_path / "out")
    assert set(manifests) == {f"mls_{name}-train" for name in spoken}
    for name, code in (("english", "en"), ("german", "de"), ("dutch", "nl")):
        cuts = read_corpus(manifests[f"mls_{name}-train"])
        report = check_corpus(cuts)
        assert (report.n_ok, report.n_rejected, report.languages) == (2, 0, {code: 2})
        texts = [text for text, _ in real(spoken[name])]
        assert [cut.supervisions[0].text for cut in cuts] == texts


def test_librispeech_with_real_speech(tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "9"
    chapter.mkdir(parents=True)
    found = real("en_kathleen", 3)
    for number, (_, audio) in enumerate(found):
        (chapter / f"84-9-{number:04d}.flac").write_bytes(audio)
    lines = [f"84-9-{number:04d} {text.upper()}\n" for number, (text, _) in enumerate(found)]
    (chapter / "84-9.trans.txt").write_text("".join(lines))
    cuts = read_corpus(prepare("librispeech", tmp_path, tmp_path / "out")["dev-clean"])
    assert check_corpus(cuts).languages == {"en": 3}
    assert [cut.supervisions[0].text for cut in cuts] == [text for text, _ in found]


def test_real_speech_survives_a_round_trip(tmp_path: Path) -> None:
    source = SPEECH / "en_barista"
    if not (source / "dev.jsonl").is_file():
        pytest.skip(f"no speech data at {SPEECH}; set ISTHMUS_SPEECH")
    original = read_corpus(source / "dev.jsonl")
    nemo = tmp_path / "nemo.json"
    with nemo.open("w") as stream:
        for cut in original:
            row = {
                "audio_filepath": str(Path(cut.recording.sources[0].source).resolve()),
                "duration": cut.duration,
                "text": cut.supervisions[0].text,
                "id": cut.id,
                "slots": cut.custom["slots"],
            }
            stream.write(json.dumps(row) + "\n")
    prepared = read_corpus(prepare("nemo", nemo, tmp_path / "out")["nemo"])
    assert check_corpus(prepared).n_rejected == 0
    for before, after in zip(original, prepared, strict=True):
        assert (before.id, before.duration) == (after.id, after.duration)
        assert before.supervisions[0].text == after.supervisions[0].text
        assert before.custom["slots"] == after.custom["slots"]

"""Every corpus format gives the same cuts, and every bad line is caught, counted and placed."""

import gzip
import json
import os
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut
from lhotse.cut import Cut

from isthmus.errors import IsthmusError, suggest
from isthmus.speech.audio import SAMPLE_RATE, AudioError
from isthmus.speech.corpora import (
    CorpusReport,
    check_corpus,
    expand_path,
    load_cut,
    read_corpus,
    scorable,
    usable,
)

SPEECH = Path(os.environ.get("ISTHMUS_SPEECH") or Path(__file__).parents[3] / "shared/speech")
TEXTS = {"a": "good morning", "b": "good evening"}
SECONDS = {"a": 1.0, "b": 1.5}


def write_audio(path: Path, seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (round(seconds * rate), channels)
    samples = np.random.default_rng(len(path.name)).uniform(-0.3, 0.3, shape)
    soundfile.write(path, samples, rate)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A folder with a.wav of 1 s and b.wav of 1.5 s."""
    for name, seconds in SECONDS.items():
        write_audio(tmp_path / f"{name}.wav", seconds)
    return tmp_path


def sidecars(folder: Path) -> Path:
    (folder / "a.txt").write_text("good morning\n")
    (folder / "b.lab").write_text("good evening\n")
    return folder


def table_with_names(folder: Path) -> Path:
    (folder / "metadata.csv").write_text(
        'speaker,file_name,transcription\np,a.wav,good morning\nq,b.wav,"good evening"\n'
    )
    return folder


def table_of_tabs(folder: Path) -> Path:
    (folder / "transcripts.tsv").write_text("a.wav\tgood morning\nb.wav\tgood evening\n")
    return folder


def table_of_bars(folder: Path) -> Path:
    (folder / "metadata.csv").write_text("a|good morning|Good morning.\nb|good evening|G\n")
    return folder


def librispeech_like(folder: Path) -> Path:
    (folder / "1-2.trans.txt").write_text("a good morning\nb good evening\n")
    return folder


def isthmus_lines(folder: Path) -> Path:
    rows = [{"audio": f"{name}.wav", "text": text} for name, text in TEXTS.items()]
    return write_jsonl(folder / "train.jsonl", rows)


def zipped_lines(folder: Path) -> Path:
    data = isthmus_lines(folder).read_bytes()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(data))
    return folder / "train.jsonl.gz"


def nemo(folder: Path) -> Path:
    rows = [
        {"audio_filepath": f"{name}.wav", "text": text, "duration": SECONDS[name], "lang": "en"}
        for name, text in TEXTS.items()
    ]
    return write_jsonl(folder / "manifest.json", rows)


def slam_llm(folder: Path) -> Path:
    rows = [
        {"key": name, "source": str(folder / f"{name}.wav"), "target": text, "prompt": "Write."}
        for name, text in TEXTS.items()
    ]
    return write_jsonl(folder / "slam.jsonl", rows)


def kaldi(folder: Path) -> Path:
    (folder / "wav.scp").write_text(f"a {folder / 'a.wav'}\nb b.wav\n")
    (folder / "text").write_text("a good morning\nb good evening\n")
    (folder / "utt2spk").write_text("a p\nb q\n")
    return folder


def lhotse_cuts(folder: Path) -> Path:
    cuts = read_corpus(isthmus_lines(folder))
    cuts.to_file(folder / "cuts.jsonl.gz")
    return folder / "cuts.jsonl.gz"


@pytest.mark.parametrize(
    "make",
    [
        sidecars,
        table_with_names,
        table_of_tabs,
        table_of_bars,
        librispeech_like,
        isthmus_lines,
        zipped_lines,
        nemo,
        slam_llm,
        kaldi,
        lhotse_cuts,
    ],
)
def test_every_format_gives_the_same_cuts(audio: Path, make: Callable[[Path], Path]) -> None:
    cuts = list(read_corpus(make(audio)))
    assert [cut.id for cut in cuts] == ["a", "b"]
    assert [cut.supervisions[0].text for cut in cuts] == list(TEXTS.values())
    assert [cut.duration for cut in cuts] == list(SECONDS.values())
    assert [len(load_cut(cut)) for cut in cuts] == [16_000, 24_000]
    report = check_corpus(CutSet.from_cuts(cuts))
    assert (report.n_ok, report.words, report.seconds) == (2, 4, 2.5)


def test_fields_without_a_place_go_to_custom(audio: Path) -> None:
    row = {"id": 7, "audio": "a.wav", "text": "x", "speaker": "p", "language": "en", "gender": "f"}
    path = write_jsonl(audio / "m.jsonl", [{**row, "slots": {"size": "big"}, "gloss": "y"}])
    (cut,) = read_corpus(path)
    assert cut.id == "7"
    supervision = cut.supervisions[0]
    assert (supervision.speaker, supervision.language, supervision.gender) == ("p", "en", "f")
    assert cut.custom["slots"] == {"size": "big"}
    assert cut.custom["gloss"] == "y"
    (cut,) = [cut for cut in read_corpus(slam_llm(audio)) if cut.id == "a"]
    assert cut.custom["prompt"] == "Write."


def test_manifest_with_duration_opens_no_audio(tmp_path: Path) -> None:
    row = {"audio": "none.wav", "duration": 2.0, "sample_rate": 8000, "text": "x"}
    (cut,) = read_corpus(write_jsonl(tmp_path / "m.jsonl", [row]))
    assert (cut.duration, cut.sampling_rate) == (2.0, 8000)


def test_missing_ids_are_stems_made_unique_by_the_line(audio: Path) -> None:
    rows = [{"audio": "a.wav", "start": 0.1 * n, "duration": 0.2, "text": "x"} for n in range(3)]
    cuts = read_corpus(write_jsonl(audio / "m.jsonl", rows))
    assert [cut.id for cut in cuts] == ["a", "a-2", "a-3"]


def test_parts_of_a_recording_are_cut_out(audio: Path) -> None:
    (audio / "wav.scp").write_text("rec b.wav\n")
    (audio / "segments").write_text("u1 rec 0 0.5\nu2 rec 0.5 -1\n")
    (audio / "text").write_text("u1 one\nu2 two\n")
    whole = soundfile.read(audio / "b.wav", dtype="float32")[0]
    first, second = read_corpus(audio)
    np.testing.assert_array_equal(load_cut(first), whole[:8_000])
    np.testing.assert_array_equal(load_cut(second), whole[8_000:])
    assert second.supervisions[0].text == "two"


def test_kaldi_commands_are_refused(audio: Path) -> None:
    (audio / "wav.scp").write_text("a a.wav\nb sox b.wav -t wav - |\n")
    with pytest.raises(IsthmusError, match=r"wav\.scp:2: recording 'b'.*runs no commands"):
        read_corpus(audio)


def test_same_id_twice_rejects_the_second_and_names_both_lines(audio: Path) -> None:
    rows = [{"id": "u", **GOOD}, {"id": "v", **GOOD}, {"id": "u", **GOOD}, {"id": "u", **GOOD}]
    path = write_jsonl(audio / "m.jsonl", rows)
    good, report = usable(read_corpus(path), max_bad_fraction=0.5)
    assert [(cut.id, cut.custom["isthmus_origin"]) for cut in good] == [
        ("u", f"{path}:1"),
        ("v", f"{path}:2"),
    ]
    assert report.reasons == {"duplicate_id": 2}
    said = f"{path}:3: utterance 'u' has the id of another one at {path}:1."
    assert report.rejections[0].message.startswith(said)


def test_an_id_twice_in_lhotse_cuts(audio: Path) -> None:
    text = gzip.decompress(lhotse_cuts(audio).read_bytes()).decode()
    path = audio / "cuts.jsonl"
    path.write_text(text + text.splitlines()[0])
    report = check_corpus(read_corpus(path))
    assert (report.n_ok, report.reasons) == (2, {"duplicate_id": 1})
    assert f"{path}:3: utterance 'a'" in report.rejections[0].message


@pytest.mark.parametrize(
    ("name", "content", "number", "message"),
    [
        ("m.jsonl", '{{"audio": "a.wav"}}', 2, "not valid JSON"),
        ("m.jsonl", "[1]", 2, "a list where an object was expected"),
        ("m.jsonl", '{"audio": "a.wav", "te', 1, "not valid JSON"),
        ("m.jsonl", "\0" * 9, 3, "not valid JSON"),
        ("cuts.jsonl", "{", 1, "not valid JSON"),
        ("cuts.jsonl", '{"id": "r", "type": "MonoCut"}', 2, "lhotse cannot read this line"),
        ("cuts.jsonl", "RECORDING", 3, "a Recording where a cut was expected"),
        ("metadata.csv", "a.wav,good, morning", 2, "3 columns where 2 were expected"),
        ("segments", "u3 rec 0.1", 1, "'rec 0.1' is no segment"),
        ("segments", "u3 other 0 0.1", 2, "recording 'other' is not in wav.scp"),
    ],
)
def test_a_line_that_cannot_be_read_is_one_fault(
    audio: Path, name: str, content: str, number: int, message: str
) -> None:
    path = audio / name
    lines = {
        "m.jsonl": [json.dumps({**GOOD, "id": "u"}), json.dumps({**GOOD, "id": "v"})],
        "metadata.csv": ["a.wav,good morning", "b.wav,good evening"],
        "segments": ["u rec 0 0.7", "v rec 0.7 1.4"],
        "cuts.jsonl": gzip.decompress(lhotse_cuts(audio).read_bytes()).decode().splitlines(),
    }[name]
    if content == "RECORDING":
        content = json.dumps(json.loads(lines[0])["recording"])
    lines.insert(number - 1, content)
    path.write_text("".join(line + "\n" for line in lines))
    (audio / "wav.scp").write_text("rec b.wav\n")
    (audio / "text").write_text("u good morning\nv good evening\n")
    report = check_corpus(read_corpus(audio if name == "segments" else path))
    assert (report.n_ok, report.reasons) == (2, {"bad_line": 1})
    (rejection,) = report.rejections
    assert rejection.id == f"{name}:{number}"
    assert rejection.message.startswith(f"{path}:{number}: {message}")


def test_an_id_twice_in_a_kaldi_file(audio: Path) -> None:
    (audio / "wav.scp").write_text("a a.wav\nb b.wav\na b.wav\n")
    (audio / "text").write_text("a good morning\nb good evening\nb good night\n")
    report = check_corpus(read_corpus(audio))
    assert (report.n_ok, report.reasons) == (2, {"duplicate_id": 2})
    assert [one.id for one in report.rejections] == ["wav.scp:3", "text:3"]
    assert f"'b' has the id of another one at {audio / 'text'}:2" in report.rejections[1].message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", r"m\.jsonl:1: not valid JSON"),
        ("[1]\n", r"m\.jsonl:1: a list"),
        ('{"wave": "a.wav"}\n', r"m\.jsonl:1: none of the fields"),
        ("\n\n", "no utterance"),
        ("[1]\n" * 100 + '{"audio": "a.wav"}', r"m\.jsonl:1: a list"),
        ('{"id": "r", "sources": []}\n', "lhotse"),
    ],
)
def test_unreadable_manifests_say_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    with pytest.raises(IsthmusError, match=message):
        read_corpus(path)


def test_paths_that_are_no_corpus(audio: Path) -> None:
    with pytest.raises(IsthmusError, match="no such corpus"):
        read_corpus(audio / "none")
    with pytest.raises(IsthmusError, match="no corpus"):
        read_corpus(audio / "a.wav")
    (audio / "sub").mkdir()
    with pytest.raises(IsthmusError, match="no audio"):
        read_corpus(audio / "sub")


GOOD = {"audio": "a.wav", "text": "good morning"}
BAD_LINES: list[tuple[dict[str, Any], str]] = [
    ({"text": 17}, "bad_text"),
    ({"text": ["a"]}, "bad_text"),
    ({"text": None}, "no_text"),
    ({"text": " "}, "empty_text"),
    ({"text": "?!"}, "empty_text"),
    ({"text": "a\0b"}, "bad_text"),
    ({"text": "a\tb"}, "bad_text"),
    ({"text": "a\u202eb"}, "bad_text"),
    ({"text": "a" * 100_000}, "too_fast"),
    ({"duration": -0.3}, "bad_duration"),
    ({"duration": "long"}, "bad_duration"),
    ({"duration": True}, "bad_duration"),
    ({"duration": float("nan")}, "bad_duration"),
    ({"start": -1}, "bad_duration"),
    ({"duration": 0.9}, "wrong_duration"),
    ({"duration": 1.1}, "wrong_duration"),
    ({"start": 5.0}, "past_end"),
    ({"start": 0.5, "duration": 1.5}, "wrong_duration"),
    ({"audio": "none.wav"}, "missing"),
    ({"audio": None}, "missing"),
    ({"audio": "a.txt"}, "unreadable"),
    ({"audio": "."}, "not_a_file"),
    ({"audio": "long.wav"}, "too_long"),
    ({"id": "../a"}, "bad_id"),
    ({"id": "a\nb"}, "bad_id"),
]


@pytest.mark.parametrize(("change", "code"), BAD_LINES)
def test_each_bad_line_has_its_reason(audio: Path, change: dict[str, Any], code: str) -> None:
    (audio / "a.txt").write_text("this is no audio")
    write_audio(audio / "long.wav", 3.0)
    path = write_jsonl(audio / "m.jsonl", [{**GOOD, "id": "good"}, {"id": "bad", **GOOD, **change}])
    report = check_corpus(read_corpus(path), max_seconds=2.0)
    assert (report.n_in, report.n_ok, report.n_rejected) == (2, 1, 1)
    assert report.reasons == {code: 1}
    assert f"{path}:2: utterance" in report.rejections[0].message


def test_bad_line_is_no_waveform(audio: Path) -> None:
    path = write_jsonl(audio / "m.jsonl", [{**GOOD, "id": "sp-88", "duration": -0.3}])
    (cut,) = read_corpus(path)
    message = r"m\.jsonl:1: utterance 'sp-88' has duration -0\.3 s; durations must be positive"
    with pytest.raises(IsthmusError, match=message):
        load_cut(cut)


def test_bytes_that_are_no_utf8_reject_their_line_only(audio: Path) -> None:
    path = audio / "m.jsonl"
    path.write_bytes(
        b'{"audio": "a.wav", "text": "caf\xe9"}\n{"audio": "b.wav", "text": "caf\xc3\xa9"}\n'
    )
    report = check_corpus(read_corpus(path))
    assert report.reasons == {"bad_text": 1}
    assert report.characters == "acfé"
    json.dumps(report.to_dict()).encode()
    "\n".join(report.lines()).encode()


def test_duplicates_in_a_cut_set_are_counted(audio: Path) -> None:
    cuts = list(read_corpus(isthmus_lines(audio)))
    report = check_corpus(CutSet.from_cuts([*cuts, cuts[0]]))
    assert report.reasons == {"duplicate_id": 1}


def test_number_as_text_in_a_lhotse_cut_is_caught(audio: Path) -> None:
    path = lhotse_cuts(audio)
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    rows[0]["supervisions"][0]["text"] = 3
    report = check_corpus(read_corpus(write_jsonl(audio / "cuts.jsonl", rows)))
    assert report.reasons == {"bad_text": 1}


def test_report_counts_and_can_be_read(audio: Path) -> None:
    report = check_corpus(read_corpus(nemo(audio)))
    assert report == CorpusReport(
        n_in=2,
        n_ok=2,
        n_rejected=0,
        reasons={},
        seconds=2.5,
        words=4,
        speakers=0,
        languages={"en": 2},
        shortest=1.0,
        longest=1.5,
        characters=" degimnorv",
    )
    assert json.loads(json.dumps(report.to_dict()))["languages"] == {"en": 2}
    assert report.lines()[0] == "2 of 2 utterances usable, 0 rejected"


def test_usable_skips_up_to_the_fraction(audio: Path) -> None:
    rows = [{**GOOD, "id": f"u{n}"} for n in range(4)]
    rows[2]["audio"] = "none.wav"
    cuts = read_corpus(write_jsonl(audio / "m.jsonl", rows))
    good, report = usable(cuts, max_bad_fraction=0.25)
    assert [cut.id for cut in good] == ["u0", "u1", "u3"]
    assert report.n_in == report.n_ok + report.n_rejected == 4
    with pytest.raises(IsthmusError, match=r"1 of 4 .*\n.*missing: .*m\.jsonl:3: utterance 'u2'"):
        usable(cuts, max_bad_fraction=0.2)
    with pytest.raises(IsthmusError, match="1 of 1"):
        usable(CutSet.from_cuts([cuts["u2"]]), max_bad_fraction=1.0)


def test_what_has_a_transcript_can_be_scored_whatever_its_audio_is(audio: Path) -> None:
    rows = [{**GOOD, "id": name} for name in ("good", "gone", "mute", "both", "fast", "good", "?")]
    rows[1] |= {"audio": "none.wav"}
    rows[2] |= {"text": "..."}
    rows[3] = {"id": "both", "audio": "none.wav"}  # no duration: looked for as it is read
    rows[4] |= {"text": 200 * "so "}
    lines = [json.dumps(row) for row in rows[:-1]] + ["{torn"]
    (audio / "m.jsonl").write_text("\n".join(lines))
    good, bad = scorable(read_corpus(audio / "m.jsonl"))
    assert [cut.id for cut in good] == ["good", "gone", "fast"]
    assert [one.code for one in bad] == ["empty_text", "no_text", "duplicate_id", "bad_line"]


def test_checks_can_be_left_out(audio: Path) -> None:
    row = {"audio": "none.wav", "duration": 2.0}
    cuts = read_corpus(write_jsonl(audio / "m.jsonl", [row]))
    assert check_corpus(cuts, decode_audio=False, require_text=False).n_ok == 1
    assert check_corpus(cuts, decode_audio=False).reasons == {"no_text": 1}
    assert check_corpus(cuts, require_text=False).reasons == {"missing": 1}


def test_header_mode_decodes_nothing_and_finds_what_headers_tell(
    audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("isthmus.speech.audio.SoundFileReader.blocks", decode)
    (audio / "cut.wav").write_bytes((audio / "b.wav").read_bytes()[:20_000])
    (audio / "text.wav").write_text("this is no audio")
    changes: list[tuple[dict[str, Any], str | None]] = [
        ({"duration": 1.0}, None),
        ({"start": 0.5, "duration": 0.4}, None),
        ({"audio": "none.wav", "duration": 1.0}, "missing"),
        ({"audio": "cut.wav", "duration": 0.62}, "truncated"),
        ({"audio": "text.wav", "duration": 1.0}, "unreadable"),
        ({"duration": 0.9}, "wrong_duration"),
        ({"duration": 1.1}, "wrong_duration"),
        ({"start": 0.5, "duration": 0.6}, "wrong_duration"),
        ({"start": 2.0, "duration": 0.6}, "past_end"),
    ]
    rows = [{"id": f"u{i}", **GOOD, **change} for i, (change, _) in enumerate(changes)]
    report = check_corpus(read_corpus(write_jsonl(audio / "m.jsonl", rows)), decode_audio="header")
    expected = {f"u{i}": code for i, (_, code) in enumerate(changes) if code}
    assert {one.id: one.code for one in report.rejections} == expected


def test_audio_is_decoded_by_several_threads(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)  # passes only when two wait at once

    def load(cut: Cut) -> None:
        both.wait(timeout=10)
        if cut.id == "b":
            raise AudioError("truncated", "cut short")

    monkeypatch.setattr("isthmus.speech.corpora.load_cut", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    report = check_corpus(read_corpus(isthmus_lines(audio)))
    assert [(one.id, one.code) for one in report.rejections] == [("b", "truncated")]


def test_channels_of_a_lhotse_recording_stay_apart(tmp_path: Path) -> None:
    path = write_audio(tmp_path / "call.wav", 0.5, channels=2)
    samples = soundfile.read(path, dtype="float32")[0]
    (mean,) = read_corpus(write_jsonl(tmp_path / "m.jsonl", [{"audio": "call.wav", "text": "x"}]))
    np.testing.assert_allclose(load_cut(mean), samples.mean(axis=1), atol=1e-6)
    item = mean.to_dict()
    item["recording"]["sources"][0]["channels"] = [0, 1]
    item["recording"].pop("channel_ids", None)
    (right,) = read_corpus(write_jsonl(tmp_path / "cuts.jsonl", [{**item, "channel": 1}]))
    np.testing.assert_array_equal(load_cut(right), samples[:, 1])


def test_what_only_lhotse_could_load_is_refused(audio: Path) -> None:
    (cut, _) = read_corpus(isthmus_lines(audio))
    assert isinstance(cut, MonoCut)
    for changed in (cut.perturb_speed(1.1), cut.pad(duration=3.0)):
        with pytest.raises(AudioError) as caught:
            load_cut(changed)
        assert caught.value.code == "unsupported"


def supervised(audio: Path, *spans: tuple[float, float]) -> Path:
    """A manifest of one lhotse cut, from 0.25 s of b.wav on for 1 s, with supervisions."""
    (_, cut) = read_corpus(isthmus_lines(audio))
    item = cut.to_dict() | {"start": 0.25, "duration": 1.0}
    (one,) = item["supervisions"]
    item["supervisions"] = [
        {**one, "id": f"s{n}", "start": start, "duration": duration, "text": f"text {n}"}
        for n, (start, duration) in enumerate(spans)
    ]
    return write_jsonl(audio / "cuts.jsonl", [item])


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0.0, 1.0)], [("b", 4_000, 20_000)]),
        ([(0.01, 0.98)], [("b", 4_000, 20_000)]),
        ([(0.25, 0.5)], [("b", 8_000, 16_000)]),
        ([(0.0, 0.5)], [("b", 4_000, 12_000)]),
        ([(0.5, 0.51)], [("b", 12_000, 20_000)]),
        ([(0.0, 0.5), (0.25, 0.75)], [("s0", 4_000, 12_000), ("s1", 8_000, 20_000)]),
        ([(0.0, 1.0), (0.5, 0.25)], [("s0", 4_000, 20_000), ("s1", 12_000, 16_000)]),
    ],
)
def test_a_supervision_is_the_part_that_it_covers(
    audio: Path, spans: list[tuple[float, float]], expected: list[tuple[str, int, int]]
) -> None:
    whole = soundfile.read(audio / "b.wav", dtype="float32")[0]
    cuts = list(read_corpus(supervised(audio, *spans)))
    assert [cut.id for cut in cuts] == [name for name, _, _ in expected]
    for number, (cut, (_, start, end)) in enumerate(zip(cuts, expected, strict=True)):
        assert [one.text for one in cut.supervisions] == [f"text {number}"]
        np.testing.assert_array_equal(load_cut(cut), whole[start:end])
    assert check_corpus(CutSet.from_cuts(cuts)).reasons == {}


@pytest.mark.parametrize("span", [(-0.5, 1.0), (0.5, 1.0), (0.5, 0.0)])
def test_a_supervision_beyond_its_cut_is_a_bad_line(audio: Path, span: tuple[float, float]) -> None:
    path = supervised(audio, span)
    with pytest.raises(IsthmusError, match=r"cuts\.jsonl:1: cut 'b' lasts 1\.0 s.*'s0' reaches"):
        read_corpus(path)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("make", [isthmus_lines, table_of_tabs, kaldi, sidecars])
def test_names_match_however_their_accents_are_composed(
    audio: Path, make: Callable[[Path], Path], forms: tuple[str, str]
) -> None:
    on_disk, in_text = (unicodedata.normalize(form, "\u00e9t\u00e9/\u01d8") for form in forms)
    path = make(audio)
    (audio / on_disk).parent.mkdir()
    (audio / "a.wav").rename(audio / f"{on_disk}.wav")
    if make is sidecars:
        name = Path(in_text).with_suffix(".txt").name
        (audio / "a.txt").rename((audio / on_disk).parent / name)
    else:
        names = ("wav.scp", "train.jsonl", "transcripts.tsv")
        for file in (audio / name for name in names if (audio / name).exists()):
            changed = file.read_text().replace(str(audio / "a.wav"), "a.wav")
            file.write_text(changed.replace("a.wav", f"{in_text}.wav"))
    assert check_corpus(read_corpus(path)).n_ok == 2


def test_kaldi_ids_match_however_their_accents_are_composed(audio: Path) -> None:
    (audio / "wav.scp").write_text("e\u0301 a.wav\n")
    (audio / "text").write_text("\u00e9 good\nother one\n")
    report = check_corpus(read_corpus(audio))
    assert (report.n_ok, report.reasons) == (1, {"missing": 1})
    assert report.rejections[0].message.startswith(f"{audio / 'text'}:2: utterance 'other' has no")


def test_letters_that_this_unicode_does_not_know_are_letters(audio: Path) -> None:
    new = "\U00031350"  # of Unicode 15
    rows = [{**GOOD, "text": new}, {"audio": "b.wav", "id": new, "text": f"{new} is a name"}]
    assert check_corpus(read_corpus(write_jsonl(audio / "m.jsonl", rows))).reasons == {}


def test_a_table_is_read_by_its_grammar(audio: Path) -> None:
    path = audio / "m.csv"
    path.write_text('file_name,text\na.wav,"good\nmorning"\nb.wav,good evening\n')
    report = check_corpus(read_corpus(path))
    assert (report.n_in, report.n_ok, report.reasons) == (2, 1, {"bad_text": 1})
    assert report.rejections[0].message.startswith(f"{path}:2: utterance 'a' has the character")
    path.write_text("file_name\na.wav\nb.wav\n")
    assert check_corpus(read_corpus(path)).reasons == {"no_text": 2}
    path.write_text("a.wav,path\nb.wav,text\n")
    assert [cut.supervisions[0].text for cut in read_corpus(path)] == ["path", "text"]


def test_two_fields_of_one_meaning_are_a_bad_line(audio: Path) -> None:
    rows = [{"file_name": "a.wav", "text": "one"}]
    rows.append({"file_name": "b.wav", "text": "one", "transcription": "two"})
    report = check_corpus(read_corpus(write_jsonl(audio / "m.jsonl", rows)))
    assert (report.n_ok, report.reasons) == (1, {"bad_line": 1})


def test_a_sidecar_that_is_no_utf8_spoils_its_own_line(audio: Path) -> None:
    sidecars(audio)
    (audio / "a.txt").write_bytes("good".encode("utf-16"))
    report = check_corpus(read_corpus(audio))
    assert (report.n_ok, report.reasons) == (1, {"bad_line": 1})


def test_variables_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_SPEECH", "/data/speech")
    assert expand_path("${ISTHMUS_SPEECH}/en/train.jsonl") == Path("/data/speech/en/train.jsonl")
    assert expand_path("$ISTHMUS_SPEECH/en") == Path("/data/speech/en")
    monkeypatch.delenv("ISTHMUS_SPEECH")
    assert expand_path("${ISTHMUS_SPEECH}/en") == Path("../shared/speech/en")
    with pytest.raises(IsthmusError, match=r"ISTHMUS_SPECH is not set\. Did you mean 'ISTHMUS_SP"):
        expand_path("${ISTHMUS_SPECH}/en")


def test_speech_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = "${ISTHMUS_SPEECH}/en/train.jsonl"
    remedy = r"Set it to the folder of speech corpora that holds en/train\.jsonl\."
    monkeypatch.delenv("ISTHMUS_SPEECH", raising=False)
    with pytest.raises(IsthmusError, match=rf"not set, which stands for \.\./shared.*{remedy}"):
        read_corpus(corpus)
    monkeypatch.setenv("ISTHMUS_SPEECH", str(tmp_path))
    with pytest.raises(IsthmusError, match=rf"ISTHMUS_SPEECH is '{tmp_path}'\. {remedy}"):
        read_corpus(corpus)
    with pytest.raises(IsthmusError, match=r"no such corpus\. Name a manifest"):
        read_corpus("en/train.jsonl")


def test_suggestion_is_made_only_for_near_names() -> None:
    assert suggest("lineer", ["linear", "conv"]) == " Did you mean 'linear'?"
    assert suggest("zzz", ["linear", "conv"]) == ""


def test_real_speech_is_usable() -> None:
    manifests = sorted(SPEECH.glob("*/*.jsonl"))
    if not manifests:
        pytest.skip(f"no speech data at {SPEECH}; set ISTHMUS_SPEECH")
    cuts = CutSet.from_cuts(cut for path in manifests for cut in read_corpus(path))
    report = check_corpus(cuts.subset(first=200))
    assert report.n_rejected == 0, report.lines()
    assert check_corpus(cuts, decode_audio=False).n_rejected == 0

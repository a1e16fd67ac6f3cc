"""Output files to the letter, readable again, and never one over another."""

import json
import math
import re
import warnings
from pathlib import Path

import pytest

from isthmus import files
from isthmus.decoding.formats import (
    Layout,
    as_json,
    as_srt,
    as_tsv,
    as_txt,
    as_vtt,
    check_outputs,
    outputs,
    write_transcript,
)
from isthmus.decoding.transcript import Segment, Transcript, Word
from isthmus.errors import IsthmusError

TWO = (Segment(0.0, 2.5, "hello there"), Segment(3661.25, 3662.0, " good bye "))


def said(text: str, start: float = 0.0, step: float = 0.5) -> Segment:
    """A segment whose words follow each other every `step` seconds, with a pause after each."""
    words = [
        Word(word, start + number * step, start + number * step + 0.8 * step, 0.5)
        for number, word in enumerate(text.split())
    ]
    return Segment(start, words[-1].end, text, words=tuple(words))


def texts(subtitles: str) -> list[str]:
    """The texts of SRT's cues."""
    return [cue.split("\n", 2)[2] for cue in subtitles.split("\n\n") if cue]


def seconds(clock: str) -> float:
    """A time of SRT or VTT."""
    parts = [float(part) for part in clock.replace(",", ".").split(":")]
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def test_txt() -> None:
    assert as_txt(TWO) == "hello there\ngood bye\n"


def test_no_space_is_put_where_none_is_written() -> None:
    words = [Word(t, i, i + 1, 0.5) for i, t in enumerate(("春", "は、", "OK", "白", "く"))]
    spring = Segment(0, 5, "春は、OK白く", words=tuple(words))
    transcript = Transcript((spring, Segment(5, 6, "なりゆく"), Segment(6, 7, "so it is")), 7.0)
    assert transcript.text == "春は、OK白くなりゆく so it is"
    found = json.loads(as_json(transcript))
    assert "".join(segment["text"] for segment in found["segments"]) == transcript.text
    shown = [word["word"] for word in found["segments"][0]["words"]]
    assert shown == ["春", "は、", " OK", " 白", "く"]
    assert texts(as_srt([spring])) == ["春は、 OK 白く"]
    marked = texts(as_srt([spring], Layout(highlight_words=True)))
    assert marked[0] == "<u>春</u>は、 OK 白く"


def test_srt() -> None:
    assert as_srt(TWO) == (
        "1\n00:00:00,000 --> 00:00:02,500\nhello there\n\n"
        "2\n01:01:01,250 --> 01:01:02,000\ngood bye\n\n"
    )


def test_vtt() -> None:
    assert as_vtt(TWO) == (
        "WEBVTT\n\n"
        "00:00.000 --> 00:02.500\nhello there\n\n"
        "01:01:01.250 --> 01:01:02.000\ngood bye\n\n"
    )


def test_vtt_is_markup_and_srt_is_not() -> None:
    text = "AT&T says <laughs> a<b --> &amp;"
    assert as_vtt([Segment(0.0, 1.0, text)]).splitlines()[3] == (
        "AT&amp;T says &lt;laughs&gt; a&lt;b -&gt; &amp;amp;"
    )
    assert as_srt([Segment(0.0, 1.0, text)]).splitlines()[2] == "AT&T says <laughs> a<b -> &amp;"
    words = said("a<b AT&T")
    for layout in (Layout(), Layout(max_line_width=8), Layout(max_words_per_line=2)):  # unescaped
        assert as_vtt([words], layout).splitlines()[3:5] == ["a&lt;b AT&amp;T", ""]
    marked = as_vtt([words], Layout(highlight_words=True))
    assert "\n<u>a&lt;b</u> AT&amp;T\n" in marked
    assert "\na&lt;b <u>AT&amp;T</u>\n" in marked


def test_tsv() -> None:
    assert as_tsv(TWO) == "start\tend\ttext\n0\t2500\thello there\n3661250\t3662000\tgood bye\n"


def test_json() -> None:
    words = (Word("grüß", 1.0, 1.2504, 0.75), Word("dich", 1.3, 2.0, 0.5))
    segment = Segment(1.0, 2.0, "grüß dich", -0.5, "length", (7, 8), (-0.25, -0.5), words)
    found = as_json(Transcript((segment,), 3.0, "de"))
    assert found.isascii()
    assert json.loads(found) == {
        "text": "grüß dich",
        "segments": [
            {
                "id": 0,
                "seek": 100,
                "start": 1.0,
                "end": 2.0,
                "text": " grüß dich",
                "tokens": [7, 8],
                "temperature": 0.0,
                "avg_logprob": -0.375,
                "compression_ratio": 11 / 19,  # bytes in UTF-8, and of zlib's stream
                "no_speech_prob": 0.0,
                "ctc_distance": None,
                "doubtful": False,
                "words": [
                    {"word": " grüß", "start": 1.0, "end": 1.25, "probability": 0.75},
                    {"word": " dich", "start": 1.3, "end": 2.0, "probability": 0.5},
                ],
                "finish_reason": "length",
                "score": -0.5,
            }
        ],
        "language": "de",
        "duration": 3.0,
        "seconds": 0.0,
        "finish_reason": "length",
        "ctc_distance": None,
        "doubtful": False,
        "score": -0.5,
        "confidence": pytest.approx(math.exp(-0.375)),
    }


def test_json_has_no_number_that_json_lacks() -> None:
    segment = Segment(0.0, 1.0, "", -math.inf, "no_speech", (1,), (-math.inf,))
    found = json.loads(as_json(Transcript((segment,), 1.0)), parse_constant=pytest.fail)
    assert found["segments"][0]["avg_logprob"] is None
    assert found["segments"][0]["no_speech_prob"] == 1.0
    assert found["segments"][0]["text"] == ""
    assert found["language"] is None


def test_nothing_heard() -> None:
    for segments in ((), (Segment(0.0, 1.0, " \n", finish_reason="no_speech"),)):
        assert as_txt(segments) == as_srt(segments) == ""
        assert as_srt(segments, Layout(highlight_words=True)) == ""
        assert as_vtt(segments) == "WEBVTT\n\n"
        assert as_tsv(segments) == "start\tend\ttext\n"
        assert json.loads(as_json(Transcript(segments, 1.0)))["text"].strip() == ""


def test_text_never_breaks_its_file() -> None:
    text = "a --> b\n\n2\r\n00:00 ---> c\td\u2028e\u00a0f"
    assert as_txt([Segment(0, 1, text)]) == "a --> b 2 00:00 ---> c\td e\u00a0f\n"
    assert as_tsv([Segment(0, 1, text)]).splitlines()[1:] == [
        "0\t1000\ta --> b 2 00:00 ---> c d e\u00a0f"
    ]
    with_words = Segment(0, 1, text, words=(Word("a", 0, 1, 1), Word("--->", 1, 2, 1)))
    for segment, layout in (
        (Segment(0, 1, text), Layout()),
        (with_words, Layout()),
        (with_words, Layout(highlight_words=True)),
    ):
        for written in (as_srt([segment], layout), as_vtt([segment], layout)):
            for cue in written.removeprefix("WEBVTT\n\n").split("\n\n")[:-1]:
                assert cue.count("-->") == 1


@pytest.mark.parametrize(
    ("moment", "srt", "vtt"),
    [
        (0.0004, "00:00:00,000", "00:00.000"),
        (59.9996, "00:01:00,000", "01:00.000"),
        (3599.9999, "01:00:00,000", "01:00:00.000"),
        (360_000.5, "100:00:00,500", "100:00:00.500"),
        (-1e-9, "00:00:00,000", "00:00.000"),
    ],
)
def test_clocks(moment: float, srt: str, vtt: str) -> None:
    segment = Segment(moment, moment, "a")
    assert as_srt([segment]) == f"1\n{srt} --> {srt}\na\n\n"
    assert as_vtt([segment]) == f"WEBVTT\n\n{vtt} --> {vtt}\na\n\n"


def test_files_read_back() -> None:
    segments = [
        Segment(0.1 * i, 0.1 * i + 1 / 3, f"wörd {i} 日本 'x'") for i in range(0, 90_000, 997)
    ]
    for written in (as_srt(segments), as_vtt(segments)):
        cues = re.findall(r"^(\S+) --> (\S+)\n(.+)\n$", written, re.MULTILINE)
        assert [text for *_, text in cues] == [segment.text for segment in segments]
        for (start, end, _), segment in zip(cues, segments, strict=True):
            assert seconds(start) == pytest.approx(segment.start, abs=0.00051)
            assert seconds(end) == pytest.approx(segment.end, abs=0.00051)
    rows = [line.split("\t") for line in as_tsv(segments).splitlines()[1:]]
    assert [text for *_, text in rows] == as_txt(segments).splitlines()
    assert [int(start) for start, *_ in rows] == [round(1000 * s.start) for s in segments]


def test_words_bound_their_cue() -> None:
    segment = Segment(0.0, 9.0, "a b", words=(Word("a", 1, 2, 1), Word("b", 2, 3, 1)))
    assert as_srt([segment]) == "1\n00:00:01,000 --> 00:00:03,000\na b\n\n"


def test_highlighted_words() -> None:
    assert as_vtt([said("one two", 1.0)], Layout(highlight_words=True)) == (
        "WEBVTT\n\n"
        "00:01.000 --> 00:01.400\n<u>one</u> two\n\n"
        "00:01.400 --> 00:01.500\none two\n\n"
        "00:01.500 --> 00:01.900\none <u>two</u>\n\n"
    )


def test_words_per_line() -> None:
    segments = [said("a b c d e"), said("f g", 4.0)]
    assert texts(as_srt(segments, Layout(max_words_per_line=2))) == ["a b", "c d", "e", "f g"]


def test_line_width_alone_keeps_segments() -> None:
    segments = [said("aaa bbb ccc"), said("incomprehensibilities d", 4.0)]
    assert texts(as_srt(segments, Layout(max_line_width=7))) == [
        "aaa bbb\nccc",
        "incomprehensibilities\nd",
    ]


def test_width_and_count_flow_over_segments() -> None:
    layout = Layout(max_line_width=7, max_line_count=2)
    segments = [said("aaa bbb ccc"), said("ddd eee", 1.5), said("fff", 20.0)]
    assert texts(as_srt(segments, layout)) == ["aaa bbb\nccc ddd", "eee", "fff"]  # a long pause
    highlighted = as_srt(segments[:1], Layout(highlight_words=True, max_line_width=7))
    assert texts(highlighted)[-1] == "aaa bbb\n<u>ccc</u>"


def test_a_segment_that_was_not_aligned_is_kept_whole() -> None:
    segments = [said("a b"), Segment(4.0, 5.0, "c d e")]
    assert texts(as_srt(segments, Layout(max_words_per_line=1))) == ["a", "b", "c d e"]


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(IsthmusError, match="word timestamps"):
        as_srt(TWO, Layout(highlight_words=True))
    with pytest.raises(IsthmusError, match="max_line_width is 0"):
        Layout(max_line_width=0)
    with pytest.warns(UserWarning, match="max_line_count has no effect"):
        Layout(max_line_count=2)
    with pytest.warns(UserWarning, match="max_words_per_line has no effect"):
        Layout(max_line_width=20, max_words_per_line=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Layout(max_line_width=20, max_line_count=2)


def test_files_are_named_after_the_recording(tmp_path: Path) -> None:
    transcript = Transcript(TWO, 4000.0)
    paths = write_transcript(transcript, "calls/monday.v2.wav", tmp_path / "new")
    names = {f"monday.v2.{kind}" for kind in ("txt", "srt", "vtt", "tsv", "json")}
    assert {path.name for path in paths} == names == {p.name for p in (tmp_path / "new").iterdir()}
    assert (tmp_path / "new/monday.v2.srt").read_bytes() == as_srt(TWO).encode()
    [path] = write_transcript(Transcript((), 1.0), "calls/monday.v2.wav", tmp_path / "new", "txt")
    assert path.read_text() == ""
    with pytest.raises(IsthmusError, match=r"'str'.*Did you mean 'srt'"):
        write_transcript(transcript, "a.wav", tmp_path, "str")  # type: ignore[arg-type]  # meant


def test_no_output_takes_the_place_of_another(tmp_path: Path) -> None:
    good = ["a/x.wav", "a/y.wav", "a/x.wav", "x.2.wav"]
    check_outputs([(name, tmp_path) for name in good])
    check_outputs([("a/x.wav", tmp_path / "a"), ("b/x.wav", tmp_path / "b")])
    for clash in (["a/x.wav", "b/x.wav"], ["x.wav", "x.mp3"]):
        with pytest.raises(IsthmusError, match=r"x\.wav and .* written to x\.\*"):
            check_outputs([(name, tmp_path) for name in clash])


def test_a_folder_stands_for_its_recordings(tmp_path: Path) -> None:
    for name in ("b.wav", "a.FLAC", "in/a.mp3", "notes.txt"):
        (tmp_path / "talks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "talks" / name).touch()
    talks, out = tmp_path / "talks", tmp_path / "out"
    names = [str(talks / name) for name in ("a.FLAC", "b.wav", "in/a.mp3")]
    beside = list(zip(names, [talks, talks, talks / "in"], strict=True))
    assert outputs([str(talks)], "srt") == beside
    elsewhere = list(zip(names, [out, out, out / "in"], strict=True))
    assert outputs(["c.wav", str(talks)], "srt", out) == [("c.wav", out), *elsewhere]
    assert outputs(["c.wav"]) == [("c.wav", Path())]
    check_outputs(beside)
    check_outputs(elsewhere)
    (tmp_path / "talks/b.txt").write_text("what was said, by a person")
    assert outputs([str(talks)], "srt") == beside
    for kind in ("txt", "all"):
        with pytest.raises(IsthmusError, match=r"b\.txt exists\. Name another folder with"):
            outputs([str(talks)], kind)
    assert outputs([str(talks)], "all", out) == elsewhere


def test_a_fault_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(name: str, path: Path) -> None:
        if name == "flush":
            raise OSError(28, "No space left on device")

    write_transcript(Transcript(TWO, 1.0), "a.wav", tmp_path, "txt")
    monkeypatch.setattr(files, "observers", [no_space])
    with pytest.raises(OSError, match="No space"):
        write_transcript(Transcript((), 1.0), "a.wav", tmp_path, "txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == as_txt(TWO)

"""Each utterance of a job once, whatever is wrong with it, and never another model's words."""

import importlib.util
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import soundfile
from hypothesis import given
from lhotse.cut import Cut

from isthmus.decoding.inputs import is_corpus
from isthmus.decoding.job import (
    Claims,
    Cluster,
    System,
    cut_up,
    system,
    transcribe_corpora,
)
from isthmus.decoding.recogniser import Result
from isthmus.decoding.transcript import Segment, Transcript, Word
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import observers
from isthmus.settings.base import ASSETS
from isthmus.settings.search import DecodeSettings
from isthmus.speech.audio import AudioError

ASKED_FOR = "Words need an aligner."


@dataclass(frozen=True)
class StandIn:
    """Hears the id of an utterance; writes down which, and may take its time or fail."""

    heard: Path | None = None
    delay: float = 0.0
    fault: IsthmusError | None = None
    aligns: bool = True

    def check_words(self, wanted: bool) -> None:
        if wanted and not self.aligns:
            raise IsthmusError(ASKED_FOR)

    def results(self, audio: Sequence[Cut], *, word_timestamps: bool = False) -> Iterator[Result]:
        for index in sorted(range(len(audio)), key=lambda index: audio[index].duration):
            time.sleep(self.delay)
            cut = audio[index]
            if self.heard is not None:
                with self.heard.open("a") as stream:
                    stream.write(f"{cut.id}\n")
            if "bad" in str(cut.recording.sources[0].source):
                yield Result(index, self.fault or AudioError("missing", f"{cut.id} is not there."))
                continue
            words = (Word(cut.id, 0.0, 0.5, 1.0),) if word_timestamps else ()
            silent = cut.id.endswith("7")
            text = cut.id.encode(errors="replace").decode()
            segment = Segment(0.0, cut.duration, text, -len(cut.id) / 7, words=words)
            if silent:
                segment = Segment(0.0, cut.duration, "", finish_reason="no_speech")
            seconds = time.perf_counter() % 1
            yield Result(index, Transcript((segment,), cut.duration, seconds=seconds), seconds)


def standing_in(
    model: str = "one", stand_in: StandIn = StandIn(), batch_size: int = 1, **decode: Any
) -> System:
    settings = DecodeSettings(batch_size=batch_size, **decode)
    return System(lambda: stand_in, {"trained": model}, settings)


def write_manifest(file: Path, count: int, bad: Sequence[int] = ()) -> str:
    """Utterances of recordings that nobody opens; the names of `bad` ones say so."""
    rows = [
        {"id": f"u{i}", "audio": f"{'bad' if i in bad else 'good'}-{i}.wav", "duration": 1 + i % 5}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def outputs(folder: Path) -> bytes:
    return (folder / "transcripts.jsonl").read_bytes()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outputs(folder).splitlines()]


def parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Which parts are there, and what changes if one is written again."""
    found = {}
    for path in (folder / "parts").glob("part-*.jsonl"):
        stat = path.stat()
        found[path.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


@given(st.lists(st.floats(0, 2000)), st.integers(1, 4))
def test_parts_hold_each_utterance_once_and_are_small(
    durations: list[float], batch_size: int
) -> None:
    found = list(cut_up(durations, batch_size))
    assert [index for part in found for index in part] == list(range(len(durations)))
    for part in found:
        assert 1 <= len(part) <= 8 * batch_size
        assert len(part) == 1 or sum(durations[i] for i in part) <= 80 * batch_size + 1e-6


def test_all_utterances_stand_in_order_and_bad_ones_are_told(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", 40, bad=(3, 20))
    seen: list[tuple[int, int]] = []
    out = tmp_path / "out"
    report = transcribe_corpora(
        standing_in(), [manifest], out, on_utterance=lambda *at: seen.append(at)
    )
    assert seen == [(n, 40) for n in (8, 16, 24, 32, 40)]
    found = rows(out)
    assert [row["id"] for row in found] == [f"u{i}" for i in range(40)]
    assert found[0] == {
        "id": "u0",
        "audio_filepath": str(tmp_path / "good-0.wav"),
        "status": "ok",
        "text": "u0",
        "language": None,
        "duration": 1.0,
        "finish_reason": "stop",
        "score": -2 / 7,
        "confidence": 1.0,
        "ctc_distance": None,
        "doubtful": False,
    }
    assert found[3] == {
        "id": "u3",
        "audio_filepath": str(tmp_path / "bad-3.wav"),
        "status": "failed:missing",
        "duration": 4.0,
        "error": "u3 is not there.",
    }
    assert report == json.loads((out / "report.json").read_text())
    assert report["status"] == {"failed:missing": 2, "no_speech": 4, "ok": 34}
    assert report["finish_reasons"] == {"no_speech": 4, "stop": 34}
    assert [row["id"] for row in report["bad"]] == ["u3", "u20"]
    assert (report["utterances"], report["failed"], report["duplicates"]) == (40, 2, 0)
    assert report["audio_hours"] == pytest.approx((40 * 3 - 4 - 1) / 3600)
    assert report["rtfx"] > 0


def test_an_id_that_comes_twice_is_transcribed_once(tmp_path: Path) -> None:
    first = write_manifest(tmp_path / "a.jsonl", 3)
    second = tmp_path / "b.jsonl"
    lines = ['{"id": "u1", "audio": "x.wav", "duration": 1}', '{"id": "n", "audio": "n.wav", ']
    more = ['{"id": "v", "audio": "v.wav", "duration": 1}'] * 2
    second.write_text("\n".join([*lines, *more]))
    report = transcribe_corpora(standing_in(), [first, str(second)], tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == ["u0", "u1", "u2", "b.jsonl:2", "v"]
    assert found[1]["audio_filepath"].endswith("good-1.wav")
    assert report["duplicates"] == 2
    twice = [row for row in report["bad"] if row["status"] == "rejected:duplicate_id"]
    assert [row["id"] for row in twice] == ["u1", "v"]
    assert "a.jsonl:2" in twice[0]["error"]


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    doing = standing_in(stand_in=StandIn(heard))
    manifest = write_manifest(tmp_path / "m.jsonl", 20)
    out = tmp_path / "out"
    report = transcribe_corpora(doing, [manifest], out)
    whole = outputs(out)
    assert len(heard.read_text().split()) == 20
    assert transcribe_corpora(doing, [manifest], out) == report
    assert len(heard.read_text().split()) == 20
    (out / "parts" / "part-000001.jsonl").unlink()
    transcribe_corpora(doing, [manifest], out)
    assert heard.read_text().split()[20:] == [f"u{i}" for i in (10, 15, 11, 12, 8, 13, 9, 14)]
    assert outputs(out) == whole


def test_what_depends_on_something_else_is_refused(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", 9)
    out = tmp_path / "out"
    transcribe = partial(transcribe_corpora, corpora=[manifest], output_dir=out)
    transcribe(standing_in())
    changed: dict[str, Callable[[], object]] = {
        "model.trained: 'one' then, 'two' now": lambda: transcribe(standing_in("two")),
        "decode.beam_size: 4 then, 1 now": lambda: transcribe(standing_in(beam_size=1)),
        "decode.gate: 'auto' then, 'none' now": lambda: transcribe(standing_in(gate="none")),
        "words: False then, True now": lambda: transcribe(standing_in(), words=True),
        "segments: False then, True now": lambda: transcribe(standing_in(), segments=True),
    }
    for difference, attempt in changed.items():
        with pytest.raises(IsthmusError, match=difference):
            attempt()
    before = Path(manifest).read_text()
    for other in (before.replace("good-8", "else-8"), before.replace("4}", "4.5}")):
        Path(manifest).write_text(other)
        with pytest.raises(IsthmusError, match="corpora: '"):
            transcribe(standing_in())
    Path(manifest).write_text(before)
    transcribe(standing_in())
    (out / "job.json").unlink()
    with pytest.raises(IsthmusError, match=r"no job\.json that says of what"):
        transcribe(standing_in())


def test_words_and_segments_are_there_when_asked_for(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", 2)
    transcribe_corpora(standing_in(), [manifest], tmp_path / "segments", segments=True)
    transcribe_corpora(standing_in(), [manifest], tmp_path / "words", words=True)
    (segment,) = rows(tmp_path / "segments")[1]["segments"]
    assert segment["text"] == " u1"
    assert "words" not in segment
    assert rows(tmp_path / "words")[1]["segments"][0]["words"][0]["word"] == " u1"
    deaf = standing_in(stand_in=StandIn(aligns=False))
    with pytest.raises(IsthmusError, match=ASKED_FOR):
        transcribe_corpora(deaf, [manifest], tmp_path / "deaf", words=True)
    assert not parts(tmp_path / "deaf")


def test_what_may_pass_is_no_fault_of_the_recording(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", 20, bad=(12,))
    away = standing_in(stand_in=StandIn(fault=RetryLater("The file server is away.")))
    with pytest.raises(RetryLater, match="file server"):
        transcribe_corpora(away, [manifest], tmp_path / "out")
    assert list(parts(tmp_path / "out")) == ["part-000000.jsonl"]
    report = transcribe_corpora(standing_in(), [manifest], tmp_path / "out")
    assert report["failed"] == 1


@pytest.mark.parametrize("file", ["part-000001.jsonl", "report.json", "job.json"])
def test_a_full_disk_is_for_later(file: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", 20)

    def full(name: str, path: Path) -> None:
        if name == "write" and path.name == f".{file}.partial":
            raise OSError(28, "No space left on device", str(path))

    observers.append(full)
    try:
        with pytest.raises(RetryLater, match="No space left on device"):
            transcribe_corpora(standing_in(), [manifest], tmp_path / "out")
    finally:
        observers.remove(full)
    assert not (tmp_path / "out" / "report.json").exists()
    before = parts(tmp_path / "out")
    report = transcribe_corpora(standing_in(), [manifest], tmp_path / "out")
    assert report["utterances"] == 20
    assert before.items() <= parts(tmp_path / "out").items()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"id": "u0"}\n' * 8, b"null\n" * 8])
def test_a_damaged_part_is_never_merged(damage: bytes, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", 20)
    out = tmp_path / "out"
    transcribe_corpora(standing_in(), [manifest], out)
    (out / "report.json").unlink()
    (out / "parts" / "part-000001.jsonl").write_bytes(damage)
    with pytest.raises(IsthmusError, match=r"part-000001\.jsonl is damaged"):
        transcribe_corpora(standing_in(), [manifest], out)


def test_ids_and_names_that_are_no_unicode_end_nothing(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    lines = [r'{"id": "\ud800\u2028", "audio": "a.wav", "duration": 1}']
    manifest.write_text("\n".join([*lines, '{"id": "é", "audio": "b.wav", "duration": 1}']))
    transcribe_corpora(standing_in(), [str(manifest)], tmp_path / "out")
    assert [row["id"] for row in rows(tmp_path / "out")] == ["\ud800\u2028", "é"]
    assert '"é"'.encode() in outputs(tmp_path / "out")


def _claim(file: Path, numbers: Sequence[int], answers: Any) -> None:
    claims = Claims(file)
    for number in numbers:
        with claims.hold(number, wait=False) as mine:
            answers.put(mine)


def test_a_claim_is_one_process_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with Claims(tmp_path / "claims").hold(3, wait=False) as mine:
        assert mine
        other = context.Process(target=_claim, args=(tmp_path / "claims", [-1, 2, 3, 4], answers))
        other.start()
        assert [answers.get(timeout=20) for _ in range(4)] == [True, True, False, True]
        other.join()
    other = context.Process(target=_claim, args=(tmp_path / "claims", [3], answers))
    other.start()
    assert answers.get(timeout=20)
    other.join()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(IsthmusError, match=r"cannot be locked: No locks available"):
        transcribe_corpora(
            standing_in(), [write_manifest(tmp_path / "m.jsonl", 1)], tmp_path / "out"
        )


@pytest.fixture
def recordings(tmp_path: Path) -> str:
    """Two of noise, one long, one silent, one that is no audio."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, seconds, level in (("a", 1, 0.1), ("b", 2, 0.1), ("long", 35, 0.1), ("silent", 1, 0)):
        noise = level * rng.standard_normal(16_000 * seconds)
        soundfile.write(folder / f"{name}.wav", noise, 16_000)
    (folder / "bad.wav").write_bytes(b"RIFF nothing")
    manifest = folder / "m.jsonl"
    lengths = {"a": 1.0, "long": 35.0, "bad": 1.0, "b": 2.0, "silent": 1.0}
    lines = [
        {"id": name, "audio": f"{name}.wav", "duration": seconds, "text": "§"}
        for name, seconds in lengths.items()
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(manifest)


def test_a_corpus_is_told_from_a_recording(recordings: str, tmp_path: Path) -> None:
    audio = Path(recordings).parent
    assert is_corpus(recordings)
    assert is_corpus(str(audio))
    shutil.copy(audio / "a.wav", audio / "a.recording")
    for name in (audio / "a.wav", audio / "bad.wav", audio / "a.recording", audio / "none", "-"):
        assert not is_corpus(str(name))


def test_the_shipped_system_does_a_job(recordings: str, tmp_path: Path) -> None:
    shipped = system(settings={"beam_size": 1, "batch_size": None})
    assert shipped.decode.gate in ("silero", "energy")
    assert set(shipped.model) == {"recipe", "frozen", "trained"}
    report = transcribe_corpora(shipped, [recordings], tmp_path / "out")
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert list(found) == ["a", "long", "bad", "b", "silent"]
    assert found["bad"]["status"].startswith("failed:")
    assert found["silent"]["status"] == "no_speech"
    assert found["long"]["duration"] == 35.0
    assert report["failed"] == 1
    other = system(settings={"beam_size": 2})
    with pytest.raises(IsthmusError, match=r"decode\.beam_size: 1 then, 2 now"):
        transcribe_corpora(other, [recordings], tmp_path / "out")


def test_an_aligner_is_part_of_what_transcribes(model_folder: Callable[[str], Path]) -> None:
    path = str(model_folder("conformer"))
    assert system().model.items() < system(align_model=path).model.items()


def test_a_run_that_changes_is_another_system(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ASSETS / "tiny", run)
    before = system(run).model
    weights = run / "best" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    after = system(run).model
    assert {name for name in before if before[name] != after[name]} == {"trained"}


def test_ray_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    manifest = write_manifest(tmp_path / "m.jsonl", 3)
    with pytest.raises(IsthmusError, match=r"extra `ray`.*pip install 'isthmus\[ray\]'"):
        transcribe_corpora(standing_in(), [manifest], tmp_path / "out", cluster=Cluster())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_ray_does_the_same(recordings: str, tmp_path: Path) -> None:
    shipped = system(settings={"beam_size": 1, "batch_size": 1})
    more = Path(recordings).with_name("more.jsonl")
    line = '{"id": "more-%d", "audio": "a.wav"}\n'
    more.write_text("".join(line % number for number in range(28)))
    corpora = [recordings, str(more)]  # 5 parts
    transcribe_corpora(shipped, corpora, tmp_path / "alone")
    ray = Cluster("local", workers=2)
    report = transcribe_corpora(shipped, corpora, tmp_path / "ray", cluster=ray)
    assert report["failed"] == 1
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "alone")


def test_the_verb_says_what_has_no_effect_and_how_texts_ended(
    isthmus: Callable[..., tuple[int, str, str]],
    recordings: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    ends = {"length": 3, "no_speech": 1, "stop": 8}

    def done(*arguments: object, **options: object) -> dict[str, Any]:
        asked.update(options)
        return {"utterances": 12, "failed": 0, "finish_reasons": ends}

    monkeypatch.setattr("isthmus.decoding.job.transcribe_corpora", done)
    flags = ["-f", "srt", "--max-line-width", "40", "--nbest", "2"]
    code, out, err = isthmus("transcribe", recordings, "-m", "tiny", "-o", tmp_path / "out", *flags)
    assert (code, asked["words"]) == (0, False)
    line = "12 utterances, 0 of them failed, 3 ended by length, 1 ended by no_speech"
    assert out == f"{line}: {tmp_path / 'out'}\n"
    for flag in ("--output-format", "--max-line-width", "--nbest"):
        assert f"warning: {flag} has no effect on corpora" in err
    assert err.count("warning: ") == 3
    ends.clear()
    code, out, err = isthmus("transcribe", recordings, "-m", "tiny", "-o", tmp_path / "out")
    assert (out, err) == (f"12 utterances, 0 of them failed: {tmp_path / 'out'}\n", "")

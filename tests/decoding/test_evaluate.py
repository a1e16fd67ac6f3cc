"""Evaluation: nothing is lost, nothing is left out in silence, nothing is written over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from torch import Tensor

from isthmus.decoding.evaluate import ctc_scores, evaluate
from isthmus.decoding.pretrained import CTCRecogniser
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.decoding.transcript import together
from isthmus.errors import IsthmusError
from isthmus.recipe import change_settings, load_recipe
from isthmus.runs.feature_cache import (
    feature_cache,
)
from isthmus.scoring import normaliser
from isthmus.training.batches import collate
from isthmus.training.runs import train

Isthmus = Callable[..., tuple[int, str, str]]
Waves = Callable[..., Tensor]
TEXTS = {"a": "go left", "b": "stop", "c": "one two", "d": "yes"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, waves: Waves) -> Path:
    """Four good utterances."""
    folder = tmp_path_factory.mktemp("corpora") / "speech"
    folder.mkdir()
    for seed, (name, text) in enumerate(TEXTS.items()):
        samples = waves(8000 + 1600 * seed, seed=seed).numpy()
        soundfile.write(folder / f"{name}.wav", samples, 16_000)
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def faulty(corpus: Path, waves: Waves) -> Path:
    """The same utterances, one cut short, one not audio, one without text."""
    folder = corpus.parent / "faulty"
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    soundfile.write(folder / "torn.flac", waves(16_000).numpy(), 16_000)
    (folder / "torn.flac").write_bytes((folder / "torn.flac").read_bytes()[:9000])
    (folder / "noise.wav").write_bytes(b"RIFF nothing")
    (folder / "mute.wav").write_bytes((corpus / "a.wav").read_bytes())
    for name, text in (("torn", "a long story"), ("noise", "hiss"), ("mute", "...")):
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, model_folder: Callable[[str], Path]
) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = {
        "name": "tiny",
        "encoder": {"type": "conformer", "path": str(model_folder("conformer"))},
        "projector": {"downsample_rate": 2, "hidden": 16},
        "llm": {"path": str(model_folder("llama"))},
        "data": {"train": [str(corpus)]},
        "train": {"steps": 1, "batch_size": 2, "warmup_steps": 0},
        "decode": {"tokens_per_second": 4, "extra_tokens": 4, "batch_size": 3, "gate": "none"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "recipe.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def transcriber(run: Path) -> Transcriber:
    return load(run)


@pytest.fixture
def deaf(transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch) -> Transcriber:
    """One that must not be asked to transcribe."""

    def refuse(*arguments: Any) -> None:
        pytest.fail("decoded before the request was checked")

    monkeypatch.setattr(transcriber, "results", refuse)
    return transcriber


def test_what_cannot_be_heard_is_deleted_and_what_has_no_text_left_out(
    transcriber: Transcriber, corpus: Path, faulty: Path, tmp_path: Path
) -> None:
    whole = evaluate(transcriber, [str(corpus)])
    result = evaluate(transcriber, [str(corpus), str(faulty)], folder=tmp_path)
    report = json.loads(json.dumps(result.to_dict()))
    assert report["left_out"] == {"speech": {}, "faulty": {"empty_text": 1}}
    assert report["unheard"] == {"speech": {}, "faulty": {"truncated": 1, "unreadable": 1}}
    good, bad = report["sets"]["speech"], report["sets"]["faulty"]
    assert good == whole.to_dict()["sets"]["speech"]
    deleted = len(["a", "long", "story", "hiss"])
    assert (bad["words"], bad["del"]) == (good["words"] + deleted, good["del"] + deleted)
    assert (bad["sub"], bad["ins"], bad["missing"]) == (good["sub"], good["ins"], 2)
    assert report["utterances"] == 2 * len(TEXTS) + 2
    assert report["audio_seconds"] == pytest.approx(2 * whole.to_dict()["audio_seconds"])
    rows = [json.loads(line) for line in (tmp_path / "faulty.jsonl").open()]
    errors = {row["id"]: (row["pred_text"], row["error"]) for row in rows if "error" in row}
    assert errors.keys() == {"torn", "noise"}
    assert all(text == "" and id in error for id, (text, error) in errors.items())
    for item in result.sets["faulty"]:
        if item.fault:
            continue
        alone = transcriber.transcribe(item.cut)
        assert (item.cut.id, alone.text) in {
            (one.cut.id, one.transcript.text) for one in whole.sets["speech"]
        }


def test_progress_counts_every_utterance(transcriber: Transcriber, faulty: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(transcriber, [str(faulty)], on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(1, 7)]  # one has no text


def test_nothing_usable_is_an_error(transcriber: Transcriber, faulty: Path, tmp_path: Path) -> None:
    for suffix in ("flac", "txt"):
        (tmp_path / f"torn.{suffix}").write_bytes((faulty / f"torn.{suffix}").read_bytes())
    with pytest.raises(IsthmusError, match=r"None of 1 utterances.*truncated"):
        evaluate(transcriber, [str(tmp_path)])
    report = evaluate(transcriber, [str(tmp_path), str(faulty)]).to_dict()
    assert report["sets"][tmp_path.name]["wer"] == 1.0
    (tmp_path / "torn.txt").write_text("...")
    with pytest.raises(IsthmusError, match="none of 1 utterances can be scored"):
        evaluate(transcriber, [str(tmp_path)])


def test_faults_of_the_request_come_before_decoding(
    deaf: Transcriber, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(IsthmusError, match="Did you mean 'basic'"):
        evaluate(deaf, [str(corpus)], normaliser="basik")
    (tmp_path / "speech.jsonl").write_text("of another day")
    with pytest.raises(IsthmusError, match=r"speech\.jsonl exists"):
        evaluate(deaf, [str(corpus)], folder=tmp_path)
    assert (tmp_path / "speech.jsonl").read_text() == "of another day"


def test_transcripts_are_written_before_they_are_scored(
    transcriber: Transcriber, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_rules.py").write_text("def fail(text):\n    raise RuntimeError(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        evaluate(transcriber, [str(corpus)], normaliser="raising_rules:fail", folder=out)
    rows = [json.loads(line) for line in (out / "speech.jsonl").open()]
    assert {row["id"]: row["text"] for row in rows} == TEXTS


def test_sets_of_one_name_are_kept_apart(
    transcriber: Transcriber, corpus: Path, tmp_path: Path
) -> None:
    lines = [
        json.dumps({"id": id, "audio_filepath": str(corpus / f"{id}.wav"), "text": text}) + "\n"
        for id, text in TEXTS.items()
    ]
    for number, folder in enumerate(("a/b", "x/a/b", "a_b")):
        (tmp_path / folder).mkdir(parents=True)
        name = "b_c.jsonl" if folder == "a_b" else "c.jsonl"
        (tmp_path / folder / name).write_text("".join(lines[: number + 1]))
    corpora = sorted(map(str, tmp_path.rglob("*.jsonl")))
    result = evaluate(transcriber, corpora, folder=tmp_path / "out")
    assert sorted(map(len, result.sets.values())) == [1, 2, 3]
    written = [len(file.read_text().splitlines()) for file in (tmp_path / "out").iterdir()]
    assert sorted(written) == [1, 2, 3]


def test_ctc_is_scored_on_the_same_utterances(transcriber: Transcriber, faulty: Path) -> None:
    evaluation = evaluate(transcriber, [str(faulty)])
    scores = ctc_scores(evaluation)
    found = {one.id: one.hypothesis for one in scores.sets["faulty"].utterances}
    assert found.keys() == {*TEXTS, "torn", "noise"}
    assert found["torn"] == found["noise"] == ""
    assert len(scores.sets["faulty"].missing) == 2
    head = transcriber.model.encoder.ctc
    assert head is not None
    for item in evaluation.sets["faulty"]:
        if item.fault:
            continue
        batch = collate([""], [transcriber.load(item.cut)], [""])
        frames, lengths = transcriber.model.encoder(batch.waveforms, batch.num_samples)
        [heard] = head.greedy(head.log_probs(frames), lengths)
        assert normaliser("basic")(heard) == found[item.cut.id]


def test_ctc_hears_long_utterances_in_the_same_chunks_and_once(
    transcriber: Transcriber, waves: Waves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "long.wav", waves(10 * 16_000).numpy(), 16_000)
    soundfile.write(tmp_path / "short.wav", waves(16_000).numpy(), 16_000)
    for name in ("long", "short"):
        (tmp_path / f"{name}.txt").write_text("go left")
    monkeypatch.setitem(transcriber.__dict__, "longest", 3.0)
    encoder, heard = transcriber.encoder, list[int]()
    forward = encoder.forward

    def listen(waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        heard.extend(num_samples.tolist())
        return forward(waveforms, num_samples)

    monkeypatch.setattr(encoder, "forward", listen)
    evaluation = evaluate(transcriber, [str(tmp_path)])
    assert evaluation.to_dict()["chunk_seconds"] == 3.0
    [scores] = ctc_scores(evaluation).sets.values()
    assert {one.id for one in scores.utterances} == {"long", "short"}
    [long] = [one for one in evaluation.sets[tmp_path.name] if one.cut.id == "long"]
    chunks = [len(one.waveform) for one in transcriber.chunks(long.cut)]
    assert heard == [16_000, *chunks]
    assert max(heard) <= 3 * 16_000
    alone = CTCRecogniser(encoder, transcriber.settings)
    segments = alone._segments(transcriber.chunks(long.cut), words=False, language="")
    assert long.transcript.ctc_text == together(one.text for one in segments)


def test_frames_of_the_cache_are_told_and_not_timed(
    run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    plain = load(run)
    report = evaluate(plain, [str(corpus)]).to_dict()
    assert report["feature_cache"] == "none"
    assert report["rtfx"] > 0
    cached = change_settings(load_recipe(run / "recipe.yaml").data, {"feature_cache": "float32"})
    recipe = load_recipe(run / "recipe.yaml").model_copy(update={"data": cached})
    plain.cache = feature_cache(recipe, plain.model)
    report = evaluate(plain, [str(corpus)]).to_dict()
    assert (report["feature_cache"], report["rtfx"]) == ("float32", None)


def test_formats_without_a_folder_are_written_here(
    isthmus: Isthmus, run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("transcribe", corpus / "a.wav", "--model", run)
    assert isthmus(*command)[0] == 0
    assert not list(tmp_path.iterdir())
    assert isthmus(*command, "-f", "srt")[0] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.srt"]
    assert isthmus(*command, "--max_words_per_line", 2, "--no_word_timestamps")[0] == 0
    assert {file.suffix[1:] for file in tmp_path.iterdir()} == {"srt", "vtt", "txt", "tsv", "json"}


def test_an_unknown_format_is_refused_before_anything_is_loaded(
    isthmus: Isthmus, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "isthmus.decoding.systems.load_system", lambda *_, **__: pytest.fail("loaded")
    )
    code, _, err = isthmus("transcribe", corpus / "a.wav", "-o", "out", "-f", "str")
    assert (code, "Unknown output format 'str'" in err) == (1, True)


def test_flags_without_effect_are_told(
    isthmus: Isthmus, run: Path, corpus: Path, model_folder: Callable[[str], Path]
) -> None:
    command = ("transcribe", corpus / "a.wav", "--model", run)
    aligner = ("--align_model", model_folder("conformer"))
    _, _, err = isthmus(*command, *aligner, "--nbest", 2, "--strict")
    assert "--align-model has no effect without --word-timestamps" in err
    assert "--nbest has no effect without --json" in err
    _, out, err = isthmus(
        *command, *aligner, "--word_timestamps", "--nbest", 2, "--json", "--no-strict"
    )
    assert "no effect" not in err
    assert json.loads(out)["decode"]["strict"] is False


def test_the_command_goes_on_says_what_is_left_out_and_exits_1(
    isthmus: Isthmus, run: Path, corpus: Path, faulty: Path, tmp_path: Path
) -> None:
    code, out, _ = isthmus("evaluate", run, corpus, "--ctc", "--json", "-o", tmp_path)
    assert code == 0
    report = json.loads(out)
    assert report["ctc"]["words"] == report["words"] == 6
    code, _, err = isthmus("evaluate", run, corpus, "--output_dir", tmp_path)
    assert (code, "exists" in err) == (1, True)
    code, out, _ = isthmus("evaluate", run, faulty)
    assert code == 1
    assert "left out of faulty: 1 empty_text" in out
    assert "not heard in faulty, their words counted as deleted: 1" in out
    torn, whole = faulty / "torn.flac", faulty / "a.wav"
    code, out, err = isthmus("transcribe", torn, whole, tmp_path / "none.wav", "--model", run)
    assert code == 1
    assert out.startswith(f"{whole}: ")
    assert f"error: {torn}" in err
    assert "none.wav" in err
    _, out, _ = isthmus("transcribe", torn, whole, "--model", run, "--json")
    report = json.loads(out)
    assert report["decode"]["beam_size"] == 4
    first, second = report["files"]
    assert first.keys() == {"file", "error"}
    assert second["file"] == str(whole)


def test_ctc_is_refused_before_decoding(
    isthmus: Isthmus, run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ctc(*arguments: Any, **options: Any) -> Transcriber:
        transcriber = load(*arguments, **options)
        transcriber.model.encoder.ctc = transcriber.ctc = None
        monkeypatch.setattr(transcriber, "results", lambda audio: pytest.fail("decoded"))
        return transcriber

    monkeypatch.setattr("isthmus.decoding.systems.load", without_ctc)
    code, _, err = isthmus("evaluate", run, corpus, "--ctc")
    assert code == 1
    assert "no CTC head" in err


def test_languages_have_rows_of_their_own(
    corpus: Path, transcriber: Transcriber, caplog: pytest.LogCaptureFixture
) -> None:
    lines = []
    for name, text in TEXTS.items():
        row = {"id": name, "audio": str(corpus / f"{name}.wav"), "text": text}
        lines.append(json.dumps(row | {"language": "en" if name < "c" else "he"}) + "\n")
    lines[-1] = lines[-1].replace("yes", "\u05db\u05bc\u05df")  # with a point
    manifest = corpus.parent / "languages.jsonl"
    manifest.write_text("".join(lines))
    report = evaluate(transcriber, [str(manifest)]).to_dict()
    assert set(report["languages"]) == {"en", "he"}
    parts = [report["languages"][name]["wer"] for name in ("en", "he")]
    assert report["macro"]["wer"] == sum(parts) / 2
    assert "1 transcripts have marks" in caplog.text
    caplog.clear()
    evaluate(transcriber, [str(manifest)], normaliser="basic-marks")
    assert "marks" not in caplog.text
    assert "languages" not in evaluate(transcriber, [str(corpus)]).to_dict()

"""The command line: light to start, one clear error for what is wrong, JSON where it reports."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM

import numpy as np
import pytest
import soundfile

from isthmus.quickstart import quickstart_recipe
from isthmus.training.loop import Interrupted

Isthmus = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["transcribe", "--help"]])
def test_help_needs_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys, isthmus.cli\n"
        f"sys.argv = ['isthmus', *{arguments!r}]\n"
        "try: isthmus.cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('LOADED', {'torch', 'transformers', 'lhotse'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED set()" in done.stdout


def test_recipes_can_be_listed_and_copied_but_not_over_a_file(
    isthmus: Isthmus, tmp_path: Path
) -> None:
    code, out, _ = isthmus("recipes", "--json")
    assert code == 0
    assert "tiny/projector" in json.loads(out)
    copy = tmp_path / "my.yaml"
    assert isthmus("cp", "tiny/projector", copy)[0] == 0
    assert "isthmus train" in copy.read_text()
    copy.write_text("mine")
    code, _, err = isthmus("cp", "tiny/projector", copy)
    assert code == 1
    assert "exists" in err
    assert copy.read_text() == "mine"


def test_schema_is_json(isthmus: Isthmus) -> None:
    for kind in ("recipe", "ctc", "lm"):
        code, out, _ = isthmus("schema", kind)
        assert code == 0
        assert json.loads(out)["type"] == "object"
    code, _, err = isthmus("schema", "recipes")
    assert code == 1
    assert "Did you mean 'recipe'?" in err


def test_check_counts_and_fails_on_bad_data(isthmus: Isthmus, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "good.wav", rng.normal(0, 0.1, 16000), 16000)
    (tmp_path / "good.txt").write_text("a good one")
    code, out, _ = isthmus("check", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["n_ok"] == 1
    samples = np.full(16000, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / "nan.wav", samples, 16000, subtype="FLOAT")
    (tmp_path / "nan.txt").write_text("not a number")
    soundfile.write(tmp_path / "mute.wav", rng.normal(0, 0.1, 16000), 16000)
    (tmp_path / "mute.txt").write_text("  ")
    code, out, _ = isthmus("check", tmp_path, "--json")
    assert code == 1
    report = json.loads(out)
    assert (report["n_in"], report["n_ok"], report["n_rejected"]) == (3, 1, 2)
    assert report["reasons"] == {"non_finite": 1, "empty_text": 1}


def test_prepare_writes_a_manifest_that_check_accepts(isthmus: Isthmus, tmp_path: Path) -> None:
    book = tmp_path / "LibriSpeech/dev-clean/84/121123"
    book.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    soundfile.write(book / "84-121123-0000.flac", noise, 16000)
    (book / "84-121123.trans.txt").write_text("84-121123-0000 GO ON\n")
    code, out, _ = isthmus(
        "prepare", "librispeech", tmp_path / "LibriSpeech", tmp_path / "out", "--json"
    )
    assert code == 0
    manifest = json.loads(out)["dev-clean"]
    assert isthmus("check", manifest)[0] == 0
    assert json.loads(Path(manifest).read_text())["text"] == "go on"


def test_synth_is_deterministic_and_never_overwrites(isthmus: Isthmus, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    for name in ("a", "b"):
        code, out, _ = isthmus(
            "synth", tmp_path / name, "--utterances", 3, "--domains", "digit=1,order=2", "--json"
        )
        assert code == 0
        assert json.loads(out)["utterances"] == 3
    first, second = ((tmp_path / n / "manifest.jsonl").read_text() for n in ("a", "b"))
    assert first == second
    code, _, err = isthmus("synth", tmp_path / "a", "--utterances", 3)
    assert code == 1
    assert "exists" in err
    code, _, err = isthmus("synth", tmp_path / "c", "--domains", "digits=x")
    assert (code, "name=weight" in err) == (1, True)


def test_score_prints_figures_and_the_listing(isthmus: Isthmus, tmp_path: Path) -> None:
    (tmp_path / "ref.txt").write_text("the cat sat\non the mat\n")
    (tmp_path / "hyp.txt").write_text("the cat sad\non the the mat\n")
    code, out, _ = isthmus("score", tmp_path / "ref.txt", tmp_path / "hyp.txt", "--json")
    assert code == 0
    figures = json.loads(out)
    assert (figures["sub"], figures["ins"], figures["del"], figures["words"]) == (1, 1, 0, 6)
    assert figures["wer"] == pytest.approx(2 / 6)
    low, high = figures["interval"]
    assert low <= figures["wer"] <= high
    assert figures["normaliser"] == "basic"
    code, out, _ = isthmus("score", tmp_path / "ref.txt", tmp_path / "hyp.txt")
    assert "(sat->sad)" in out
    code, _, err = isthmus("score", tmp_path / "ref.txt", tmp_path / "none.txt")
    assert code == 1
    assert "none.txt" in err


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """Files that are wrong in one way each, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.tsv").write_text("a\tone\n")
    (tmp_path / "other.tsv").write_text("b\tone\n")
    (tmp_path / "latin.txt").write_bytes("olé".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"id": "a", "text"\n')
    (tmp_path / "deep.jsonl").write_text('{"id":' + "[" * 100_000 + "\n")
    (tmp_path / "failing_rules.py").write_text("1 / 0")
    soundfile.write(tmp_path / "long.wav", np.zeros(60 * 16000), 16000)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    return set(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny/projektor"], "Did you mean 'tiny/projector'?"),
        (["train", "tiny/projector", "projector.kind=x"], "unknown key projector.kind"),
        (["train", "tiny/conformer"], "is not a valid recipe"),
        (["transcribe", "nowhere.wav", "-m", "no-run"], "No run folder"),
        (["check", "nowhere.jsonl"], "nowhere.jsonl"),
        (["prepare", "librispeach", ".", "out"], "librispeech"),
        (["evaluate", "no-run", "data"], "No run folder"),
        (["score", "one.tsv", "other.tsv"], "1 of 1 hypotheses have no reference: b"),
        (["score", "one.tsv", "none.tsv"], "none.tsv"),
        (["score", "one.tsv", "."], "directory"),
        (["score", "one.tsv", "latin.txt"], "latin.txt: not UTF-8"),
        (["score", "one.tsv", "broken.jsonl"], "broken.jsonl:1: not JSON"),
        (["score", "one.tsv", "deep.jsonl"], "deep.jsonl:1: not JSON"),
        (["score", "one.tsv", "one.tsv", "--missing", "skip"], "--missing"),
        (["score", "one.tsv", "one.tsv", "--normaliser", "basik"], "Did you mean 'basic'?"),
        (["score", "one.tsv", "one.tsv", "--normaliser", "failing_rules:f"], "division by zero"),
        (["score", "one.tsv", "one.tsv", "--normaliser", ".rules:f"], "cannot be imported"),
        (["synth", "out", "--text", "latin.txt"], "latin.txt: not UTF-8"),
        (["synth", "out", "--domains", "digitz=1"], "Did you mean 'digit"),
        (["quickstart", "nowhere.wav", "-o", "out"], "nowhere.wav"),
    ],
)
def test_what_is_wrong_is_one_clear_error(
    isthmus: Isthmus, inputs: set[Path], arguments: list[str], message: str, tmp_path: Path
) -> None:
    code, out, err = isthmus(*arguments)
    assert code == 1
    assert "error: " in err
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert set(tmp_path.iterdir()) == inputs


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (Interrupted(SIGTERM, 3), 143)]
)
def test_interruption_has_the_exit_code_that_shells_expect(
    isthmus: Isthmus, monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    def job(*arguments: object, **options: object) -> None:
        raise stop

    monkeypatch.setattr("isthmus.training.runs.train", job)
    found, out, err = isthmus("train", "tiny/projector")
    assert found == code
    assert not out
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["it's here", "a: b", "[x]", "#1"])
def test_quickstart_folder_may_have_any_name(name: str) -> None:
    folder = Path(name)
    assert quickstart_recipe(folder).data.train == (str(folder / "speech/train"),)

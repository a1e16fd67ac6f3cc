"""The command line: light to start, one clear error for what is wrong, JSON where it reports."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.main import get_command

from isthmus import files
from isthmus.cli import app
from isthmus.decoding.recogniser import Result
from isthmus.decoding.transcript import Segment, Transcript
from isthmus.lab.quickstart import quickstart_recipe
from isthmus.runs.feature_cache import Verification
from isthmus.settings.search import DecodeSettings
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


def test_the_package_is_the_command_line() -> None:
    def said(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "isthmus", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = said("recipes")
    assert (code, err) == (0, "")
    assert "tiny/projector" in out
    assert said("cp", "tiny/projektor", "x.yaml")[0] == 1  # main's own errors
    assert "Usage: isthmus" in said("--help")[1]


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ("isthmus tra", {"train", "transcribe"}),
        ("isthmus train tiny/pro", {"tiny/projector"}),
        ("isthmus cp real/ctc-", {"real/ctc-posterior"}),
        ("isthmus transcribe a.wav --model ", {"base", "tiny"}),
        ("isthmus evaluate ti", {"tiny"}),
        ("isthmus analyse alignment b", {"base"}),
        ("isthmus train my", set()),  # a file of the reader's own: the shell's affair
    ],
)
def test_shells_complete_names_without_torch(words: str, some: set[str]) -> None:
    code = (
        "import os, sys\n"
        "from isthmus.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'lhotse'} & set(sys.modules), file=sys.stderr)\n"
    )
    asked = {
        "_ISTHMUS_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | asked,
    )
    assert set(done.stdout.split()) == some
    assert done.stderr == "set()\n"


BEFORE_TORCH = [  # what is wrong, and a word of what is said
    (["train", "tiny/projektor"], "Did you mean"),
    (["train", "no.yaml"], "no.yaml: line 2, column 7: 'llm: [' is not valid YAML: expected the"),
    (["train", "tiny/quickstart", "a={b: 1"], "line 1, column 6: '{b: 1' is not valid YAML"),
    (["train", "tiny/projector"], "Make it: isthmus synth"),
    (["cache", "tiny/projector"], "Make it: isthmus synth"),
    (["transcribe", "a.wav", "-f", "srd"], "Did you mean 'srt'"),
    (["transcribe", "empty", "-f", "srt"], "empty: no recordings in it"),
    (["transcribe", "a/x.wav", "b/x.wav", "-o", "out"], "both be written"),
    (["transcribe", "a.wav", "-o", "no.yaml"], "cannot be written"),
    (["transcribe", "a.wav", "-o", "no.yaml/x"], "no.yaml/x cannot be written: nothing can be"),
    (["transcribe", "empty"], "empty: no audio"),
    (["transcribe", "a.wav", "--nbest", "3", "--beam-size", "2"], "--nbest 3 is more than --beam"),
    (["transcribe", "a.wav", "--nbest", "9"], "--nbest 9 is more than --beam-size 4"),
    (["transcribe", "nowhere.wav", "no.yaml"], "nowhere.wav: no such file"),
    (["transcribe", "a.wav", "-m", "no-run"], "No run folder"),
    (["transcribe", "a.wav", "-m", "."], "is no run folder"),
    (["transcribe", "a.wav", "-m", "newer"], "written by isthmus 99.0, this is"),
    (["transcribe", "a.wav", "--beam_size", "0"], "--beam-size"),
    (["transcribe", "a.wav", "decode.nbest=9"], "--nbest 9 is more than --beam-size 4"),
    (["transcribe", "a.wav", "decode.gate=["], "is not valid YAML"),
    (["evaluate", "tiny", "a", "decode.beam_size=2", "--beam-size", "1"], "are one setting"),
    (["transcribe", "a.wav", "--device", "gpu"], "--device gpu: give auto, cpu"),
    (["evaluate", "tiny", "a", "--device", "cuda0"], "--device cuda0: give auto, cpu"),
    (["train", "tiny/projector", "--device", "gpu"], "--device gpu: give auto, cpu"),
    (["evaluate", "newer", "a"], "written by isthmus 99.0, this is"),
    (["evaluate", "tiny", "nowhere"], "no such corpus"),
    (["evaluate", "tiny", ".", "--normaliser", "basik"], "Did you mean 'basic'"),
    (["plan", "tiny/projektor"], "Did you mean"),
    (["plan", "tiny/projector", "steps"], "is not an override"),
    (["plan", "tiny/projector", "--gpu", "h2000"], "Did you mean 'H200'"),
    (["reproduce", "t44"], "Did you mean 't4'"),
    (["reproduce", "t9"], "Table 9 is in 't10'"),
    (["reproduce", "t5"], "neither a file nor shipped. Shipped: alignment-loss, "),
    (["reproduce"], ""),
    (["recipes"], ""),
    (["cp", "tiny/projector", "no.yaml"], "exists"),
]


def test_what_can_be_known_at_once_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "no.yaml").write_text("name: x\nllm: [")
    (tmp_path / "newer").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "newer/recipe.yaml").write_text("name: newer\n")
    (tmp_path / "newer/environment.json").write_text('{"isthmus": "99.0"}')
    code = (
        "import sys, isthmus.cli\n"
        f"for arguments in {[given for given, _ in BEFORE_TORCH]!r}:\n"
        "    sys.argv = ['isthmus', *arguments]\n"
        "    try: isthmus.cli.main()\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "    heavy = {'torch', 'transformers', 'lhotse'} & set(sys.modules)\n"
        "    assert not heavy, arguments\n"
        "    print('----', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    said = done.stderr.split("----\n")
    for (given, message), err in zip(BEFORE_TORCH, said, strict=False):
        assert message in err, given
    assert len(said) == len(BEFORE_TORCH) + 1


def verbs(command: Any, *names: str) -> Iterator[tuple[Any, list[str]]]:
    """Every verb below a command, itself included, by the names that call it."""
    yield command, [*names]
    for name, below in getattr(command, "commands", {}).items():
        yield from verbs(below, *names, name)


@pytest.mark.parametrize(("command", "names"), [*verbs(get_command(app))])
def test_help_cuts_no_name_at_80_columns(
    isthmus: Isthmus, command: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = isthmus(*names, "--help")
    assert code == 0
    options = [name for one in command.params for name in (*one.opts, *one.secondary_opts)]
    shown = [name for name in options if name.startswith("-")]
    for name in [*shown, *getattr(command, "commands", ())]:
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", out), name
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("names", [[], ["analyse"]])
def test_help_cuts_no_sentence(
    isthmus: Isthmus, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = isthmus(*names, "--help")[1]
    commands: dict[str, Any] = getattr(get_command(app), "commands", {})
    for name in names:
        commands = commands[name].commands
    for command in commands.values():
        assert "".join(command.help.split()) in "".join(out.split())


def test_warnings_say_that_they_are(tmp_path: Path) -> None:
    """Those of the log, and Python's own, each in one line; what is no warning is as it was."""
    code = (
        "import logging, warnings, isthmus.cli as cli\n"
        "def app(**options):\n"
        "    logging.getLogger('isthmus.x').warning('one %d', 1)\n"
        "    logging.getLogger('isthmus.x').info('two')\n"
        "    warnings.warn('three', stacklevel=2)\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["warning: one 1", "two", "warning: three"]


def test_options_may_have_underscores_as_whispers_have(isthmus: Isthmus) -> None:
    for given in ("--output_format", "--output-format"):
        assert "Unknown output format" in isthmus("transcribe", "a.wav", given, "x")[2]


def test_recipes_can_be_listed_and_copied_but_not_over_a_file(
    isthmus: Isthmus, tmp_path: Path
) -> None:
    code, out, _ = isthmus("recipes", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["tiny/llama-chat-start"] == (
        "First steps of the tiny chat model: spelling and made-up words, which cannot be guessed, "
        "so that it learns to look and copy."
    )
    assert all(line.endswith(".") and ".." not in line for line in shown.values())
    assert not any(re.search(r"\b(Run|Source|Expect|Ours):", line) for line in shown.values())
    assert all(line in isthmus("recipes")[1] for line in shown.values())
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


def test_score_says_what_it_takes_for_ids_and_is_told(isthmus: Isthmus, tmp_path: Path) -> None:
    files = tmp_path / "ref.txt", tmp_path / "hyp.txt"
    files[0].write_text("u1 the cat\nu2 the mat\n")
    files[1].write_text("u2 the mat\nu1 the cat\n")
    code, out, err = isthmus("score", *files, "--json")
    assert (code, json.loads(out)["words"]) == (0, 4)
    assert f"{files[0]} is read as Kaldi text" in err
    code, out, err = isthmus("score", *files, "--json", "--format", "lines")
    assert (code, json.loads(out)["words"], err) == (0, 6, "")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(name: str, path: Path) -> None:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a name, as from write

    monkeypatch.setattr(files, "observers", [no_space])


@pytest.mark.parametrize("verb", ["cp", "prepare", "transcribe", "evaluate"])
def test_a_full_disk_is_one_line_for_later(
    isthmus: Isthmus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: None, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/a.wav", np.zeros(8000), 16_000)
    (tmp_path / "in/a.txt").write_text("yes")
    arguments, file = {
        "cp": (["tiny/projector", "a.yaml"], "a.yaml"),
        "prepare": (["folder", "in", "out"], "out/in.jsonl"),
        "transcribe": (["in/a.wav", "-m", "tiny", "-o", "out", "-f", "txt"], "out/a.txt"),
        "evaluate": (["tiny", "in", "-o", "out", "--json"], "out/in.jsonl"),
    }[verb]
    code, out, err = isthmus(verb, *arguments)
    assert code == 75
    message = f"error: {file}: cannot be written: No space left on device. Make room,"
    assert [line.startswith(message) for line in err.splitlines()].count(True) == 1
    assert "Traceback" not in err
    if verb == "evaluate":
        assert json.loads(out)["del"] == 1


def test_synth_names_a_full_disk(
    isthmus: Isthmus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("espeakng_loader")

    def no_space(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    code, _, err = isthmus("synth", tmp_path / "a", "--utterances", 1, "--domains", "digit=1")
    assert (code, err.count("\n")) == (75, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_full_standard_output_is_for_later(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "a.txt").write_text("one two\n")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "isthmus", "score", "a.txt", "a.txt", *flags]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 75
    assert done.stderr.startswith("error: cannot be written: No space left on device.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_letters_that_a_terminal_lacks_end_nothing(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "u", "text": "caf\u00e9\\ud800"}', "utf-8")
    (tmp_path / "b.jsonl").write_text('{"id": "u", "text": "one"}')
    command = [sys.executable, "-m", "isthmus", "score", "a.jsonl", "b.jsonl", "--normaliser=none"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if encoding == "utf-8":
        assert "caf\u00e9\\ud800->one" in done.stdout


NO_DATA = ("data.train=[]", "data.dev=[]")


@pytest.mark.parametrize("environment", [None, "elsewhere"])
def test_a_recipe_says_how_the_data_it_lacks_is_made(
    isthmus: Isthmus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ISTHMUS_SPEECH", raising=False)
    if environment:
        monkeypatch.setenv("ISTHMUS_SPEECH", environment)
    assert isthmus("cp", "tiny/projector", "my.yaml")[0] == 0
    code, out, err = isthmus("train", "my.yaml")
    assert (code, out) == (1, "")
    assert "Make it: isthmus synth synth/projector --utterances 3000 --seed 3\n" in err
    assert "Set it to the folder of speech corpora" in err
    assert err.count("ISTHMUS_SPEECH") == 1  # not once for each of its corpora


@pytest.mark.parametrize("found", [Verification(3, 0, 300_000), Verification(0, 4, 12)])
@pytest.mark.parametrize("verify", [False, True])
def test_the_cache_says_what_was_done_and_how_much_there_is(
    isthmus: Isthmus, monkeypatch: pytest.MonkeyPatch, found: Verification, verify: bool
) -> None:
    monkeypatch.setattr("isthmus.training.runs.cache_features", lambda *_, **__: found)
    code, out, _ = isthmus("cache", "tiny/projector", *NO_DATA, *(["--verify"] if verify else []))
    assert code == 0
    size = "300.0 kB" if found.sound else "12 bytes"
    done = "Verified" if verify else "Kept"
    assert out == f"{done}: {found.sound} utterances, {size}; {found.broken} broken entries\n"


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
        (["train", "tiny/projector", *NO_DATA, "projector.kind=x"], "unknown key projector."),
        (["train", "tiny/conformer", *NO_DATA], "is not a valid recipe"),
        (["train", "latin.txt"], "latin.txt: not UTF-8"),
        (["train", "tiny/projector", "data.train=[nowhere]"], "nowhere: no such corpus"),
        (["train", "tiny/quickstart", "--resume", "--overwrite"], "exclude each other"),
        (["transcribe", "nowhere.wav", "-m", "no-run"], "No run folder"),
        (["check", "nowhere.jsonl"], "nowhere.jsonl"),
        (["prepare", "librispeach", ".", "out"], "librispeech"),
        (["evaluate", "no-run", "data"], "No run folder"),
        (["score", "one.tsv", "other.tsv"], "1 of 1 hypotheses have no reference: b"),
        (["score", "one.tsv", "none.tsv"], "none.tsv"),
        (["score", "one.tsv", "."], "directory"),
        (["score", "one.tsv", "latin.txt"], "latin.txt:1: not UTF-8"),
        (["score", "one.tsv", "broken.jsonl"], "broken.jsonl:1: not valid JSON"),
        (["score", "one.tsv", "deep.jsonl"], "deep.jsonl:1: not valid JSON"),
        (["score", "one.tsv", "one.tsv", "--missing", "skip"], "--missing"),
        (["score", "one.tsv", "one.tsv", "--normaliser", "basik"], "Did you mean 'basic'?"),
        (["score", "one.tsv", "one.tsv", "--normaliser", "failing_rules:f"], "division by zero"),
        (["score", "one.tsv", "one.tsv", "--normaliser", ".rules:f"], "cannot be imported"),
        (["synth", "out", "--text", "latin.txt"], "latin.txt:1: not UTF-8"),
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

    monkeypatch.setattr("isthmus.lab.plateau.train_watched", job)
    found, out, err = isthmus("train", "tiny/projector", *NO_DATA)
    assert found == code
    assert ("interrupted before the first step" in err) == isinstance(stop, KeyboardInterrupt)
    assert not out
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["it's here", "a: b", "[x]", "#1"])
def test_quickstart_folder_may_have_any_name(name: str) -> None:
    folder = Path(name)
    assert quickstart_recipe(folder).data.train == (str(folder / "speech/train"),)


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("decode.beem_size=2", "unknown key decode.beem_size. Did you mean 'beam_size'?"),
        ("decode.beam_size=none", "decode.beam_size: Input should be a valid integer"),
        (
            "decode.gate=silence",
            "decode.gate: Input should be 'auto', 'silero', 'energy' or 'none'",
        ),
    ],
)
def test_settings_are_taken_and_refused_as_in_training(
    isthmus: Isthmus, tmp_path: Path, setting: str, fault: str
) -> None:
    manifest = tmp_path / "corpus.jsonl"
    soundfile.write(tmp_path / "hush.wav", np.zeros(16000), 16000)
    manifest.write_text('{"id": "a", "audio": "hush.wav", "text": "turn on"}\n')
    for line in (
        ["train", "tiny/projector", *NO_DATA],
        ["transcribe", tmp_path / "hush.wav", "-m", "tiny"],
        ["transcribe", manifest, "-m", "tiny", "-o", tmp_path / "out"],
        ["evaluate", "tiny", manifest],
    ):
        code, _, err = isthmus(*line, setting)
        assert (code, fault in err) == (1, True), line
    good = ["decode.gate=energy", "decode.ctc_delay=null", "decode.hotwords=[turn, light]"]
    code, out, _ = isthmus("evaluate", "tiny", manifest, *good, "--json")
    decode = json.loads(out)["decode"]
    assert (code, decode["gate"], decode["ctc_delay"]) == (0, "energy", None)
    assert decode["hotwords"] == ["turn", "light"]


def test_silence_is_said_in_one_line_and_is_no_fault(isthmus: Isthmus, tmp_path: Path) -> None:
    file = tmp_path / "hush.wav"
    soundfile.write(file, np.zeros(32000), 16000)
    said = f"{file}: no speech was found in it.\n"
    assert isthmus("transcribe", file, "-m", "tiny") == (0, "\n", said)
    code, out, err = isthmus("transcribe", file, "-m", "tiny", "--json")
    assert (code, err) == (0, said)
    assert json.loads(out)["files"][0]["finish_reason"] == "no_speech"


def test_files_that_are_written_are_named_but_not_with_json(
    isthmus: Isthmus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Transcriber:
        settings = DecodeSettings()

        def results(self, audio: list[str], **options: object) -> Iterator[Result]:
            yield Result(0, Transcript((Segment(0.0, 1.0, "one"),), 1.0))

    monkeypatch.setattr("isthmus.decoding.systems.load_system", lambda *a, **b: Transcriber())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks/in").mkdir(parents=True)
    soundfile.write("a.wav", np.zeros(16000), 16000)
    assert isthmus("transcribe", "a.wav", "-f", "txt") == (0, "", "a.txt\n")
    assert (tmp_path / "a.txt").read_text() == "one\n"
    assert isthmus("transcribe", "a.wav", "-f", "txt", "--json")[2] == ""
    assert isthmus("transcribe", "a.wav") == (0, "one\n", "")
    soundfile.write("talks/in/b.wav", np.zeros(16000), 16000)
    assert isthmus("transcribe", "talks", "-f", "srt") == (0, "", "talks/in/b.srt\n")
    assert "00:00:01,000\none" in (tmp_path / "talks/in/b.srt").read_text()
    assert isthmus("transcribe", "talks", "-f", "vtt", "-o", "out") == (0, "", "out/in/b.vtt\n")

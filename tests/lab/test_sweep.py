"""Sweeps: planned, done once whoever does them, and gone on with after a kill."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from isthmus.errors import IsthmusError
from isthmus.files import FolderLock
from isthmus.lab import sweep_runs
from isthmus.lab.sweep import Plan, make_plan
from isthmus.lab.sweep_checks import Checks
from isthmus.lab.sweep_runs import RESULT, Sweeper, states
from isthmus.lab.sweep_table import Table, markdown
from isthmus.model.encoder import build_encoder
from isthmus.model.parts import sources
from isthmus.recipe_files import shipped_sweeps
from isthmus.settings.base import SHIPPED
from isthmus.training.loop import OnStep
from isthmus.training.runs import train

Command = Callable[..., tuple[int, str, str]]
RATE = 16_000

BASE = """
name: mini
encoder: {{type: fbank, num_mels: 8}}
projector: {{type: linear, downsample_rate: 20, hidden: 8}}
llm: {{path: "{llm}"}}
data: {{train: ["${{SPEECH_HERE}}/train.jsonl"], feature_cache: float32}}
train: {{steps: 4, warmup_steps: 0, batch_size: 2, save_every: 2, eval_every: 100}}
decode: {{beam_size: 1, tokens_per_second: 2, extra_tokens: 1, gate: none}}
"""
SWEEP = """
title: A small table
source: A paper, table 4
figure: accuracy
scales:
  tiny:
    recipe: "{base}"
    test: {{one: "${{SPEECH_HERE}}/test.jsonl", two: "${{SPEECH_HERE}}/train.jsonl"}}
    rows:
      - {{name: wide, expected: {{one: 68.95}}, printed: {{encoder parameters: 7.63M}}}}
      - {{name: narrow, set: {{projector.hidden: 4}}}}
    claims: [{{says: "Wide is better.", lower: wide, than: narrow}}]
"""


@contextmanager
def silent(steps: int) -> Iterator[OnStep]:
    yield lambda metrics: None


@pytest.fixture
def sweep(
    tmp_path: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A sweep of two minute runs."""
    generator = np.random.default_rng(0)
    texts = {"train": ["one two", "go up", "stop", "turn left"], "test": ["stop", "go"]}
    for name, lines in texts.items():
        rows = []
        for number, text in enumerate(lines):
            audio = tmp_path / f"{name}-{number}.wav"
            soundfile.write(audio, 0.1 * generator.standard_normal(RATE), RATE)
            rows.append({"id": audio.stem, "audio": str(audio), "duration": 1.0, "text": text})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setenv("SPEECH_HERE", str(tmp_path))
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base.yaml"
    base.write_text(BASE.format(llm=model_folder("llama")))
    file = tmp_path / "small.yaml"
    file.write_text(SWEEP.format(base=base))
    return file


def plan_of(sweep: Path) -> Plan:
    return make_plan(str(sweep), "tiny", sweep.parent / "out")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def timeless(table: Table) -> dict[str, Any]:
    found = table.to_dict()
    for row in found["rows"]:
        row.pop("training_seconds", None)
    return found


# --- plans


def test_all_shipped_sweeps_are_plans_at_every_scale(tmp_path: Path) -> None:
    names = "t2 t3 t4 t7 t8 t10 f2 f3 f4 stride encoder-depth lora-rank text-mask llm-family"
    assert {*names.split()} <= shipped_sweeps().keys()
    runs: dict[str, set[str]] = {}
    for name, file in shipped_sweeps().items():
        assert "†" not in file.read_text()
        for scale in ("paper", "tiny"):
            if scale == "paper" or f"\n  {scale}:\n" in file.read_text():
                plan = make_plan(name, scale, tmp_path)
                plan.shared(plan.runs)
                runs[f"{name}/{scale}"] = {run.name for run in plan.runs}
                assert len(runs[f"{name}/{scale}"]) == len(plan.runs), "two rows are one run"
    assert runs["t7/paper"] == runs["f4/paper"]
    assert runs["t2/paper"] & runs["t3/paper"]
    assert runs["t3/paper"] & runs["t4/paper"] & runs["t10/paper"] & runs["t8/paper"]


def test_the_figures_of_the_papers_table_4(tmp_path: Path) -> None:
    rows = {run.row.name: run for run in make_plan("t4", "paper", tmp_path).runs}
    assert len(rows) == 14
    assert rows["HuBERT X-Large LS-960"].row.expected == {"test-clean": 1.94, "test-other": 3.81}
    # the projectors' sizes follow from the widths (D, E = 4096), as printed
    for run in rows.values():
        width, printed = int(run.row.printed["D"]), run.row.printed["projector"]
        rate = 10 if run.row.name == "FBank" else 5
        size = rate * width * 2048 + 2048 + 2048 * 4096 + 4096
        assert printed == f"{size / 1e6:.2f}M", run.row.name


def test_a_run_is_named_by_what_decides_it(sweep: Path) -> None:
    wide, narrow = (run.name for run in plan_of(sweep).runs)
    assert wide.startswith("fbank_llama")
    assert wide != narrow
    edit(sweep, "projector.hidden: 4}", "projector.hidden: 8}")  # the base has that already
    assert [run.name for run in plan_of(sweep).runs] == [wide, wide]
    edit(sweep, "/test.jsonl", "/train.jsonl")
    assert plan_of(sweep).runs[0].name != wide


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("projector.hidden: 4", "projector.hiden: 4", "'hidden'"),
        ("lower: wide", "lower: wyde", "Did you mean 'wide'"),
        ("lower: wide", "lower: wide, earlier: wide", "one of lower and earlier"),
        ("expected: {one", "expected: {three", "not under test"),
        ("name: narrow", "name: wide", "one name"),
        ("rows:", "rowz:", "'rows'"),
    ],
)
def test_faults_of_a_sweep_are_named(sweep: Path, old: str, new: str, said: str) -> None:
    edit(sweep, old, new)
    with pytest.raises(IsthmusError, match=said):
        plan_of(sweep)


def test_models_and_speech_are_made_only_where_they_are_wanted(sweep: Path) -> None:
    text = """    speech: {a: {utterances: 2, seed: 1}, ab: {utterances: 2, seed: 1}}
    models:
      first: tiny/ladder/llama-small
      second:
        recipe: tiny/ladder/llama-small-chat
        set: {start_from: "${SWEEP}/models/first/model"}
      third: tiny/ladder/llama-small
"""
    edit(sweep, "    rows:\n", text + "    rows:\n")
    edit(sweep, "projector.hidden: 4", 'llm.path: "${SWEEP}/models/second/model"')
    edit(sweep, '"${SPEECH_HERE}/test.jsonl"', '"${SWEEP}/speech/ab"')
    plan = plan_of(sweep)
    assert [*plan.shared(plan.runs).models] == ["first", "second"]
    assert [*plan.shared(plan.runs).speech] == ["ab"]
    assert not plan.shared(plan.chosen(["wide"])).models
    llm = plan.expanded(plan.runs[1].recipe).llm.path
    assert llm == str(sweep.parent / "out/tiny/models/second/model")


def test_variables_in_all_paths_of_parts_are_replaced(sweep: Path) -> None:
    edit(
        sweep,
        "projector.hidden: 4",
        """encoder: {type: pair, first: {type: whisper, path: "${SPEECH_HERE}/a"},
            second: {type: wavlm, path: "$SPEECH_HERE/b"}},
        projector: {type: units, path: "${SWEEP}/units"}""",
    )
    plan = plan_of(sweep)
    recipe = plan.expanded(plan.runs[1].recipe).model_dump()
    assert recipe["encoder"]["first"]["path"] == f"{sweep.parent}/a"
    assert recipe["encoder"]["second"]["path"] == f"{sweep.parent}/b"
    assert recipe["projector"]["path"] == f"{sweep.parent}/out/tiny/units"
    assert recipe["data"]["train"] == ("${SPEECH_HERE}/train.jsonl",)  # replaced when it is read


def test_a_scale_takes_what_it_shares_from_a_file(sweep: Path) -> None:
    names = [run.name for run in plan_of(sweep).runs]
    test = '    test: {one: "${SPEECH_HERE}/test.jsonl", two: "${SPEECH_HERE}/train.jsonl"}\n'
    (sweep.parent / "block.yaml").write_text(f"average: sets\nagainst: nothing\n{test.strip()}\n")
    edit(sweep, test, "    like: block.yaml\n    against: narrow\n")
    plan = plan_of(sweep)
    assert [run.name for run in plan.runs] == names
    assert (plan.scale.average, plan.scale.against) == ("sets", "narrow")
    edit(sweep, "block.yaml", "shared/tiny.yaml")  # a shipped one
    edit(sweep, "expected: {one", "expected: {digits")
    assert "held-out" in str(plan_of(sweep).sweep.scales["tiny"].test)
    edit(sweep, "shared/tiny.yaml", "blok.yaml")
    with pytest.raises(IsthmusError, match=r"scales\.tiny\.like: no file 'blok.yaml'"):
        plan_of(sweep)


# --- runs


def test_rows_are_done_once_and_the_table_says_all(sweep: Path, isthmus: Command) -> None:
    out = sweep.parent / "out"
    code, said, _ = isthmus("reproduce", sweep, "-o", out, "--dry-run", "--json")
    assert (code, [run["state"] for run in json.loads(said)]) == (0, ["to do", "to do"])
    assert not out.exists(), "a dry run writes nothing"
    assert "base.yaml projector.hidden=4\n" in isthmus("reproduce", sweep, "--dry-run")[1]
    code, said, log = isthmus("reproduce", sweep, "-o", out, "--json")
    assert code == 0, log
    found = json.loads(said)
    assert found == json.loads((out / "tiny/small.json").read_text())
    wide, narrow = found["rows"]
    assert wide["expected"] == {"one": 68.95}
    assert set(wide["wer"]) == {"one", "two", "all"}
    assert wide["parameters"]["trained"] > narrow["parameters"]["trained"]
    assert narrow["against"]["p"] > 0
    assert found["claims"][0]["verdict"]
    shown = (out / "tiny/small.md").read_text()
    assert "68.95" in shown
    assert "7.63M" in shown
    page = (out / "tiny/small.html").read_text()
    assert "<svg" in page
    assert "<script" not in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("runs/*/*") if file.is_file()}
    code, again, log = isthmus("reproduce", sweep, "-o", out, "--json")
    assert (code, json.loads(again)) == (0, found)
    assert before == {file: file.stat().st_mtime_ns for file in before}


def sweep_that_dies(sweep: Path, out: Path, place: str) -> None:
    """To be run in a process of its own."""
    torch.set_num_threads(1)  # what the parent's threads hold is lost in the fork

    def die(*given: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def observe(steps: int) -> Iterator[OnStep]:
        yield lambda metrics: die() if place == "training" and metrics["step"] == 3 else None

    if place == "evaluation":
        vars(sweep_runs)["evaluate"] = die
    Sweeper(make_plan(str(sweep), "tiny", out), observe, ["code"]).reproduce()


def test_a_killed_sweep_ends_in_the_same_table(sweep: Path) -> None:
    expected = timeless(Sweeper(plan_of(sweep), silent).reproduce())
    other = sweep.parent / "other"
    for place in ("training", "evaluation"):
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=sweep_that_dies, args=(sweep, other, place))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert states(make_plan(str(sweep), "tiny", other))[0]["state"] == "begun"
    found = timeless(Sweeper(make_plan(str(sweep), "tiny", other), silent, ["code"]).reproduce())
    assert found | {"folder": ""} == expected | {"folder": ""}


def sweep_noting_what_it_trains(sweep: Path) -> None:
    torch.set_num_threads(1)

    def noting(recipe: Any, folder: Path, *given: Any, **more: Any) -> Any:
        with (sweep.parent / "trained").open("a") as stream:
            stream.write(f"{folder.name}\n")
        return train(recipe, folder, *given, **more)

    vars(sweep_runs)["train"] = noting
    assert len(Sweeper(plan_of(sweep), silent).reproduce().results) == 2


def test_processes_share_out_the_rows(sweep: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=sweep_noting_what_it_trains, args=(sweep,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    trained = (sweep.parent / "trained").read_text().split()
    assert sorted(trained) == sorted(run.name for run in plan_of(sweep).runs)


def test_what_other_processes_are_at_is_waited_for_and_said_once(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(sweep)
    Sweeper(plan, silent).reproduce()
    held = [FolderLock(plan.state_folder(run.name)).__enter__() for run in plan.runs]
    result = plan.run_folder(plan.runs[0]) / RESULT
    result.rename(sweep.parent / "kept")
    assert [run["state"] for run in states(plan)] == ["running", "done"]
    naps: list[float] = []

    def others_finish(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            (sweep.parent / "kept").rename(result)
            for lock in held:
                lock.__exit__(None, None, None)

    monkeypatch.setattr(sweep_runs.time, "sleep", others_finish)
    monkeypatch.setattr(sweep_runs, "train", None)  # is not called
    caplog.set_level("INFO", "isthmus")
    assert len(Sweeper(plan, silent).reproduce().results) == 2
    said = [line for line in caplog.messages if "Other processes" in line]
    assert said == ["Other processes are at wide, narrow: waiting for them."]


def test_a_row_that_fails_is_listed_and_the_others_go_on(sweep: Path, isthmus: Command) -> None:
    edit(sweep, "set: {projector.hidden: 4}", "set: {llm.path: /nowhere/at/all}")
    edit(sweep, "- {name: wide", "- {name: narrow")
    edit(sweep, "- {name: narrow, set", "- {name: wide, set")
    out = sweep.parent / "out"
    code, _, log = isthmus("reproduce", sweep, "-o", out)
    assert code == 1
    assert "1 rows failed: wide" in log
    assert "/nowhere/at/all" in (out / "tiny/small.md").read_text()
    assert [run["state"] for run in states(plan_of(sweep))] == ["done", "failed"]


def test_a_full_disk_ends_the_sweep_to_be_started_again(
    sweep: Path, isthmus: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    out = sweep.parent / "out"
    monkeypatch.setattr(sweep_runs, "evaluate", full)
    code, _, log = isthmus("reproduce", sweep, "-o", out)
    assert (code, "make room" in log) == (75, True)
    monkeypatch.undo()
    monkeypatch.setenv("SPEECH_HERE", str(sweep.parent))
    assert isthmus("reproduce", sweep, "-o", out)[0] == 0


def test_changes_underneath_are_refused(sweep: Path) -> None:
    plan = plan_of(sweep)
    Sweeper(plan, silent).reproduce(["wide"])
    file = plan.run_folder(plan.runs[0]) / RESULT
    stored = json.loads(file.read_text())

    def said() -> str:
        table = Sweeper(plan, silent).reproduce(["wide"])
        assert "wide" not in table.results
        return table.failed["wide"]

    changed = json.loads(file.read_text())
    changed["recipe"]["train"]["learning_rate"] = 0.5
    file.write_text(json.dumps(changed))
    assert "train.learning_rate: 0.5 then, 0.0001 now" in said()
    file.write_text(json.dumps(stored))
    edit(sweep.parent / "test.jsonl", '"text": "go"', '"text": "gone"')
    assert "test set one has other utterances" in said()
    edit(sweep.parent / "test.jsonl", '"text": "gone"', '"text": "go"')
    stored["parts"]["llm"]["sha256"] = {"model.safetensors": "0" * 64}
    file.write_text(json.dumps(stored))
    assert "has other files" in said()
    del stored["parts"]["llm"], stored["recipe"]["train"]["keep"]  # a setting that is new since
    stored["environment"]["code"] = "older"  # allowed, and said
    file.write_text(json.dumps(stored))
    table = Sweeper(plan, silent).reproduce()
    assert not table.failed
    assert "not all made by the same code" in markdown(table)


def test_rows_that_were_trained_on_other_data_are_refused_in_any_table(sweep: Path) -> None:
    edit(sweep, ', two: "${SPEECH_HERE}/train.jsonl"', "")
    plan = plan_of(sweep)
    Sweeper(plan, silent).reproduce(["wide"])
    edit(sweep.parent / "train.jsonl", "turn left", "turn right")
    table = Sweeper(plan, silent).reproduce(["narrow"])  # which is not the row
    assert [*table.results] == ["narrow"]
    assert "train.jsonl, which was trained on, has other utterances" in table.failed["wide"]
    assert [run["state"] for run in states(plan)] == ["failed", "done"]
    table = Sweeper(plan, silent).reproduce(["narrow"])  # another process, which reads of it
    assert "Failed: wide." in markdown(table)
    assert table.verdicts[0][1] == "not measured yet"
    edit(sweep.parent / "train.jsonl", "turn right", "turn left")
    table = Sweeper(plan, silent).reproduce(["wide"])
    assert [*table.results] == ["wide"]
    assert [*table.failed] == ["narrow"]


def test_other_files_of_any_part_are_refused(
    sweep: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder("llama"), sweep.parent / "llm")
    monkeypatch.setitem(SHIPPED, "isthmus/mini", sweep.parent / "llm")
    (sweep.parent / "units").write_text("centroids")
    parts = 'llm.path: isthmus/mini, projector: {type: units, path: "${SPEECH_HERE}/units"}'
    edit(sweep, "projector.hidden: 4", parts)
    plan = plan_of(sweep)
    run = plan.runs[1]
    found = sources(plan.expanded(run.recipe))
    assert {*found} == {"llm", "projector"}
    result = {
        "recipe": run.recipe.model_dump(mode="json"),
        "parts": {name: part.to_dict() for name, part in found.items()},
        "test": {},
    }
    Checks(plan).check(run, result)
    (sweep.parent / "units").write_text("others")
    with pytest.raises(IsthmusError, match=r"the projector \S+/units has other files"):
        Checks(plan).check(run, result)
    (sweep.parent / "units").write_text("centroids")
    (sweep.parent / "llm/more.json").write_text("{}")
    with pytest.raises(IsthmusError, match="the llm isthmus/mini has other files"):
        Checks(plan).check(run, result)


def test_a_failure_that_was_mended_is_forgotten(
    sweep: Path, model_folder: Callable[[str], Path]
) -> None:
    edit(sweep, "projector.hidden: 4", 'llm.path: "${SPEECH_HERE}/later"')
    plan = plan_of(sweep)
    assert [*Sweeper(plan, silent).reproduce().failed] == ["narrow"]
    shutil.copytree(model_folder("llama"), sweep.parent / "later")
    table = Sweeper(plan, silent).reproduce()
    assert ([*table.results], table.failed) == (["wide", "narrow"], {})
    assert [run["state"] for run in states(plan)] == ["done", "done"]


def test_sizes_are_those_that_the_papers_count(
    sweep: Path, encoder_settings: Callable[[str], Any]
) -> None:
    whisper = encoder_settings("whisper-unpadded")
    edit(sweep, "projector.hidden: 4", f"encoder: {whisper.model_dump_json()}, llm.quantise: int8")
    table = Sweeper(plan_of(sweep), silent).reproduce()
    assert not table.failed
    network = build_encoder(whisper).network
    positions = network.embed_positions.weight.numel()  # sinusoids, which are never learnt
    sizes = table.results["narrow"]["parameters"]
    assert sizes["encoder"] == sum(p.numel() for p in network.parameters()) - positions
    assert sizes["llm"] is None
    assert "| narrow |" in markdown(table)


def test_missing_data_is_one_error_before_anything(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPEECH_HERE")
    with pytest.raises(IsthmusError, match="SPEECH_HERE is not set") as error:
        Sweeper(plan_of(sweep), silent).reproduce()
    assert str(error.value).count("SPEECH_HERE is not") == 1
    assert "isthmus prepare" in str(error.value)
    assert not (sweep.parent / "out").exists()
    monkeypatch.setenv("SPEECH_HERE", str(sweep.parent))
    Sweeper(plan_of(sweep), silent).reproduce()
    monkeypatch.delenv("SPEECH_HERE")  # what is finished can be shown without
    assert len(Sweeper(plan_of(sweep), silent).reproduce().results) == 2


def test_all_that_a_papers_sweep_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("LIBRISPEECH", "QWEN_AUDIO_ENCODER"):
        monkeypatch.delenv(variable, raising=False)
    plan = make_plan("t4", "paper", tmp_path)
    with pytest.raises(IsthmusError) as error:
        plan.check_data(plan.runs)
    said = str(error.value)
    assert said.count("variable LIBRISPEECH is not set") == 1
    assert "`isthmus prepare librispeech SOURCE FOLDER`, then `export LIBRISPEECH=FOLDER`" in said
    corpora = plan.corpora(plan.runs)
    assert len(corpora) > 3
    assert all(corpus in said for corpus in corpora[:3])
    assert f" and {len(corpora) - 3} more:" in said
    assert "row 'Whisper-large-v2 of Qwen-Audio': " in said
    assert said.count("variable QWEN_AUDIO_ENCODER is not set") == 1
    monkeypatch.setenv("LIBRISPEECH", str(tmp_path))
    with pytest.raises(IsthmusError, match=f"variable LIBRISPEECH is '{tmp_path}'"):
        plan.check_data(plan.runs)
    for corpus in corpora:
        (tmp_path / Path(corpus).name).touch()
    plan.check_data(plan.runs)  # the other rows can be done
    assert "QWEN_AUDIO_ENCODER is not set" in caplog.text


def test_names_that_are_unknown(sweep: Path, isthmus: Command) -> None:
    assert "Did you mean 't4'" in isthmus("reproduce", "t44", "--scale", "paper")[2]
    assert "has no scale" in isthmus("reproduce", sweep, "--scale", "paper")[2]
    code, _, log = isthmus("reproduce", sweep, "--only", "wid")
    assert (code, "Did you mean 'wide'" in log) == (1, True)
    assert "table 4" in isthmus("reproduce")[1]


def test_shared_things_made_otherwise_are_refused(sweep: Path) -> None:
    pytest.importorskip("espeakng_loader")
    edit(sweep, "    rows:\n", "    speech: {few: {utterances: 2, seed: 1}}\n    rows:\n")
    edit(sweep, '"${SPEECH_HERE}/test.jsonl"', '"${SWEEP}/speech/few"')
    Sweeper(plan_of(sweep), silent).reproduce(["wide"])
    edit(sweep, "seed: 1", "seed: 2")
    table = Sweeper(plan_of(sweep), silent).reproduce()
    assert [*table.failed] == ["wide", "narrow"]  # the finished one, too
    assert "seed: 1 then, 2 now" in table.failed["wide"]
    assert "seed: 1 then, 2 now" in table.failed["narrow"]


def test_models_that_rows_share_are_trained_once(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16"
    recipe = sweep.parent / "lm.yaml"
    recipe.write_text(
        f"name: lm\narchitecture: {{{sizes}}}\nsentences: 20\n"
        "train: {steps: 2, eval_every: 2, warmup_steps: 0}\n"
    )
    edit(sweep, "    rows:\n", f"    models: {{small: {recipe}}}\n    rows:\n")
    edit(sweep, "projector.hidden: 4", 'llm.path: "${SWEEP}/models/small/model"')
    plan = plan_of(sweep)
    assert plan.runs[1].name.startswith("fbank_small_")
    assert len(Sweeper(plan, silent).reproduce().results) == 2
    monkeypatch.setattr(sweep_runs, "pretrain_lm", None)  # is not called
    (plan.run_folder(plan.runs[1]) / RESULT).unlink()
    others = [FolderLock(plan.state_folder(name)) for name in ("models-small", "models-other")]
    with monkeypatch.context() as patch, others[0], others[1]:
        patch.setattr(sweep_runs.time, "sleep", None)  # what is made is not waited for
        assert not Sweeper(plan, silent, ["code"]).reproduce().failed
    edit(recipe, "steps: 2", "steps: 3")
    (plan.run_folder(plan.runs[1]) / RESULT).unlink()
    table = Sweeper(plan, silent, ["code"]).reproduce()
    assert [*table.results] == ["wide"]
    assert "train.steps: 2 then, 3 now" in table.failed["narrow"]


def test_the_frames_of_an_encoder_are_computed_once_for_all_rows(sweep: Path) -> None:
    Sweeper(plan_of(sweep), silent).reproduce()
    indexes = (sweep.parent / "cache").rglob("*.jsonl")
    entries = [json.loads(line)["key"] for file in indexes for line in file.open()]
    assert len(entries) == len({*entries}) == 6  # four to train on, and two more to test

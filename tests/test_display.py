"""What is shown of training: the lines of a log, the bar of a terminal, TensorBoard's curves."""

import io
import json
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isthmus import display as module
from isthmus.display import CURVES, TensorBoard, loading, print_scores, training_display
from isthmus.errors import IsthmusError
from isthmus.lab.language_model import pretrain_lm
from isthmus.recipe import LanguageRecipe


def step(number: int, **more: Any) -> dict[str, Any]:
    metrics = {"step": number, "loss": 2.0, "accuracy": 0.5, "units": 100, "step_seconds": 2.0}
    return metrics | {"audio_seconds": 90.0} | more


def shown(total: int, steps: Iterator[dict[str, Any]] | list[dict[str, Any]], **how: Any) -> str:
    """What a console of 40 columns is written, or one of another kind."""
    stream = io.StringIO()
    options = {"force_terminal": False, "width": 40} | how
    with training_display(total, Console(file=stream, **options)) as display:
        for metrics in steps:
            display(metrics)
    return stream.getvalue()


# --- what is waited for


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_long_loading_is_spoken_of_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, patience: float
) -> None:
    monkeypatch.setattr(module, "PATIENCE", patience)
    stream, before = io.StringIO(), threading.active_count()
    with loading("the model", Console(file=stream, force_terminal=terminal)):
        deadline = time.monotonic() + 10
        while terminal and not patience and not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.001)
    assert stream.getvalue() == ("loading the model …\n" if terminal and not patience else "")
    assert threading.active_count() <= before + 1  # one that was cancelled may still be ending


# --- lines of a log


def test_a_log_has_a_line_each_fifty_steps_and_at_the_end() -> None:
    lines = shown(120, map(step, range(1, 121))).splitlines()
    assert [line.partition(" |")[0] for line in lines] == [
        "step 50/120",
        "step 100/120",
        "step 120/120",
    ]
    assert lines[0].endswith("loss 2.000 | accuracy 50.0% | 0:02:20 left | 45 s audio/s")


def test_a_line_says_what_there_is_to_say() -> None:
    more = {"padding": 0.0, "memory_gb": 12.34, "mfu": 0.4567}
    line = shown(50, [step(50, **more)])
    assert line.endswith("45 s audio/s | padding 0.0% | 12.3 GB | MFU 45.7%\n")


def test_text_has_tokens_for_audio() -> None:
    assert "| 50 tokens/s" in shown(50, [step(50, audio_seconds=0.0)])


@pytest.mark.parametrize("missing", [*step(1), "all"])
def test_no_metric_but_the_step_is_needed(missing: str) -> None:
    metrics = {"step": 50} if missing == "all" else step(50)
    if missing != "step":
        metrics.pop(missing, None)
    assert shown(50, [metrics]).startswith("step 50/50 | loss ")


def test_means_weigh_loss_by_units_and_utilisation_by_time() -> None:
    first = step(49, loss=1.0, units=300, mfu=0.2, step_seconds=3.0, padding=0.1)
    second = step(50, loss=3.0, units=100, mfu=0.6, step_seconds=1.0, padding=0.3)
    line = shown(50, [first, second])
    assert "loss 1.500" in line
    assert "MFU 30.0%" in line
    assert "padding 20.0%" in line


def test_time_left_is_of_recent_steps() -> None:
    """Not of the slow ones at the beginning."""
    times = [60.0] * 30 + [2.0] * 20
    lines = shown(100, [step(n, step_seconds=t) for n, t in enumerate(times, start=1)])
    assert "| 0:01:40 left |" in lines


def test_a_resumed_run_counts_only_its_own_steps() -> None:
    assert "| 0:01:40 left |" in shown(10_050, map(step, range(9_991, 10_001)))


def test_days_are_left_as_days() -> None:
    assert "| 2 days, 7:33:20 left |" in shown(100_050, [step(50)])


def test_validation_has_a_line() -> None:
    text = shown(100, [step(7, dev_loss=0.51239, dev_accuracy=0.875)])
    assert text == "step 7: validation loss 0.5124, accuracy 87.5%\n"


def test_a_skipped_step_is_named_and_spoils_no_mean() -> None:
    bad = step(49, loss=math.nan, skipped=["utt-[1], utt-[/2]", "utt-3"])
    first, second = shown(50, [bad, step(50)]).splitlines()
    assert first.startswith("step 49: ")
    assert first.endswith("skipped: utt-[1], utt-[/2]; utt-3")
    assert "loss 2.000" in second


def test_recordings_that_were_left_out_are_counted() -> None:
    steps = [step(1, rejected=["a", "b"]), *map(step, range(2, 50)), step(50, rejected=["c"])]
    assert shown(50, steps).endswith("| left out 3\n")


# --- a terminal


def test_a_terminal_has_a_bar_and_what_matters_most() -> None:
    more = {"padding": 0.0, "memory_gb": 12.34, "mfu": 0.4567}
    steps = [*map(step, range(901, 950)), step(950, dev_loss=0.5, dev_accuracy=0.9, **more)]
    text = shown(1000, steps, force_terminal=True, width=80)
    last = text.rpartition("\x1b[2K")[2]
    assert "step 950: validation loss 0.5000" in text
    assert "950/1000 loss 2.000 | accuracy 50.0% | 0:01:40 left" in re.sub(r"\x1b\[\d+m", "", last)
    assert "step 950/" not in text  # the bar says it


# --- TensorBoard


@pytest.fixture
def accumulator() -> Any:
    pytest.importorskip("tensorboard", reason="the extra `log` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator


def curves(accumulator: Any, folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = accumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_draws_each_metric(accumulator: Any, tmp_path: Path) -> None:
    more = {"dev_loss": 0.5, "dev_accuracy": 0.75, "learning_rate": 0.25, "gradient_norm": 4.0}
    more |= {"padding": 0.125, "memory_gb": 8.0, "tflops": 256.0, "mfu": 0.375}
    with TensorBoard(tmp_path / "board") as board:
        assert not (tmp_path / "board").exists()  # a run may still be refused, or removed
        board(step(1))
        board(step(2, **more))
    found = curves(accumulator, tmp_path / "board")
    assert found.keys() == set(CURVES.values())
    assert found[CURVES["loss"]] == [(1, 2.0), (2, 2.0)]
    assert found[CURVES["audio_speed"]] == [(1, 45.0), (2, 45.0)]
    assert found[CURVES["dev_loss"]] == [(2, 0.5)]
    assert found[CURVES["memory_gb"]] == [(2, 8.0)]


def test_a_resumed_run_draws_its_steps_once(accumulator: Any, tmp_path: Path) -> None:
    for first, last, loss in ((1, 6, 1.0), (4, 8, 2.0)):
        with TensorBoard(tmp_path) as board:
            for number in range(first, last + 1):
                board(step(number, loss=loss))
    assert curves(accumulator, tmp_path)[CURVES["loss"]] == [
        *((number, 1.0) for number in (1, 2, 3)),
        *((number, 2.0) for number in (4, 5, 6, 7, 8)),
    ]


def test_a_full_disk_ends_the_curves_and_not_the_training(
    accumulator: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*values: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with caplog.at_level(logging.WARNING), TensorBoard(tmp_path) as board:
        board(step(1))
        board(step(2))
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard's files cannot be written: [Errno 28] No space left on device. Going on "
        "without them."
    ]


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(IsthmusError, match=r"extra `log`.*pip install 'isthmus\[log\]'"):
        TensorBoard(tmp_path)


def test_the_metrics_of_a_training_have_these_names(accumulator: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = LanguageRecipe.model_validate(
        {
            "name": "tiny",
            "architecture": sizes | {"intermediate_size": 16},
            "sentences": 8,
            "train": {"steps": 2, "workers": 0},
        }
    )
    stream = io.StringIO()
    with (
        training_display(2, Console(file=stream)) as display,
        TensorBoard(tmp_path / "board") as board,
    ):

        def both(metrics: dict[str, Any]) -> None:
            display(metrics)
            board(metrics)

        pretrain_lm(recipe, tmp_path / "run", on_step=both)
    assert "step 2/2 | loss" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()
    page = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page.partition("| Field |")[2], re.M)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)}
    assert written - documented == set()
    assert documented - written <= {"padding", "tflops", "mfu", "rejected", "skipped"}
    assert CURVES.keys() - documented == {"audio_speed"}
    wanted = {"loss", "dev_loss", "accuracy", "dev_accuracy", "learning_rate", "gradient_norm"}
    assert {CURVES[name] for name in wanted | {"memory_gb"}} <= curves(
        accumulator, tmp_path / "board"
    ).keys()


def test_scores_have_a_row_for_each_language(capsys: pytest.CaptureFixture[str]) -> None:
    score = {"wer": 0.5, "interval": None, "cer": 0.25, "sub": 1, "ins": 0, "del": 1, "words": 4}
    report = {**score, "sets": {"test": score}, "normaliser": "basic", "left_out": {}}
    print_scores(report)
    assert "language" not in capsys.readouterr().out
    print_scores(report | {"languages": {"de": score}, "macro": {"wer": 0.125, "cer": None}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["language", "de", "50.00", "25.00", "1", "0", "1", "4"] in lines
    assert ["mean", "of", "languages", "12.50", "-"] in lines


def test_a_single_set_has_one_row_and_several_have_another_for_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = {"wer": 0.5, "interval": None, "cer": 0.25, "sub": 1, "ins": 0, "del": 1, "words": 4}
    report = {**score, "sets": {"sp": score}, "normaliser": "basic", "left_out": {}}
    print_scores(report | {"ctc": {**score, "sets": {"sp": score}}})
    firsts = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert firsts == ["set", "sp", "sp", "normaliser:"]
    print_scores(report | {"sets": {"sp": score, "other": score}})
    firsts = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert firsts == ["set", "sp", "other", "all", "normaliser:"]


def test_scores_say_how_they_were_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    score = {"wer": 0.5, "interval": None, "cer": 0.25, "sub": 1, "ins": 0, "del": 1, "words": 4}
    report = {**score, "sets": {"sp": score}, "normaliser": "basic", "left_out": {}}
    own = {"beam_size": 4, "ctc_weight": 0.0, "instruction": None}
    report["decode"] = {**own, "ctc_weight": 0.3}
    print_scores(report, own)
    assert capsys.readouterr().out.splitlines()[-1] == "decode: beam 4, ctc_weight 0.3"
    print_scores(report | {"decode": own | {"beam_size": 1}}, own)
    assert capsys.readouterr().out.splitlines()[-1] == "decode: beam 1"

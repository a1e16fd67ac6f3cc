"""Runs side by side: their jumps, whatever their length, finished or not, and their names."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from isthmus.errors import IsthmusError
from isthmus.lab.curves import emergence_svg, read_runs, write_emergence

Isthmus = Callable[..., tuple[int, str, str]]


def write_run(folder: Path, steps: int, jump: int | None, planned: int | None = None) -> Path:
    """A run whose accuracy goes from 40 % to 90 % at `jump`."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(steps).normal(0, 0.02, steps)
    lines = [
        {"step": n + 1, "loss": 1.0, "accuracy": (0.4 if not jump or n < jump else 0.9) + d}
        for n, d in enumerate(noise.tolist())
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(f"train: {{steps: {planned or steps}}}\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "a" / "run", 600, 200),
        write_run(tmp_path / "b" / "run", 300, None, planned=900),
        write_run(tmp_path / "other <&>", 900, 700),
    ]


def test_each_jump_is_found_under_a_name_of_its_own(runs: list[Path]) -> None:
    found = read_runs(runs)
    assert [run.name for run in found] == ["a/run", "b/run", "other <&>"]
    assert [run.progress for run in found] == ["600", "300 of 900", "900"]
    jumps = [run.emergence for run in found]
    assert jumps[1] is None
    for jump, at in ((jumps[0], 201), (jumps[2], 701)):
        assert jump is not None
        assert jump.step == pytest.approx(at, abs=3)
        assert (jump.before, jump.after) == (pytest.approx(0.4, abs=0.02), pytest.approx(0.9, 0.02))


def test_what_is_still_being_written_is_read_so_far(runs: list[Path]) -> None:
    file = runs[0] / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[5] = json.dumps({"step": 6, "loss": None, "accuracy": 0.0, "skipped": ["u1"]})
    file.write_text("\n".join(lines[:500]) + '\n{"step": 501, "los')
    (runs[0] / "recipe.yaml").write_text("train: {steps: 600}")
    [found] = read_runs(runs[:1])
    assert found.progress == "500 of 600"
    assert len(found.steps) == 499
    assert 6 not in found.steps
    assert found.emergence is not None


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"has no metrics\.jsonl"):
        read_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(IsthmusError, match="holds no step yet"):
        read_runs([tmp_path])


def test_the_drawing_has_a_curve_a_mark_and_a_line_of_the_key_for_each(runs: list[Path]) -> None:
    found = read_runs(runs)
    drawing = emergence_svg(found)
    names = ElementTree.fromstring(drawing).findall(".//*[@class='name']")
    assert [name.text for name in names] == [
        f"a/run: step {found[0].emergence.step}, from 40 % to 90 %",  # type: ignore[union-attr]  # it has one
        "b/run: no jump in 300 of 900 steps",
        f"other <&>: step {found[2].emergence.step}, from 40 % to 90 %",  # type: ignore[union-attr]  # so
    ]
    marks = re.findall(r'class="jump run run(\d)" d="M([\d.]+) ', drawing)
    assert [number for number, _ in marks] == ["0", "2"]
    assert float(marks[0][1]) < float(marks[1][1])
    ends = [
        float(re.findall(rf'class="line run run{n}" d="M[^"]*L([\d.]+) ', drawing)[0])
        for n in range(3)
    ]
    assert ends[1] < ends[0] < ends[2]  # each as long as its run


def test_many_runs_can_be_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{number}", 20, None) for number in range(10)]
    kinds = re.findall(r'class="line (run run\d[^"]*)"', emergence_svg(read_runs(runs)))
    assert len(set(kinds)) == 10


def test_pages_and_drawings_stand_alone(runs: list[Path], tmp_path: Path) -> None:
    found = read_runs(runs)
    for name in ("page.html", "drawing.svg"):
        write_emergence(found, tmp_path / name)
        text = (tmp_path / name).read_text()
        assert "other &lt;&amp;&gt;" in text
        assert "<script" not in text
        assert not re.findall(r'(?:src|href)="(?!data:,)', text)
        assert "--run0:" in text  # its colours
    ElementTree.fromstring((tmp_path / "drawing.svg").read_text())
    with pytest.raises(IsthmusError, match=r"page\.pdf does not end in \.html or \.svg"):
        write_emergence(found, tmp_path / "page.pdf")


def test_the_verb(isthmus: Isthmus, runs: list[Path], tmp_path: Path) -> None:
    code, out, _ = isthmus("analyse", "emergence", *runs, "-o", tmp_path / "page.html", "--json")
    assert code == 0
    report = json.loads(out)["runs"]
    assert report[0]["emergence"]["step"] == pytest.approx(201, abs=3)
    assert report[1]["emergence"] is None
    assert (tmp_path / "page.html").is_file()
    code, out, _ = isthmus("analyse", "emergence", *runs)
    assert code == 0
    assert re.search(r"b/run +300 of 900 +none +– +–", out)
    assert isthmus("analyse", "emergence", runs[0], "-o", "x.png")[0] == 1


def test_a_drawing_replaces_nothing(isthmus: Isthmus, runs: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "mine.svg"
    mine.write_text("mine")
    code, _, err = isthmus("analyse", "emergence", *runs, "-o", mine)
    assert (code, mine.read_text()) == (1, "mine")
    assert "mine.svg exists. Name another file with --output" in err

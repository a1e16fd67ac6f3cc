"""A bug report in one paste: complete, whatever fails in it, and without the user's name."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from isthmus.doctor import doctor
from isthmus.model.fetch import PARTS

Isthmus = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of somebody called alice, who has caches elsewhere too."""
    folder = tmp_path / "home" / "alice"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.delenv("ISTHMUS_PARTS", raising=False)
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "scratch" / "alice" / "isthmus"))
    return folder


def test_it_says_what_a_report_needs(isthmus: Isthmus, home: Path) -> None:
    code, out, err = isthmus("doctor", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    for package in ("isthmus", "torch", "transformers", "peft", "soundfile"):
        assert found["versions"][package] == version(package)
    assert found["extras"]["gguf"].startswith("gguf ")
    assert found["device"]["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert found["parts"] == dict.fromkeys(PARTS, "not there")
    assert "free" in found["caches"]["hub"]
    assert found["environment"]["ISTHMUS_PARTS"] == "not set"
    code, out, _ = isthmus("doctor")
    assert f"torch                  {version('torch')}\n" in out


def test_sizes_are_those_of_the_files(home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "scratch/alice/isthmus/features"
    cache.mkdir(parents=True)
    (cache / "a").write_bytes(bytes(3_000_000))
    (cache / "b").symlink_to(cache / "a")
    assert ": 3.0 MB, " in doctor()["caches"]["isthmus"]


def test_paths_do_not_say_who_asks(home: Path, tmp_path: Path) -> None:
    (home / ".cache/isthmus-parts").mkdir(parents=True)
    caches = doctor()["caches"]
    assert caches["parts"].startswith("~/.cache/isthmus-parts: ")
    assert caches["isthmus"].startswith(f"{tmp_path}/scratch/~/isthmus: ")


def test_a_variable_that_may_hold_a_secret_is_not_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "ISTHMUS_KEY", "HF_ENDPOINT", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "s3cret")
    assert "s3cret" not in json.dumps(doctor())


def test_what_fails_is_said_beside_it_and_nothing_else_is_lost(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = doctor()

    def lost(package: str) -> str:
        if package == "transformers":
            raise PackageNotFoundError(f"{home}/{package}")
        return version(package)

    monkeypatch.setattr("isthmus.doctor.version", lost)
    monkeypatch.setitem(sys.modules, "torch", None)  # cannot be imported
    part = home / ".cache/isthmus-parts/whisper-base"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    found = doctor(check_sums=True)
    assert list(found) == list(whole)
    assert found["versions"]["transformers"].startswith("not known: PackageNotFoundError: ")
    assert "~/transformers" in found["versions"]["transformers"]
    assert found["versions"]["torch"] == whole["versions"]["torch"]
    assert found["device"]["fault"].startswith("not known: ModuleNotFoundError: ")
    assert found["parts"]["whisper-base"].startswith("not known: ~/.cache/isthmus-parts/whisper")
    assert found["parts"]["whisper-tiny.en"] == "not there"
    assert doctor()["parts"]["whisper-base"] == "there, sums not checked"


def test_it_loads_nothing_heavier_than_torch() -> None:
    heavy = {"transformers", "lhotse", "peft", "accelerate", "av", "onnxruntime"}
    code = (
        "import sys, isthmus.cli\n"
        "sys.argv = ['isthmus', 'doctor']\n"
        "try: isthmus.cli.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"print('LOADED', {heavy} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED set()" in done.stdout

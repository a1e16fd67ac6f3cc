"""What a first answer costs: CPU seconds of whole processes, on one thread, files in memory.

Transcribes an utterance of about three seconds of ISTHMUS_SPEECH (../shared/speech unless set), or
the recording that is named, with the shipped system in a process of its own. Prints the CPU seconds
(user and system) of each program, least and median, and the ratio to importing torch; the programs
take turns, so that a busy machine is busy for all.

    python benchmarks/cold_start.py [RECORDING]
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

REPEATS = 7
SECONDS = 3.0
CLI = "from isthmus.cli import main; main()"


def main() -> None:
    recording = sys.argv[1] if len(sys.argv) > 1 else short_recording()
    programs = {
        "import torch": ["import torch"],
        "import a network of transformers": ["from transformers import LlamaForCausalLM"],
        "isthmus --help": [CLI, "--help"],
        "isthmus transcribe": [CLI, "transcribe", recording],
    }
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(REPEATS + 1):
        for name, program in programs.items():
            taken[name].append(cpu_seconds(program))
    least = {name: min(seconds[1:]) for name, seconds in taken.items()}  # the first warms the disk
    for name, seconds in taken.items():
        median = statistics.median(seconds[1:])
        ratio = least[name] / least["import torch"]
        print(f"{name:34}  {least[name]:5.2f} s, median {median:5.2f} s  {ratio:5.2f} x torch")


def cpu_seconds(program: list[str]) -> float:
    """User and system time of a Python process that runs this, on one thread."""
    before = children()
    command = [sys.executable, "-c", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled already
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return children() - before


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def short_recording() -> str:
    folder = Path(os.environ.get("ISTHMUS_SPEECH", "../shared/speech")) / "en_barista"
    lines = (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    entry = min(map(json.loads, lines), key=lambda entry: abs(entry["duration"] - SECONDS))
    return str(folder / entry["audio"])


if __name__ == "__main__":
    main()

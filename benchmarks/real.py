"""What a training step costs on real parts: Whisper base, SmolLM2-135M, real speech.

The parts are those of $ISTHMUS_PARTS, the speech is en_librispeech of $ISTHMUS_SPEECH: batches of 8
utterances of 3 to 5 s, about 600 positions. The ways take turns step by step on the same
utterances; time is CPU time of this process with one thread, loading not counted. `level` trains
by `isthmus train`'s own loop, on utterances of 2 to 12 s, and looks whether its steps get slower.
Prints a Markdown table; exit code 1 if a floor is missed.

    python benchmarks/real.py [--only step|level] [--repeats N] [--steps N] [--batch-size N]
        [--output FILE]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from slam_baseline import IGNORE, SlamBaseline, SlamBatch
from torch import Tensor, nn
from training import Fast, Row, Step, header, report, spread
from transformers.utils import logging as transformers_logging

from isthmus.build import build_model
from isthmus.recipe import Recipe
from isthmus.runs.feature_cache import (
    CACHE_VARIABLE,
    feature_cache,
)
from isthmus.speech.corpora import load_cut
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.batches import (
    Batch,
)
from isthmus.training.loop import fit
from isthmus.training.parallel import Ranks
from isthmus.training.speech_task import SpeechTask, place, prepare
from isthmus.training.training_data import (
    speech_data,
)

BATCHES, BATCH_SIZE = 3, 8
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}
PLAIN = "a plain step of equal positions, bf16"
THEIRS, THEIRS_HALF = (f"a step as SLAM-LLM makes it, {name}" for name in ("fp32", "bf16"))
FLOORS = {PLAIN: 0.6, THEIRS: 0.07, THEIRS_HALF: 0.12}
FIRST, LAST = (50, 150), (900, 1000)  # steps that are compared


def manifest(shortest: float, longest: float, count: int | None, folder: Path) -> Path:
    """Utterances between two lengths, in seconds."""
    speech = Path(os.environ.get("ISTHMUS_SPEECH", "../shared/speech")) / "en_librispeech"
    lines = (speech / "train.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if shortest < row["duration"] < longest]
    rows = [json.dumps(row | {"audio": str(speech / row["audio"])}) for row in found]
    target = folder / "speech.jsonl"
    target.write_text("\n".join(rows[:count]) + "\n")
    return target


def real_recipe(speech: Path, **train: Any) -> Recipe:
    """The experiment on real parts in bfloat16, the frames in the cache."""
    parts = Path(os.environ.get("ISTHMUS_PARTS", "~/.cache/isthmus-parts")).expanduser()
    return Recipe.model_validate(
        {
            "name": "real",
            "encoder": {"type": "whisper", "path": str(parts / "whisper-base")},
            "llm": {"path": str(parts / "smollm2-135m-instruct")},
            "prompt": {"template": "slam-llm"},
            "data": {"train": [str(speech)], "feature_cache": "bfloat16"},
            "train": {"batch_size": BATCH_SIZE, "precision": "bfloat16", **train},
        }
    )


class Plain:
    """A step of equal positions: frames in memory, a batch padded on the right, all logits.

    The LLM has float32 weights under autocast, as SLAM-LLM has it.
    """

    def __init__(self, recipe: Recipe):
        torch.manual_seed(0)
        self.model = build_model(recipe)
        self.model.llm.store(torch.float32)
        self.model.train()
        self.optimiser = torch.optim.AdamW(self.model.projector.parameters(), lr=1e-4)

    def step(self, frames: Sequence[Tensor], texts: Sequence[str]) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            row = self.model.row(self.model.project(frames), texts)
            pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
            labels = pad(row.labels.split(row.lengths), padding_value=IGNORE)
            lengths = torch.tensor(row.lengths)
            output = self.model.llm.network(
                inputs_embeds=pad(row.embeddings.split(row.lengths)),
                attention_mask=(torch.arange(labels.shape[1]) < lengths[:, None]).long(),
                labels=labels,
                use_cache=False,
            )
            self.correct = output.logits.argmax(dim=-1)[:, :-1] == labels[:, 1:]  # as there
        output.loss.backward()
        self.optimiser.step()
        return float(output.loss.detach())


def measure_step(recipe: Recipe, repeats: int) -> list[Row]:
    """The ways in turn, and where ours spends its time."""
    steps = ways(recipe)
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, own in steps.items():
            started = time.process_time()
            own[number % len(own)]()
            if number:  # the first is warm-up
                spent[name].append(time.process_time() - started)
    rows = []
    for name, floor in FLOORS.items():
        ratios = [one / other for one, other in zip(spent["ours"], spent[name], strict=True)]
        seconds = [statistics.median(spent[way]) for way in ("ours", name)]
        detail = f"{seconds[0]:.2f} s against {seconds[1]:.2f} s; {spread(ratios)}"
        rows.append(Row(f"CPU time against {name}", floor, statistics.median(ratios), detail))
    shares = [outside_products(step) for step in steps["ours"]]
    what = "time outside matrix products, share"
    return [*rows, Row(what, 0.5, statistics.median(shares), spread(shares))]


def ways(recipe: Recipe) -> dict[str, list[Step]]:
    """Steps on the same batches, each way with models of its own."""
    ours, plain = Fast(recipe), Plain(recipe)
    groups = ours.task.plan(0)[:BATCHES]
    batches = [ours.task.load(own, 0) for own in groups]
    steps: dict[str, list[Step]] = {
        "ours": [partial(ours.step_on, batch) for batch in batches],
        PLAIN: [partial(plain.step, frames_of(batch), batch.texts) for batch in batches],
    }
    for name, autocast in ((THEIRS, None), (THEIRS_HALF, torch.bfloat16)):
        trainer = theirs(recipe, autocast)
        steps[name] = []
        for own in groups:
            cuts = [ours.task.train.cuts[index] for (index,) in own]
            batch = trainer.collate([load_cut(c) for c in cuts], [transcript(c) for c in cuts])
            steps[name].append(partial(loss_of, trainer, batch))
    return steps


def theirs(recipe: Recipe, autocast: torch.dtype | None) -> SlamBaseline:
    """SLAM-LLM's step on float32 weights."""
    torch.manual_seed(0)
    model = build_model(recipe)
    model.encoder.store(torch.float32)
    model.llm.store(torch.float32)
    encoder: Any = model.encoder
    return SlamBaseline(encoder, model.projector, model.llm, model.prompt, autocast)


def loss_of(trainer: SlamBaseline, batch: SlamBatch) -> float:
    return trainer.step(batch)[0]


def frames_of(batch: Batch) -> list[Tensor]:
    frames = batch.frames_each()
    assert all(one is not None for one in frames), "the cache was filled"
    return [one for one in frames if one is not None]


def outside_products(step: Callable[[], float]) -> float:
    """Share of a step's time that is not in kernels of matrix products."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return 1.0 - float(sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / total)


def measure_level(recipe: Recipe, folder: Path) -> list[Row]:
    """CPU time of late steps against early ones, in one training by the product's loop."""
    torch.manual_seed(0)
    model = build_model(recipe)
    task = SpeechTask(model, *speech_data(recipe, model), recipe)
    place(model, recipe.train, Ranks())
    task.use_cache(feature_cache(recipe, model))
    prepare(model, recipe.train, Ranks(), cached=True)
    task.fill_cache(Ranks(), lambda done, count: None)
    clock: list[float] = [time.process_time()]
    memory: list[float] = [0.0]

    def note(metrics: dict[str, Any]) -> None:
        clock.append(time.process_time())
        memory.append(metrics["memory_gb"])

    fit(task, recipe.train, folder, on_step=note)
    steps = recipe.train.steps
    first, last = (
        (clock[end] - clock[start]) / (end - start)
        for start, end in (
            [round(edge * steps / LAST[1]) for edge in span] for span in (FIRST, LAST)
        )
    )
    early = memory[round(FIRST[1] * steps / LAST[1])]
    detail = (
        f"{last:.2f} s against {first:.2f} s a step of {recipe.train.batch_size} in {steps} steps; "
        f"memory {memory[-1]:.2f} GB against {early:.2f} GB"
    )
    return [Row("CPU time of late steps against early ones", 1.1, last / first, detail)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", choices=["step", "level"])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--steps", type=int, default=LAST[1], help="of the long training")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of the long training")
    parser.add_argument("--output", type=Path, help="also write the table here, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    print(header(), end="\n\n", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="isthmus-benchmark-") as name:
        folder = Path(name)
        os.environ[CACHE_VARIABLE] = f"{folder}/cache"
        if given.only != "level":
            speech = manifest(3, 5, BATCHES * BATCH_SIZE, folder)
            rows += measure_step(real_recipe(speech), given.repeats)
        if given.only != "step":
            steps = {"steps": given.steps, "save_every": given.steps, "eval_every": given.steps}
            steps |= {"batch_size": given.batch_size, "warmup_steps": 10}
            speech = manifest(2, 12, None, folder)
            rows += measure_level(real_recipe(speech, **steps), folder)
    report(rows, given.output)
    if any(row.missed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""What training the projector costs, against the same training done as SLAM-LLM does it.

Random weights, noise for speech, lengths as in LibriSpeech's training sets (`DURATIONS`). Time is
CPU time of this process with one thread, so that others on the machine hardly matter; the ways
take turns step by step on the same utterances, audio files read in each. Memory is what
tensors hold, as torch's profiler records it, in a process of its own. Prints a Markdown table; exit
code 1 if a floor is missed.

    python benchmarks/training.py [--only time|memory|curve] [--repeats N] [--quick] [--output FILE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from slam_baseline import SlamBaseline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
)
from transformers.utils import logging as transformers_logging

from isthmus.build import build_model
from isthmus.recipe import Recipe
from isthmus.runs.feature_cache import (
    CACHE_VARIABLE,
    feature_cache,
)
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.corpora import load_cut
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.batches import (
    Batch,
    Group,
)
from isthmus.training.loop import METRICS, fit
from isthmus.training.parallel import Ranks
from isthmus.training.speech_task import SpeechTask, place, prepare
from isthmus.training.training_data import (
    speech_data,
)

# Share of LibriSpeech's training utterances that are shorter, and seconds: 12.3 s in the mean.
DURATIONS = (
    (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0),
    (1.4, 3.4, 5.4, 11.0, 13.8, 15.2, 16.4, 17.5, 24.5),
)
TOKENS_PER_SECOND = (3.45, 0.5)  # of transcripts, mean and deviation
WORDS = 31_996  # of the tokenizer, each a token


@dataclass(frozen=True)
class Row:
    """One line of the table; floors are upper limits."""

    what: str
    floor: float | None
    measured: float
    detail: str

    @property
    def missed(self) -> bool:
        return self.floor is not None and self.measured > self.floor


@dataclass(frozen=True)
class Sizes:
    """What is trained on what."""

    hidden: int = 768  # of the LLM
    layers: int = 12
    feed_forward: int = 2048
    encoder_hidden: int = 384
    encoder_layers: int = 6
    encoder_feed_forward: int = 1936
    convolutions: int = 160  # channels of the encoder's front end
    vocabulary: int = 32_000
    projector_hidden: int = 2048
    utterances: int = 48
    batch_size: int = 8
    time_scale: float = 1.0  # on the durations


CURVE = Sizes(128, 4, 344, 64, 2, 256, 32, 32_000, 256, 64, 8, 0.25)
QUICK = Sizes(32, 2, 64, 16, 2, 32, 8, 32_000, 16, 8, 4, 0.1)
CURVE_STEPS = 200
MEMORY_UTTERANCES, MEMORY_SECONDS, MEMORY_VOCABULARY = 12, 12.5, 128_000

Step = Callable[[], float]  # takes it, and gives its loss


def durations(count: int, rng: np.random.Generator) -> list[float]:
    """Seconds of utterances, drawn as from LibriSpeech's training sets."""
    return [float(second) for second in np.interp(rng.random(count), *DURATIONS)]


def text_of(seconds: float, rng: np.random.Generator) -> str:
    """A transcript of as many tokens as LibriSpeech has in so many seconds."""
    mean, deviation = TOKENS_PER_SECOND
    count = max(1, round(seconds * max(1.0, rng.normal(mean, deviation))))
    return " ".join(word(number) for number in rng.integers(WORDS, size=count))


def word(number: int) -> str:
    """One of the words, three letters and digits."""
    return np.base_repr(36**2 + number, 36)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word; other text is unknown tokens of up to three letters."""
    names = ["<unk>", "<s>", "</s>", "<pad>", *map(word, range(WORDS))]
    pieces = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w{1,3}|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_models(sizes: Sizes, folder: Path) -> None:
    """A HuBERT of the large kind and a Llama, as the Hugging Face hub holds them."""
    torch.manual_seed(0)
    encoder = AutoConfig.for_model(
        "hubert",
        hidden_size=sizes.encoder_hidden,
        num_hidden_layers=sizes.encoder_layers,
        num_attention_heads=max(2, sizes.encoder_hidden // 64),
        intermediate_size=sizes.encoder_feed_forward,
        conv_dim=[sizes.convolutions] * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    AutoModel.from_config(encoder, trust_remote_code=False).save_pretrained(folder / "encoder")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "encoder")
    tokenizer = word_tokenizer()
    llm = AutoConfig.for_model(
        "llama",
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(2, sizes.hidden // 64),
        intermediate_size=sizes.feed_forward,
        vocab_size=sizes.vocabulary,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    network = AutoModelForCausalLM.from_config(llm, trust_remote_code=False)
    network.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")


def write_speech(seconds: Sequence[float], rng: np.random.Generator, folder: Path) -> None:
    """A FLAC file of noise an utterance, its transcript beside it."""
    (folder / "speech").mkdir()
    for number, duration in enumerate(seconds):
        samples = rng.normal(0, 0.1, round(duration * SAMPLE_RATE)).clip(-1, 1)
        soundfile.write(folder / "speech" / f"{number:04d}.flac", samples, SAMPLE_RATE)
        (folder / "speech" / f"{number:04d}.txt").write_text(text_of(duration, rng))


def recipe_of(folder: Path, sizes: Sizes, cache: str | None, **train: Any) -> Recipe:
    """The experiment on the models and the speech of a folder; `cache`: the frames' precision."""
    data = {"train": [str(folder / "speech")]} | ({"feature_cache": cache} if cache else {})
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "encoder": {"type": "hubert", "path": str(folder / "encoder")},
            "projector": {"hidden": sizes.projector_hidden},
            "llm": {"path": str(folder / "llm")},
            "data": data,
            "train": {"batch_size": sizes.batch_size, **train},
        }
    )


class Fast:
    """What `isthmus train` does, a step at a time; the encoder's frames are in the cache."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(0)
        self.model = build_model(recipe)
        self.task = SpeechTask(self.model, *speech_data(recipe, self.model), recipe)
        place(self.model, recipe.train, Ranks())
        self.task.use_cache(feature_cache(recipe, self.model, strict=True))
        prepare(self.model, recipe.train, Ranks())
        assert self.model.attention is not None, "the benchmark is of the packed way"
        self.task.fill_cache(Ranks(), lambda done, count: None)
        self.model.train()
        self.half = recipe.train.precision == "bfloat16"
        self.parameters = list(self.task.trainable().values())
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)
        self.positions = self.padding = 0

    def epoch(self, number: int) -> list[Step]:
        return [partial(self.step, groups, number) for groups in self.task.plan(number)]

    def step(self, groups: list[Group], epoch: int) -> float:
        return self.step_on(self.task.load(groups, epoch))

    def step_on(self, batch: Batch) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.task.loss(batch)
        loss.total.backward()
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad /= loss.units
        self.optimiser.step()
        self.positions += loss.positions
        self.padding += loss.padding
        return float(loss.total.detach()) / loss.units


class Slow:
    """The baseline on the same models and utterances."""

    def __init__(self, recipe: Recipe):
        torch.manual_seed(0)
        model = build_model(recipe)
        encoder: Any = model.encoder
        self.trainer = SlamBaseline(encoder, model.projector, model.llm, model.prompt)
        self.cuts = speech_data(recipe, model)[0].cuts
        self.batch_size = recipe.train.batch_size or 1
        self.positions = self.padding = 0

    def epoch(self, number: int) -> list[Step]:
        """Its steps, the utterances in random order."""
        order = np.random.default_rng(number).permutation(len(self.cuts)).tolist()
        starts = range(0, len(order), self.batch_size)
        return [partial(self.step, order[start : start + self.batch_size]) for start in starts]

    def step(self, indices: Sequence[int]) -> float:
        cuts = [self.cuts[index] for index in indices]
        batch = self.trainer.collate([load_cut(c) for c in cuts], [transcript(c) for c in cuts])
        self.positions += batch.attention_mask.numel()
        self.padding += int((batch.attention_mask == 0).sum())
        return self.trainer.step(batch)[0]


def ways(folder: Path, sizes: Sizes) -> dict[str, Fast | Slow]:
    """Baseline and fast path, each with models of its own."""
    half = recipe_of(folder, sizes, "bfloat16", precision="bfloat16")
    single = recipe_of(folder, sizes, "float32")
    return {"baseline": Slow(single), "fp32": Fast(single), "bf16": Fast(half)}


def measure_time(sizes: Sizes, repeats: int, folder: Path) -> list[Row]:
    """CPU time of an epoch, the frames in the cache, the ways taking turns step by step."""
    rng = np.random.default_rng(0)
    write_models(sizes, folder)
    write_speech([s * sizes.time_scale for s in durations(sizes.utterances, rng)], rng, folder)
    found = ways(folder, sizes)
    spent: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats):
        epochs = {name: way.epoch(repeat + 1) for name, way in found.items()}
        for name in found:
            spent[name].append(0.0)
        for steps in zip(*epochs.values(), strict=True):
            for name, step in zip(found, steps, strict=True):
                started = time.process_time()
                step()
                spent[name][-1] += time.process_time() - started
    fast, slow = found["fp32"], found["baseline"]
    assert isinstance(fast, Fast)
    rows = []
    for name, floor in (("fp32", 0.55), ("bf16", 0.25)):
        ratios = [one / other for one, other in zip(spent[name], spent["baseline"], strict=True)]
        seconds = [statistics.median(spent[way]) for way in (name, "baseline")]
        detail = f"{seconds[0]:.1f} s against {seconds[1]:.1f} s in fp32; {spread(ratios)}"
        rows.append(Row(f"CPU time of an epoch, {name}", floor, statistics.median(ratios), detail))
    share = slow.padding / slow.positions
    detail = f"of {fast.positions} positions; the baseline {share:.1%} of {slow.positions}"
    padding = Row("padding, share of LLM positions", 0.01, fast.padding / fast.positions, detail)
    print("\n".join(fast.model.summary()[:3]), end="\n\n")
    return [*rows, padding]


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3f}-{max(values):.3f} in {len(values)} repeats"


def measure_memory(sizes: Sizes, folder: Path) -> list[Row]:
    """Most bytes of tensors in a step beyond those held before it, each way in a process."""
    write_models(sizes, folder)
    seconds = [MEMORY_SECONDS * sizes.time_scale] * sizes.utterances
    write_speech(seconds, np.random.default_rng(0), folder)
    found = {}
    for name in ("baseline", "fp32", "bf16"):
        command = [sys.executable, __file__, "--peak-of", name, "--folder", str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(ran.stderr)
        found[name] = json.loads(ran.stdout.splitlines()[-1])
    slow = found["baseline"]["bytes"]
    return [
        Row(
            f"memory above the weights, {name}",
            floor,
            found[name]["bytes"] / slow,
            f"{found[name]['bytes'] / 1e6:,.0f} MB against {slow / 1e6:,.0f} MB in fp32; "
            f"vocabulary {sizes.vocabulary:,}, {found['baseline']['positions']} positions",
        )
        for name, floor in (("fp32", 0.2), ("bf16", None))
    ]


def print_peak(name: str, folder: Path) -> None:
    """In the process that `measure_memory` starts: one step under torch's profiler."""
    sizes = Sizes(batch_size=10_000)  # all utterances of the folder
    recipe = recipe_of(folder, sizes, "float32")
    if name == "bf16":
        recipe = recipe_of(folder, sizes, "bfloat16", precision="bfloat16")
    way = Slow(recipe) if name == "baseline" else Fast(recipe)
    (step,) = way.epoch(1)
    print(json.dumps({"bytes": peak_bytes(step), "positions": way.positions}))


def peak_bytes(step: Step) -> int:
    """Most bytes that tensors hold during a step, above those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    peak: int = max(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))
    return peak


def measure_curve(sizes: Sizes, steps: int, folder: Path) -> list[Row]:
    """Losses of the product's own loop, packed from the cache and padded with the encoder live."""
    rng = np.random.default_rng(0)
    write_models(sizes, folder)
    write_speech([s * sizes.time_scale for s in durations(sizes.utterances, rng)], rng, folder)
    curves = []
    for name, cache, packing in (("fast", "float32", True), ("plain", None, False)):
        settings = {"steps": steps, "warmup_steps": 20, "eval_every": steps, "save_every": steps}
        recipe = recipe_of(folder, sizes, cache, packing=packing, **settings)
        torch.manual_seed(0)
        model = build_model(recipe)
        task = SpeechTask(model, *speech_data(recipe, model), recipe)
        task.use_cache(feature_cache(recipe, model))
        prepare(model, recipe.train, Ranks())
        (folder / name).mkdir()
        fit(task, recipe.train, folder / name)
        lines = (folder / name / METRICS).read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    worst = max(abs(fast - plain) / plain for fast, plain in zip(*curves, strict=True))
    detail = (
        f"{steps} steps of {sizes.batch_size} utterances, LLM of {sizes.layers} layers of "
        f"{sizes.hidden}, loss {curves[1][0]:.4f} to {curves[1][-1]:.4f}"
    )
    return [Row("loss curve, greatest relative difference", 1e-5, worst, detail)]


def header() -> str:
    """When, what and where was measured."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{date.today()}, commit {commit or 'unknown'}, {cpu}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--only", choices=["time", "memory", "curve"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run at all")
    parser.add_argument("--output", type=Path, help="also write the table here, as JSON")
    parser.add_argument("--peak-of", choices=["baseline", "fp32", "bf16"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    if given.peak_of:
        os.environ[CACHE_VARIABLE] = str(given.folder / "cache")
        print_peak(given.peak_of, given.folder)
        return
    big, curve = (QUICK, QUICK) if given.quick else (Sizes(), CURVE)
    wide = replace(big, vocabulary=MEMORY_VOCABULARY, utterances=MEMORY_UTTERANCES)
    parts = {
        "time": partial(measure_time, big, given.repeats),
        "memory": partial(measure_memory, wide),
        "curve": partial(measure_curve, curve, 8 if given.quick else CURVE_STEPS),
    }
    print(header(), end="\n\n", flush=True)
    rows: list[Row] = []
    for name, measure in parts.items():
        if given.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="isthmus-benchmark-") as folder:
                os.environ[CACHE_VARIABLE] = f"{folder}/cache"
                rows += measure(Path(folder))
    report(rows, given.output, quick=given.quick)
    if any(row.missed for row in rows) and not given.quick:
        sys.exit(1)


def report(rows: Sequence[Row], output: Path | None, **more: object) -> None:
    """The table, also as JSON."""
    print("| what | floor | measured | |\n|---|---|---|---|")
    for row in rows:
        floor = "-" if row.floor is None else f"<= {row.floor:g}"
        print(f"| {row.what} | {floor} | {row.measured:.3g} | {row.detail} |")
    if output:
        result = {"machine": header(), **more, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How fast the full-size system works on a GPU: HuBERT X-Large, a projector, Vicuna-7B.

Random weights of those shapes, made on the device, noise for speech, lengths as in LibriSpeech.
What is measured is the training step, reading files is not. The floors: with the encoder live the
GPU does 45 % of the dense bf16 products it could (only what the model asks for counts: no padding,
no recomputation), and from cached frames 2.5 times the audio of SLAM-LLM's way passes in a second.
With `--decode` decoding is measured instead: beam 4 in bf16, 500 seconds of audio in one, and 4
times faster than `generate` on the same batches. Prints a Markdown table; exit code 1 if a floor
is missed.

    python benchmarks/full_size.py [--tokens N] [--steps N] [--output FILE]
    python benchmarks/full_size.py --decode [--batch-size N] [--utterances N] [--output FILE]
    python benchmarks/full_size.py --sizes tiny --device cpu    # does it run at all
"""

import argparse
import gc
import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_decoding import clock, lengths, measure_decoding
from slam_baseline import SlamBaseline
from training import durations, header, text_of, word_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from isthmus.model.encoder import SelfSupervisedEncoder
from isthmus.model.llm import LLM
from isthmus.model.projector import LinearProjector
from isthmus.model.prompt import PaperPrompt
from isthmus.model.speech_llm import SpeechLLM
from isthmus.settings.optimisation import SpeechTrainSettings
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.training.batches import Batch, Budget, collate, plan_epoch
from isthmus.training.hardware import peak_flops
from isthmus.training.parallel import Ranks
from isthmus.training.speech_task import prepare
from isthmus.training.training_data import positions_of

MFU_FLOOR, SPEED_FLOOR = 0.45, 2.5
BASELINE_BATCH = 6  # utterances, as in SLAM-LLM's recipe for LibriSpeech


@dataclass(frozen=True)
class Shapes:
    """Sizes of encoder and LLM, as transformers names them."""

    encoder: dict[str, Any]
    llm: dict[str, Any]
    convolutions: int
    time_scale: float = 1.0  # on the durations


FULL = Shapes(  # facebook/hubert-xlarge-ll60k and lmsys/vicuna-7b-v1.5
    {
        "hidden_size": 1280,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
    },
    {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
    },
    512,
)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TINY = Shapes(SMALL, SMALL, 8, 0.1)


@dataclass(frozen=True)
class Speed:
    """One way to train."""

    way: str
    audio_seconds_per_second: float
    step_seconds: float  # median
    positions: int  # of the LLM in a step, mean, without padding
    mfu: float | None  # where the peak of the device is known
    peak_memory_gb: float


@dataclass(frozen=True)
class Utterances:
    """What is trained on."""

    seconds: list[float]
    texts: list[str]

    def waveform(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        return rng.normal(0, 0.1, round(self.seconds[index] * SAMPLE_RATE)).astype(np.float32)


def build(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> SpeechLLM:
    """The system with random weights, the projector in float32."""
    encoder = AutoConfig.for_model(
        "hubert",
        conv_dim=[shapes.convolutions] * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        **shapes.encoder,
    )
    tokenizer = word_tokenizer()
    llm = AutoConfig.for_model("llama", vocab_size=32_000, **shapes.llm)
    torch.manual_seed(0)
    with torch.device(device):
        hubert = AutoModel.from_config(encoder, dtype=dtype, trust_remote_code=False)
        vicuna = AutoModelForCausalLM.from_config(llm, dtype=dtype, trust_remote_code=False)
        projector = LinearProjector(encoder.hidden_size, llm.hidden_size, 5, 2048)
    ears = SelfSupervisedEncoder(hubert, normalise=True)
    return SpeechLLM(ears, projector, LLM(vicuna, tokenizer), PaperPrompt())


def token_batches(model: SpeechLLM, heard: Utterances, tokens: int, count: int) -> list[Batch]:
    """`count` batches of so many LLM positions, their waveforms on the CPU."""
    measure = positions_of(model)
    sizes = [measure([s], text) for s, text in zip(heard.seconds, heard.texts, strict=True)]
    budget = Budget(max_tokens=tokens)
    plan = plan_epoch(heard.seconds, budget, seed=0, epoch=0, positions=sizes)
    batches = []
    for indices in plan[:count]:
        waveforms = [heard.waveform(index) for index in indices]
        batch = collate(list(map(str, indices)), waveforms, [heard.texts[i] for i in indices])
        batches.append(replace(batch, seconds=sum(heard.seconds[i] for i in indices)))
    return batches


def with_frames(model: SpeechLLM, batch: Batch) -> Batch:
    """The batch as the feature cache gives it: frames in bfloat16, on the CPU, without samples."""
    lengths = [model.encoder.output_length(int(n)) for n in batch.num_samples]
    frames = torch.randn(sum(lengths), model.encoder.dim).bfloat16()
    waveforms = torch.zeros(len(lengths), 0)
    return replace(batch, frames=frames, num_frames=tuple(lengths), waveforms=waveforms)


def own_step(
    model: SpeechLLM, optimiser: torch.optim.Optimizer, batch: Batch
) -> tuple[float, int, float]:
    """One step of `isthmus train`: seconds of audio, real positions, FLOPs that count."""
    device = next(model.projector.parameters()).device
    optimiser.zero_grad(set_to_none=True)
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        kept = [frames for frames in batch.frames_each() if frames is not None]
        frames = kept or model.encode(batch.waveforms, batch.num_samples)
        found = model.transcript_loss(model.project(frames), batch.texts)
    (found.total / found.tokens).backward()
    optimiser.step()
    float(found.total.detach())  # the loop logs it
    positions = found.positions - found.padding
    encoded = [] if kept else [batch.seconds]
    return batch.seconds, positions, model.flops(positions, found.tokens, encoded)


def measure(
    way: str,
    steps: Sequence[Callable[[], tuple[float, int, float]]],
    warm_up: int,
    device: torch.device,
) -> Speed:
    """The steps one by one, the first `warm_up` of them not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spent, results = [], []
    for step in steps:
        started = clock(device)
        results.append(step())
        spent.append(clock(device) - started)
    seconds, positions, flops = (sum(part) for part in zip(*results[warm_up:], strict=True))
    total = sum(spent[warm_up:])
    peak = peak_flops(device)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    return Speed(
        way,
        seconds / total,
        statistics.median(spent[warm_up:]),
        round(positions / (len(steps) - warm_up)),
        flops / total / peak if peak else None,
        memory / 1e9,
    )


def line(speed: Speed) -> str:
    mfu = "-" if speed.mfu is None else f"{speed.mfu:.1%}"
    return (
        f"| {speed.way} | {speed.audio_seconds_per_second:,.0f} | {speed.step_seconds:.3f} | "
        f"{speed.positions:,} | {mfu} | {speed.peak_memory_gb:.1f} |"
    )


def own_speeds(
    shapes: Shapes, heard: Utterances, given: argparse.Namespace, device: torch.device
) -> list[Speed]:
    """Packed rows in bf16, all ways; checkpointing last, because it cannot be undone."""
    model = build(shapes, torch.bfloat16, device)
    print("\n".join(model.summary()))
    ranks = Ranks()
    ranks.device = device
    count = given.warm_up + given.steps
    live = token_batches(model, heard, given.tokens, count)
    cached = [with_frames(model, batch) for batch in live]
    found = []
    for checkpointing in (False, True):
        settings = SpeechTrainSettings(
            precision="bfloat16", max_tokens=given.tokens, checkpointing=checkpointing
        )
        print("\n".join(prepare(model, settings, ranks)))
        model.train()
        optimiser = torch.optim.AdamW(model.trainable().values(), lr=1e-4, weight_decay=0.0)
        for name, batches in (("encoder live", live), ("frames cached", cached)):
            way = f"{name}, checkpointing" if checkpointing else name
            steps = [partial(own_step, model, optimiser, batch) for batch in batches]
            found.append(measure(way, steps, given.warm_up, device))
    return found


def baseline_speed(
    shapes: Shapes, heard: Utterances, given: argparse.Namespace, device: torch.device
) -> Speed:
    """Random batches, float32 weights under float16 autocast."""
    model = build(shapes, torch.float32, device)
    ears: Any = model.encoder
    trainer = SlamBaseline(ears, model.projector, model.llm, model.prompt)
    order = np.random.default_rng(0).permutation(len(heard.texts)).tolist()

    def step(indices: list[int]) -> tuple[float, int, float]:
        texts = [heard.texts[i] for i in indices]
        batch = trainer.collate(waveforms[tuple(indices)], texts)
        trainer.step(batch)
        seconds = sum(heard.seconds[i] for i in indices)
        positions = int(batch.attention_mask.sum())
        tokens = int((batch.labels >= 0).sum())
        return seconds, positions, model.flops(positions, tokens, [seconds])

    starts = range(0, BASELINE_BATCH * (given.warm_up + given.steps), BASELINE_BATCH)
    chosen = [order[start : start + BASELINE_BATCH] for start in starts]
    waveforms = {tuple(own): [heard.waveform(i) for i in own] for own in chosen}
    steps = [partial(step, own) for own in chosen]
    return measure("SLAM-LLM's way, batches of 6", steps, given.warm_up, device)


def decode(shapes: Shapes, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of decoding, printed too."""
    model = build(shapes, torch.bfloat16, device).eval()
    seconds, limits = lengths(given.utterances, shapes.time_scale)
    found = measure_decoding(model, seconds, limits, given.batch_size)
    for name in ("rtfx", "times_generate"):
        print(f"{name}: {found[name]['measured']:.2f} (floor {found[name]['floor']:g})")
    print(f"the same texts as generate: {found['same_texts']} of {given.utterances}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the full-size system.")
    parser.add_argument("--decode", action="store_true", help="decoding instead of training")
    parser.add_argument("--batch-size", type=int, default=64, help="utterances decoded together")
    parser.add_argument("--utterances", type=int, default=512, help="to be decoded")
    parser.add_argument("--sizes", choices=["full", "tiny"], default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=12_000, help="LLM positions of a step")
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those")
    parser.add_argument("--output", type=Path, default=Path("full_size.json"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("skipped: needs a CUDA GPU")
        return
    device = torch.device(given.device)
    shapes = TINY if given.sizes == "tiny" else FULL
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = {"machine": f"{header()}, {name}", "sizes": given.sizes}
    print(f"{result['machine']}\n")
    found = decode(shapes, given, device) if given.decode else train(shapes, given, device)
    given.output.write_text(json.dumps(result | found, indent=2) + "\n")
    floors = [one for one in found.values() if isinstance(one, dict) and "floor" in one]
    missed = [one for one in floors if (one["measured"] or one["floor"]) < one["floor"]]
    if missed and given.sizes == "full":
        sys.exit(1)


def train(shapes: Shapes, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The figures of training, printed too."""
    rng = np.random.default_rng(0)
    enough = (given.warm_up + given.steps) * max(BASELINE_BATCH, given.tokens // 30)
    seconds = [second * shapes.time_scale for second in durations(enough, rng)]
    heard = Utterances(seconds, [text_of(second, rng) for second in seconds])
    print(f"{given.tokens} LLM positions a step\n")
    found = own_speeds(shapes, heard, given, device)
    gc.collect()
    torch.cuda.empty_cache()
    slow = baseline_speed(shapes, heard, given, device)
    print(
        "\n| way | audio s / s | s a step | positions | MFU | peak GB |\n|---|---|---|---|---|---|"
    )
    print("\n".join(map(line, [*found, slow])))
    live, cached = found[:2]
    faster = cached.audio_seconds_per_second / slow.audio_seconds_per_second
    mfu = "unknown" if live.mfu is None else f"{live.mfu:.1%}"
    print(f"\nMFU, encoder live: {mfu} (floor {MFU_FLOOR:.0%})")
    print(f"frames cached against SLAM-LLM's way: {faster:.2f} times (floor {SPEED_FLOOR} times)")
    return {
        "tokens": given.tokens,
        "ways": [asdict(speed) for speed in [*found, slow]],
        "mfu": {"floor": MFU_FLOOR, "measured": live.mfu},
        "times_the_baseline": {"floor": SPEED_FLOOR, "measured": faster},
    }


if __name__ == "__main__":
    main()

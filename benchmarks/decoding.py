"""What decoding costs, against transformers' `generate` and against greedy search without drafts.

Random weights, noise for speech, lengths as in LibriSpeech's test-clean (`DURATIONS`). No random
model ends its texts: each utterance has a limit of tokens, which generate is told as a criterion
of its own. Time is CPU time of this process with one thread, so that others on the machine hardly
matter; the ways take turns batch by batch. Prints a Markdown table; exit code 1 if a floor is
missed.

    python benchmarks/decoding.py [--only beam|draft] [--repeats N] [--quick] [--output FILE]
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from isthmus.decoding.beam import SearchOptions, beam_search
from isthmus.decoding.draft import draft_search
from isthmus.model.llm import LLM, character_tokenizer

# Share of LibriSpeech's test-clean utterances that are shorter, and seconds: 7.4 s in the mean.
DURATIONS = (
    (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0),
    (1.3, 2.2, 3.6, 5.8, 9.6, 17.5, 28.0, 35.0),
)
TOKENS_PER_SECOND = (3.35, 0.5)  # of transcripts, mean and deviation
EMBEDDINGS_PER_SECOND = 10
PROMPT = 17  # tokens beside the audio
BEAMS = 4
END = 2  # which ends no text here
DRAFT_ERRORS = 0.02  # share of tokens
TIE = 1e-4  # of scores
OPTIONS = SearchOptions(repetition_guard=False)  # which generate does not have


@dataclass(frozen=True)
class Row:
    """One line of the table; floors are lower limits."""

    what: str
    floor: float | None
    measured: float
    detail: str


@dataclass(frozen=True)
class Sizes:
    """The LLM and what it decodes."""

    hidden: int = 768
    layers: int = 9
    feed_forward: int = 2048
    vocabulary: int = 32_000
    utterances: int = 40
    batch_size: int = 8
    drafted: int = 8  # utterances decoded with drafts


QUICK = Sizes(64, 2, 128, 320, 6, 3, 2)


@dataclass(frozen=True)
class Utterance:
    """A decoding prompt and how many tokens its text has."""

    prompt: Tensor  # (L, E)
    limit: int


def build_llm(sizes: Sizes, *, sure: bool = False) -> LLM:
    """A Llama with random weights.

    `sure`: each token makes one other several times as likely as all the rest, as in a trained
    model; else bfloat16, which has eight bits, ties at every sixth token or so.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(2, sizes.hidden // 64),
        intermediate_size=sizes.feed_forward,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=not sure,
        eos_token_id=END,
    )
    network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if sure:
        table, head = network.get_input_embeddings(), network.get_output_embeddings()
        with torch.no_grad():
            head.weight[torch.randperm(sizes.vocabulary)] = table.weight
            table.weight *= 50  # beside it the layers' additions are small
    return LLM(network, character_tokenizer()).eval()


def utterances(sizes: Sizes) -> list[Utterance]:
    """Of lengths that are evenly spread over those of test-clean, in random order."""
    rng = np.random.default_rng(0)
    shares = (np.arange(sizes.utterances) + 0.5) / sizes.utterances
    generator = torch.Generator().manual_seed(0)
    found = []
    for seconds in rng.permutation(np.interp(shares, *DURATIONS)):
        length = PROMPT + round(seconds * EMBEDDINGS_PER_SECOND)
        limit = max(1, round(seconds * rng.normal(*TOKENS_PER_SECOND)))
        noise = torch.randn(length, sizes.hidden, generator=generator)
        found.append(Utterance(0.02 * noise, limit))
    return found


class Limits(StoppingCriteria):
    """Ends the texts of each utterance of a batch at its own limit."""

    def __init__(self, limits: Sequence[int]):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        repeats = len(input_ids) // len(self.limits)
        limits = self.limits.to(input_ids.device)
        return input_ids.shape[1] >= limits.repeat_interleave(repeats)


Found = list[list[int]]  # tokens of each utterance
Texts = dict[int, list[int]]  # the same by the utterances' places


def generate(llm: LLM, batch: Sequence[Utterance]) -> Found:
    """By transformers, prompts padded to the longest."""
    longest = max(len(one.prompt) for one in batch)
    pad = torch.nn.functional.pad
    prompts = [pad(one.prompt, (0, 0, longest - len(one.prompt), 0)) for one in batch]
    masks = [pad(torch.ones_like(o.prompt[:, 0]), (longest - len(o.prompt), 0)) for o in batch]
    limits = [one.limit for one in batch]
    network: Any = llm.network
    output = network.generate(
        inputs_embeds=torch.stack(prompts).to(llm.dtype),
        attention_mask=torch.stack(masks).long(),
        max_new_tokens=max(limits),
        num_beams=BEAMS,
        early_stopping=False,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Limits(limits)]),
    )
    return [row[:limit] for row, limit in zip(output.tolist(), limits, strict=True)]


def ours(llm: LLM, batch: Sequence[Utterance], beam_size: int = BEAMS) -> Found:
    found = beam_search(
        llm,
        [one.prompt for one in batch],
        [one.limit for one in batch],
        [END],
        beam_size=beam_size,
        options=OPTIONS,
    )
    return [best.tokens for best, *_ in found]


def batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def timed(work: Callable[[], Found]) -> tuple[float, Found]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def measure_beam(sizes: Sizes, repeats: int) -> list[Row]:
    """Four beams: all utterances, the ways taking turns batch by batch."""
    llm, data = build_llm(sizes), utterances(sizes)
    given = list(range(len(data)))
    by_length = sorted(given, key=lambda index: len(data[index].prompt))
    ways = {
        "generate": (generate, batches(given, sizes.batch_size)),
        "generate, sorted": (generate, batches(by_length, sizes.batch_size)),
        "ours": (ours, batches(by_length, sizes.batch_size)),
    }
    ours(llm, data[:1])  # finds out about the network
    spent: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, Texts] = {name: {} for name in ways}
    with torch.inference_mode():
        for _ in range(repeats):
            for name in ways:
                spent[name].append(0.0)
            for turn in range(len(ways["ours"][1])):
                for name, (work, parts) in ways.items():
                    batch = [data[index] for index in parts[turn]]
                    seconds, found = timed(partial(work, llm, batch))
                    spent[name][-1] += seconds
                    texts[name] |= dict(zip(parts[turn], found, strict=True))
    rows = []
    for name, floor in (("generate", 4.0), ("generate, sorted", 2.8)):
        what = f"beam {BEAMS}, batch {sizes.batch_size}, times faster than {name}"
        rows.append(ratio(what, floor, spent[name], spent["ours"]))
        rows.append(identity(llm, data, f"the same text as {name}", texts["ours"], texts[name]))
    return rows


def ratio(what: str, floor: float, slow: Sequence[float], fast: Sequence[float]) -> Row:
    """How much less CPU time, the median over repeats."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    seconds = [statistics.median(times) for times in (slow, fast)]
    detail = f"{seconds[0]:.2f} s against {seconds[1]:.2f} s; {spread(ratios)}"
    return Row(what, floor, statistics.median(ratios), detail)


def identity(llm: LLM, data: Sequence[Utterance], what: str, found: Texts, expected: Texts) -> Row:
    """Share of utterances with the same tokens, or others of a score as good."""
    differ = [index for index in expected if found[index] != expected[index]]
    gaps = [
        abs(score(llm, data[index], found[index]) - score(llm, data[index], expected[index]))
        for index in differ
    ]
    ties = sum(gap < TIE for gap in gaps)
    share = 1 - (len(differ) - ties) / len(expected)
    detail = f"of {len(expected)} utterances; {ties} by a tie (scores within {TIE:g})"
    return Row(what, 1.0, share, detail + (f", gaps {gaps}" if gaps else ""))


@torch.inference_mode()
def score(llm: LLM, one: Utterance, tokens: Sequence[int]) -> float:
    """Mean log-probability of the tokens, in one pass without a cache."""
    text = torch.tensor(tokens)
    whole = torch.cat([one.prompt.to(llm.dtype), llm.embed(text)])
    keep = torch.arange(len(one.prompt) - 1, len(whole) - 1)
    log_probs = llm.logits(whole[None], torch.ones(1, len(whole)).long(), keep)[0].log_softmax(-1)
    return float(log_probs.gather(1, text[:, None]).mean())


def measure_draft(sizes: Sizes, repeats: int, dtype: torch.dtype, floor: float) -> list[Row]:
    """Greedy, an utterance at a time, with a draft and without."""
    llm = build_llm(sizes, sure=True)
    llm.store(dtype)
    data = utterances(sizes)[: sizes.drafted]
    spent: dict[str, list[float]] = {"plain": [], "draft": []}
    texts: dict[str, Texts] = {"plain": {}, "draft": {}}
    ours(llm, data[:1], 1)

    def run(name: str, index: int, work: Callable[[], Found]) -> list[int]:
        seconds, found = timed(work)
        spent[name][-1] += seconds
        texts[name][index] = found[0]
        return found[0]

    for repeat in range(repeats):
        rng = random.Random(repeat)
        for seconds in spent.values():
            seconds.append(0.0)
        for index, one in enumerate(data):
            tokens = run("plain", index, partial(ours, llm, [one], 1))
            draft = with_errors(tokens, DRAFT_ERRORS, sizes.vocabulary, rng)
            run("draft", index, partial(with_draft, llm, one, draft))
    name = str(dtype).removeprefix("torch.")
    what = f"draft with {DRAFT_ERRORS:.0%} errors, batch 1, {name}, times faster than greedy"
    return [
        ratio(what, floor, spent["plain"], spent["draft"]),
        identity(llm, data, f"the same text without, {name}", texts["draft"], texts["plain"]),
    ]


def with_draft(llm: LLM, one: Utterance, draft: Sequence[int]) -> Found:
    found = draft_search(llm, [one.prompt], [draft], [one.limit], [END], options=OPTIONS)
    return [best.tokens for best, *_ in found]


def with_errors(
    tokens: Sequence[int], rate: float, vocabulary: int, rng: random.Random
) -> list[int]:
    """The tokens with so many of them replaced, left out, or doubled by another."""
    draft: list[int] = []
    for token in tokens:
        kind = rng.choice(("other", "none", "more")) if rng.random() < rate else "same"
        if kind in ("other", "more"):
            draft.append(rng.randrange(3, vocabulary))
        if kind in ("same", "more"):
            draft.append(token)
    return draft


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f} in {len(values)} repeats"


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
    parser.add_argument("--only", choices=["beam", "draft"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    parser.add_argument("--output", type=Path, help="also write the table here, as JSON")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    sizes = QUICK if given.quick else Sizes()
    print(header(), end="\n\n", flush=True)
    rows: list[Row] = []
    if given.only in (None, "beam"):
        rows += measure_beam(sizes, given.repeats)
    if given.only in (None, "draft"):
        rows += measure_draft(sizes, given.repeats, torch.float32, 2.8)
        rows += measure_draft(sizes, given.repeats, torch.bfloat16, 5.0)
    print("| what | floor | measured | |\n|---|---|---|---|")
    for row in rows:
        floor = "-" if row.floor is None else f">= {row.floor:g}"
        print(f"| {row.what} | {floor} | {row.measured:.3g} | {row.detail} |")
    if given.output:
        result = {"machine": header(), "quick": given.quick, "rows": [asdict(row) for row in rows]}
        given.output.write_text(json.dumps(result, indent=2) + "\n")
    if any(row.floor is not None and row.measured < row.floor for row in rows) and not given.quick:
        sys.exit(1)


if __name__ == "__main__":
    main()

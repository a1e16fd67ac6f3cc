"""The search on real parts: beams against transformers' `generate`, and drafts against none.

Recordings of ISTHMUS_SPEECH (en_kathleen and en_barista, dev), CPU time of one thread, the ways in
turn batch by batch, the LLM in float32 and in bfloat16. No scorer beside the LLM, which `generate`
does not have, and the guard against repetition is off for the same reason.

    python benchmarks/base.py [RUN] [--utterances N]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from decoding import header
from torch import Tensor

from isthmus.decoding.beam import SearchOptions, beam_search
from isthmus.decoding.draft import draft_search
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.speech.corpora import load_cut, read_corpus

SETS = ("en_kathleen", "en_barista")
BATCH, BEAMS = 8, 4
OPTIONS = SearchOptions(repetition_guard=False)
Texts = list[list[int]]  # tokens


@dataclass(frozen=True)
class Utterance:
    """A decoding prompt (L, E), the most tokens of its text, and what the CTC head says."""

    prompt: Tensor
    limit: int
    draft: list[int]


@torch.inference_mode()
def prepared(system: Transcriber, count: int | None) -> list[Utterance]:
    """Utterances of the sets, sorted by length."""
    cuts = [cut for name in SETS for cut in read_corpus(f"${{ISTHMUS_SPEECH}}/{name}/dev.jsonl")]
    model = system.model
    found = []
    for cut in cuts[:count]:
        frames = model.encode_alone(torch.from_numpy(load_cut(cut)))
        audio, said, _ = system._listen([frames], keep=False)
        prompt, limit = model.sequence(audio[0])[0], system._budget(cut.duration)
        found.append(Utterance(prompt, limit, system._tokens(said[0])))
    return sorted(found, key=lambda one: len(one.prompt))


def generate(system: Transcriber, batch: Sequence[Utterance]) -> Texts:
    """By transformers, prompts padded to the longest; end tokens cut off."""
    network: Any = system.model.llm.network
    prompts = [one.prompt for one in batch]
    longest = max(map(len, prompts))
    pad = torch.nn.functional.pad
    output = network.generate(
        inputs_embeds=torch.stack([pad(one, (0, 0, longest - len(one), 0)) for one in prompts]),
        attention_mask=torch.stack(
            [pad(torch.ones(len(one)), (longest - len(one), 0)) for one in prompts]
        ).long(),
        max_new_tokens=max(one.limit for one in batch),
        num_beams=BEAMS,
        length_penalty=1.0,
        early_stopping=False,
        do_sample=False,
        eos_token_id=list(system.ends),
        pad_token_id=system.ends[0],
    )
    return [[token for token in row if token not in system.ends] for row in output.tolist()]


def searched(system: Transcriber, batch: Sequence[Utterance], beams: int) -> Texts:
    found = beam_search(
        system.model.llm,
        [one.prompt for one in batch],
        [one.limit for one in batch],
        system.ends,
        beam_size=beams,
        options=OPTIONS,
    )
    return [best.tokens for best, *_ in found]


def drafted(system: Transcriber, one: Utterance) -> Texts:
    found = draft_search(
        system.model.llm, [one.prompt], [one.draft], [one.limit], system.ends, options=OPTIONS
    )
    return [best.tokens for best, *_ in found]


class Way:
    """One way to decode: its CPU time, and its texts."""

    def __init__(self, work: Callable[..., Texts]):
        self.work, self.seconds, self.texts = work, 0.0, Texts()

    def __call__(self, *given: Any) -> None:
        started = time.process_time()
        found = self.work(*given)
        self.seconds += time.process_time() - started
        self.texts += found


def report(what: str, slow: Way, fast: Way) -> None:
    same = sum(a == b for a, b in zip(slow.texts, fast.texts, strict=True))
    cost = f"{slow.seconds:.1f} s against {fast.seconds:.1f} s"
    print(f"| {what} | {slow.seconds / fast.seconds:.2f} | {cost} | {same} of {len(slow.texts)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("run", nargs="?", default="base")
    parser.add_argument("--utterances", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    system = load(arguments.run, ctc_weight=0.0)
    data = prepared(system, arguments.utterances)
    print(header())
    print("\n| what | times faster | CPU time | same texts |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        system.model.llm.network.to(dtype)
        compare(system, [replace(one, prompt=one.prompt.to(dtype)) for one in data], str(dtype))


def compare(system: Transcriber, data: Sequence[Utterance], dtype: str) -> None:
    reference, beams = Way(generate), Way(searched)
    greedy, drafts = Way(searched), Way(drafted)
    with torch.inference_mode():
        searched(system, data[:1], BEAMS)  # finds out about the network
        for start in range(0, len(data), BATCH):
            batch = data[start : start + BATCH]
            reference(system, batch)
            beams(system, batch, BEAMS)
            for one in batch:
                greedy(system, [one], 1)
                drafts(system, one)
    report(f"{dtype}: beam {BEAMS}, batch {BATCH}, than generate", reference, beams)
    report(f"{dtype}: greedy, one by one, with drafts than without", greedy, drafts)


if __name__ == "__main__":
    main()

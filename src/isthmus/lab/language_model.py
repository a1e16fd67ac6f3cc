"""Training of a small language model on text made on the spot.

Raw: next-token prediction on sentences. Chat: it also learns to repeat what it is told, the way a
frozen encoder would tell it: letter by letter, with stutters, fillers and misheard letters.

Shapes: B batch, L tokens, E width.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from isthmus.build import build_language_model
from isthmus.files import write_folder
from isthmus.lab.sentences import sentence
from isthmus.model.llm import LLM, save_llm
from isthmus.model.prompt import (
    BarePrompt,
    ChatPrompt,
    PaperPrompt,
    Prompt,
    SlamPrompt,
    plain_tokens,
    tokenise,
)
from isthmus.recipe import LanguageRecipe
from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import Progress
from isthmus.runs.folder import BEST, MODEL
from isthmus.training.loop import Loss, OnStep, fit
from isthmus.training.parallel import Ranks
from isthmus.training.runs import Opening, RunFolder

IGNORE = -100  # label without loss
FILLER = "_"  # what is told between two letters
SOUNDS_ALIKE = ("aeiouy", "bpdtgkvfcq", "mn", "sxzc", "lrw", "ckqg", "jgh", "uwo", "iey")
INSTRUCTIONS = (
    "Transcribe speech to text.",
    "Transcribe speech to text. Output the transcription directly without redundant content. "
    "Ensure that the output is not duplicated.",
    "Repeat what is said.",
    "Write down what you hear.",
    "Say it again, clearly.",
    "Please repeat the words.",
    "What was said?",
)
RAW_SENTENCES = 6  # of an example of raw text
DEV_SEED = 1_000_003
DEV_EXAMPLES = 256

Example = tuple[list[int], list[int]]  # tokens, labels
Loaded = tuple[list[Example], float]  # a batch, and the noise on its embeddings


class LanguageTask:
    """Cross-entropy (nats; units are tokens) and next-token accuracy."""

    def __init__(self, llm: LLM, recipe: LanguageRecipe):
        self.module = llm
        self.recipe = recipe
        self.seed = recipe.seed
        self.bad_fraction = 0.0
        self.examples = lru_cache(maxsize=2)(self._examples)

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def state(self) -> Mapping[str, Tensor]:
        return dict(self.module.named_parameters())

    def plan(self, epoch: int) -> list[list[int]]:
        """Batches of examples of like length, `tokens_per_batch` tokens at most with padding."""
        lengths = [len(tokens) for tokens, _ in self.examples(self.seed, epoch)]
        batches: list[list[int]] = [[]]
        for index in np.argsort(lengths, kind="stable").tolist():
            if (
                batches[-1]
                and lengths[index] * (len(batches[-1]) + 1) > self.recipe.tokens_per_batch
            ):
                batches.append([])
            batches[-1].append(index)
        order = np.random.default_rng([self.recipe.seed, epoch, 1]).permutation(len(batches))
        return [batches[i] for i in order.tolist()]

    def dev_plan(self) -> list[range]:
        count = min(DEV_EXAMPLES, self.recipe.sentences)
        return [range(start, min(start + 16, count)) for start in range(0, count, 16)]

    def load(self, indices: Sequence[int], epoch: int | None) -> Loaded:
        if epoch is None:
            examples, noise = self.examples(DEV_SEED, 0), 0.0
        else:
            examples, noise = self.examples(self.seed, epoch), self.recipe.embedding_noise
        return [examples[index] for index in indices], noise

    def describe(self, indices: Sequence[int]) -> str:
        return f"examples {list(indices)}"

    def _examples(self, seed: int, epoch: int) -> list[Example]:
        return [
            self._example(np.random.default_rng([seed, epoch, index]))
            for index in range(self.recipe.sentences)
        ]

    def _example(self, rng: np.random.Generator) -> Example:
        tokenizer = self.module.tokenizer
        if not self.recipe.chat or rng.random() < self.recipe.raw_share:
            texts = [sentence(rng, self.recipe.domains) for _ in range(RAW_SENTENCES)]
            tokens = [
                tokenizer.bos_token_id,
                *tokenizer.encode("\n".join(texts), add_special_tokens=False),
                tokenizer.eos_token_id,
            ]
            return tokens, tokens
        return repetition(
            self.module,
            draw_prompt(rng),
            sentence(rng, self.recipe.domains),
            rng,
            self.recipe.noise,
        )

    def loss(self, loaded: Loaded) -> Loss:
        examples, noise = loaded
        length = max(len(tokens) for tokens, _ in examples)
        tokens = torch.full((len(examples), length), int(self.module.tokenizer.pad_token_id))
        labels = torch.full((len(examples), length), IGNORE)
        for row, (ids, wanted) in enumerate(examples):
            tokens[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(wanted)
        device = next(self.module.parameters()).device
        tokens, labels = tokens.to(device), labels.to(device)
        embeddings = self.module.embed(tokens)  # (B, L, E)
        if noise:  # NEFTune (arXiv 2310.05914): what the projector says will not be letters exactly
            scale = noise / (length * embeddings.shape[2]) ** 0.5
            embeddings = embeddings + torch.empty_like(embeddings).uniform_(-scale, scale)
        lengths = torch.tensor([len(ids) for ids, _ in examples], device=device)
        mask = (torch.arange(length, device=device) < lengths[:, None]).long()
        keep = torch.arange(length - 1, device=device)
        logits = self.module.logits(embeddings, mask, keep)  # (B, L - 1, V)
        targets = labels[:, 1:]
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        supervised = targets != IGNORE
        correct = (logits.argmax(dim=-1) == targets) & supervised
        return Loss(total, int(supervised.sum()), int(correct.sum()))


def draw_prompt(rng: np.random.Generator) -> Prompt:
    """A template and an instruction; mostly those of SLAM-ASR."""
    instruction = str(rng.choice(INSTRUCTIONS)) if rng.random() < 0.4 else INSTRUCTIONS[0]
    kind = rng.random()
    if kind < 0.6:
        return PaperPrompt(instruction="" if rng.random() < 0.1 else instruction)
    if kind < 0.75:
        return SlamPrompt(instruction=instruction)
    return ChatPrompt(instruction=instruction) if kind < 0.9 else BarePrompt()


def repetition(
    llm: LLM, prompt: Prompt, text: str, rng: np.random.Generator, noise: float
) -> Example:
    """An instruction to repeat `text`, told as an encoder would, and the clean reply."""
    told = plain_tokens(llm.tokenizer, mishear(text, rng, noise))
    tokens: list[int] = []
    labels: list[int] = []
    for piece in tokenise(prompt, llm.tokenizer, text):
        ids = told if piece.tokens is None else piece.tokens
        tokens += ids
        labels += ids if piece.loss else [IGNORE] * len(ids)
    return tokens, labels


def mishear(text: str, rng: np.random.Generator, noise: float) -> str:
    """`text` as the frames of a CTC encoder spell it: letters held, fillers between, errors.

    At most a share `noise` of the letters is wrong: mistaken for one that sounds alike, lost, or
    added. Two equal letters always have a filler between them.
    """
    errors = noise * rng.random() ** 2
    pause = float(np.exp(rng.uniform(np.log(0.3), np.log(3.0))))  # fillers after a letter
    told = [FILLER] * int(rng.integers(0, 16))
    for letter in text:
        chance = rng.random()
        if chance < errors / 4:
            continue
        spoken = _confuse(letter, rng) if chance < errors * 3 / 4 else letter
        for unit in [spoken, _confuse(" ", rng)] if chance > 1 - errors / 4 else [spoken]:
            if told and told[-1] == unit:
                told.append(FILLER)
            told += [unit] * (2 if rng.random() < 0.2 else 1)
            told += [FILLER] * int(rng.poisson(pause))
    return "".join(told + [FILLER] * int(rng.integers(0, 16)))


def _confuse(letter: str, rng: np.random.Generator) -> str:
    groups = [group for group in SOUNDS_ALIKE if letter in group]
    if not groups or rng.random() < 0.3:
        return str(rng.choice(list("abcdefghijklmnopqrstuvwxyz' ")))
    return str(rng.choice(list(groups[rng.integers(len(groups))])))


def pretrain_lm(
    recipe: LanguageRecipe,
    folder: Path,
    opening: Opening = Opening(),
    *,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train a small language model; `folder`/model is the LLM to name in a recipe."""
    with Ranks() as ranks, RunFolder(recipe, folder, opening, ranks) as run:
        torch.manual_seed(recipe.seed)
        llm = build_language_model(recipe).to(ranks.device)
        run.begin()
        task = LanguageTask(llm, recipe)
        end = fit(task, recipe.train, folder, resume=run.resumed, on_step=on_step, ranks=ranks)
        checkpoint.load_weights(folder / BEST, task.state())
        ranks.lead(lambda: write_folder(folder / MODEL, partial(save_llm, llm.cpu().eval())))
        return end

"""Has the language model of a run kept its way with text?

Perplexity a word of the same texts, for the model as it came and as it is in the run, in the same
precision. A frozen model must be the same to the last bit, and is held to that.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.build import llm_of
from isthmus.lab.perplexity import Perplexity, perplexity_text, word_perplexity
from isthmus.model.adapters import merge_adapters
from isthmus.model.device import choose_device
from isthmus.model.llm import LLM
from isthmus.recipe import Recipe
from isthmus.runs.loading import load_run
from isthmus.scoring.error_rate import Interval, percentile_interval, resampled_rates
from isthmus.settings.base import Tune
from isthmus.settings.llms import LoraSettings

RESAMPLES = 1000


@dataclass(frozen=True)
class TextAbility:
    """What training did to the perplexity of texts."""

    tune: Tune
    before: Perplexity  # of the model as it came
    after: Perplexity  # of the model in the run
    merged: Perplexity | None  # with its adapters added to its weights, where that is possible
    same_weights: bool  # by SHA-256, adapters aside

    @property
    def equal(self) -> bool:
        """Whether it is the same model: weights, and each text to the last bit."""
        return self.same_weights and self.before == self.after

    @property
    def sound(self) -> bool:
        """Whether nothing moved that was to be frozen."""
        return self.equal if self.tune == "frozen" else self.same_weights or self.tune == "full"

    @property
    def difference(self) -> float:
        """Perplexity after less that before: above 0, the model has lost."""
        return self.after.value - self.before.value

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the difference: both models on the same drawn texts."""
        pairs = zip(self.before.texts, self.after.texts, strict=True)
        nats = np.array([[before.nats, after.nats] for before, after in pairs]).T  # (2, N)
        words = np.array([[text.words] * 2 for text in self.before.texts]).T
        with np.errstate(over="ignore"):
            before, after = np.exp(resampled_rates(nats, words, seed=0, resamples=RESAMPLES))
        return percentile_interval(after - before) if np.isfinite(before + after).all() else None

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"perplexity a word of {self.before.words:,} words, llm.tune {self.tune}, "
            f"{self.before.precision}:",
            f"as it came:      {perplexity_text(self.before.value)}",
            f"in the run:      {perplexity_text(self.after.value)}",
        ]
        if self.merged:
            found.append(f"adapters merged: {perplexity_text(self.merged.value)}")
        if self.equal:
            return [*found, "equal to the last bit, and so are the weights (SHA-256)"]
        if not self.sound:
            return [*found, "WEIGHTS THAT WERE FROZEN ARE NOT WHAT THEY WERE"]
        low, high = self.interval or (math.nan, math.nan)
        return [
            *found,
            f"difference:      {self.difference:+.2f} ({low:+.2f} to {high:+.2f}, 95 %)",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "tune": self.tune,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "merged": self.merged.to_dict() if self.merged else None,
            "difference": self.difference if math.isfinite(self.difference) else None,
            "interval": self.interval,
            "same_weights": self.same_weights,
            "equal": self.equal,
        }


def text_ability(run: Path, texts: Sequence[str]) -> TextAbility:
    """The text ability of a run's language model; one model is held at a time.

    Raises IsthmusError as `load_run` and `word_perplexity` do.
    """
    model, recipe = load_run(run)
    llm = model.llm
    del model
    after, weights = word_perplexity(llm, texts), weights_digest(llm)
    joined = None
    if recipe.llm.mergeable:
        merge_adapters(llm)
        joined = word_perplexity(llm, texts)
    del llm
    original = original_llm(recipe)
    before = word_perplexity(original, texts)
    same = weights_digest(original) == weights
    return TextAbility(recipe.llm.tune, before, after, joined, same)


def original_llm(recipe: Recipe) -> LLM:
    """The language model of a recipe as it came, on the device, held as the recipe trains it."""
    if recipe.llm.tune == "full":
        return llm_of(recipe).float().to(choose_device()).eval()
    plain = recipe.llm.model_copy(update={"tune": "frozen", "lora": LoraSettings()})
    llm = llm_of(recipe.model_copy(update={"llm": plain}))
    return llm.to(choose_device()).eval()


def weights_digest(llm: LLM) -> str:
    """SHA-256 over names and values of the weights, those of adapters left out."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = llm.network.state_dict()
    names = {name.replace(".base_layer.", "."): value for name, value in state.items()}
    for name, value in sorted(names.items()):
        if ".lora_" not in name:
            numbers = value.detach().cpu().contiguous().flatten()
            digest.update(name.encode() + numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

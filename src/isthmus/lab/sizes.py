"""Parameters and bytes of a model that need not be there.

The recipe itself builds it, on torch's meta device: sizes without weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus.build import build_model
from isthmus.lab.placeholders import Pretrained, Producers, build_sized, with_placeholders
from isthmus.model.encoder import Encoder, build_encoder, parameters
from isthmus.model.layers import decoder_layers
from isthmus.model.llm import build_llm
from isthmus.model.presets import PRESETS, on_meta
from isthmus.model.quantise import RowScaledLinear, quantise
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import CTCRecipe, LanguageRecipe, Recipe
from isthmus.settings.encoders import EncoderSettings
from isthmus.settings.llms import LLMSettings
from isthmus.settings.optimisation import SpeechTrainSettings, TrainSettings
from isthmus.speech.audio import SAMPLE_RATE

NF4_BITS = 4.5  # of a weight, with its share of a scale for every 64


@contextmanager
def sized_model(recipe: Recipe, producers: Producers) -> Iterator[SpeechLLM]:
    """The model that `recipe` builds, on the meta device and not yet quantised.

    Scales of quantised weights would count as parameters. Raises IsthmusError for models that are
    not known offline.
    """
    plain = recipe.model_copy(update={"llm": recipe.llm.model_copy(update={"quantise": "none"})})
    with on_meta(), TemporaryDirectory(prefix="isthmus-") as folder:
        yield build_model(with_placeholders(plain, Path(folder), producers))


@contextmanager
def sized_pretraining(
    recipe: CTCRecipe | LanguageRecipe, producers: Producers
) -> Iterator[Pretrained]:
    """The same of a model that is trained alone."""
    with on_meta(), TemporaryDirectory(prefix="isthmus-") as folder:
        yield build_sized(with_placeholders(recipe, Path(folder), producers), Path(folder) / "new")


def preset_parameters(name: str) -> int:
    """Parameters of a known model as a part of a recipe; of encoders without their heads."""
    kind = str(PRESETS[name].config["model_type"])
    with on_meta():
        if PRESETS[name].kind == "llm":
            return parameters(build_llm(LLMSettings(path=name)))[0]
        part = {"type": "conformer" if kind.startswith("parakeet") else kind, "path": name}
        settings: TypeAdapter[EncoderSettings] = TypeAdapter(EncoderSettings)
        return parameters(build_encoder(settings.validate_python(part)))[0]


def presets_table() -> list[dict[str, Any]]:
    """The known models: name, kind, parameters, note."""
    counts: dict[str, int] = {}  # many are of one size
    rows = []
    for name, preset in PRESETS.items():
        size = repr(preset.config)
        if size not in counts:
            counts[size] = preset_parameters(name)
        row = {"name": name, "kind": preset.kind, "parameters": counts[size]}
        rows.append(row | {"note": preset.note})
    return rows


def weight_bytes(recipe: Recipe, model: SpeechLLM) -> dict[str, int]:
    """Bytes of each part's weights. The language model of a sized model is quantised by this."""
    kind = recipe.llm.quantise
    if kind != "none":  # int4 takes a library that rounds weights: its sizes are known without
        quantise(model.llm.network, "int8" if kind == "int4" else kind)
    weights = {
        name: sum(
            value.numel() * value.element_size()
            for value in chain(part.parameters(), part.buffers())
        )
        for name, part in model.named_children()
    }
    if kind == "int4":
        for part in model.llm.modules():
            if isinstance(part, RowScaledLinear):
                weights["llm"] -= round(part.weight.numel() * (1 - NF4_BITS / 8))
    return weights


def activation_bytes(model: SpeechLLM, recipe: Recipe, seconds: float, tokens: int) -> int:
    """What a step keeps of an utterance for its gradient, about: see docs/plan.md."""
    number = 2 if recipe.train.precision == "bfloat16" else 4
    layers = layer_values(model.llm.network, model.llm.dim)
    again = recipe.train.checkpointing  # then only the input of each is kept, and all of one
    kept = len(layers) * model.llm.dim + max(layers) if again else sum(layers)
    total = model.positions(seconds, tokens) * (kept + model.llm.dim) * number
    if not recipe.train.packing:  # the logits and their gradient, in float32
        total += 8 * tokens * int(model.llm.network.config.get_text_config().vocab_size)
    total += 4 * model.audio_tokens(seconds) * _linear_values(model.projector)
    if not uses_cache(recipe) and any(True for _ in model.encoder.parameters()):
        layers = layer_values(model.encoder, model.encoder.dim)
        passing = recipe.encoder.tune == "frozen"  # a layer's go when the next one's come
        samples = int(model.encoder.encoded_seconds(seconds) * SAMPLE_RATE)
        kept = max(layers) if passing else sum(layers)
        total += model.encoder.output_length(samples) * kept * number
    return total


def layer_values(network: nn.Module, width: int) -> list[int]:
    """Numbers that each layer makes of a position, about: its products, two norms, two sums."""
    return [_linear_values(layer) + 4 * width for layer in decoder_layers(network)]


def _linear_values(module: nn.Module) -> int:
    """Outputs of the linear layers within; the inputs, too, of those that are trained."""
    total = 0
    for part in module.modules():
        if isinstance(part, nn.Linear | Conv1D):
            outputs, inputs = part.weight.shape[:: -1 if isinstance(part, Conv1D) else 1]
            total += outputs + (inputs if part.weight.requires_grad else 0)
    return total


def uses_cache(recipe: Recipe) -> bool:
    """Whether the frames of the encoder are kept on disk, as training decides it."""
    changed = recipe.data.augment is not None or recipe.data.join is not None
    kept = recipe.data.feature_cache != "none"
    return kept and recipe.encoder.tune == "frozen" and not changed


def frame_bytes(recipe: Recipe, encoder: Encoder, seconds: float) -> int:
    """An utterance's frames in the feature cache, in bfloat16 unless the recipe says otherwise."""
    number = 4 if recipe.data.feature_cache == "float32" else 2
    return encoder.output_length(int(seconds * SAMPLE_RATE)) * encoder.dim * number


def mean_batch(train: TrainSettings, seconds: float, positions: int) -> float:
    """Utterances of a batch, on the mean."""
    if train.batch_size is not None:
        return float(train.batch_size)
    if train.max_duration is not None:
        return max(1.0, train.max_duration / seconds)
    assert isinstance(train, SpeechTrainSettings)
    assert train.max_tokens is not None
    return max(1.0, train.max_tokens / positions)


def token_count(tokenizer: Any, texts: list[str]) -> float:
    """Tokens of a transcript on the mean, its end among them."""
    return 1 + math.fsum(
        len(tokenizer.encode(text, add_special_tokens=False)) for text in texts
    ) / len(texts)

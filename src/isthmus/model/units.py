"""Discrete units: each frame becomes the nearest of K centroids, and its number an embedding.

Shapes: B batch, T encoder frames, A audio embeddings, K units, D encoder width, E LLM width.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.files import write_atomic
from isthmus.model.encoder import Encoder
from isthmus.model.llm import LLM
from isthmus.model.parts import Source, sources
from isthmus.model.projector_base import Projector, build_projector, check_projector
from isthmus.model.weights import sha256
from isthmus.settings.encoders import EncoderSettings
from isthmus.settings.projectors import UnitProjectorSettings

METADATA = "units"  # under which a file says what it is of, as JSON
SAMPLE = 8192  # embeddings of the LLM that statistics are taken of, at least


@dataclass(frozen=True)
class Units:
    """Centroids (K, D) float32 of the frames of one encoder."""

    centroids: Tensor
    encoder: str  # its name, for people
    sha256: str  # of its files: `files_digest`
    layer: str = "last"

    def save(self, file: Path) -> None:
        """Write a .safetensors file. Raises OSError."""
        about = {"encoder": self.encoder, "sha256": self.sha256, "layer": self.layer}
        about["dim"] = str(self.centroids.shape[-1])
        # one entry, because several would be written in any order
        metadata = {METADATA: json.dumps(about)}
        write_atomic(file, save({"centroids": self.centroids.contiguous()}, metadata))

    @classmethod
    def load(cls, file: Path) -> "Units":
        """Raises IsthmusError for what is no file of units."""
        try:
            with safe_open(file, "pt") as stored:
                about = json.loads((stored.metadata() or {})[METADATA])
                centroids = stored.get_tensor("centroids").float()
                if centroids.ndim != 2:
                    raise ValueError(f"its centroids have {centroids.ndim} dimensions, not 2")
                return cls(centroids, about["encoder"], about["sha256"], about["layer"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise IsthmusError(
                f"projector.path: {file} cannot be read as a file of units ({error}). Make one "
                f"with: isthmus units RECIPE --output {file}"
            ) from error


def files_digest(files: Mapping[str, Source]) -> str:
    """SHA-256 of all files that an encoder is loaded from."""
    sums = {name: source.sha256 for name, source in files.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def nearest(frames: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid (K, D) of each frame (T, D): their numbers (T,)."""
    with torch.autocast(frames.device.type, enabled=False):
        products = frames.float() @ centroids.T
        return (centroids.square().sum(dim=1) - 2 * products).argmin(dim=1)


class UnitProjector(Projector):
    """The embedding of each frame's nearest centroid; repeats count once if `deduplicate`.

    SpeechGPT (arXiv 2305.11000), section 4: units are new tokens of the LLM, here in a table (K, E)
    of their own. Each utterance is read alone, so that no company rounds its units to others.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, table: Tensor, deduplicate: bool):
        super().__init__()
        self.register_buffer("centroids", centroids, persistent=False)  # they have a file
        self.units = nn.Embedding(len(table), table.shape[1], _weight=table)
        self.deduplicate = deduplicate
        self.exact = not deduplicate

    def output_length(self, num_frames: int) -> int:
        """One for every frame; at most, if repeats count once."""
        return num_frames

    def forward(self, frames: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        rows = zip(frames, num_frames.tolist(), strict=True)
        units = [nearest(row[:length], self.centroids) for row, length in rows]
        if self.deduplicate:
            units = [row.unique_consecutive() for row in units]
        lengths = torch.tensor([len(row) for row in units], device=frames.device)
        return self.units(nn.utils.rnn.pad_sequence(units, batch_first=True)), lengths


@sources.register
def _(settings: UnitProjectorSettings) -> dict[str, Source]:
    return {"": Source(settings.path, None, {settings.file.name: sha256(settings.file)})}


@check_projector.register
def _(settings: UnitProjectorSettings, encoder: Encoder, heard: EncoderSettings) -> None:
    if heard.tune != "frozen":
        raise IsthmusError(
            f"encoder.tune is {heard.tune!r}, but units are of the frames of an encoder "
            "that stays as it is. Set encoder.tune: frozen, or take another projector.type."
        )
    units = _units(settings, encoder)
    if any(value.is_meta for value in encoder.parameters()):
        return  # it is only planned with, and its weights are not at hand
    if units.sha256 != files_digest(sources(heard)):
        raise IsthmusError(
            f"projector.path: {settings.path} holds units of the encoder {units.encoder}, whose "
            "files have another SHA-256 than those of this recipe's encoder. Make units of "
            "this one with `isthmus units`, or put the other back."
        )


@build_projector.register
def _(settings: UnitProjectorSettings, encoder: Encoder, llm: LLM) -> UnitProjector:
    """The table is drawn with the mean and deviation of the LLM's own embeddings."""
    centroids = _units(settings, encoder).centroids
    vocabulary = int(llm.network.config.get_text_config().vocab_size)
    some = torch.arange(0, vocabulary, max(1, vocabulary // SAMPLE))
    deviation, mean = torch.std_mean(llm.embed(some).detach().float(), dim=0)
    table = mean + deviation * torch.randn(len(centroids), llm.dim, device=mean.device)
    return UnitProjector(centroids, table, settings.deduplicate)


def _units(settings: UnitProjectorSettings, encoder: Encoder) -> Units:
    units = Units.load(settings.file)
    if units.centroids.shape[1] != encoder.dim:
        raise IsthmusError(
            f"projector.path: {settings.path} holds units of frames {units.centroids.shape[1]} "
            f"wide, of the encoder {units.encoder}; this recipe's encoder has frames "
            f"{encoder.dim} wide. Make units of this one with `isthmus units`."
        )
    return units

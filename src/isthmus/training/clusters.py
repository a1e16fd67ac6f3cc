"""Making of discrete units: k-means over the frames of a frozen encoder.

Shapes: N sampled frames, T encoder frames, D encoder width, K units.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lhotse.cut import Cut
from torch import Tensor

from isthmus.build import encoder_of
from isthmus.errors import IsthmusError
from isthmus.model.device import choose_device
from isthmus.model.encoder import Encoder
from isthmus.model.parts import sources
from isthmus.model.units import Units, files_digest, nearest
from isthmus.recipe import Recipe
from isthmus.speech.corpora import load_cut
from isthmus.training.languages import chosen
from isthmus.training.training_data import load_cuts

FRAMES_PER_UNIT = 256  # that are sampled; more hardly moves the centroids
FRAMES_PER_UTTERANCE = 50  # at least, so that few utterances have to be heard
ITERATIONS = 25
CHUNK = 65_536  # frames that distances are computed of at a time

OnUtterance = Callable[[int, int], None]

log = logging.getLogger(__name__)


def make_units(
    recipe: Recipe, file: Path, clusters: int, on_utterance: OnUtterance = lambda done, total: None
) -> int:
    """Write `file` for `projector.path`: centroids of the recipe's encoder on its training data.

    Its projector plays no part. The recipe's seed decides the sample and the start. Returns how
    many frames were sampled. Raises IsthmusError for a file that exists and for too little data.
    """
    if file.exists():
        raise IsthmusError(f"{file} exists. Name another file with --output, or delete it.")
    if not recipe.data.train:
        raise IsthmusError("data.train is empty. Name a manifest or folder to learn units from.")
    cuts = chosen(load_cuts(recipe.data.train, recipe.data), recipe.data.languages, "data.train")
    encoder = encoder_of(recipe).to(choose_device()).eval()
    cuts = _not_too_long(cuts, encoder.max_seconds, recipe.data.max_bad_fraction)
    frames = sample_frames(encoder, cuts, clusters * FRAMES_PER_UNIT, recipe.seed, on_utterance)
    if len(frames) < clusters:
        raise IsthmusError(
            f"data.train gives {len(frames)} frames, too few for {clusters} units. Give more data, "
            "or lower --clusters."
        )
    centroids = kmeans(frames.to(choose_device()), clusters, recipe.seed).cpu()
    files = sources(recipe.encoder)
    name = " + ".join(one.name for one in files.values()) or recipe.encoder.type
    Units(centroids, name, files_digest(files)).save(file)
    return len(frames)


def _not_too_long(cuts: Sequence[Cut], limit: float | None, bad_fraction: float) -> list[Cut]:
    """Those that the encoder takes; raises IsthmusError where too many are longer."""
    fitting = [cut for cut in cuts if limit is None or cut.duration <= limit]
    left_out = len(cuts) - len(fitting)
    if left_out > bad_fraction * len(cuts):
        raise IsthmusError(
            f"{left_out} of {len(cuts)} utterances of data.train are longer than the {limit:g} s "
            "that the encoder takes. Set data.max_seconds to that, or raise data.max_bad_fraction."
        )
    if left_out:
        log.warning("left out: %d utterances of more than %g s", left_out, limit)
    return fitting


@torch.no_grad()
def sample_frames(
    encoder: Encoder, cuts: Sequence[Cut], wanted: int, seed: int, on_utterance: OnUtterance
) -> Tensor:
    """About `wanted` frames (N, D), on the CPU, of utterances in random order."""
    draw = random.Random(seed)
    order = draw.sample(range(len(cuts)), len(cuts))
    share = max(FRAMES_PER_UTTERANCE, math.ceil(wanted / max(1, len(cuts))))
    found: list[Tensor] = []
    count = 0
    for done, index in enumerate(order, start=1):
        try:
            waveform = torch.from_numpy(load_cut(cuts[index]))[None].to(choose_device())
        except IsthmusError as error:
            log.warning("left out: %s", error)
            continue
        num_samples = torch.tensor([waveform.shape[1]], device=waveform.device)
        frames, (length,) = encoder(waveform, num_samples)
        places = draw.sample(range(int(length)), min(share, int(length)))
        found.append(frames[0, sorted(places)].float().cpu())
        count += len(places)
        on_utterance(done, len(order))
        if count >= wanted:
            break
    return torch.cat(found) if found else torch.empty(0, encoder.dim)


def kmeans(frames: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids (K, D) of frames (N, D), N >= K: k-means++ (Arthur and Vassilvitskii, 2007).

    The same for the same seed, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    centroids = frames[torch.randint(len(frames), (1,), generator=generator).to(frames.device)]
    distances = (frames - centroids).square().sum(dim=1)
    while len(centroids) < clusters:
        weights = distances.cpu().double()
        if not weights.any():  # no more different frames than this
            weights += 1
        # not torch.multinomial, which takes no more than 2 ** 24 frames
        share = torch.rand(1, generator=generator, dtype=torch.double) * weights.sum()
        place = torch.searchsorted(weights.cumsum(0), share).clamp(max=len(frames) - 1)
        newest = frames[place.to(frames.device)]
        centroids = torch.cat([centroids, newest])
        distances = torch.minimum(distances, (frames - newest).square().sum(dim=1))
    for _ in range(ITERATIONS):
        assigned = torch.cat([nearest(part, centroids) for part in frames.split(CHUNK)])
        counts = assigned.bincount(minlength=clusters)
        # in order, and not index_add, whose sums on a GPU are others each time
        means = torch.segment_reduce(frames[assigned.argsort(stable=True)], "mean", lengths=counts)
        moved = torch.where(counts[:, None] > 0, means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids

"""What a recipe names as data, as utterances that can be trained on."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from lhotse import CutSet
from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.model.prompt import tokenise
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Corpus, DataSettings, Experiment
from isthmus.speech.corpora import read_corpus, usable
from isthmus.training.batches import SpeechData, transcript

log = logging.getLogger(__name__)

Fits = Callable[[Cut], str | None]  # what is wrong with an utterance for this model, if anything


def speech_data(
    recipe: Experiment, model: SpeechLLM | None = None
) -> tuple[SpeechData, SpeechData | None]:
    """Training and validation data of a recipe, as far as `model` can take it.

    Raises IsthmusError when more than data.max_bad_fraction of a corpus cannot be used.
    """
    data = recipe.data
    if not data.train:
        raise IsthmusError("data.train is empty. Name a manifest or folder to train on.")
    fits = fits_model(model) if model else lambda cut: None
    limit = model.encoder.max_seconds if model else None
    train = SpeechData(
        load_cuts(data.train, data, limit, fits),
        seed=recipe.seed,
        augmentation=data.augment,
        join=data.join,
    )
    dev = load_cuts(data.dev, data, limit, fits)
    return train, SpeechData(dev) if dev else None


def load_cuts(
    corpora: Sequence[Corpus | str],
    data: DataSettings,
    max_seconds: float | None = None,
    fits: Fits = lambda cut: None,
) -> list[Cut]:
    """Usable utterances of corpora, as often as each is repeated; says what was left out."""
    limit = min(data.max_seconds, max_seconds or data.max_seconds)
    cuts: list[Cut] = []
    for entry in corpora:
        corpus = Corpus(path=entry, repeat=1) if isinstance(entry, str) else entry
        found = read_corpus(corpus.path)
        good, report = usable(found, max_bad_fraction=data.max_bad_fraction, max_seconds=limit)
        kept = _fitting(corpus.path, good, fits, data.max_bad_fraction)
        left_out = Counter(report.reasons)
        if len(kept) < len(good):
            left_out["too_long_for_the_model"] = len(good) - len(kept)
        log.info(
            "%s: %d utterances, %.2f h%s%s",
            corpus.path,
            len(kept),
            sum(cut.duration for cut in kept) / 3600,
            f", {corpus.repeat} times" if corpus.repeat > 1 else "",
            f"; left out: {dict(left_out)}" if left_out else "",
        )
        for rejection in report.rejections:
            log.info("  %s", rejection.message)
        cuts += kept * corpus.repeat
    return cuts


def fits_model(model: SpeechLLM) -> Fits:
    """Whether audio, prompt and transcript are no more positions than the language model takes."""
    limit = model.llm.max_tokens

    def fault(cut: Cut) -> str | None:
        pieces = tokenise(model.prompt, model.llm.tokenizer, transcript(cut))
        text = sum(len(piece.tokens) for piece in pieces if piece.tokens)
        positions = model.audio_tokens(cut.duration) + text
        if limit is None or positions <= limit:
            return None
        return (
            f"utterance {cut.id!r} takes {positions} positions ({text} of them text), the language "
            f"model has {limit}"
        )

    return fault


def _fitting(corpus: str, cuts: CutSet, fits: Fits, max_bad_fraction: float) -> list[Cut]:
    good, faults = [], []
    for cut in cuts:
        fault = fits(cut)
        if fault is None:
            good.append(cut)
        else:
            faults.append(fault)
            log.info("  %s", fault)
    if len(faults) > max_bad_fraction * (len(good) + len(faults)):
        raise IsthmusError(
            f"{corpus}: {len(faults)} of {len(good) + len(faults)} utterances do not fit: "
            f"{faults[0]}. Lower data.max_seconds, shorten the transcripts, or raise "
            "data.max_bad_fraction."
        )
    return good

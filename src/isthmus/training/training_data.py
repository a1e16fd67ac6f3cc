"""What a recipe names as data, as utterances that can be trained on."""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence

from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.model.conformer import ConformerCTC
from isthmus.model.llm import LLM
from isthmus.model.speech_llm import SpeechLLM
from isthmus.model.spelling import letters_known
from isthmus.model.token_ctc import needed_embeddings
from isthmus.recipe import CTCRecipe, Recipe
from isthmus.settings.base import DEFAULT_LANGUAGE
from isthmus.settings.datasets import Corpus, DataSettings
from isthmus.speech.audio import SAMPLE_RATE
from isthmus.speech.augment import Augmentation
from isthmus.speech.corpora import read_corpus, usable
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.batches import (
    Fits,
    Positions,
    SpeechData,
)
from isthmus.training.languages import check_named, check_spoken, chosen

log = logging.getLogger(__name__)


def speech_data(
    recipe: Recipe | CTCRecipe, model: SpeechLLM | ConformerCTC
) -> tuple[SpeechData, SpeechData | None]:
    """Training and validation data of a recipe, as far as `model` can take it.

    Raises IsthmusError when more than data.max_bad_fraction of a corpus cannot be used.
    """
    data = recipe.data
    if not data.train:
        raise IsthmusError("data.train is empty. Name a manifest or folder to train on.")
    positions = positions_of(model, data.augment) if isinstance(model, SpeechLLM) else None
    budget = recipe.train.max_tokens if isinstance(recipe, Recipe) else None
    fits = _within(budget, positions, fits_model(model, data.augment))
    cuts = chosen(load_cuts(data.train, data, fits), data.languages, "data.train")
    if data.language_temperature is not None:
        check_named(cuts)
    if isinstance(recipe, Recipe) and isinstance(recipe.train.text_masking, dict):
        masked = recipe.train.text_masking.keys() - {DEFAULT_LANGUAGE}
        check_spoken("train.text_masking", sorted(masked), cuts, "data.train")
    if isinstance(model, SpeechLLM):
        _warn_of_unspelt(model.llm, cuts)
    train = SpeechData(
        cuts,
        seed=recipe.seed,
        augmentation=data.augment,
        join=data.join,
        temperature=data.language_temperature,
        fits=fits,
        positions=positions,
    )
    dev = load_cuts(data.dev, data, _within(budget, positions, fits_model(model)))
    if dev:
        dev = chosen(dev, data.languages, "data.dev")
    return train, SpeechData(dev, positions=positions) if dev else None


def _warn_of_unspelt(llm: LLM, cuts: Sequence[Cut]) -> None:
    """Say which transcripts teach the language model to write its unknown token."""
    bad, letters = llm.unspelt([transcript(cut) for cut in cuts])
    if bad:
        log.warning(
            "data.train: the LLM's tokenizer cannot spell %s, which %.1f %% of the transcripts "
            "have (%d of %d): there it learns to write %s. Leave these out, spell them otherwise, "
            "or take another LLM.",
            " ".join(letters[:20]) + (" ..." if len(letters) > 20 else ""),
            100 * bad / len(cuts),
            bad,
            len(cuts),
            llm.tokenizer.unk_token,
        )


def positions_of(model: SpeechLLM, augmentation: Augmentation | None = None) -> Positions:
    """LLM positions of utterances heard as one, as many as `augmentation` may make them."""
    longest = augmentation.longest if augmentation else lambda seconds: seconds
    return lambda durations, text: model.positions(
        sum(map(longest, durations)), _tokens(model, text)
    )


def _tokens(model: SpeechLLM, text: str) -> int:
    return len(model.transcript_tokens(text)) + 1  # the end token


def _within(budget: int | None, positions: Positions | None, fits: Fits) -> Fits:
    """`fits`, and no utterance is more than the batch may hold."""
    if budget is None or positions is None:
        return fits

    def fault(durations: Sequence[float], text: str) -> str | None:
        found = positions(durations, text)
        over = f"it takes {found} positions, train.max_tokens allows {budget} a batch"
        return over if found > budget else fits(durations, text)

    return fault


def load_cuts(
    corpora: Sequence[Corpus | str],
    data: DataSettings,
    fits: Fits = lambda durations, text: None,
) -> list[Cut]:
    """Usable utterances of corpora, as often as each is repeated; says what was left out."""
    cuts: list[Cut] = []
    for entry in corpora:
        corpus = Corpus(path=entry, repeat=1) if isinstance(entry, str) else entry
        good, report = usable(
            read_corpus(corpus.path),
            max_bad_fraction=data.max_bad_fraction,
            max_seconds=data.max_seconds,
            decode_audio="header",  # what is broken behind it is found, and counted, in training
        )
        found = [(cut, fits([float(cut.duration)], transcript(cut))) for cut in good]
        kept = [cut for cut, fault in found if fault is None]
        faults = [f"utterance {cut.id!r}: {fault}" for cut, fault in found if fault]
        if faults and report.n_in - len(kept) > data.max_bad_fraction * report.n_in:
            raise IsthmusError(
                f"{corpus.path}: {len(faults)} of {report.n_in} utterances do not fit the model, "
                f"such as {faults[0]}. Mend them, lower data.max_seconds, or raise "
                "data.max_bad_fraction (or train.max_tokens, where that is named)."
            )
        left_out = Counter(report.reasons)
        if faults:
            left_out["does_not_fit"] = len(faults)
        log.info(
            "%s: %d utterances, %.2f h%s%s",
            corpus.path,
            len(kept),
            sum(cut.duration for cut in kept) / 3600,
            f", {corpus.repeat} times" if corpus.repeat > 1 else "",
            f"; left out: {dict(left_out)}" if left_out else "",
        )
        for message in [rejection.message for rejection in report.rejections] + faults:
            log.info("  %s", message)
        cuts += kept * corpus.repeat
    return cuts


def fits_model(model: SpeechLLM | ConformerCTC, augmentation: Augmentation | None = None) -> Fits:
    """What is wrong for `model` with utterances heard as one, however `augmentation` draws."""
    if isinstance(model, ConformerCTC):
        return _fits_ctc(model)
    longest = augmentation.longest if augmentation else lambda seconds: seconds
    says = model.projector.ctc is not None

    def fault(durations: Sequence[float], text: str) -> str | None:
        found = model.fault(sum(map(longest, durations)), _tokens(model, text))
        if found is None and says:
            needed = needed_embeddings(model.transcript_tokens(text))
            room = model.audio_tokens(sum(durations))
            if needed > room:
                return f"its text needs {needed} embeddings for CTC, the audio has {room}"
        return f"{found}, as data.augment may lengthen it" if found and augmentation else found

    return fault


def _fits_ctc(model: ConformerCTC) -> Fits:
    """CTC needs a frame for each unit, and one more between two equal ones."""
    letters = letters_known(model.tokenizer)

    def fault(durations: Sequence[float], text: str) -> str | None:
        unknown = sorted(set(text) - letters)
        if unknown:
            return f"its text has {', '.join(map(repr, unknown))}, not among the letters"
        units = model.tokenizer.encode(text, add_special_tokens=False)
        needed = len(units) + sum(a == b for a, b in itertools.pairwise(units))
        frames = model.output_length(int(sum(durations) * SAMPLE_RATE))
        if needed > frames:
            return f"its text needs {needed} frames for CTC, the audio has {frames}"
        return None

    return fault

"""Spelling units that are learnt from the texts before the training of what writes them.

A run keeps its units: learnt again they would be nearly the same, and resuming wants the very same.
"""

from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from isthmus.errors import IsthmusError
from isthmus.files import recover_folder, write_folder
from isthmus.model.parts import loading
from isthmus.model.spelling import for_ctc, learn_units
from isthmus.recipe import CTCRecipe
from isthmus.runs import checkpoint
from isthmus.runs.folder import CHECKPOINTS
from isthmus.settings.datasets import Corpus
from isthmus.speech.corpora import read_corpus
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.languages import chosen
from isthmus.training.parallel import Ranks

UNITS = "units"


def run_units(
    recipe: CTCRecipe, folder: Path, ranks: Ranks, *, resumed: bool
) -> PreTrainedTokenizerFast | None:
    """The units of a run that learns some; None where nothing is to be learnt.

    Raises IsthmusError where a run to resume has lost them.
    """
    if recipe.units is None:
        return None
    kept = folder / UNITS
    recover_folder(kept)
    if resumed and kept.is_dir():
        with loading(str(kept)):
            stored: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
                kept, trust_remote_code=False
            )
        return stored
    if resumed and checkpoint.checkpoints(folder / CHECKPOINTS):
        raise IsthmusError(
            f"{kept} is missing: it holds the units that the run's checkpoints spell with. Bring "
            "it back, or begin again with --overwrite."
        )
    units = recipe.units
    learnt: list[str] = []

    def learn() -> None:
        learnt.append(learn_units(units, texts_of(recipe)).backend_tokenizer.to_str())

    ranks.lead(learn)  # by one: learnt again they would be nearly the same
    (text,) = ranks.gather(learnt)
    return for_ctc(Tokenizer.from_str(text))


def keep_units(units: PreTrainedTokenizerFast | None, folder: Path, ranks: Ranks) -> None:
    """Store learnt units in a run folder that has none."""
    if units is None:
        return

    def write(path: Path) -> None:
        units.save_pretrained(path)

    def keep() -> None:
        if not (folder / UNITS).is_dir():
            write_folder(folder / UNITS, write)

    ranks.lead(keep)


def texts_of(recipe: CTCRecipe) -> list[str]:
    """Transcripts of what a recipe trains on.

    Raises IsthmusError where there are none, and for a language of data.languages without any.
    """
    corpora = [entry.path if isinstance(entry, Corpus) else entry for entry in recipe.data.train]
    cuts = [cut for corpus in corpora for cut in read_corpus(corpus)]
    wanted = chosen(cuts, recipe.data.languages, "data.train")
    texts = [text for text in map(transcript, wanted) if text.strip()]
    if not texts:
        raise IsthmusError(
            "units: data.train has no text to learn sentence pieces from. Name a manifest with "
            "transcripts, and check data.languages."
        )
    return texts

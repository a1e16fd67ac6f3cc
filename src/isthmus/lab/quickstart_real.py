"""The second act of the quickstart: ears for one's own recordings, on the parts of base."""

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import fastcopy
from rich.console import Console

from isthmus.decoding.evaluate import evaluate
from isthmus.decoding.transcriber import load
from isthmus.display import training_display
from isthmus.errors import IsthmusError
from isthmus.recipe import Recipe, change_settings
from isthmus.runs.folder import BASE, SHIPPED_RUNS
from isthmus.runs.loading import stored_recipe
from isthmus.scoring.normalise import lower
from isthmus.speech.corpora import read_corpus, usable
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.runs import train

UTTERANCES, HELD_OUT = 150, 20  # at most: to encode one takes about a second of a core
AT_LEAST = 10
TRAINING = {
    "llm_weight": 0.0,  # the language model is not to learn from so little
    "ctc_weight": 1.0,
    "steps": 150,
    "learning_rate": 2e-4,  # 1e-3 and 5e-5 came less far with a reader whom it had never heard
    "warmup_steps": 10,
    "schedule": "cosine",
    "batch_size": None,
    "max_duration": 60.0,
    "max_tokens": None,
    "accumulate": 1,
    "eval_every": 25,
    "patience": 4,
    "save_every": 150,
}


def run(folder: Path, corpora: Sequence[str]) -> dict[str, Any]:
    """Train the projector of base on recordings with texts, into `folder`/run; the figures.

    The error rate of some that are not trained on is measured before and after. Raises IsthmusError
    for fewer than ten that can be used, and without base.
    """
    console = Console(stderr=True, highlight=False)
    recipe = real_recipe(folder)
    parts = _speech(corpora, recipe.data.max_seconds)
    known = load(BASE)
    (folder / "speech").mkdir(parents=True, exist_ok=True)
    for name, cuts in parts.items():
        console.print(f"{len(cuts)} utterances are {name.replace('-', ' ')}")
        CutSet.from_cuts(cuts).to_file(_manifest(folder, name))
    held_out = [str(_manifest(folder, "held-out"))]
    started = time.perf_counter()
    before = evaluate(known, held_out).scores.pooled
    with training_display(recipe.train.steps, console) as display:
        train(recipe, folder / "run", on_step=display)
    after = evaluate(load(folder / "run"), held_out).scores.pooled
    console.print(
        f"[bold]WER {before.wer:.1%}[/] with base, [bold]{after.wer:.1%}[/] with your run, on what "
        "was held out"
    )
    console.print(f"Read with it: isthmus transcribe a.wav --model {folder / 'run'}", markup=False)
    return {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "seconds": time.perf_counter() - started,
        "run": str(folder / "run"),
    }


def real_recipe(folder: Path) -> Recipe:
    """The recipe of base, to go on from it with the speech in `folder`.

    Raises IsthmusError where base does not ship.
    """
    if not SHIPPED_RUNS[BASE].is_dir():
        raise IsthmusError("This isthmus has no system base. Install one that has.")
    recipe = stored_recipe(SHIPPED_RUNS[BASE])
    data = {name: (str(_manifest(folder, name)),) for name in ("trained-on", "held-out")}
    changes = {
        "train": data["trained-on"],
        "dev": data["held-out"],
        "feature_cache": "bfloat16",
        "augment": None,  # or nothing could be kept
        "join": None,
        "languages": None,
    }
    return recipe.model_copy(
        update={
            "name": "yours",
            "start_from": (BASE,),
            "data": change_settings(recipe.data, changes),
            "train": change_settings(recipe.train, TRAINING),
        }
    )


def _manifest(folder: Path, part: str) -> Path:
    return folder / "speech" / f"{part}.jsonl"


def _speech(corpora: Sequence[str], max_seconds: float) -> dict[str, list[Cut]]:
    """Some of the utterances to be trained on, and others to be held out, drawn by lot."""
    cuts = CutSet.from_cuts(cut for corpus in corpora for cut in read_corpus(corpus))
    good, _ = usable(cuts, max_bad_fraction=1.0, decode_audio="header", max_seconds=max_seconds)
    found = [cut for cut in map(_plain, good) if transcript(cut)]  # some texts are marks alone
    if len(found) < AT_LEAST:
        raise IsthmusError(
            f"{', '.join(corpora)}: {len(found)} utterances can be used, and {AT_LEAST} are needed "
            "at least. `isthmus check` says what is wrong with others."
        )
    random.Random(0).shuffle(found)
    held_out = min(HELD_OUT, len(found) // 5)
    return {"held-out": found[:held_out], "trained-on": found[held_out:][:UTTERANCES]}


def _plain(cut: Cut) -> Cut:
    """A cut with its text as base writes: small letters, and no marks but the apostrophe."""
    return fastcopy(cut, supervisions=[fastcopy(cut.supervisions[0], text=lower(transcript(cut)))])

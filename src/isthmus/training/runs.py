"""Run folders, and the jobs that fill them."""

import contextlib
import hashlib
import json
import logging
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from isthmus.build import build_conformer, build_model
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import LOCK, FolderLock, read_json, write_atomic, write_folder
from isthmus.model.cache import require_cache
from isthmus.model.parts import Source, sources
from isthmus.recipe import CTCRecipe, Experiment, Recipe, dump_recipe
from isthmus.recipe_files import parse_yaml, read_yaml
from isthmus.runs import checkpoint
from isthmus.runs.checkpoint import Progress
from isthmus.runs.feature_cache import (
    Verification,
    feature_cache,
)
from isthmus.runs.folder import BEST, CHECKPOINTS, ENVIRONMENT, MODEL, PARTS, RECIPE
from isthmus.runs.loading import as_recorded, begin_from, compare_sources
from isthmus.training.batches import SpeechData
from isthmus.training.ctc import CTCTask
from isthmus.training.learnt_units import UNITS, keep_units, run_units
from isthmus.training.loop import METRICS, OnStep, fit
from isthmus.training.parallel import Ranks
from isthmus.training.speech_task import SpeechTask, arithmetic, place, prepare
from isthmus.training.training_data import (
    speech_data,
)

DATA = "data.json"
CHANGES = "changes.jsonl"
TENSORBOARD = "tensorboard"
WRITTEN = {RECIPE, PARTS, DATA, ENVIRONMENT, CHANGES, METRICS, BEST, CHECKPOINTS, MODEL}
WRITTEN |= {TENSORBOARD, UNITS}
log = logging.getLogger(__name__)

VERSIONS = ("isthmus", "torch", "transformers", "tokenizers", "safetensors", "lhotse")
COMPARED = (*VERSIONS, "code")  # what must be the same when a run is resumed
SHAPING = re.compile(r"(encoder|projector)\.(?!(.*\.)?(path|revision)$)|llm\.(tune$|lora\b)")
"""Keys that say which weights are trained: those of a run would fit no others."""


@dataclass(frozen=True)
class Opening:
    """What may be done to the run folder."""

    resume: bool = False
    """Go on with the run in it; begin it if there is none yet."""
    overwrite: bool = False
    allow_change: Collection[str] = ()
    """Keys of the recipe that may differ when a run is resumed, `data`, `code`, or a package."""


class RunFolder:
    """A run folder that belongs to this process, or to the processes of one torchrun."""

    def __init__(self, recipe: Experiment, folder: Path, opening: Opening, ranks: Ranks):
        self.recipe = recipe
        self.folder = folder
        self.opening = opening
        self.ranks = ranks
        self.resumed = False
        self._changes: dict[str, tuple[Any, Any]] = {}
        self._lock: FolderLock | None = None

    def __enter__(self) -> Self:
        """Raises IsthmusError when the folder holds anything that the run must not touch."""
        if not self.ranks.leads:
            logging.getLogger("isthmus").setLevel(logging.ERROR)  # one process tells
        try:
            self.ranks.lead(self._enter)
        except BaseException:
            self._release()
            raise
        stored = self.opening.resume and (self.folder / RECIPE).exists()
        self.resumed = self.ranks.any(self.ranks.leads and stored)
        return self

    def __exit__(self, *error: Any) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)

    def begin(
        self, data: Mapping[str, str] | None = None, begun_from: Sequence[Source] = ()
    ) -> None:
        """Write what explains the run; `data` are checksums of what is trained on.

        `begun_from` are the runs that it begins with now. A run that is not resumed is removed
        first.
        """
        if len(set(self.ranks.gather([json.dumps(data, sort_keys=True)]))) > 1:
            raise IsthmusError(
                "The processes do not find the same data: ids, durations or texts differ, or some "
                "cannot read a recording that others can. Give all machines the same files."
            )
        runs = {f"start_from.{place}": one.to_dict() for place, one in enumerate(begun_from)}
        self.ranks.lead(lambda: self._begin(data, runs))

    def _enter(self) -> None:
        if self.folder.exists():  # nothing is made before models and data are there
            self._lock = FolderLock(self.folder).__enter__()
        self._check()

    def _check(self) -> None:
        folder, opening = self.folder, self.opening
        found = {path.name for path in folder.iterdir()} - {LOCK} if folder.exists() else set()
        foreign = sorted(name for name in found if not _is_written(name))
        if not {RECIPE, ENVIRONMENT} <= found:
            if foreign or found & {RECIPE, BEST, CHECKPOINTS, MODEL}:
                raise IsthmusError(
                    f"{folder} exists, is not empty and is no run folder: it holds "
                    f"{', '.join(foreign[:5] or sorted(found)[:5])}. Name another folder."
                )
            if opening.resume and self._lock is None:
                log.info("%s holds no run yet: it begins.", folder)
        elif opening.resume:
            self._refuse(_recipe_changes(folder, self.recipe))
            compare_sources(self.recipe, folder)
            before, now = read_json(folder / ENVIRONMENT), _environment()
            self._refuse({n: (before.get(n), now[n]) for n in COMPARED if before.get(n) != now[n]})
        elif not opening.overwrite:
            raise IsthmusError(
                f"{folder} holds a run already. Add --resume to go on, --overwrite to replace "
                "it, or name another folder with --output-dir."
            )
        elif foreign:
            raise IsthmusError(
                f"{folder} holds {', '.join(foreign[:5])} beside a run, which --overwrite "
                "would not know how to make again. Move it away, or name another folder."
            )

    def _refuse(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Raise IsthmusError for changes that were not allowed."""
        # A key that only one side has may be of another version, and set to what was always done.
        shaping = {key for key, pair in changes.items() if SHAPING.match(key) and None not in pair}
        refused = {k: pair for k, pair in changes.items() if k in shaping or not self._allowed(k)}
        if refused:
            lines = [f"  {key}: {old!r} then, {new!r} now" for key, (old, new) in refused.items()]
            keys = " ".join(f"--allow-change {key}" for key in refused)
            remedy = (
                f"Put it back, or train into a new folder: other weights than these are trained "
                f"with another {', '.join(sorted(shaping))}."
                if shaping
                else f"Put it back, train into a new folder, or allow it: {keys}"
            )
            raise IsthmusError("\n".join([f"{self.folder} was begun otherwise:", *lines, remedy]))
        for key, (old, new) in changes.items():
            log.warning("%s changes within the run: %r then, %r now.", key, old, new)
        self._changes |= changes

    def _allowed(self, key: str) -> bool:
        return any(key == one or key.startswith(f"{one}.") for one in self.opening.allow_change)

    def _begin(self, data: Mapping[str, str] | None, runs: Mapping[str, Any]) -> None:
        if self._lock is None:
            self._lock = FolderLock(self.folder).__enter__()
            self._check()
            if (self.folder / RECIPE).exists() and not self.opening.overwrite:
                raise RetryLater(f"Another process has begun a run in {self.folder} meanwhile.")
        if self.resumed:
            before = read_json(self.folder / DATA) if data is not None else {}
            if data is not None and before != data:
                self._refuse({"data": (before, data)})
            then = read_json(self.folder / PARTS)
            self._refuse({n: (then[n], runs[n]) for n in runs.keys() & then if then[n] != runs[n]})
            self._note_changes()
        else:
            found = [path for path in self.folder.iterdir() if _is_written(path.name)]
            # last those two that make it a run: until then the same command may overwrite it
            last = {RECIPE: 1, ENVIRONMENT: 2}
            for path in sorted(found, key=lambda path: last.get(path.name, 0)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            then = {name: part.to_dict() for name, part in sources(self.recipe).items()}
        _write_json(self.folder / PARTS, then | runs)
        if data is not None:
            _write_json(self.folder / DATA, data)
        _write_json(self.folder / ENVIRONMENT, _environment())
        write_atomic(self.folder / RECIPE, dump_recipe(self.recipe))  # last: now it is a run

    def _note_changes(self) -> None:
        """Add to the folder's history what goes on otherwise than it was begun."""
        if not self._changes:
            return
        steps = [int(path.name[5:]) for path in checkpoint.checkpoints(self.folder / CHECKPOINTS)]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        when = {"date": now, "step": max(steps, default=0)}
        file = self.folder / CHANGES
        lines = [file.read_text(encoding="utf-8")] if file.exists() else []
        for key, (before, after) in self._changes.items():
            lines.append(json.dumps(when | {"key": key, "before": before, "after": after}) + "\n")
        write_atomic(file, "".join(lines))


def _is_written(name: str) -> bool:
    """Whether a run writes this, or leaves it when it is killed in writing."""
    halfway = re.fullmatch(r"\.(.+)\.(partial|replaced|removed)", name)
    return (halfway[1] if halfway else name) in WRITTEN


def _environment() -> dict[str, Any]:
    """What the run is computed with."""
    package = Path(__file__).resolve().parent.parent
    code = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        code.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return {name: version(name) for name in VERSIONS} | {
        "code": code.hexdigest()[:16],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "command": sys.argv[1:],
    }


def _recipe_changes(folder: Path, recipe: Experiment) -> dict[str, tuple[Any, Any]]:
    """The keys in which a recipe differs from that of the run."""
    before, now = _flat(read_yaml(folder / RECIPE)), _flat(parse_yaml(dump_recipe(recipe)))
    keys = [*now, *(key for key in before if key not in now)]
    return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        below = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{key}.") if below else {prefix + key: value}
    return found


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")


def _digests(train: SpeechData, dev: SpeechData | None) -> dict[str, str]:
    """SHA-256 of what is trained and validated on."""
    return {"train": train.digest()} | ({"dev": dev.digest()} if dev else {})


def train(
    recipe: Recipe,
    folder: Path,
    opening: Opening = Opening(),
    *,
    on_step: OnStep = lambda metrics: None,
    on_task: Callable[[SpeechTask], None] = lambda task: None,
) -> Progress:
    """Train what a recipe does not freeze; `folder` is then a run to decode with.

    `on_task` is shown model and data before the first step, to watch, not to touch. Nothing is
    written before the models and the data are loaded.
    """
    with Ranks() as ranks, RunFolder(recipe, folder, opening, ranks) as run:
        torch.manual_seed(recipe.seed)
        pinned = as_recorded(recipe, folder) if run.resumed else recipe
        model = build_model(pinned)
        going_on = run.resumed and checkpoint.checkpoints(folder / CHECKPOINTS)
        others = () if going_on else recipe.start_from
        begun_from = [begin_from(model, recipe, other) for other in others]
        if recipe.train.llm_weight == 0 and recipe.llm.tune != "frozen" and not recipe.start_from:
            log.warning(
                "llm.tune is %s, but train.llm_weight is 0: the LLM never runs, and nothing of it "
                "is trained. Set llm.tune to frozen, or train.llm_weight above 0.",
                recipe.llm.tune,
            )
        place(model, recipe.train, ranks)
        require_cache(model.llm.network, recipe.llm.path)
        for line in [*model.summary(), *arithmetic(model, recipe, ranks)]:
            log.info(line)
        train_data, dev = speech_data(recipe, model)
        run.begin(_digests(train_data, dev), begun_from)
        task = SpeechTask(model, train_data, dev, recipe)
        cache = feature_cache(recipe, model)
        task.use_cache(cache)
        for line in prepare(model, recipe.train, ranks, cached=cache is not None):
            log.info(line)
        on_task(task)
        return fit(task, recipe.train, folder, resume=run.resumed, on_step=on_step, ranks=ranks)


def cache_features(
    recipe: Recipe, on_utterance: Callable[[int, int], None], *, only_verify: bool = False
) -> Verification | None:
    """Fill the feature cache of a recipe with what it trains and validates on, and read it all.

    Several processes share the filling, and none of them waits to read: None.
    """
    if recipe.data.feature_cache == "none":
        raise IsthmusError(
            "data.feature_cache is none. Choose a precision: add data.feature_cache=bfloat16."
        )
    with Ranks() as ranks:
        model = build_model(recipe)
        model.encoder.to(ranks.device)  # nothing else has work
        cache = feature_cache(recipe, model, strict=True)
        if cache is None:
            raise IsthmusError("This recipe has no frames that could be kept; the log says why.")
        with contextlib.closing(cache):
            if not only_verify:
                task = SpeechTask(model, *speech_data(recipe, model), recipe)
                task.use_cache(cache)
                task.fill_cache(ranks, on_utterance)
            return cache.verify() if ranks.world == 1 else None


def pretrain_ctc(
    recipe: CTCRecipe,
    folder: Path,
    opening: Opening = Opening(),
    *,
    on_step: OnStep = lambda metrics: None,
) -> Progress:
    """Train a Conformer with CTC; `folder`/model is the encoder to name in a recipe."""
    with Ranks() as ranks, RunFolder(recipe, folder, opening, ranks) as run:
        torch.manual_seed(recipe.seed)
        units = run_units(recipe, folder, ranks, resumed=run.resumed)
        model = build_conformer(recipe, units).to(ranks.device)
        train_data, dev = speech_data(recipe, model)
        run.begin(_digests(train_data, dev))
        keep_units(units, folder, ranks)
        task = CTCTask(model, train_data, dev, recipe)
        end = fit(task, recipe.train, folder, resume=run.resumed, on_step=on_step, ranks=ranks)
        checkpoint.load_weights(folder / BEST, task.state())
        ranks.lead(lambda: write_folder(folder / MODEL, model.cpu().eval().save))
        return end

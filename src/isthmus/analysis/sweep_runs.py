"""The runs of a sweep: trained, tested, and put into the table, each once, whoever does it.

There is no coordinator. A run is locked while one process is at it, so that the same command,
started several times, spreads the sweep over processes and machines; what is finished is never
done again, and what was killed goes on.
"""

import contextlib
import errno
import gc
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from isthmus.analysis.curves import SMOOTH
from isthmus.analysis.emergence import find_emergence
from isthmus.analysis.evaluate import Evaluation, evaluate, load_sets
from isthmus.analysis.perplexity import word_perplexity
from isthmus.analysis.report import Curves
from isthmus.analysis.svg import downsample, moving_mean
from isthmus.analysis.sweep import SWEEP, Plan, Run
from isthmus.analysis.sweep_table import Table, write_tables
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import LOCK, MANIFEST, FolderLock, read_json, require_space, write_atomic
from isthmus.model.parts import source
from isthmus.recipe import CTCRecipe, LanguageRecipe, checked_settings
from isthmus.scoring import normaliser
from isthmus.speech.synthesis import draw_texts, synthesise_corpus
from isthmus.training.batches import SpeechData, transcript
from isthmus.training.checkpoint import Progress
from isthmus.training.folder import ENVIRONMENT
from isthmus.training.loop import METRICS, OnStep
from isthmus.training.runs import (
    DATA,
    MODEL,
    PARTS,
    Opening,
    pretrain_ctc,
    pretrain_lm,
    train,
)

RESULT = "result.json"
FAULT = "error.txt"
TRANSCRIPTS = "transcripts"
POLL_SECONDS = 2.0
UTTERANCE_BYTES = 100_000  # of synthetic speech, generously
NORMALISER = "basic"
FULL = (errno.ENOSPC, errno.EDQUOT)

Observe = Callable[[int], AbstractContextManager[OnStep]]
log = logging.getLogger(__name__)


@dataclass
class Sweeper:
    """A plan on its way to a table."""

    plan: Plan
    observe: Observe  # gives an observer of so many training steps
    allow_change: Collection[str] = ()  # as of Opening, for runs that were begun
    failed: dict[str, str] = field(default_factory=dict)  # row -> why

    def reproduce(self, only: Collection[str] = ()) -> Table:
        """Do what is left of the rows, or of those named, and write the table after each.

        Rows that another process is at are looked at again until they are finished. A row that
        cannot be done is listed in `failed`, and the others go on.

        Raises:
            IsthmusError: before anything is done, for unknown rows and corpora that are not there.
            RetryLater: the disk is full; the same command goes on.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise IsthmusError(
                "A sweep shares out its rows by itself: instead of torchrun, start `isthmus "
                "reproduce` once for each GPU (CUDA_VISIBLE_DEVICES)."
            )
        plan = self.plan
        waiting = plan.chosen(only)
        try:
            todo = [run for run in waiting if not (plan.run_folder(run) / RESULT).exists()]
            if todo:
                plan.check_data(todo)
            while waiting:
                busy = [run for run in waiting if not self._visit(run)]
                if busy and len(busy) < len(waiting):
                    names = ", ".join(run.row.name for run in busy)
                    log.info("Other processes are at %s: waiting for them.", names)
                if busy:
                    time.sleep(POLL_SECONDS)
                waiting = busy
            return self._write_tables()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise RetryLater(
                f"{error.filename or plan.folder} cannot be written: {error.strerror}. Nothing "
                "finished is lost: make room, and give the same command again."
            ) from error

    @property
    def _opening(self) -> Opening:
        return Opening(resume=True, allow_change=self.allow_change)

    def _visit(self, run: Run) -> bool:
        """Finish a run, and write the table if it was not yet; False: another process is at it."""
        lock = _try_lock(self.plan.state_folder(run.name))
        if lock is None:
            return False
        fault = self.plan.state_folder(run.name) / FAULT
        with lock:
            try:
                new = self._finish(run)
                fault.unlink(missing_ok=True)
            except RetryLater:
                raise
            except (IsthmusError, torch.OutOfMemoryError) as error:
                log.error("Row %s failed: %s", run.row.name, error)
                self.failed[run.row.name] = str(error)
                write_atomic(fault, f"{error}\n")
                new = True
        if new:
            self._write_tables()
        return True

    def _finish(self, run: Run) -> bool:
        """Do what is left of a run; False: nothing was."""
        folder = self.plan.run_folder(run)
        result = read_result(folder)
        new = result is None
        if result is None:
            log.info("Row %s: %s", run.row.name, folder)
            self._make_shared(run)
            recipe = self.plan.expanded(run.recipe)
            with self.observe(recipe.train.steps) as on_step:
                end = train(recipe, folder, self._opening, on_step=on_step)
            gc.collect()  # two large models need not fit at once
            transcriber = load(str(folder), cached=True)
            result = self._measure(run, transcriber, end)
            _write_json(folder / RESULT, result)
        else:
            self._check(run, result)
            transcriber = None
        if "perplexity" in self.plan.sweep.measure and "perplexity" not in result:
            transcriber = transcriber or load(str(folder), cached=True)
            result["perplexity"] = self._perplexity(transcriber)
            _write_json(folder / RESULT, result)
            new = True
        return new

    def _perplexity(self, transcriber: Transcriber) -> dict[str, Any]:
        """The LLM's, a word of the transcripts of each test set."""
        test, normalise = self._test, normaliser("lower")
        found = {}
        for name, cuts in zip(test, load_sets(list(test.values()))[0].values(), strict=True):
            texts = [normalise(transcript(cut)) for cut in cuts]
            found[name] = word_perplexity(transcriber.model.llm, texts).to_dict()
        return found

    @cached_property
    def _test(self) -> dict[str, str]:
        """The test corpora as they are found on this machine."""
        test = self.plan.scale.test
        return {name: path.replace(SWEEP, str(self.plan.folder)) for name, path in test.items()}

    @cached_property
    def _digests(self) -> dict[str, str]:
        """SHA-256 of what is tested on."""
        sets = load_sets(list(self._test.values()))[0].values()
        return {n: SpeechData(cuts).digest() for n, cuts in zip(self._test, sets, strict=True)}

    def _measure(self, run: Run, transcriber: Transcriber, end: Progress) -> dict[str, Any]:
        """All that the table wants to know of a finished run."""
        folder = self.plan.run_folder(run)
        test = self._test
        shutil.rmtree(folder / TRANSCRIPTS, ignore_errors=True)  # of one that was killed
        found = evaluate(
            transcriber, list(test.values()), normaliser=NORMALISER, folder=folder / TRANSCRIPTS
        )
        curves = Curves.read(_metrics(folder / METRICS))
        jump = find_emergence(curves.steps, curves.accuracy)
        parts = {
            name: (sum(p.numel() for p in part.parameters()), _trained(part))
            for name, part in transcriber.model.named_children()
        }
        return {
            "recipe": run.recipe.model_dump(mode="json"),
            "test": self._digests,
            "parts": read_json(folder / PARTS),
            "data": read_json(folder / DATA),
            "environment": read_json(folder / ENVIRONMENT),
            **_scores(found, list(test)),
            "parameters": {name: total for name, (total, _) in parts.items()}
            | {"trained": sum(trained for _, trained in parts.values())},
            "steps": end.step,
            "best_step": end.best_step,
            "best_loss": end.best_loss,
            "training_seconds": sum(
                one.get("step_seconds", 0) for one in _metrics(folder / METRICS)
            ),
            "emergence": jump and {"step": jump.step, "before": jump.before, "after": jump.after},
            "accuracy": downsample(
                curves.steps, moving_mean(curves.accuracy, max(1, len(curves.steps) // SMOOTH))
            ),
        }

    def _check(self, run: Run, result: Mapping[str, Any]) -> None:
        """Raise IsthmusError where a finished run is not what would be done now."""
        folder = self.plan.run_folder(run)
        changes = [*_changed(run.recipe, result["recipe"], folder)]
        with contextlib.suppress(IsthmusError):  # what is not there any more cannot differ
            for name, digest in self._digests.items():
                if result["test"].get(name) != digest:
                    changes.append(f"the test set {name} has other utterances")
        for name, part in result["parts"].items():
            if Path(part["name"]).is_dir() and source(part["name"]).sha256 != part["sha256"]:
                changes.append(f"the {name} {part['name']} has other files")
        _refuse(folder, changes)

    def _make_shared(self, run: Run) -> None:
        """Speech and models that a run wants, each once; one process makes, the others wait."""
        shared, root = self.plan.shared([run]), self.plan.folder
        if not shared.speech and not shared.models:
            return
        with _wait_for(self.plan.state_folder("shared")):
            for name, speech in shared.speech.items():
                folder = root / "speech" / name
                _stamp(folder, speech)
                if not (folder / "manifest.jsonl").exists():
                    log.info("Speaking %d utterances: %s", speech.utterances, folder)
                    require_space(folder, speech.utterances * UTTERANCE_BYTES)
                    texts = draw_texts(speech.utterances, speech.seed, speech.domains)
                    synthesise_corpus(folder, texts, speech.seed, held_out=speech.held_out)
            for name, recipe in shared.models.items():
                folder = root / "models" / name
                _stamp(folder, recipe)
                if not (folder / MODEL / MANIFEST).exists():
                    self._pretrain(recipe, folder)

    def _pretrain(self, recipe: CTCRecipe | LanguageRecipe, folder: Path) -> None:
        log.info("Pretraining: %s", folder)
        with self.observe(recipe.train.steps) as on_step:
            if isinstance(recipe, CTCRecipe):
                pretrain_ctc(self.plan.expanded(recipe), folder, self._opening, on_step=on_step)
            else:
                pretrain_lm(self.plan.expanded(recipe), folder, self._opening, on_step=on_step)

    def _write_tables(self) -> Table:
        plan = self.plan
        with _wait_for(plan.state_folder(f"table-{plan.name}")):
            failed = dict(self.failed)
            results = {}
            for run in plan.runs:
                name, fault = run.row.name, plan.state_folder(run.name) / FAULT
                result = read_result(plan.run_folder(run))
                if result is None and fault.exists():  # of another process, or an earlier time
                    failed.setdefault(name, fault.read_text(encoding="utf-8").strip())
                elif result is not None and name not in failed:
                    results[name] = result
            table = Table(plan, results, failed)
            write_tables(table)
            return table


def states(plan: Plan, only: Collection[str] = ()) -> list[dict[str, Any]]:
    """What there is to do: each run, its changes to the base, and how far it is."""
    return [
        {
            "row": run.row.name,
            "recipe": run.row.recipe or plan.scale.recipe,
            "set": run.row.set,
            "run": str(plan.run_folder(run)),
            "state": _state(plan, run),
        }
        for run in plan.chosen(only)
    ]


def _state(plan: Plan, run: Run) -> str:
    folder, state = plan.run_folder(run), plan.state_folder(run.name)
    if (folder / RESULT).exists():
        return "done"
    if (state / LOCK).exists():
        lock = _try_lock(state)
        if lock is None:
            return "running"
        lock.close()
    if (state / FAULT).exists():
        return "failed"
    return "begun" if folder.exists() else "to do"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run."""
    return dict(read_json(folder / RESULT)) if (folder / RESULT).exists() else None


def _try_lock(folder: Path) -> ExitStack | None:
    """What holds the lock of a folder until it is left; None where another process has it."""
    held = ExitStack()
    try:
        held.enter_context(FolderLock(folder))
        return held
    except RetryLater as error:
        if isinstance(error.__cause__, BlockingIOError):
            return None
        raise


@contextlib.contextmanager
def _wait_for(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, however long it takes to get it."""
    said = False
    while (lock := _try_lock(folder)) is None:
        if not said:
            log.info("Another process holds %s: waiting for it.", folder)
        said = True
        time.sleep(POLL_SECONDS / 10)
    with lock:
        yield


def _stamp(folder: Path, settings: Any) -> None:
    """Say beside a folder what it is made from; raises IsthmusError where that was another."""
    file = folder.with_name(f"{folder.name}.json")
    if file.exists():
        _refuse(folder, [*_changed(settings, read_json(file), folder)])
    else:
        _write_json(file, settings.model_dump(mode="json"))


def _changed(now: Any, stored: Any, folder: Path) -> Iterator[str]:
    """Settings in which `now` differs from what is stored; what is new since has its default."""
    before = checked_settings(type(now), stored, f"{folder} was made by another version")
    yield from _differences(before.model_dump(mode="json"), now.model_dump(mode="json"))


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            below = f"{key}.{name}" if key else str(name)
            yield from _differences(before.get(name), now.get(name), below)
    elif before != now:
        yield f"{key}: {before!r} then, {now!r} now"


def _refuse(folder: Path, changes: Sequence[str]) -> None:
    if changes:
        raise IsthmusError(
            "\n".join([f"{folder} was made otherwise:", *(f"  {line}" for line in changes)])
            + "\nPut it back, remove that folder, or name another with --output-dir."
        )


def _scores(found: Evaluation, names: Sequence[str]) -> dict[str, Any]:
    """Error rates of each set and of all, with errors and words of each utterance for pairing."""
    sets = {
        name: {
            **score.to_dict(),
            "left_out": dict(found.left_out.get(own, {})),
            "errors": {one.id: [one.counts.errors, one.counts.words] for one in score.utterances},
        }
        for name, (own, score) in zip(names, found.scores.sets.items(), strict=True)
    }
    return {"sets": sets, "all": found.scores.pooled.to_dict(), "decode": found.settings}


def _metrics(file: Path) -> list[dict[str, float]]:
    with file.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [{k: math.nan if v is None else v for k, v in one.items()} for one in found]


def _trained(part: torch.nn.Module) -> int:
    return sum(value.numel() for value in part.parameters() if value.requires_grad)


def _write_json(path: Path, values: object) -> None:
    write_atomic(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

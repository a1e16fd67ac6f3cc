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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from isthmus.decoding.evaluate import Evaluation, evaluate, load_sets
from isthmus.decoding.transcriber import Transcriber, load
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import LOCK, MANIFEST, FolderLock, read_json, require_space, write_atomic
from isthmus.lab.curves import SMOOTH
from isthmus.lab.emergence import find_emergence
from isthmus.lab.language_model import pretrain_lm
from isthmus.lab.perplexity import word_perplexity
from isthmus.lab.report import Curves
from isthmus.lab.svg import downsample, moving_mean
from isthmus.lab.sweep import Plan, Run, Speech
from isthmus.lab.sweep_checks import (
    Checks,
    check_stamp,
    corpus_digests,
    shared_folders,
    stamp_file,
)
from isthmus.lab.sweep_table import Table, write_tables
from isthmus.lab.synthesis import draw_texts, synthesise_corpus
from isthmus.model.encoder import parameters
from isthmus.recipe import CTCRecipe, LanguageRecipe
from isthmus.runs.checkpoint import Progress
from isthmus.runs.folder import ENVIRONMENT, MODEL, PARTS
from isthmus.scoring import normaliser
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.loop import METRICS, OnStep
from isthmus.training.runs import (
    Opening,
    pretrain_ctc,
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

    def reproduce(self, only: Collection[str] = ()) -> Table:
        """Do what is left of the rows, or of those named, and write the table after each.

        Rows that another process is at are looked at again until they are finished. A row that
        cannot be done is listed in the table's `failed`, and the others go on.

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
            said: list[Run] = []
            while waiting:
                busy = [run for run in waiting if not self._visit(run)]
                if busy and busy != said:
                    names = ", ".join(run.row.name for run in busy)
                    log.info("Other processes are at %s: waiting for them.", names)
                if busy:
                    time.sleep(POLL_SECONDS)
                waiting = said = busy
            return self._write_tables()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise RetryLater(
                f"{error.filename or plan.folder} cannot be written: {error.strerror}. Nothing "
                "finished is lost: make room, and give the same command again."
            ) from error

    @cached_property
    def _checks(self) -> Checks:
        return Checks(self.plan)

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
            for shared, settings in shared_folders(self.plan, run):
                self._make_shared(shared, settings)
            # Before it is trained on: what changes from then on is refused by the training.
            speech = corpus_digests(self.plan, self.plan.corpora([run]))
            recipe = self.plan.expanded(run.recipe)
            with self.observe(recipe.train.steps) as on_step:
                end = train(recipe, folder, self._opening, on_step=on_step)
            gc.collect()  # two large models need not fit at once
            transcriber = load(str(folder), cached=True)
            test = self.plan.scale.test
            result = self._measure(run, transcriber, end) | {
                "test": {name: speech[path] for name, path in test.items()},
                "corpora": {k: v for k, v in speech.items() if k not in test.values()},
            }
            _write_json(folder / RESULT, result)
        else:
            self._checks.check(run, result)
            transcriber = None
        if "perplexity" in self.plan.sweep.measure and "perplexity" not in result:
            transcriber = transcriber or load(str(folder), cached=True)
            result["perplexity"] = self._perplexity(transcriber)
            _write_json(folder / RESULT, result)
            new = True
        return new

    def _perplexity(self, transcriber: Transcriber) -> dict[str, Any]:
        """The LLM's, a word of the transcripts of each test set."""
        normalise = normaliser("lower")
        found = {}
        sets = load_sets(self._test)[0].values()
        for name, cuts in zip(self.plan.scale.test, sets, strict=True):
            texts = [normalise(transcript(cut)) for cut in cuts]
            found[name] = word_perplexity(transcriber.model.llm, texts).to_dict()
        return found

    @property
    def _test(self) -> list[str]:
        """The test corpora as they are found on this machine."""
        return [self.plan.found(corpus) for corpus in self.plan.scale.test.values()]

    def _measure(self, run: Run, transcriber: Transcriber, end: Progress) -> dict[str, Any]:
        """All that the table wants to know of a finished run."""
        folder = self.plan.run_folder(run)
        shutil.rmtree(folder / TRANSCRIPTS, ignore_errors=True)  # of one that was killed
        found = evaluate(
            transcriber, self._test, normaliser=NORMALISER, folder=folder / TRANSCRIPTS
        )
        curves = Curves.read(_metrics(folder / METRICS))
        jump = find_emergence(curves.steps, curves.accuracy)
        parts = {n: parameters(part) for n, part in transcriber.model.named_children()}
        sizes: dict[str, int | None] = {name: total for name, (total, _) in parts.items()}
        if run.recipe.llm.quantise != "none":
            sizes["llm"] = None  # packed weights and their scales are no count of parameters
        return {
            "recipe": run.recipe.model_dump(mode="json"),
            "parts": read_json(folder / PARTS),
            "environment": read_json(folder / ENVIRONMENT),
            **_scores(found, list(self.plan.scale.test)),
            "parameters": {**sizes, "trained": sum(trained for _, trained in parts.values())},
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

    def _make_shared(self, folder: Path, settings: Speech | CTCRecipe | LanguageRecipe) -> None:
        """Speech or a model that runs share, once: one process makes it, the others wait."""
        speech = isinstance(settings, Speech)
        last = folder / "manifest.jsonl" if speech else folder / MODEL / MANIFEST
        check_stamp(folder, settings)
        if last.exists():
            return
        with _wait_for(self.plan.state_folder(f"{folder.parent.name}-{folder.name}")):
            check_stamp(folder, settings)
            _write_json(stamp_file(folder), settings.model_dump(mode="json"))
            if last.exists():
                return
            if isinstance(settings, Speech):
                _speak(settings, folder)
            else:
                self._pretrain(settings, folder)

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
            results, failed = {}, {}
            for run in plan.runs:
                fault = plan.state_folder(run.name) / FAULT
                result = read_result(plan.run_folder(run))
                if result is not None and not fault.exists():
                    try:
                        self._checks.check(run, result)
                    except IsthmusError as error:  # a row that was not asked for
                        write_atomic(fault, f"{error}\n")
                if fault.exists():  # perhaps of another process, or an earlier time
                    failed[run.row.name] = fault.read_text(encoding="utf-8").strip()
                elif result is not None:
                    results[run.row.name] = result
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
    failed = (state / FAULT).exists()
    if (folder / RESULT).exists() and not failed:
        return "done"
    if (state / LOCK).exists():
        lock = _try_lock(state)
        if lock is None:
            return "running"
        lock.close()
    if failed:
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


def _speak(speech: Speech, folder: Path) -> None:
    log.info("Speaking %d utterances: %s", speech.utterances, folder)
    require_space(folder, speech.utterances * UTTERANCE_BYTES)
    texts = draw_texts(speech.utterances, speech.seed, speech.domains)
    synthesise_corpus(folder, texts, speech.seed, held_out=speech.held_out)


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


def _write_json(path: Path, values: object) -> None:
    write_atomic(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

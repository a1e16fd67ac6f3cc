"""What is finished is taken only where it is what would be done now: settings, files and speech."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from isthmus.decoding.evaluate import load_sets
from isthmus.errors import IsthmusError
from isthmus.files import read_json
from isthmus.lab.sweep import Plan, Run
from isthmus.model.parts import sources
from isthmus.recipe import checked_settings
from isthmus.settings.base import SHIPPED
from isthmus.speech.utterances import find_corpus
from isthmus.training.batches import SpeechData


@dataclass
class Checks:
    """Compares finished runs of a plan with what is found now; reads each corpus and file once.

    What is not there any more cannot differ: results can be shown without it.
    """

    plan: Plan
    _known: dict[str, Any] = field(default_factory=dict)  # digests, by what they are of

    def check(self, run: Run, result: Mapping[str, Any]) -> None:
        """Raise IsthmusError, with the differences, where `result` is not what would be done."""
        folder = self.plan.run_folder(run)
        refuse(folder, changed(run.recipe, result["recipe"], folder))
        for below, settings in shared_folders(self.plan, run):
            check_stamp(below, settings)
        refuse(folder, [*self._other_parts(run, result), *self._other_speech(result)])

    def _other_parts(self, run: Run, result: Mapping[str, Any]) -> Iterator[str]:
        """Pretrained parts, but for those of the hub, where the revision says what they are."""
        try:
            recipe = self.plan.expanded(run.recipe)
        except IsthmusError:  # a variable that names a folder is not set
            return
        for name, part in result["parts"].items():
            settings = attrgetter(name)(recipe)
            path = settings.path
            if path in SHIPPED or Path(path).expanduser().exists():
                if path not in self._known:
                    self._known[path] = sources(settings)[""].sha256
                if self._known[path] != part["sha256"]:
                    yield f"the {name} {path} has other files"

    def _other_speech(self, result: Mapping[str, Any]) -> Iterator[str]:
        for name, digest in result["test"].items():
            if self._digest(self.plan.scale.test[name]) not in (digest, None):
                yield f"the test set {name} has other utterances"
        for corpus, digest in result.get("corpora", {}).items():  # which the oldest do not have
            if self._digest(corpus) not in (digest, None):
                yield f"{corpus}, which was trained on, has other utterances"

    def _digest(self, corpus: str) -> str | None:
        if corpus not in self._known:
            try:
                find_corpus(self.plan.found(corpus))
            except IsthmusError:
                return None
            [self._known[corpus]] = corpus_digests(self.plan, [corpus]).values()
        digest: str = self._known[corpus]
        return digest


def corpus_digests(plan: Plan, corpora: Iterable[str]) -> dict[str, str]:
    """SHA-256 over the utterances of each corpus, by its name in the sweep.

    Not of those that a model has room for, as no model is at hand where a result is checked.
    """
    names = list(corpora)
    sets = load_sets([plan.found(name) for name in names])[0].values()
    return {name: SpeechData(cuts).digest() for name, cuts in zip(names, sets, strict=True)}


def shared_folders(plan: Plan, run: Run) -> Iterator[tuple[Path, Any]]:
    """What is made before a run, in the order of the making: its folder and its settings."""
    shared = plan.shared([run])
    for kind, made in (("speech", shared.speech), ("models", shared.models)):
        for name, settings in made.items():
            yield plan.folder / kind / name, settings


def stamp_file(folder: Path) -> Path:
    """Says what a folder that runs share is made from."""
    return folder.with_name(f"{folder.name}.json")


def check_stamp(folder: Path, settings: Any) -> None:
    """Raise IsthmusError where a shared folder was made from other settings."""
    file = stamp_file(folder)
    if file.exists():
        refuse(folder, changed(settings, read_json(file), folder))


def changed(now: Any, stored: Any, folder: Path) -> list[str]:
    """Settings in which `now` differs from what is stored; what is new since has its default."""
    before = checked_settings(type(now), stored, f"{folder} was made by another version")
    return [*_differences(before.model_dump(mode="json"), now.model_dump(mode="json"))]


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            below = f"{key}.{name}" if key else str(name)
            yield from _differences(before.get(name), now.get(name), below)
    elif before != now:
        yield f"{key}: {before!r} then, {now!r} now"


def refuse(folder: Path, changes: Sequence[str]) -> None:
    """Raise IsthmusError if there are changes."""
    if changes:
        raise IsthmusError(
            "\n".join([f"{folder} was made otherwise:", *(f"  {line}" for line in changes)])
            + "\nPut it back, remove that folder, or name another with --output-dir."
        )

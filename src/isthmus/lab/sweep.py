"""A sweep: the experiments behind one table or figure of a paper, as one file.

It has scales: `paper` as the authors did it, `tiny` with models that train in minutes anywhere. A
row is a base recipe with settings changed. `${SWEEP}` in it stands for the folder of the scale,
where what all sweeps share lies: speech/NAME, models/NAME/model, and the runs.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from isthmus.errors import IsthmusError, suggest
from isthmus.recipe import (
    CTCRecipe,
    Experiment,
    LanguageRecipe,
    Recipe,
    checked_settings,
    named_models,
)
from isthmus.recipe_files import find_sweep, read_recipe, read_yaml, shipped_sweeps
from isthmus.settings.base import PartSettings, PretrainedSettings
from isthmus.settings.datasets import DataSettings
from isthmus.speech.utterances import expand_path, find_corpus

SWEEP = "${SWEEP}"
SHOWN = 3  # corpora of a kind that are not there
PREPARED = ("librispeech", "mls")  # by `isthmus prepare`, for variables of these names

log = logging.getLogger(__name__)

AnyExperiment = TypeVar("AnyExperiment", bound=Experiment)


class Row(PartSettings):
    """One run of a sweep, and what the paper has for it."""

    name: str
    recipe: str | None = None
    """Another base than the scale's."""
    set: dict[str, Any] = Field({})
    """Settings of the base to change, by dotted keys."""
    expected: dict[str, float] = Field({})
    """The paper's WER in percent, by test set."""
    printed: dict[str, str] = Field({})
    """Other figures of the paper, to be shown as they are."""


class Claim(PartSettings):
    """What the paper concluded from two rows: fewer errors, or an earlier emergence."""

    says: str
    lower: str | None = None
    earlier: str | None = None
    than: str

    @model_validator(mode="after")
    def _one_kind(self) -> "Claim":
        if (self.lower is None) == (self.earlier is None):
            raise ValueError("give one of lower and earlier, the name of a row")
        return self

    @property
    def row(self) -> str:
        """The one that is said to be better."""
        return self.lower or self.earlier or ""


class Speech(PartSettings):
    """A synthetic corpus (isthmus.lab.synthesis)."""

    utterances: int = Field(ge=1)
    seed: int = Field(ge=0)
    domains: dict[str, float] | None = None
    held_out: bool = False


class Model(PartSettings):
    """A model that a sweep pretrains."""

    recipe: str
    set: dict[str, Any] = Field({})
    """Settings of the recipe to change."""


class Scale(PartSettings):
    """The runs of a sweep at one size."""

    recipe: str
    """The base of its rows: a file, or the name of a shipped recipe."""
    set: dict[str, Any] = Field({})
    """Settings of the base to change in all rows."""
    test: dict[str, str] = Field(min_length=1)
    """Corpora that each run is tested on, by name."""
    average: Literal["words", "sets"] = "words"
    """What all test sets together mean: all their words pooled, or the mean of the sets' rates."""
    rows: tuple[Row, ...] = Field(min_length=1)
    against: str | None = None
    """The row that all are compared with; the first unless given."""
    speech: dict[str, Speech] = Field({})
    models: dict[str, Model | str] = Field({})
    """Recipes of pretraining, by the name of the model; a later one may start from an earlier."""
    claims: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _names_are_known(self) -> "Scale":
        names = [row.name for row in self.rows]
        if len({*names}) < len(names):
            raise ValueError(f"two rows of {', '.join(names)} have one name")
        named = [self.against] if self.against else []
        for claim in self.claims:
            named += [claim.row, claim.than]
        for row in self.rows:
            for one in row.expected.keys() - self.test:
                raise ValueError(f"row {row.name!r} expects {one!r}, which is not under test")
        for name in named:
            if name not in names:
                raise ValueError(f"no row {name!r}.{suggest(name, names)}")
        return self


class Sweep(PartSettings):
    """One table or figure."""

    title: str
    source: str
    """Where the expected figures are from."""
    scales: dict[Literal["paper", "tiny"], Scale] = Field(min_length=1)
    figure: Literal["accuracy"] | None = None
    """Also draw next-token accuracy against training step."""
    measure: tuple[Literal["perplexity"], ...] = ()
    """perplexity: the LLM's, a word of the test transcripts."""


@dataclass(frozen=True)
class Run:
    """What a row comes to: equal runs of all sweeps of a scale are one."""

    row: Row
    recipe: Recipe  # with ${SWEEP} in it
    test: Mapping[str, str]

    @property
    def name(self) -> str:
        """A folder name, of what is joined and a checksum of everything."""
        # Defaults are left out: what a later version adds does not part old runs from their rows.
        values = self.recipe.model_dump(mode="json")
        kinds = {k: v.get("type", v.get("template")) for k, v in values.items() if type(v) is dict}
        changed = self.recipe.model_dump(mode="json", exclude_defaults=True)
        key = json.dumps([kinds, changed, dict(self.test)], sort_keys=True)
        parts = [_short(part) for part in (self.recipe.encoder, self.recipe.llm)]
        words = re.sub(r"[^\w.-]+", "-", "_".join(parts))
        return f"{words}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _short(part: PartSettings) -> str:
    if not isinstance(part, PretrainedSettings):
        return str(getattr(part, "type", ""))
    words = [word for word in part.path.split("/") if word not in ("", "model")]
    return words[-1] if words else part.path


@dataclass(frozen=True)
class Shared:
    """What is made before runs, for all sweeps of a scale; models in the order of their making."""

    speech: Mapping[str, Speech]
    models: Mapping[str, CTCRecipe | LanguageRecipe]


@dataclass(frozen=True)
class Plan:
    """A sweep at one scale, in a folder."""

    name: str
    sweep: Sweep
    scale: Scale
    folder: Path  # of the scale: ${SWEEP}
    runs: tuple[Run, ...]

    def chosen(self, only: Collection[str]) -> list[Run]:
        """The runs of these rows, or of all. Raises IsthmusError for an unknown row."""
        names = [run.row.name for run in self.runs]
        for name in only:
            if name not in names:
                raise IsthmusError(
                    f"{self.name} has no row {name!r}.{suggest(name, names)} Rows: "
                    f"{', '.join(names)}."
                )
        return [run for run in self.runs if not only or run.row.name in only]

    def run_folder(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def found(self, corpus: str) -> str:
        """A corpus of the sweep, with this folder for `${SWEEP}`."""
        return corpus.replace(SWEEP, str(self.folder))

    def state_folder(self, name: str) -> Path:
        """For locks and faults: a run's own folder holds nothing but the run."""
        return self.folder / "state" / name

    def expanded(self, experiment: AnyExperiment) -> AnyExperiment:
        """With this folder for `${SWEEP}`, and variables in the paths of models replaced.

        Those in corpora are replaced when they are read. Raises IsthmusError for an unset one.
        """
        text = json.dumps(experiment.model_dump(mode="json"))
        values = json.loads(text.replace(SWEEP, json.dumps(str(self.folder))[1:-1]))
        for part, key in named_models(values):
            if "$" in part[key]:
                part[key] = str(expand_path(part[key]))
        return type(experiment).model_validate(values)

    def shared(self, runs: Sequence[Run]) -> "Shared":
        """The corpora and models that these runs want made."""
        text = json.dumps([[run.recipe.model_dump(mode="json"), dict(run.test)] for run in runs])
        models = {}
        for name, model in reversed(self.scale.models.items()):
            if _mentions(text, "models", name):
                models[name] = pretraining(model)
                text += json.dumps(models[name].model_dump(mode="json"))
        speech = {n: s for n, s in self.scale.speech.items() if _mentions(text, "speech", n)}
        return Shared(speech, dict(reversed(models.items())))

    def corpora(self, runs: Sequence[Run]) -> list[str]:
        """All that is trained, pretrained, validated and tested on."""
        pretrained = [
            one for one in self.shared(runs).models.values() if isinstance(one, CTCRecipe)
        ]
        data: list[DataSettings] = [one.data for one in pretrained]
        data += [run.recipe.data for run in runs]
        entries = [entry for one in data for entry in (*one.train, *one.dev)]
        named = [entry if isinstance(entry, str) else entry.path for entry in entries]
        named += self.scale.test.values()
        return list(dict.fromkeys(named))

    def check_data(self, runs: Sequence[Run]) -> None:
        """Raise IsthmusError, with remedies, for corpora that are not there.

        It also names models' variables that are not set; these alone only fail their rows.
        """
        missing: dict[str, list[str]] = {}  # by the variable that they begin with
        faults = []
        for name in self.corpora(runs):
            try:
                if SWEEP not in name:  # which is made
                    find_corpus(name)
            except IsthmusError as error:
                if variable := re.match(r"\$\{?(\w+)", name):
                    missing.setdefault(variable[1], []).append(name)
                else:
                    faults.append(f"  {error}")
        faults += [_missing_text(*found) for found in missing.items()]
        unset = [f"  {fault}" for fault in dict.fromkeys(self._unset_models(runs))]
        if faults:
            head = f"{self.name} needs speech that is not there:"
            raise IsthmusError("\n".join([head, *faults, *unset]))
        for fault in unset:
            log.warning("%s", fault.strip())

    def _unset_models(self, runs: Sequence[Run]) -> Iterator[str]:
        for run in runs:
            try:
                self.expanded(run.recipe)
            except IsthmusError as error:
                yield f"row {run.row.name!r}: {error}"


def _missing_text(variable: str, names: Sequence[str]) -> str:
    """Corpora that are not where the variable says, and what to do."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    folder = os.environ.get(variable)
    kind = variable.lower() if variable.lower() in PREPARED else "KIND"
    return (
        f"  {', '.join(names[:SHOWN])}{more}: the environment variable {variable} is "
        f"{repr(folder) if folder else 'not set'}. "
        f"Make them: `isthmus prepare {kind} SOURCE FOLDER`, then `export {variable}=FOLDER`."
    )


def _mentions(text: str, kind: str, name: str) -> bool:
    return bool(re.search(rf"\$\{{SWEEP\}}/{kind}/{re.escape(name)}(?![\w.-])", text))


def make_plan(name: str, scale: str, folder: Path) -> Plan:
    """Read a sweep, by file or shipped name, and the recipes of its rows; nothing else is touched.

    Raises IsthmusError for a sweep, a scale or a setting that does not exist.
    """
    file = find_sweep(name)
    sweep = read_sweep(file)
    known = {str(key): value for key, value in sweep.scales.items()}
    if scale not in known:
        raise IsthmusError(f"{name} has no scale {scale!r}. It has: {', '.join(known)}.")
    chosen = known[scale]
    runs = []
    for row in chosen.rows:
        changes = _overrides({**chosen.set, **row.set})
        base, settings = read_recipe(row.recipe or chosen.recipe, changes)
        fault = f"{file}, row {row.name!r}: {base} so changed is not a valid recipe"
        runs.append(Run(row, checked_settings(Recipe, settings, fault), chosen.test))
    return Plan(file.stem, sweep, chosen, folder.absolute() / scale, tuple(runs))


def read_sweep(file: Path) -> Sweep:
    """A sweep with its scales complete: `like` names a file of what several scales share.

    It lies beside the sweep, or is shipped; a scale's own keys replace those in it. Raises
    IsthmusError.
    """
    values = read_yaml(file)
    given = values.get("scales") if isinstance(values, dict) else None
    scales: dict[str, Any] = given if isinstance(given, dict) else {}
    for name, scale in scales.items():
        if isinstance(scale, dict) and "like" in scale:
            shared = _shared_settings(file, f"scales.{name}.like", str(scale["like"]))
            scales[name] = shared | {key: value for key, value in scale.items() if key != "like"}
    return checked_settings(Sweep, values, f"{file} is not a valid sweep")


def _shared_settings(file: Path, key: str, like: str) -> dict[str, Any]:
    for folder in (file.parent, *(one.parent for one in shipped_sweeps().values())):
        if (folder / like).is_file():
            found = read_yaml(folder / like)
            if isinstance(found, dict):
                return found
            raise IsthmusError(f"{file}: {key}: {folder / like} holds no settings of a scale.")
    raise IsthmusError(
        f"{file}: {key}: no file {like!r} beside it, nor among the shipped sweeps, which have "
        "shared/tiny.yaml."
    )


def pretraining(model: Model | str) -> CTCRecipe | LanguageRecipe:
    """A recipe of either kind; only speech has `data`."""
    chosen = Model(recipe=model) if isinstance(model, str) else model
    file, values = read_recipe(chosen.recipe, _overrides(chosen.set))
    kind: type[CTCRecipe | LanguageRecipe] = CTCRecipe if "data" in values else LanguageRecipe
    return checked_settings(kind, values, f"{file} is not a valid recipe")


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]  # JSON is YAML

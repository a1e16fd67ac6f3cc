"""Corpora of any size, transcribed by any number of processes, each utterance exactly once.

The corpora are cut into parts. A part is a file that is there whole or not at all, and what is
there is never done again, so processes may be killed at any time and the command be repeated. They
need no coordinator: who holds the lock on a part's byte of one common file does that part, and the
kernel lets go of it however the process ends. torchrun, a scheduler, Ray and a second terminal are
therefore one and the same: more processes with the same output folder. Of the file system that they
share this asks locks by fcntl (local disks, NFS 4, Lustre with flock) and renaming in one step.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy

from isthmus.decoding.formats import transcript_dict
from isthmus.decoding.recogniser import Result
from isthmus.decoding.systems import load_system, system_folder, system_settings
from isthmus.decoding.transcriber import run_folder
from isthmus.decoding.transcript import Transcript
from isthmus.errors import IsthmusError, RetryLater
from isthmus.files import discard, read_json, write_atomic
from isthmus.model.device import choose_device, on_device
from isthmus.model.parts import source
from isthmus.model.weights import sha256
from isthmus.recipe import change_settings
from isthmus.runs.checkpoint import WEIGHTS
from isthmus.runs.folder import DEFAULT, RECIPE, default_system, holds_run
from isthmus.runs.folder import PARTS as FROZEN
from isthmus.runs.loading import trained_weights
from isthmus.settings.search import RecogniserSettings
from isthmus.speech.audio import AudioError
from isthmus.speech.corpora import read_corpus
from isthmus.speech.cuts import (
    FAULT,
    ORIGIN,
    language,
)
from isthmus.speech.utterances import same_id

JOB, CLAIMS, PARTS = "job.json", ".claims", "parts"
TRANSCRIPTS, REPORT = "transcripts.jsonl", "report.json"
BATCHES = 8  # of a part: as much as there is to sort by length, and to lose by a kill
MEAN_SECONDS = 10.0  # of an utterance; a part of longer ones has fewer
FOLDER = -1  # what is claimed to write what is not a part

OnUtterance = Callable[[int, int], None]  # utterances done, of how many
Row = dict[str, Any]
log = logging.getLogger(__name__)


class Hears(Protocol):
    """What a job needs of a Recogniser."""

    def check_words(self, wanted: bool) -> None: ...

    def results(
        self, audio: Sequence[Cut], *, word_timestamps: bool = False
    ) -> Iterator[Result]: ...


@dataclass(frozen=True)
class System:
    """What transcribes: how to load it, and all that its transcripts depend on."""

    load: Callable[[], Hears]
    model: Mapping[str, str]  # SHA-256 by what it is of
    decode: RecogniserSettings
    device: str = "auto"  # where each process loads it


@dataclass(frozen=True)
class Cluster:
    """Where Ray starts the processes: one for each GPU, or for each core where there is none."""

    address: str | None = None
    """Of a cluster that runs; without one Ray starts on this machine, or obeys RAY_ADDRESS."""
    workers: int | None = None


def system(
    run: str | Path = DEFAULT,
    *,
    align_model: str | None = None,
    ears: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> System:
    """The system of that name, not loaded yet; arguments are those of `load_system`.

    Raises IsthmusError.
    """
    if str(run) == DEFAULT:  # the choice of this process, not of each that loads it
        run = default_system()
    folder = system_folder(run)
    decode = system_settings(folder, settings or {}, ears)
    if decode.gate == "auto":  # machines with different packages must not share a job
        gate = "silero" if importlib.util.find_spec("silero_vad") else "energy"
        decode = change_settings(decode, {"gate": gate})
    if holds_run(folder):
        model = _run_sums(folder)
    else:
        model = {"pretrained": _digest(sorted(source(str(folder)).sha256.items()))}
    if align_model:
        model["aligner"] = _digest(sorted(source(align_model).sha256.items()))
    if ears:
        model |= {f"ears {name}": value for name, value in _run_sums(run_folder(ears)).items()}
    loader = partial(load_system, run, align_model=align_model, ears=ears, **decode.model_dump())
    return System(loader, model, decode, device)


def _run_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of what decides what a run writes."""
    return {
        "recipe": sha256(folder / RECIPE),
        "frozen": sha256(folder / FROZEN),
        "trained": sha256(trained_weights(folder) / WEIGHTS),
    }


def transcribe_corpora(
    system: System,
    corpora: Sequence[str],
    output_dir: str | Path,
    *,
    words: bool = False,
    segments: bool = False,
    cluster: Cluster | None = None,
    on_utterance: OnUtterance = lambda done, total: None,
) -> dict[str, Any]:
    """Transcribe corpora into `output_dir`, or do what is left of that; returns the report.

    All processes with the same `output_dir` share the work, and return when all of it is done:
    transcripts.jsonl then holds a line for each utterance, in the order of the corpora, and
    report.json what this returns. Its `failed` counts recordings and lines that could not be used,
    which end nothing: `bad` tells the reason of each. To have them tried again, delete their files
    in `parts`. Its `rtfx` is seconds of audio for a second of one process' computing. With
    `cluster`, Ray starts the processes.

    Raises IsthmusError when the folder holds another job, or was filled by another model or with
    other settings; RetryLater, with nothing lost, when it cannot be written.
    """
    make = partial(Job, system, tuple(corpora), Path(output_dir), words=words, segments=segments)
    job = make()
    if cluster is not None and not job.finished:
        _on_ray(cluster, lambda: make().run())
    return job.run(on_utterance)


class Job:
    """The work on some corpora in one folder, as one process of any number sees it."""

    def __init__(
        self,
        system: System,
        corpora: Sequence[str],
        folder: Path,
        *,
        words: bool,
        segments: bool,
    ):
        self.system = system
        self.folder = folder
        self.words = words
        self.segments = segments or words
        self.cuts, self.duplicates = _utterances(corpora)
        self.parts = list(cut_up([cut.duration for cut in self.cuts], system.decode.batch_size))
        with _writing(folder):
            (folder / PARTS).mkdir(parents=True, exist_ok=True)
            self.claims = Claims(folder / CLAIMS)
            with self.claims.hold(FOLDER, wait=True):
                self._open()

    @property
    def finished(self) -> bool:
        return (self.folder / REPORT).exists()

    def run(self, on_utterance: OnUtterance = lambda done, total: None) -> dict[str, Any]:
        """Do what nobody has done, wait for what others do, put all together."""
        done, todo = 0, list(range(len(self.parts)))
        for wait in (False, True):  # first what is free, then what others may leave undone
            left = []
            for number in todo:
                if self._do(number, wait=wait):
                    done += len(self.parts[number])
                    on_utterance(done, len(self.cuts))
                else:
                    left.append(number)
            todo = left
        with _writing(self.folder), self.claims.hold(FOLDER, wait=True):
            if not self.finished:
                self._merge()
        report: dict[str, Any] = read_json(self.folder / REPORT)
        return report

    def _open(self) -> None:
        """Raise IsthmusError unless this is the job of the folder, or the folder has none yet."""
        file, now = self.folder / JOB, self._identity()
        if file.exists():
            before = read_json(file)
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if keys:
                lines = [f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in keys]
                raise IsthmusError(
                    "\n".join([f"{self.folder} holds the transcripts of another job:", *lines])
                    + "\nPut it back, or name another folder with --output-dir."
                )
        elif any((self.folder / PARTS).iterdir()) or self.finished:
            raise IsthmusError(
                f"{self.folder} holds transcripts, and no {JOB} that says of what. Name another "
                "folder with --output-dir."
            )
        else:
            write_atomic(file, json.dumps(now, indent=2) + "\n")

    def _identity(self) -> dict[str, Any]:
        """All that the parts depend on, under dotted names."""
        decode = self.system.decode.model_dump(mode="json")
        return {
            "version": version("isthmus"),
            "utterances": len(self.cuts),
            "duplicates": len(self.duplicates),
            "corpora": _digest(map(_facts, self.cuts)),
            **{f"model.{name}": value for name, value in self.system.model.items()},
            **{f"decode.{name}": value for name, value in decode.items()},
            "words": self.words,
            "segments": self.segments,
        }

    def _file(self, number: int) -> Path:
        return self.folder / PARTS / f"part-{number:06d}.jsonl"

    def _do(self, number: int, *, wait: bool) -> bool:
        """Whether a part is there; it is made if nobody else is at it."""
        file = self._file(number)
        if file.exists():
            return True
        with self.claims.hold(number, wait=wait) as mine:
            if mine and not file.exists():
                rows = self._hear([self.cuts[index] for index in self.parts[number]])
                with _writing(self.folder):
                    for stale in (REPORT, TRANSCRIPTS):  # of a part that somebody deleted
                        discard(self.folder / stale)
                    write_atomic(file, b"".join(map(_line, rows)))
            return mine

    @cached_property
    def _hears(self) -> Hears:
        """Loaded only where there is something to do, on the GPU of this process."""
        with on_device(self.system.device):
            if choose_device() == torch.device("cuda"):  # any of them
                local = int(os.environ.get("LOCAL_RANK", "0"))
                torch.cuda.set_device(local % torch.cuda.device_count())
            hears = self.system.load()
        hears.check_words(self.words)
        return hears

    def _hear(self, cuts: Sequence[Cut]) -> list[Row]:
        rows: dict[int, Row] = {}
        for result in self._hears.results(cuts, word_timestamps=self.words):
            if isinstance(result.found, RetryLater):  # the recording is not to blame
                raise result.found
            rows[result.index] = self._row(cuts[result.index], result.found)
        return [rows[index] for index in range(len(cuts))]

    def _row(self, cut: Cut, found: Transcript | IsthmusError) -> Row:
        row = {"id": cut.id, "audio_filepath": _audio(cut)}
        if isinstance(found, IsthmusError):
            return row | _bad(cut, found)
        heard = transcript_dict(found)
        if not self.segments:
            del heard["segments"]
        status = "no_speech" if found.finish_reason == "no_speech" else "ok"
        return row | {"status": status} | heard

    def _merge(self) -> None:
        """transcripts.jsonl, and then the report, whose being there says that all is done."""
        halfway = self.folder / f".{TRANSCRIPTS}.partial"
        report = Report(self.duplicates)
        try:
            with halfway.open("wb") as stream:
                for number in range(len(self.parts)):
                    for row in self._read(number):
                        report.count(row)
                        stream.write(_line(row))
                stream.flush()
                os.fsync(stream.fileno())
            halfway.replace(self.folder / TRANSCRIPTS)
        except BaseException:
            discard(halfway)
            raise
        write_atomic(self.folder / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")

    def _read(self, number: int) -> list[Row]:
        """The rows of a part; raises IsthmusError when they are not those that were written."""
        file = self._file(number)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            rows: list[Row] = [json.loads(line) for line in file.read_bytes().splitlines()]
            if [row["id"] for row in rows] == [self.cuts[i].id for i in self.parts[number]]:
                return rows
        raise IsthmusError(f"{file} is damaged. Delete it, then give the same command again.")


class Report:
    """Counts of rows as they come by; those that could not be transcribed are kept."""

    def __init__(self, duplicates: Sequence[Row]):
        self.duplicates = len(duplicates)
        self.bad = list(duplicates)
        self.status: Counter[str] = Counter()
        self.finish_reasons: Counter[str] = Counter()
        self.audio = self.computing = 0.0  # seconds

    def count(self, row: Row) -> None:
        """Counts a row and takes the time out of it, which no two runs have in common."""
        self.status[row["status"]] += 1
        if "error" in row:
            self.bad.append(row)
            return
        self.finish_reasons[row["finish_reason"]] += 1
        self.audio += row["duration"]
        self.computing += row.pop("seconds")

    def to_dict(self) -> dict[str, Any]:
        return {
            "utterances": self.status.total(),
            "failed": len(self.bad),
            "duplicates": self.duplicates,
            "status": dict(sorted(self.status.items())),
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "audio_hours": self.audio / 3600,
            "computing_hours": self.computing / 3600,
            "rtfx": self.audio / self.computing if self.computing else None,
            "bad": self.bad,
        }


class Claims:
    """Claims on numbers, each held by one process at a time on whatever machine.

    A claim is a lock on one byte of a file, which stays empty and must not be deleted meanwhile. It
    ends with its process at the latest; a process holds one at a time.
    """

    def __init__(self, file: Path):
        """Raises IsthmusError on a system without fcntl."""
        if importlib.util.find_spec("fcntl") is None:
            raise IsthmusError(
                f"Processes share a job by fcntl, which {sys.platform} does not have. Use Linux, "
                "macOS, or the Windows Subsystem for Linux."
            )
        self.file = file

    @contextlib.contextmanager
    def hold(self, number: int, *, wait: bool) -> Iterator[bool]:
        """Whether `number`, at least -1, is claimed by this process now; with `wait` it will be."""
        import fcntl

        with _writing(self.file.parent):
            stream = self.file.open("ab")
        with stream:  # closing it ends all claims of this process, so there is one at a time
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number + 1)
            except (BlockingIOError, PermissionError):
                yield False
                return
            except OSError as error:
                raise IsthmusError(
                    f"{self.file} cannot be locked: {error.strerror}. Processes share a job by "
                    "locks; name an output folder on a file system that has them."
                ) from error
            yield True


def cut_up(durations: Sequence[float], batch_size: int) -> Iterator[range]:
    """Parts of `durations` (seconds) as ranges of indices, in order.

    A part has at most 8 batches and, unless it is a single utterance, at most as much audio as
    8 batches of utterances of 10 s.
    """
    most = BATCHES * batch_size
    start, seconds = 0, 0.0
    for index, duration in enumerate(durations):
        full = index - start == most or seconds + duration > most * MEAN_SECONDS
        if full and index > start:
            yield range(start, index)
            start, seconds = index, 0.0
        seconds += duration
    if durations:
        yield range(start, len(durations))


def _utterances(corpora: Sequence[str]) -> tuple[list[Cut], list[Row]]:
    """The first utterance of each id, without its transcript, and a row for each other."""
    found: dict[str, Cut] = {}
    duplicates: list[Row] = []
    for corpus in corpora:
        for cut in read_corpus(corpus):
            if cut.id in found:
                what = same_id(str(_custom(found[cut.id]).get(ORIGIN)))
                reason = f"{_custom(cut).get(ORIGIN)}: utterance {cut.id!r} {what}"
                row = {"id": cut.id, "audio_filepath": _audio(cut)}
                duplicates.append(row | {"status": "rejected:duplicate_id", "error": reason})
            else:
                found[cut.id] = cut.map_supervisions(partial(fastcopy, text=None))
    return list(found.values()), duplicates


def _custom(cut: Cut) -> dict[str, Any]:
    return getattr(cut, "custom", None) or {}


def _audio(cut: Cut) -> str | None:
    """The file that a cut is in, if it is in one."""
    sources = cut.recording.sources if isinstance(cut, MonoCut) and cut.has_recording else ()
    return next((os.path.abspath(one.source) for one in sources if one.type == "file"), None)


def _facts(cut: Cut) -> list[Any]:
    """What tells a cut from others as far as transcripts go."""
    fault = _custom(cut).get(FAULT, ("",))[0]
    place = [cut.start, cut.channel] if isinstance(cut, MonoCut) else []
    return [cut.id, _audio(cut), cut.duration, language(cut), fault, *place]


def _digest(values: Iterable[Any]) -> str:
    """SHA-256 of values that JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(_line(value))
    return digest.hexdigest()


def _bad(cut: Cut, error: IsthmusError) -> Row:
    """What a row says where there is no transcript."""
    if fault := _custom(cut).get(FAULT):
        status = f"rejected:{fault[0]}"
    else:
        status = f"failed:{error.code if isinstance(error, AudioError) else 'unusable'}"
    return {"status": status, "duration": cut.duration, "error": str(error)}


def _line(value: Any) -> bytes:
    """JSON in one line; what is no Unicode, such as half a surrogate pair, is escaped."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RetryLater(
            f"{error.filename or folder} cannot be written: {error.strerror}. Mend that, then give "
            "the same command again: it goes on with what is there."
        ) from error


def _on_ray(cluster: Cluster, work: Callable[[], object]) -> None:
    """Processes of a Ray cluster do the work, as any other processes would."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise IsthmusError(
            f"Ray needs the extra `ray` ({error.name} is not installed). Install it: pip install "
            "'isthmus[ray]'"
        ) from error
    started = not ray.is_initialized()
    try:
        ray.init(address=cluster.address, ignore_reinit_error=True)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = cluster.workers or gpus or int(ray.cluster_resources().get("CPU", 1))
        process = ray.remote(num_cpus=1, num_gpus=int(gpus > 0), max_calls=1)(work)
        ray.get([process.remote() for _ in range(count)])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise RetryLater(
            f"Ray failed ({error}). Give the same command again: it goes on with what is there."
        ) from error
    finally:
        if started:
            ray.shutdown()

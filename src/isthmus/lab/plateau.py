"""Why has next-token accuracy not jumped? Likely causes, each measured on the data and the model.

A run is on a plateau when, past the step by which a jump is to be expected (three warm-ups, a tenth
of all steps, and 200 steps, whichever is last), its accuracy is below 60 % and has not risen over
the last N steps, N half of that step, and it has not jumped before. Said once.

Shapes: A audio embeddings, L tokens, E LLM width.
"""

import logging
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut

from isthmus.errors import IsthmusError
from isthmus.lab.emergence import EmergenceMonitor
from isthmus.model.prompt import plain_tokens
from isthmus.model.speech_llm import SpeechLLM
from isthmus.recipe import Recipe
from isthmus.runs.checkpoint import Progress
from isthmus.settings.optimisation import LoopSettings
from isthmus.speech.corpora import load_cut
from isthmus.speech.cuts import (
    transcript,
)
from isthmus.training.loop import OnStep
from isthmus.training.runs import Opening, train
from isthmus.training.speech_task import SpeechTask

LOW = 0.6  # accuracy of those who do not listen
EARLIEST = 200  # steps
RISE = 0.02  # absolute accuracy, from one half of the last steps to the other
FALL = 0.01  # of the loss likewise, as a share of it
SURE = 2.0  # standard errors
SAMPLE = 200  # transcripts to be measured
HEARD = 4  # utterances to be heard
UPPER_COST = 1.15  # tokens of upper case to those of lower case
SCALE = 100.0  # of norms; an untrained projector gives some ten times those of tokens
SHORT = 0.5  # audio embeddings to a token
SLOW, FAST = 1e-5, 0.05  # update of a step to the weights
SPIKE, SPIKES = 10.0, 0.01  # gradient norms above their median, and their share
EMPTY, SAME, CONTRARY = 0.02, 0.3, 0.01  # shares of utterances
PADDING = 0.3

Metrics = dict[str, Any]
log = logging.getLogger(__name__)


def expected_step(settings: LoopSettings) -> int:
    """The step by which accuracy should have jumped."""
    return max(3 * settings.warmup_steps, settings.steps // 10, EARLIEST)


@dataclass(frozen=True)
class Evidence:
    """What is measured, once, of a run on a plateau."""

    model: SpeechLLM
    settings: LoopSettings
    cuts: Sequence[Cut]
    recent: Sequence[Metrics]  # of the last steps
    update: float | None  # norm of a step's change of the projector, by that of its weights

    @property
    def texts(self) -> list[str]:
        """Transcripts from all over the data, SAMPLE at most."""
        return [transcript(cut) for cut in self.spread(SAMPLE)]

    def spread(self, number: int) -> Sequence[Cut]:
        return self.cuts[:: math.ceil(len(self.cuts) / number)]


Cause = Callable[[Evidence], str | None]


@dataclass
class PlateauWatch:
    """Sees every training step, and says once why there is no jump, where there is none."""

    settings: LoopSettings
    say: Callable[[str], None] = log.warning
    task: SpeechTask | None = None
    _monitor: EmergenceMonitor = field(default_factory=EmergenceMonitor)
    _recent: deque[Metrics] = field(init=False)
    _before: dict[str, torch.Tensor] | None = None  # the projector, a step ago
    _done: bool = False

    def __post_init__(self) -> None:
        self._recent = deque(maxlen=expected_step(self.settings) // 2)

    def watch(self, task: SpeechTask) -> None:
        """The task whose steps are seen from now on."""
        self.task = task

    def __call__(self, metrics: Metrics) -> None:
        if self._done or self.task is None:
            return
        try:
            self._look(self.task, metrics)
        except Exception as error:  # any: a run of days must not end because it is looked at
            self._done, self._before = True, None
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            log.warning("why accuracy does not jump cannot be looked into: %s", reason)

    def _look(self, task: SpeechTask, metrics: Metrics) -> None:
        if "skipped" not in metrics:
            self._recent.append(metrics)
            self._monitor.update(metrics["step"], metrics["accuracy"])
        self._done = self._monitor.found is not None
        if self._done:
            self._before = None
        elif self._before is not None:
            self._diagnose(task)
        elif self._due(metrics["step"]) and on_plateau(self._recent):
            self._before = _projector(task.module)

    def _due(self, step: int) -> bool:
        """Whether a jump is overdue, and enough steps were seen (after a resume there are few)."""
        return step >= expected_step(self.settings) and len(self._recent) == self._recent.maxlen

    def _diagnose(self, task: SpeechTask) -> None:
        assert self._before is not None
        update = _change(self._before, _projector(task.module))
        self._done, self._before = True, None
        evidence = Evidence(
            task.module, self.settings, task.train.cuts, tuple(self._recent), update
        )
        for line in diagnose(evidence):
            self.say(line)


def train_watched(recipe: Recipe, folder: Path, opening: Opening, *, on_step: OnStep) -> Progress:
    """`isthmus.training.runs.train` under a watch that says why accuracy does not jump."""
    watch = PlateauWatch(recipe.train)

    def observe(metrics: Metrics) -> None:
        on_step(metrics)
        watch(metrics)

    return train(recipe, folder, opening, on_step=observe, on_task=watch.watch)


def on_plateau(recent: Sequence[Metrics]) -> bool:
    """Whether accuracy is low and has not risen over these steps."""
    accuracy = _series(recent, "accuracy")
    early, late = np.array_split(accuracy, 2)
    return len(accuracy) >= 4 and accuracy.mean() < LOW and late.mean() - early.mean() < RISE


def diagnose(evidence: Evidence) -> list[str]:
    """Lines for people: what was seen, and each cause that was found."""
    accuracy = _series(evidence.recent, "accuracy").mean()
    head = (
        f"step {evidence.recent[-1]['step']}: next-token accuracy stays at {accuracy:.0%}: the "
        "language model does not listen yet."
    )
    found, failed = [], []
    for cause in CAUSES:
        try:
            line = cause(evidence)
        except (IsthmusError, OSError, RuntimeError) as error:  # training goes on all the same
            failed.append(f"  not checked ({cause.__name__.replace('_', ' ')}): {error}")
        else:
            found += [f"  {line}"] if line else []
    checked = ", ".join(cause.__name__.replace("_", " ") for cause in CAUSES)
    return [head, *(found or [f"  None of the known causes was found ({checked})."]), *failed]


# --- causes: each measures, and speaks only where it finds


def falling_loss(evidence: Evidence) -> str | None:
    loss = _series(evidence.recent, "loss")
    early, late = np.array_split(loss, 2)
    fall = float(early.mean() - late.mean())
    error = math.hypot(*(part.std() / math.sqrt(len(part)) for part in (early, late)))
    if fall < max(FALL * early.mean(), SURE * error):
        return None
    return (
        f"the loss still falls, from {early.mean():.3f} to {late.mean():.3f} over the last "
        f"{len(loss)} steps: wait."
    )


def upper_case(evidence: Evidence) -> str | None:
    tokenizer = evidence.model.llm.tokenizer
    texts = evidence.texts
    letters = sum(map(str.isalpha, "".join(texts)))
    upper = sum(map(str.isupper, "".join(texts)))
    if upper <= letters / 2:
        return None
    now, lower = (
        sum(len(plain_tokens(tokenizer, text)) for text in some) / letters
        for some in (texts, [text.lower() for text in texts])
    )
    if now < UPPER_COST * lower:
        return None
    return (
        f"transcripts are in upper case, {now:.2f} tokens a letter, and would be {lower:.2f} in "
        "lower case, which the language model knows better: write them so."
    )


def end_token(evidence: Evidence) -> str | None:
    if evidence.model.end_token != evidence.model.llm.tokenizer.unk_token_id:
        return None
    return "the end token is the tokenizer's unknown token: set eos_token in its configuration."


def scale_of_embeddings(evidence: Evidence) -> str | None:
    audio, text = _norms(evidence.model, evidence.spread(HEARD))
    if not audio or 1 / SCALE <= audio / text <= SCALE:
        return None
    return (
        f"audio embeddings have norm {audio:.3g}, the transcript's tokens {text:.3g}: "
        f"{audio / text:.2g} times. Look at train.learning_rate and the projector's output."
    )


def stride(evidence: Evidence) -> str | None:
    model, cuts = evidence.model, evidence.spread(SAMPLE)
    seconds = sum(float(cut.duration) for cut in cuts)
    audio = sum(model.audio_tokens(float(cut.duration)) for cut in cuts)
    text = sum(len(model.transcript_tokens(transcript(cut))) for cut in cuts)
    if audio >= SHORT * text:
        return None
    return (
        f"{audio / seconds:.1f} audio embeddings a second for {text / seconds:.1f} tokens a "
        "second: the stride is too long. Lower projector.downsample_rate."
    )


def learning_rate(evidence: Evidence) -> str | None:
    norms = _series(evidence.recent, "gradient_norm")
    median = float(np.median(norms))
    spikes = int((norms > SPIKE * median).sum())
    update, rate = evidence.update, evidence.recent[-1]["learning_rate"]
    if update is not None and update < SLOW:
        return (
            f"a step changes the projector by {update:.1g} of its weights: train.learning_rate "
            f"({rate:g} now) is too small."
        )
    if update is not None and update > FAST:
        return (
            f"a step changes the projector by {update:.1%} of its weights: train.learning_rate "
            f"({rate:g} now) is too large."
        )
    if spikes > max(1, SPIKES * len(norms)):
        return (
            f"the gradient's norm was over {SPIKE:g} times its median ({median:.3g}) in {spikes} "
            f"of {len(norms)} steps: lower train.learning_rate ({rate:g} now), or set "
            "train.clip_norm."
        )
    return None


def transcripts(evidence: Evidence) -> str | None:
    cuts = evidence.cuts
    texts = Counter(" ".join(transcript(cut).split()) for cut in cuts)
    empty = sum(count for text, count in texts.items() if not any(map(str.isalnum, text)))
    if empty > EMPTY * len(cuts):
        return f"{empty} of {len(cuts)} transcripts hold no letter: leave these utterances out."
    text, most = texts.most_common(1)[0]
    if most > max(SAME * len(cuts), 1):
        return f"{most} of {len(cuts)} transcripts are {text[:60]!r}: look at the manifest."
    said = defaultdict(set)
    for cut in cuts:
        said[_audio(cut)].add(transcript(cut))
    contrary = [place for place, words in said.items() if len(words) > 1]
    if len(contrary) > CONTRARY * len(said):
        return (
            f"{len(contrary)} of {len(said)} recordings have several transcripts, such as "
            f"{contrary[0][0]}: look at the manifest."
        )
    return None


def padding(evidence: Evidence) -> str | None:
    if evidence.model.attention is not None:
        return None  # packed
    share = float(np.mean([one.get("padding", 0.0) for one in evidence.recent]))
    if share < PADDING:
        return None
    return (
        f"{share:.0%} of the language model's positions are padding, so a step teaches little: set "
        "train.packing, or train.max_duration instead of train.batch_size."
    )


CAUSES: tuple[Cause, ...] = (
    transcripts,
    upper_case,
    end_token,
    stride,
    scale_of_embeddings,
    learning_rate,
    padding,
    falling_loss,
)


# --- measuring


def _series(metrics: Sequence[Metrics], name: str) -> np.ndarray:
    return np.array([one[name] for one in metrics], dtype=np.float64)


def _projector(model: SpeechLLM) -> dict[str, torch.Tensor]:
    values = model.projector.named_parameters()
    return {name: value.detach().clone() for name, value in values if value.requires_grad}


def _change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float | None:
    """Norm of the change by that of the weights; None where nothing is trained."""
    if not before:
        return None
    moved = math.hypot(*(float((after[name] - value).norm()) for name, value in before.items()))
    size = math.hypot(*(float(value.norm()) for value in before.values()))
    return moved / size if size else None


@torch.inference_mode()
def _norms(model: SpeechLLM, cuts: Sequence[Cut]) -> tuple[float, float]:
    """Median norms of audio embeddings and of the transcripts' token embeddings."""
    device = next(model.projector.parameters()).device
    training = model.training
    model.eval()
    try:
        audio, text = [], []
        for cut in cuts:
            samples = torch.from_numpy(load_cut(cut)).to(device)[None]
            lengths = torch.tensor([samples.shape[1]], device=device)
            audio += model.embed_audio(samples, lengths)[0].float().norm(dim=-1).tolist()
            tokens = model.transcript_tokens(transcript(cut))
            text += (
                model.llm.embed(torch.tensor(tokens, device=device)).float().norm(dim=-1).tolist()
            )
    finally:
        model.train(training)
    return (float(np.median(audio)), float(np.median(text))) if audio and text else (0.0, 1.0)


def _audio(cut: Cut) -> tuple[str, float, float]:
    """Which part of which recording an utterance is."""
    source = cut.recording.sources[0].source if cut.has_recording else cut.id
    return str(source), round(float(cut.start), 3), round(float(cut.duration), 3)

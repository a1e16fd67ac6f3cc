"""What is random in the loss of a projector: drawn by seed, epoch and batch, and off elsewhere."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from isthmus.build import build_model
from isthmus.decoding.transcriber import load
from isthmus.errors import IsthmusError
from isthmus.files import file_sha256
from isthmus.model import token_ctc
from isthmus.recipe import Recipe
from isthmus.runs.checkpoint import WEIGHTS
from isthmus.runs.folder import PARTS
from isthmus.runs.loading import load_run
from isthmus.training.loop import METRICS
from isthmus.training.runs import SHAPING, Opening, train
from isthmus.training.speech_task import SpeechTask
from isthmus.training.training_data import speech_data

TEXTS = ("go left", "stop now and then", "one two", "yes", "a longer sentence", "no")
INNER = {"type": "linear", "downsample_rate": 2, "hidden": 8}
SOFT = {"type": "ctc-posterior", "inner": INNER}
INSTRUCTIONS = ["Say it.", "Write down what is said.", ""]


@pytest.fixture
def make(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., Recipe]:
    """A recipe with changes: `data={...}`, `train={...}`, ...; two utterances are Polish."""
    lines = []
    for i, text in enumerate(TEXTS):
        audio = np.random.default_rng(i).normal(0, 0.1, 6400 + 3200 * i)
        soundfile.write(tmp_path / f"u{i}.flac", audio, 16000)
        row = {"audio": f"u{i}.flac", "text": text, "language": "pl" if i < 2 else "en"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "all.jsonl").write_text("".join(lines))

    def recipe(kind: str = "fbank", **changes: dict[str, Any]) -> Recipe:
        path = {} if kind == "fbank" else {"path": str(model_folder(kind))}
        plain: dict[str, dict[str, Any]] = {
            "encoder": {"type": kind, **path},
            "projector": {"downsample_rate": 2, "hidden": 8},
            "llm": {"path": str(model_folder("llama"))},
            "prompt": {"template": "paper", "instruction": INSTRUCTIONS},
            "data": {"train": [str(tmp_path / "all.jsonl")], "dev": [str(tmp_path / "all.jsonl")]},
            "train": {"steps": 5, "learning_rate": 1e-2, "warmup_steps": 0, "batch_size": 4}
            | {"eval_every": 5, "save_every": 1},
        }
        for name, values in changes.items():
            plain[name] = values if "type" in values else {**plain.get(name, {}), **values}
        return Recipe.model_validate({"name": "random", **plain})

    return recipe


Make = Callable[..., Recipe]


def task_of(recipe: Recipe) -> SpeechTask:
    torch.manual_seed(0)
    model = build_model(recipe).eval()
    return SpeechTask(model, *speech_data(recipe, model), recipe)


def loss(task: SpeechTask, training: bool, seed: int = 0) -> float:
    torch.manual_seed(seed)
    task.module.train(training)
    with torch.no_grad():
        return float(task.loss(task.load([(0,), (5,)], 0 if training else None)).total)


RANDOM: dict[str, dict[str, Any]] = {
    "masking": {"text_masking": 0.5},
    "masking-by-language": {"text_masking": {"pl": 0.9, "default": 0.1}},
}


@pytest.mark.parametrize("name", RANDOM)
def test_in_training_only(name: str, make: Make) -> None:
    plain, other = task_of(make()), task_of(make(train=RANDOM[name]))
    assert loss(plain, training=False) == loss(other, training=False)
    assert loss(plain, training=True) != loss(other, training=True)


def test_only_the_languages_that_are_named(make: Make) -> None:
    task, plain = task_of(make(train={"text_masking": {"pl": 0.9}})), task_of(make())

    def of(which: SpeechTask, index: int) -> float:
        torch.manual_seed(0)
        which.module.train()
        return which.loss(which.load([(index,)], 0)).total.item()

    assert of(task, 1) != of(plain, 1)
    assert of(task, 4) == of(plain, 4)


@pytest.mark.parametrize(
    ("encoder", "changes"),
    [
        ("fbank", {"train": {"text_masking": 0.4, "ctc_weight": 0.2}}),
        ("fbank", {"train": {"ctc_weight": 1.0, "llm_weight": 0.0}, "projector": SOFT}),
        ("fbank", {"data": {"language_temperature": 4.0}, "train": {"packing": False}}),
        ("conformer", {"encoder": {"tune": "full"}, "data": {"spec_augment": {}}}),
    ],
    ids=["masking", "ctc", "languages", "spec-augment"],
)
def test_resume_is_exact(
    encoder: str,
    changes: dict[str, dict[str, Any]],
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_ctc, "SAMPLED", 8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(make(encoder, **changes), whole)
    short = {**changes, "train": {**changes.get("train", {}), "steps": 3}}
    train(make(encoder, **short), parts)
    allowed = Opening(resume=True, allow_change=["train.steps"])
    train(make(encoder, **changes), parts, allowed)
    assert numbers(whole) == numbers(parts)
    last = Path("checkpoints") / "step-000005" / WEIGHTS
    assert (whole / last).read_bytes() == (parts / last).read_bytes()


def test_other_weights_than_those_of_the_run_are_refused_for_good(
    make: Make, tmp_path: Path
) -> None:
    train(make(train={"steps": 1}), tmp_path / "run")
    for part, key, value in (("llm", "tune", "lora"), ("projector", "hidden", 4)):
        other = make(train={"steps": 1}, **{part: {key: value}})
        for allowed in ((), (f"{part}.{key}",)):
            with pytest.raises(IsthmusError, match=rf"{part}\.{key}: .* then, ") as refused:
                train(other, tmp_path / "run", Opening(resume=True, allow_change=allowed))
            assert "--allow-change" not in str(refused.value)
    with pytest.raises(IsthmusError, match=r"allow it: --allow-change train\.steps$"):
        train(make(), tmp_path / "run", Opening(resume=True))


@pytest.mark.parametrize(
    ("key", "shaping"),
    [
        ("encoder.tune", True),
        ("encoder.second.num_mels", True),
        ("llm.lora.rank", True),
        ("projector.type", True),
        ("encoder.path", False),
        ("encoder.second.revision", False),
        ("llm.path", False),
        ("train.steps", False),
    ],
)
def test_keys_that_say_which_weights_are_trained(key: str, shaping: bool) -> None:
    assert bool(SHAPING.match(key)) == shaping


def numbers(folder: Path) -> list[dict[str, float]]:
    kept = ("loss", "accuracy", "ctc_loss", "units", "dev_loss", "gradient_norm")
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    found = [{key: line[key] for key in kept if key in line} for line in lines]
    for line in found[:-1]:
        line.pop("dev_loss", None)  # the last step of the short run has one too
    return found


def test_the_ctc_loss_stands_apart(make: Make, tmp_path: Path) -> None:
    with_it, without = (
        train(make(train={"ctc_weight": weight, "steps": 1}), tmp_path / str(weight))
        and json.loads((tmp_path / str(weight) / METRICS).read_text())
        for weight in (0.5, 0.0)
    )
    assert "ctc_loss" not in without
    assert with_it["ctc_loss"] > 0
    assert with_it["loss"] == without["loss"]  # the transcripts' cross-entropy, as dev_loss is
    assert with_it["gradient_norm"] != without["gradient_norm"]
    assert with_it["dev_loss"] != without["dev_loss"]  # another step was made


@pytest.mark.parametrize("projector", [{}, SOFT], ids=["linear", "ctc-posterior"])
def test_the_gradient_is_that_of_both_losses(projector: dict[str, Any], make: Make) -> None:
    def gradient(llm: float, ctc: float) -> torch.Tensor:
        both = make(train={"ctc_weight": 1.0}, projector=projector)
        weights = {"llm_weight": llm, "ctc_weight": ctc}
        train = both.train.model_copy(update=weights)
        task = task_of(both.model_copy(update={"train": train}))
        task.module.train()
        found = task.loss(task.load([(0,), (5,)], 0))
        values = [one for name, one in task.trainable().items() if "blank" not in name]
        return torch.cat([one.flatten() for one in torch.autograd.grad(found.total, values)])

    llm, ctc = gradient(1.0, 0.0), gradient(0.0, 1.0)
    assert llm.norm() > 1e-3
    assert ctc.norm() > 1e-3
    torch.testing.assert_close(gradient(0.5, 2.0), llm / 2 + 2 * ctc, atol=1e-4, rtol=1e-3)


def test_the_llm_does_not_run_for_ctc_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(make(train={"llm_weight": 0.0, "ctc_weight": 1.0}))

    def run(*given: Any, **named: Any) -> None:
        raise AssertionError("the LLM ran")

    monkeypatch.setattr(task.module, "transcript_loss", run)
    found = task.loss(task.load([(0,), (5,)], 0))
    assert found.units == sum(
        len(task.module.transcript_tokens(text)) for text in task.load([(0,), (5,)], 0).texts
    )
    assert found.total.item() > 0


@pytest.mark.parametrize(("llm", "weight"), [("lora", 0.0), ("lora", 0.5), ("frozen", 0.0)])
def test_adapters_that_are_never_trained_are_told(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, llm: str, weight: float
) -> None:
    """And not where they are another run's, which are to stay as they are."""
    settings = {"steps": 1, "ctc_weight": 1.0, "llm_weight": weight}
    recipe = make(llm={"tune": llm}, train=settings)
    train(recipe, tmp_path / "run")
    told = "llm.tune is lora, but train.llm_weight is 0" in caplog.text
    assert told == ((llm, weight) == ("lora", 0.0))
    caplog.clear()
    train(recipe.model_copy(update={"start_from": (str(tmp_path / "run"),)}), tmp_path / "next")
    assert "llm_weight" not in caplog.text


def test_an_utterance_without_room_for_its_tokens_is_left_out_and_counted(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    short = {"projector": {"downsample_rate": 40}, "data": {"max_bad_fraction": 1.0}}
    everything = task_of(make(**short)).train.cuts
    kept = task_of(make(train={"ctc_weight": 1.0}, **short)).train.cuts
    assert len(kept) < len(everything)
    assert "embeddings for CTC" in caplog.text


def test_a_run_begins_with_another(make: Make, tmp_path: Path) -> None:
    train(make(train={"steps": 2, "ctc_weight": 1.0, "llm_weight": 0.0}), tmp_path / "ears")
    second = make(train={"ctc_weight": 0.5, "steps": 1, "learning_rate": 1e-30})
    begun = second.model_copy(update={"start_from": (str(tmp_path / "ears"),)})
    train(begun, tmp_path / "run")
    ears, run = (load_file(tmp_path / name / "best" / WEIGHTS) for name in ("ears", "run"))
    assert ears.keys() == run.keys()
    assert all(torch.equal(ears[name], run[name]) for name in ears)
    # a run that was killed before its first checkpoint begins there again
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "best")
    train(begun, tmp_path / "run", Opening(resume=True))
    again = load_file(tmp_path / "run" / "best" / WEIGHTS)
    assert all(torch.equal(ears[name], again[name]) for name in ears)
    other = make(projector={"hidden": 4}, train={"steps": 1})
    with pytest.raises(IsthmusError, match=r"projector\.linear1"):
        train(
            other.model_copy(update={"start_from": (str(tmp_path / "ears"),)}), tmp_path / "other"
        )
    with pytest.raises(IsthmusError, match=r"No run folder .nowhere"):
        train(other.model_copy(update={"start_from": ("nowhere",)}), tmp_path / "nothing")


@pytest.mark.parametrize(("encoder", "seconds"), [("whisper", 60.0), ("conformer", 0.4 + 1.4)])
def test_the_encoders_work_is_counted_with_its_padding(
    encoder: str, seconds: float, make: Make
) -> None:
    task = task_of(make(encoder))
    found = task.loss(task.load([(0,), (5,)], 0))
    model = task.module
    weights = sum(value.numel() for value in model.encoder.parameters())
    llm = model.flops(found.positions - found.padding, found.units, [])
    assert found.flops - llm == pytest.approx(2 * weights * model.encoder.frame_rate * seconds)


def test_prompts_are_drawn_anew_each_epoch_but_not_in_validation(make: Make) -> None:
    task = task_of(make())
    groups = [(index,) for index in range(6)]
    draws = [task.load(groups, epoch).draws for epoch in range(12)]
    assert draws[0] == task.load(groups[::-1], 0).draws[::-1]
    seen = {number % 3 for epoch in draws for number in epoch}
    assert seen == {0, 1, 2}
    assert len(set(draws)) == 12
    assert task.load(groups, None).draws == task.load(groups, None).draws


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_masking": {"german": 0.2}},
            "train.text_masking names 'german'.*in: en, pl",
        ),
        ({"text_masking": 1.0}, "text_masking.*less than 1"),
        ({"ctc_weight": -1}, "ctc_weight.*greater than or equal to 0"),
        ({"llm_weight": 0}, "llm_weight.*ctc_weight"),
    ],
)
def test_faults_are_said(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises((IsthmusError, ValueError), match=f"(?s){message}"):
        task_of(make(train=changes))


def test_data_of_languages(make: Make) -> None:
    only = task_of(make(data={"languages": ["pl"]}))
    assert len(only.train.cuts) == 2
    assert only.dev is not None
    assert len(only.dev.cuts) == 2
    with pytest.raises(IsthmusError, match="names 'de', but no utterance"):
        task_of(make(data={"languages": ["de"]}))


def test_masks_on_features_are_for_a_conformer_that_is_trained(make: Make) -> None:
    with pytest.raises(ValueError, match=r"data\.spec_augment.*fbank.*leave it out"):
        make(data={"spec_augment": {}})
    with pytest.raises(ValueError, match=r"data\.spec_augment.*tune frozen"):
        make("conformer", data={"spec_augment": {}})


def test_another_runs_ears(make: Make, tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    """Encoder and projector of one run before the language model of another."""
    soft = {"projector": SOFT, "train": {"steps": 1, "ctc_weight": 1.0}}
    lora = {**soft, "llm": {"tune": "lora"}}
    train(make(**lora), tmp_path / "mind")
    finer = {"projector": {**SOFT, "inner": {**INNER, "downsample_rate": 1}}}
    train(make("whisper", **soft | finer).model_copy(update={"seed": 5}), tmp_path / "ears")
    model, _ = load_run(tmp_path / "mind")
    heard, _ = load_run(tmp_path / "mind", tmp_path / "ears")
    ears = load_file(tmp_path / "ears" / "best" / WEIGHTS)
    mind = load_file(tmp_path / "mind" / "best" / WEIGHTS)
    state = heard.trained_state()
    assert any("lora" in name for name in state)
    for name, value in state.items():
        assert torch.equal(value, (mind if name.startswith("llm") else ears)[name])
    assert heard.encoder.dim != model.encoder.dim
    other = make(**soft, llm={"path": str(model_folder("gemma")), "tune": "lora"})
    train(other, tmp_path / "other")
    with pytest.raises(IsthmusError, match="says the tokens of"):
        load_run(tmp_path / "other", tmp_path / "ears")
    train(make(train={"steps": 1}), tmp_path / "linear")
    for pair in (("linear", "ears"), ("mind", "linear")):
        with pytest.raises(IsthmusError, match="only soft tokens"):
            load_run(*(tmp_path / name for name in pair))


def test_ears_are_named_and_bring_their_own_delay(
    make: Make, tmp_path: Path, isthmus: Callable[..., tuple[int, str, str]]
) -> None:
    for name, delay in (("mind", 0.1), ("ears", 0.2)):
        settings = {"steps": 1, "ctc_weight": 1.0}
        recipe = make(projector=SOFT, train=settings, decode={"ctc_delay": delay, "beam_size": 1})
        train(recipe, tmp_path / name)
    ears = {"name": str(tmp_path / "ears"), "commit": None}
    ears["sha256"] = {WEIGHTS: file_sha256(tmp_path / "ears" / "best" / WEIGHTS)}
    command = "evaluate", tmp_path / "mind", tmp_path / "all.jsonl", "--json"
    for options, delay, source in (([], 0.1, None), (["--ears", tmp_path / "ears"], 0.2, ears)):
        report = json.loads(isthmus(*command, *options)[1])
        assert report["decode"]["ctc_delay"] == delay
        assert report["ears"] == source
    named = load(tmp_path / "mind", ears=tmp_path / "ears", ctc_delay=0.3)
    assert named.ctc_delay == 0.3


def test_a_run_says_what_it_begins_with(make: Make, tmp_path: Path) -> None:
    """Name and weights; another than that is refused where it begins again."""
    for name in ("one", "two"):
        train(make(train={"steps": 1}), tmp_path / name)
    names = tuple(str(tmp_path / name) for name in ("one", "two"))
    recipe = make(train={"steps": 1}).model_copy(update={"start_from": names})
    train(recipe, tmp_path / "run")
    parts = json.loads((tmp_path / "run" / PARTS).read_text())
    for place, name in enumerate(names):
        sums = {WEIGHTS: file_sha256(Path(name) / "best" / WEIGHTS)}
        found = {"name": name, "commit": None, "sha256": sums}
        assert parts[f"start_from.{place}"] == found
    shutil.rmtree(tmp_path / "two")
    load_run(tmp_path / "run")  # which needs none of them
    train(make(train={"steps": 3}), tmp_path / "two")
    for folder in ("best", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / folder)
    with pytest.raises(IsthmusError, match=r"allow-change start_from\.1"):
        train(recipe, tmp_path / "run", Opening(resume=True))
    train(recipe, tmp_path / "run", Opening(resume=True, allow_change=["start_from"]))
    again = json.loads((tmp_path / "run" / PARTS).read_text())
    assert again["start_from.1"] != parts["start_from.1"]

"""What training does to text: nothing to a frozen model, to the bit; else a difference is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from isthmus.decoding.transcriber import load
from isthmus.errors import IsthmusError
from isthmus.lab import text_ability as module
from isthmus.lab.perplexity import Likelihood, Perplexity
from isthmus.lab.text_ability import TextAbility, text_ability
from isthmus.model.adapters import save_adapter
from isthmus.model.llm import build_llm
from isthmus.recipe import Recipe
from isthmus.runs.export import export_adapter
from isthmus.runs.loading import load_run, stored_recipe
from isthmus.settings.llms import LLMSettings
from isthmus.training.runs import train

Run = Callable[..., Path]
TEXTS = ["go left", "stop", "one two three", "yes please", "turn it on"]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Run:
    """A run of three steps of the tuning that is asked for, made once."""
    root = tmp_path_factory.mktemp("text-ability")
    speech = root / "speech"
    speech.mkdir()
    for place, text in enumerate(("go left", "stop")):
        soundfile.write(speech / f"u{place}.wav", np.sin(np.arange(9600) * 0.1 * place), 16000)
        (speech / f"u{place}.txt").write_text(text)

    def make(tune: str, quantise: str = "none", precision: str = "float32") -> Path:
        name = f"{tune}-{quantise}-{precision}"
        values = {
            "name": name,
            "encoder": {"type": "fbank"},
            "projector": {"downsample_rate": 10, "hidden": 8},
            "llm": {"path": str(model_folder("llama")), "tune": tune, "quantise": quantise},
            "data": {"train": [str(speech)]},
            "train": {"steps": 3, "learning_rate": 0.1, "warmup_steps": 0, "precision": precision},
        }
        if not (root / name).exists():
            train(Recipe.model_validate(values), root / name)
        return root / name

    return make


def test_a_frozen_model_is_equal_to_the_bit(make_run: Run) -> None:
    found = text_ability(make_run("frozen"), TEXTS)
    assert found.equal
    assert found.sound
    assert found.before == found.after
    assert found.merged is None
    assert (found.difference, found.interval) == (0.0, (0.0, 0.0))
    assert found.lines()[-1].startswith("equal to the last bit")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantise", ["none", "int8"])
@pytest.mark.parametrize("tune", ["frozen", "lora"])
def test_the_original_is_held_as_the_run_holds_it(
    make_run: Run, tune: str, quantise: str, precision: str
) -> None:
    found = text_ability(make_run(tune, quantise, precision), TEXTS)
    assert found.same_weights
    assert found.equal == (tune == "frozen")


@pytest.mark.parametrize(
    ("quantise", "precision"), [("none", "float32"), ("none", "bfloat16"), ("int8", "float32")]
)
def test_a_run_is_read_with_its_adapters_in_the_weights(
    make_run: Run, quantise: str, precision: str
) -> None:
    """In float32: half precision would round them off, and integers have no room."""
    run = make_run("lora", quantise, precision)
    apart, read = load_run(run)[0].llm.network.eval(), load(run).model.llm.network
    merged = {one.merged for one in read.modules() if isinstance(one, BaseTunerLayer)}
    assert merged == {(quantise, precision) == ("none", "float32")}
    tokens = torch.arange(1, 9)[None]
    with torch.inference_mode():
        before, after = apart(tokens).logits.float(), read(tokens).logits.float()
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_frozen_weights_that_moved_are_seen(
    make_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    isthmus: Callable[..., tuple[int, str, str]],
) -> None:
    run = make_run("frozen")
    load = module.load_run

    def moved(folder: Path) -> Any:
        model, recipe = load(folder)
        with torch.no_grad():
            next(model.llm.parameters())[5, 0] += 1e-3
        return model, recipe

    monkeypatch.setattr(module, "load_run", moved)
    found = text_ability(run, ["unlike any letter that moved: %"])
    assert not found.same_weights
    assert not found.sound
    lines = tmp_path / "lines.txt"
    lines.write_text("stop\n")
    code, out, _ = isthmus("analyse", "text-ability", run, lines)
    assert code == 1
    assert "NOT WHAT THEY WERE" in out


def test_a_model_trained_whole_differs(make_run: Run) -> None:
    found = text_ability(make_run("full"), TEXTS)
    assert not found.same_weights
    assert found.sound  # it was meant to move
    assert found.before != found.after
    assert found.interval is not None
    low, high = found.interval
    assert low < found.difference < high


def test_adapters_differ_but_leave_the_weights(make_run: Run) -> None:
    found = text_ability(make_run("lora"), TEXTS)
    assert found.same_weights
    assert found.sound
    assert not found.equal
    assert found.merged is not None
    assert found.merged.nats == pytest.approx(found.after.nats, rel=1e-5)
    assert found.before.nats != pytest.approx(found.after.nats, rel=1e-5)


def test_the_interval_is_of_pairs() -> None:
    """Texts that differ much among themselves, but each by as much between the models."""
    costs = np.random.default_rng(0).uniform(1, 9, 200)
    before = Perplexity(tuple(Likelihood(cost, 2, 9, 0.0) for cost in costs), "float32")
    after = Perplexity(tuple(Likelihood(cost + 0.1, 2, 9, 0.0) for cost in costs), "float32")
    found = TextAbility("lora", before, after, None, True)
    assert found.interval is not None
    assert 0 < found.interval[0] < found.difference < found.interval[1]


def test_the_verb_says_it(
    make_run: Run, isthmus: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    run = make_run("frozen")
    code, out, _ = isthmus("analyse", "text-ability", run, text, "--json")
    report = json.loads(out)
    assert (code, report["equal"], report["difference"]) == (0, True, 0.0)
    assert report["before"] == report["after"]


# --- adapters on their own


@torch.no_grad()
def test_an_exported_adapter_opens_in_peft_and_merges(
    make_run: Run, isthmus: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = make_run("lora")
    code, out, err = isthmus("export-adapter", run, tmp_path / "adapter", "--json")
    assert (code, err) == (0, "")
    base = json.loads(out)["base"]
    assert base == stored_recipe(run).llm.path
    llm = load_run(run)[0].llm
    tokens = torch.tensor([[1, *llm.tokenizer.encode("go left", add_special_tokens=False)]])
    expected = llm.network(input_ids=tokens).logits
    original = AutoModelForCausalLM.from_pretrained(base)
    untouched = original(input_ids=tokens).logits
    opened = PeftModel.from_pretrained(original, tmp_path / "adapter").eval()
    torch.testing.assert_close(opened(input_ids=tokens).logits, expected, atol=1e-5, rtol=0)
    assert (untouched - expected).abs().max() > 1e-3  # the adapter does something
    opened.merge_and_unload().save_pretrained(tmp_path / "merged")
    llm.tokenizer.save_pretrained(tmp_path / "merged")
    joined = build_llm(LLMSettings(path=str(tmp_path / "merged"))).eval()
    found = joined.network(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", ["someone/words", "isthmus/tiny-lm"])
def test_an_adapter_names_its_model_as_the_recipe_does(
    make_run: Run, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", pytest.fail)
    save_adapter(load_run(make_run("lora"))[0].llm, tmp_path / "adapter", base, "abc")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base, "abc")


def test_exporting_says_what_is_missing(
    make_run: Run, isthmus: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    run = make_run("frozen")
    with pytest.raises(IsthmusError, match=r"no adapters: its llm\.tune is frozen"):
        export_adapter(run, tmp_path / "adapter")
    code, _, err = isthmus("export-adapter", run, tmp_path)
    assert code == 1
    assert "exists. Name another folder" in err

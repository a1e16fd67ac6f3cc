"""Plans: the papers' columns of parameters, memory, arithmetic and hours, all offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.build import build_conformer, build_model
from isthmus.errors import IsthmusError
from isthmus.lab import sizes
from isthmus.lab.plan import Hardware, Plan, make_plan
from isthmus.lab.sizes import layer_values
from isthmus.lab.sweep import make_plan as sweep_plan
from isthmus.model.encoder import parameters
from isthmus.model.llm import LLM
from isthmus.model.presets import PRESETS
from isthmus.recipe import CTCRecipe, Recipe, load_any_recipe, load_recipe
from isthmus.recipe_files import shipped_recipes, shipped_sweeps
from isthmus.settings.encoders import WhisperSettings

VICUNA = "lmsys/vicuna-7b-v1.5"
LARGE = "openai/whisper-large-v2"
T3 = {  # SLAM-ASR, table 3: billions of the LLM, its width, millions of the projector
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": (1.10, 2048, 17.31),
    "meta-llama/Llama-2-7b-hf": (6.74, 4096, 21.50),
    "TinyLlama/TinyLlama-1.1B-Chat-v0.4": (1.10, 2048, 17.31),
    "microsoft/phi-2": (2.78, 2560, 18.35),
    "meta-llama/Llama-2-7b-chat-hf": (6.74, 4096, 21.50),
    VICUNA: (6.74, 4096, 21.50),
}
T4 = {  # SLAM-ASR, table 4: millions of the encoder, and of the projector
    "openai/whisper-tiny": (7.63, 12.33),
    "openai/whisper-base": (19.82, 13.64),
    "openai/whisper-small": (87.00, 16.26),
    "openai/whisper-medium": (305.68, 18.88),
    LARGE: (634.86, 21.50),
    "facebook/hubert-base-ls960": (94.70, 16.26),
    "microsoft/wavlm-base": (94.38, 16.26),
    "facebook/hubert-large-ll60k": (316.61, 18.88),
    "facebook/hubert-large-ls960-ft": (316.61, 18.88),
    "microsoft/wavlm-large": (315.45, 18.88),
    "facebook/hubert-xlarge-ll60k": (964.32, 21.50),
    "facebook/hubert-xlarge-ls960-ft": (964.32, 21.50),
}


def recipe(
    encoder: str | dict[str, Any] = "openai/whisper-tiny",
    llm: str | dict[str, Any] = "EleutherAI/pythia-70m",
    **more: Any,
) -> Recipe:
    if isinstance(encoder, str):
        kind = encoder.partition("/")[2].partition("-")[0]
        encoder = {"type": kind, "path": encoder}
    llm = {"path": llm} if isinstance(llm, str) else llm
    values = {"name": "planned", "encoder": encoder, "llm": llm, **more}
    return Recipe.model_validate(values)


def millions(count: int) -> float:
    return round(count / 1e6, 2)


@pytest.mark.parametrize("llm", T3)
def test_table_3(llm: str) -> None:
    plan = make_plan(recipe("openai/whisper-large-v2", llm))
    billions, width, projector = T3[llm]
    assert round(plan.parts["llm"].parameters / 1e9, 2) == billions
    assert plan.llm_width == width
    assert millions(plan.parts["projector"].parameters) == projector
    assert plan.parts["projector"].trained == plan.parts["projector"].parameters
    assert plan.parts["encoder"].trained == plan.parts["llm"].trained == 0


@pytest.mark.parametrize("encoder", T4)
def test_table_4(encoder: str) -> None:
    plan = make_plan(recipe(encoder, VICUNA))
    of_encoder, of_projector = T4[encoder]
    found = millions(plan.parts["encoder"].parameters)
    # the paper counts heads that HuBERT has in its own pretraining only
    assert found == pytest.approx(of_encoder, rel=0.004 if "hubert" in encoder else 0, abs=1e-9)
    assert millions(plan.parts["projector"].parameters) == of_projector
    assert plan.embeddings_per_second == pytest.approx(10, abs=0.05)


def test_table_4_without_an_encoder() -> None:
    plan = make_plan(recipe({"type": "fbank"}, VICUNA, projector={"downsample_rate": 10}))
    assert plan.parts["encoder"].parameters == 0
    assert millions(plan.parts["projector"].parameters) == 10.03


def test_an_epoch_of_the_paper() -> None:
    plan = make_plan(recipe(train={"batch_size": 6}), Hardware(count=4), hours=960)
    assert plan.epoch.steps == pytest.approx(12_000, rel=0.03)


def test_a_plan_is_of_the_model_that_training_builds(
    model_folder: Callable[[str], Path], encoder_settings: Callable[[str], Any]
) -> None:
    built = recipe(
        encoder_settings("hubert-layer").model_dump(),
        {"path": str(model_folder("llama")), "tune": "lora", "lora": {"rank": 2}},
    )
    model = build_model(built)
    plan = make_plan(built)
    for name, part in model.named_children():
        assert (plan.parts[name].parameters, plan.parts[name].trained) == parameters(part)
        values = [*part.parameters(), *part.buffers()]
        assert plan.parts[name].weight_bytes == sum(value.nbytes for value in values)
    trained = sum(value.numel() for value in model.trainable().values())
    assert plan.memory["optimiser"] == 12 * trained
    assert plan.memory["total"] == sum(plan.memory.values()) - plan.memory["total"]
    assert plan.epoch.flops == pytest.approx(
        plan.speech.utterances
        * model.flops(
            model.positions(12.3, int(plan.speech.mean_tokens)),
            int(plan.speech.mean_tokens),
            [12.3],
        )
    )


@pytest.mark.parametrize(
    ("quantise", "bits"), [("int8", 8.0), ("fp8", 8.0), ("int4", 4.5), ("none", 16.0)]
)
def test_fewer_bits_take_less_memory(quantise: str, bits: float) -> None:
    llm = {"path": "EleutherAI/pythia-1b", "quantise": quantise}
    part = make_plan(recipe(llm=llm, train={"precision": "bfloat16"})).parts["llm"]
    tables = 2 * 50_304 * 2048
    assert part.parameters == 1_011_781_632  # scales are not counted
    expected = (part.parameters - tables) * bits / 8 + tables * 2
    assert part.weight_bytes == pytest.approx(expected, rel=3e-3)


def test_a_sharded_model_is_divided() -> None:
    whole, shared = (
        make_plan(recipe(train={"shard": shard}), Hardware(count=4)).parts["llm"].weight_bytes
        for shard in (False, True)
    )
    assert shared == whole // 4


def test_arithmetic_is_inverse_to_what_the_gpus_reach() -> None:
    one = make_plan(recipe(), Hardware("h200", 1, 0.35))
    many = make_plan(recipe(), Hardware("H200", 8, 0.7))
    assert many.epoch.hours == pytest.approx(one.epoch.hours / 16)
    assert one.epoch.hours == pytest.approx(one.epoch.flops / (989e12 * 0.35) / 3600)
    assert one.run.flops == pytest.approx(100_000 * 6 * one.epoch.flops / one.speech.utterances)


def test_cached_frames_save_the_encoder() -> None:
    plain = make_plan(recipe())
    kept = make_plan(recipe(data={"feature_cache": "float32"}))
    changed = make_plan(recipe(data={"feature_cache": "bfloat16", "augment": {"padding": {}}}))
    assert kept.cache is not None
    assert plain.cache is not None
    assert kept.epoch.hours + kept.cache["hours"] == pytest.approx(plain.epoch.hours)
    assert kept.cache["bytes"] == 4 * 615 * 384 * kept.speech.utterances
    assert plain.cache["bytes"] == kept.cache["bytes"] / 2
    assert changed.epoch.flops == plain.epoch.flops
    assert any("feature_cache is off" in note for note in changed.notes)


@pytest.mark.parametrize("name", ["llama", "phi", "gpt-neox", "bloom"])
@pytest.mark.parametrize("tune", ["frozen", "full"])
def test_activations_are_about_what_autograd_keeps(
    load_llm: Callable[..., LLM], name: str, tune: str
) -> None:
    """Numbers that torch is seen to keep for the backward pass, against the formula."""
    llm = load_llm(name, tune=tune).requires_grad_(tune == "full")
    weights = {value.data_ptr() for value in llm.parameters()}
    kept: dict[int, int] = {}

    def count(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = value.untyped_storage().nbytes() // 4
        return value

    positions = 16  # few: attention's weights, which fast kernels do not keep, are small then
    embeddings = torch.randn(1, positions, llm.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        output = llm.network(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1)
    assert output.logits.requires_grad
    planned = sum(layer_values(llm.network, llm.dim))
    assert 0.5 < planned / (sum(kept.values()) / positions) < 2


def test_recomputing_keeps_less() -> None:
    plain, less = (
        make_plan(recipe(train={"checkpointing": on})).memory["activations"] for on in (False, True)
    )
    assert less < 0.7 * plain


def test_data_that_can_be_read(tmp_path: Path) -> None:
    lines = [
        {"id": f"u{n}", "audio": "a.wav", "duration": 2.0 + n, "text": "one two three four"}
        for n in range(5)
    ]
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": [{"path": str(manifest), "repeat": 3}], "max_seconds": 5.5}
    plan = make_plan(recipe(data=data))
    assert plan.speech.source == "data.train"
    assert plan.speech.hours == pytest.approx(3 * (2 + 3 + 4 + 5) / 3600)  # six seconds: too long
    assert plan.speech.utterances == 12
    assert plan.speech.mean_tokens == 6  # one, two, thre-e, four and the end
    assert make_plan(recipe(data=data), hours=1, mean_seconds=10).speech.utterances == 360
    absent = make_plan(recipe(data={"train": ["nowhere.jsonl"]}))
    assert absent.speech.hours == 960
    assert "cannot be read here" in absent.speech.source


def manifest(file: Path, speech: dict[str, list[float]]) -> str:
    """A corpus of utterances in these languages, that long; each second has a word."""
    rows = [
        {"id": f"{name}{n}", "audio": "a.wav", "duration": d, "text": "one " * int(d)}
        | {"language": name}
        for name, durations in speech.items()
        for n, d in enumerate(durations)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_what_training_leaves_out_is_not_planned_with(tmp_path: Path) -> None:
    train = [manifest(tmp_path / "a.jsonl", {"en": [4, 8, 31], "de": [2], "pl": [20]})]
    data = {"train": train, "max_seconds": 40}
    assert make_plan(recipe(data=data)).speech.utterances == 4  # Whisper takes 30 s
    longer = make_plan(recipe({"type": "fbank"}, data=data))
    assert longer.speech.utterances == 5
    some = make_plan(recipe(data=data | {"languages": ["de", "en"]})).speech
    assert (some.utterances, some.mean_seconds) == (3, pytest.approx(14 / 3))
    with pytest.raises(IsthmusError, match=r"data\.languages names 'fr'.*de, en, pl"):
        make_plan(recipe(data=data | {"languages": ["fr"]}))


def test_languages_count_as_often_as_they_are_drawn(tmp_path: Path) -> None:
    train = [manifest(tmp_path / "a.jsonl", {"en": [2.0] * 9, "pl": [12.0]})]
    plain = make_plan(recipe(data={"train": train})).speech
    assert (plain.mean_seconds, plain.source) == (pytest.approx(3), "data.train")
    drawn = make_plan(recipe(data={"train": train, "language_temperature": 1e9})).speech
    assert (drawn.utterances, drawn.mean_seconds) == (10, pytest.approx(7))
    assert drawn.mean_tokens == pytest.approx(plain.mean_tokens + 4)  # a word a second
    assert drawn.source == "data.train, drawn by data.language_temperature"
    same = make_plan(recipe(data={"train": train, "language_temperature": 1})).speech
    assert same.mean_seconds == pytest.approx(3)


@pytest.mark.parametrize(
    ("train", "utterances"),
    [({"batch_size": 5}, 5.0), ({"max_duration": 123}, 10.0), ({"max_tokens": 100}, 1.0)],
)
def test_utterances_of_a_batch(train: dict[str, Any], utterances: float) -> None:
    assert make_plan(recipe(train=train)).batch == pytest.approx(utterances)


def test_whisper_hears_its_padding() -> None:
    padded = make_plan(recipe())
    assert make_plan(recipe(), mean_seconds=30).cache["hours"] == pytest.approx(
        padded.cache["hours"] * 12.3 / 30, rel=1e-4
    )
    assert any("sinusoidal" in note for note in padded.notes)


def test_a_pair_of_encoders_and_adapters() -> None:
    """SALMONN's, with WavLM in the place of what transformers does not have."""
    whisper = {"type": "whisper", "path": "openai/whisper-tiny"}
    wavlm = {"type": "wavlm", "path": "microsoft/wavlm-base"}
    plan = make_plan(
        recipe(
            {"type": "pair", "first": whisper, "second": wavlm},
            {"path": "huggyllama/llama-7b", "tune": "lora", "lora": {"rank": 8}},
        )
    )
    alone = [make_plan(recipe(one)).cache for one in (whisper, wavlm)]
    assert plan.cache is not None
    hours = [cache["hours"] for cache in alone if cache is not None]
    assert plan.cache["hours"] == pytest.approx(sum(hours))  # 30 s and 12.3 s, each its own
    encoder, llm = plan.parts["encoder"], plan.parts["llm"]
    assert encoder.name == "openai/whisper-tiny + microsoft/wavlm-base"
    assert millions(encoder.parameters) == round(7.632384 + 94.381936, 2)
    assert llm.trained == 32 * 4 * 2 * 8 * 4096  # layers, matrices, ends, rank, width
    assert llm.parameters == 6_738_415_616 + llm.trained


def test_a_trained_encoder_has_no_cache() -> None:
    whisper = {"type": "whisper", "path": "openai/whisper-tiny", "tune": "full"}
    plan = make_plan(recipe(whisper))
    assert plan.cache is None
    assert plan.parts["encoder"].trained == plan.parts["encoder"].parameters == 7_632_384
    assert plan.epoch.flops > make_plan(recipe()).epoch.flops
    assert "none: the encoder is trained" in "\n".join(plan.lines())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_can_be_planned(name: str) -> None:
    plan = make_plan(load_any_recipe(name), hours=10)
    assert sum(part.trained for part in plan.parts.values()) > 50_000
    assert plan.run.flops > 0
    assert plan.lines()


@pytest.mark.slow
def test_every_row_of_the_papers_sweeps_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_AUDIO_ENCODER", "openai/whisper-large-v2")
    planned: dict[str, Plan] = {}  # many rows are runs of several sweeps
    for name in shipped_sweeps():
        sweep = sweep_plan(name, "paper", tmp_path)
        producers = {
            str(sweep.folder / "models" / model / "model"): sweep.expanded(recipe)
            for model, recipe in sweep.shared(sweep.runs).models.items()
        }
        for run in sweep.runs:
            if run.name not in planned:
                chosen = sweep.expanded(run.recipe)
                planned[run.name] = make_plan(
                    chosen, Hardware(count=4), hours=10, producers=producers
                )
                encoder = chosen.encoder
                if isinstance(encoder, WhisperSettings):  # 300 embeddings, and four of the GPUs
                    assert encoder.keep_padding
                    assert planned[run.name].embeddings_per_second == 10
                    assert chosen.train.batches(4) == 4
    assert len(planned) > 40


def test_what_a_recipe_will_make_has_its_size(tmp_path: Path) -> None:
    """The same as when it is made."""
    small = load_any_recipe("tiny/ladder/conformer-small")
    assert isinstance(small, CTCRecipe)
    encoder, folder = {"type": "conformer", "path": "yet/to/be/made"}, tmp_path / "made"
    planned = make_plan(recipe(encoder), producers={"yet/to/be/made": small})
    assert any("yet/to/be/made is not here yet" in note for note in planned.notes)
    build_conformer(small).save(folder)
    made = make_plan(recipe(encoder | {"path": str(folder)}))
    assert planned.parts["encoder"].parameters == made.parts["encoder"].parameters
    assert planned.run == made.run
    alone = make_plan(small, hours=1)
    assert alone.parts["model"].trained == parameters(build_conformer(small))[0]
    assert alone.memory["optimiser"] == 12 * alone.parts["model"].trained
    assert alone.run.flops == 6.0 * alone.parts["model"].trained * alone.run.positions


def test_units_that_are_yet_to_be_found() -> None:
    plan = make_plan(load_recipe("others/speech-gpt"), hours=1)
    assert plan.parts["projector"].trained == 1000 * 4096
    assert any("units/hubert-1000.safetensors is not here yet" in note for note in plan.notes)


def test_a_global_batch_is_planned_with() -> None:
    one, four = (make_plan(load_recipe("slam_asr/paper"), Hardware(count=n)) for n in (1, 4))
    assert one.epoch.steps == four.epoch.steps == pytest.approx(12_000, rel=0.03)


def test_a_warm_up_that_never_ends_is_noted() -> None:
    for steps, noted in ((20, True), (2000, False)):
        plan = make_plan(load_recipe("slam_asr/paper", [f"train.steps={steps}"]), hours=10)
        assert any("train.warmup_steps 1,000 is not less" in note for note in plan.notes) == noted


def test_a_folder_that_is_yet_to_be_trained() -> None:
    encoder = {"type": "conformer", "path": "runs/absent/model"}
    with pytest.raises(IsthmusError, match=r"runs/absent/model: there is no .*conformer:18"):
        make_plan(recipe(encoder))
    assert make_plan(recipe({"type": "conformer", "path": "conformer:24"})).notes


def test_unknown_gpu() -> None:
    with pytest.raises(IsthmusError, match=r"--gpu h210.*Did you mean 'H.*Known: "):
        make_plan(recipe(), Hardware("h210"))


def test_presets_are_listed_with_their_sizes(
    isthmus: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: PRESETS[name] for name in ("openai/whisper-tiny", "lmsys/vicuna-7b-v1.5")}
    monkeypatch.setattr(sizes, "PRESETS", some)
    found = json.loads(isthmus("presets", "--json")[1])
    rows = {row["name"]: (row["kind"], row["parameters"]) for row in found}
    assert rows["openai/whisper-tiny"] == ("encoder", 7_632_384)
    assert rows["lmsys/vicuna-7b-v1.5"] == ("llm", 6_738_415_616)


def test_the_command(isthmus: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        "name: mine\nencoder: {type: whisper, path: openai/whisper-tiny}\n"
        "llm: {path: EleutherAI/pythia-70m}\n"
    )
    code, out, err = isthmus("plan", file, "llm.path=EleutherAI/pythia-160m", "--gpu", "a100")
    assert (code, err) == (0, "")
    assert "7.63M" in out
    assert "162.32M" in out
    code, out, _ = isthmus("plan", file, "--json", "--hours", 10, "--mean-seconds", 10)
    found = json.loads(out)
    assert code == 0
    assert found["parts"]["encoder"]["parameters"] == 7_632_384
    assert found["speech"]["utterances"] == 3600
    code, _, err = isthmus("plan", file, "llm.path=EleutherAI/pythia-161m")
    assert code == 1
    assert err.startswith("error: EleutherAI/pythia-161m is not known offline")
    assert "EleutherAI/pythia-160m" in err

"""Recipes: strict, overridable, complete, and every shipped one valid."""

import shlex
from pathlib import Path

import pytest

from isthmus.errors import IsthmusError
from isthmus.recipe import CTCRecipe, LanguageRecipe, Recipe, dump_recipe, load_recipe
from isthmus.recipe_files import as_override, find_recipe, parse_yaml, shipped_recipes
from isthmus.settings.conformers import ConformerArchitecture

MINIMAL = """
name: debug
encoder: {type: whisper, path: openai/whisper-tiny}
llm: {path: TinyLlama/TinyLlama-1.1B-Chat-v0.4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "debug.yaml"
    path.write_text(MINIMAL)
    return path


def kind_of(path: Path) -> type[Recipe] | type[CTCRecipe] | type[LanguageRecipe]:
    """By the verb that the recipe's own header says to run it with."""
    text = path.read_text()
    if "isthmus pretrain-ctc" in text:
        return CTCRecipe
    return LanguageRecipe if "isthmus pretrain-lm" in text else Recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    kind = kind_of(find_recipe(name))
    recipe = load_recipe(name, kind=kind)
    assert "# Run:    isthmus" in find_recipe(name).read_text()
    assert recipe.name


def test_defaults_are_those_of_the_paper(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.projector.downsample_rate == 5
    assert recipe.projector.hidden == 2048
    assert recipe.prompt.template == "paper"
    assert recipe.prompt.instruction == "Transcribe speech to text."
    assert recipe.encoder.tune == recipe.llm.tune == "frozen"
    train = recipe.train
    assert (train.learning_rate, train.warmup_steps, train.schedule) == (1e-4, 1000, "constant")
    assert (train.steps, train.weight_decay, train.batch_size) == (100_000, 0.0, 6)
    assert recipe.decode.beam_size == 4


def test_scientific_notation_is_a_number(file: Path) -> None:
    file.write_text(MINIMAL + "train: {learning_rate: 1e-4}\n")
    assert load_recipe(file).train.learning_rate == 1e-4
    assert load_recipe(file, ["train.learning_rate=2e-3"]).train.learning_rate == 2e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=1", "unknown key train.stpes. Did you mean 'steps'?"),
        ("trian.steps=1", "unknown key trian. Did you mean 'train'?"),
        ("encoder.pth=x", "Did you mean 'path'?"),
        ("encoder.type=whispr", "whisper"),
        ("projector.stack=4", "Known keys: downsample_rate, hidden, stride_ms, type"),
        ("projector.type=conv", "'linear', 'conv1d', 'qformer'"),
        ("prompt.template=papr", "paper"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("llm.tune=forzen", "frozen"),
        ("train.batch_size=2 ", None),
        ("nonsense", "key.subkey=value"),
        ("name.x=1", "name is a value"),
        ("projector.strid_ms=80", "unknown key projector.strid_ms. Did you mean 'stride_ms'?"),
        ("projector.stride_ms=-1", "  projector.stride_ms: Input should be greater"),
        ("projector={downsample_rate: 5, stride_ms: 80}", "not both: set the other to null."),
        ("encoder={type: conformer}", "  encoder.path is missing"),
        ("data.train=[{repeat: 0}]", "  data.train.0.path is missing"),
        ("projector={type: qformer, window_seconds: 60}", "window_seconds 60 is longer than any"),
        ("train.text_masking={de: 2}", "  train.text_masking.de: "),
        ("encoder={type: pair, first: {type: fbank, num_mel: 8}}", " encoder.first.num_mel. Did"),
        ("train.steps=0", "debug.yaml with train.steps=0 is not a valid recipe"),
    ],
)
def test_faults_are_named_with_what_would_be_right(
    file: Path, override: str, message: str | None
) -> None:
    if message is None:
        assert load_recipe(file, [override]).train.batch_size == 2
        return
    with pytest.raises(IsthmusError) as fault:
        load_recipe(file, [override])
    assert message in str(fault.value)
    assert "Value error" not in str(fault.value)


def test_a_part_whose_type_alone_was_changed_is_to_be_replaced(file: Path) -> None:
    file.write_text(MINIMAL + "projector: {type: linear, downsample_rate: 4}\n")
    with pytest.raises(IsthmusError) as fault:
        load_recipe(file, ["projector.type=ctc"])
    assert "unknown key projector.downsample_rate" in str(fault.value)
    assert 'replace the whole part: projector="{type: ctc}"' in str(fault.value)
    with pytest.raises(IsthmusError) as fault:
        load_recipe(file, ["projecter.type=ctc"])
    assert "'projector'" in str(fault.value)
    assert "replace the whole part" not in str(fault.value)
    with pytest.raises(IsthmusError) as fault:
        load_recipe(file, ["projector.type=linear", "train.stpes=1"])
    assert "whole part" not in str(fault.value)


def test_windows_may_be_as_long_as_utterances(file: Path) -> None:
    window = "projector={type: qformer, window_seconds: 60}"
    assert load_recipe(file, [window, "data.max_seconds=60"])
    with pytest.raises(IsthmusError, match=r"projector\.window_seconds 60 .* data\.max_seconds 59"):
        load_recipe(file, [window, "data.max_seconds=59"])


@pytest.mark.parametrize(("steps", "share"), [(20, "2.0%"), (1000, "100.0%"), (1001, None)])
def test_a_warm_up_that_never_ends_is_told(file: Path, steps: int, share: str | None) -> None:
    fault = load_recipe(file, [f"train.steps={steps}"]).train.warmup_fault()
    assert fault is None if share is None else fault and f"{share} of train.learning_rate" in fault


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (2, "a.b=2"),
        (None, "a.b=null"),
        ("x/y", "a.b=x/y"),
        ({"type": "fbank"}, "'a.b={type: fbank}'"),
        ("${SWEEP}/models", "'a.b=${SWEEP}/models'"),
        ("2", "\"a.b='2'\""),
        ([1.5, True, "ä"], "'a.b=[1.5, true, ä]'"),
    ],
)
def test_settings_are_written_as_one_types_them(value: object, typed: str) -> None:
    found = as_override("a.b", value)
    (given,) = shlex.split(found)
    assert parse_yaml(given.partition("=")[2]) == value
    assert found == typed or value == "2"


def test_two_measures_of_a_batch_are_refused(file: Path) -> None:
    with pytest.raises(IsthmusError, match="not 2"):
        load_recipe(file, ["train.batch_size=4", "train.max_duration=60"])
    assert load_recipe(file, ["train.max_duration=60"]).train.batch_size is None


@pytest.mark.parametrize(("size", "processes", "batches"), [(6, 1, 4), (6, 4, 4), (3, 8, 8)])
def test_a_global_batch_is_the_same_on_any_number_of_processes(
    file: Path, size: int, processes: int, batches: int
) -> None:
    overrides = ["train.global_batch_size=24", f"train.batch_size={size}"]
    assert load_recipe(file, overrides).train.batches(processes) == batches


@pytest.mark.parametrize(
    ("overrides", "processes", "match"),
    [
        (["train.batch_size=5"], 1, "24 is no multiple of batch_size 5"),
        (["train.max_duration=60"], 1, "set global_batch_size to null"),
        (["train.accumulate=4"], 1, "accumulate"),
        (["train.batch_size=6"], 8, "batch_size to one of 1, 3"),
        (["train.batch_size=6"], 5, "multiple of 5"),
    ],
)
def test_a_global_batch_that_cannot_be_had(
    file: Path, overrides: list[str], processes: int, match: str
) -> None:
    with pytest.raises(IsthmusError, match=match):
        load_recipe(file, ["train.global_batch_size=24", *overrides]).train.batches(processes)


@pytest.mark.parametrize("measure", ["batch_size", "max_duration"])
def test_a_batch_of_nothing_is_refused(file: Path, measure: str) -> None:
    with pytest.raises(IsthmusError, match=rf"train\.{measure}: .* greater than"):
        load_recipe(file, [f"train.{measure}=0"])


def test_a_model_to_go_on_from_brings_its_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "ctc.yaml"
    path.write_text("name: ctc\nfront_end: {num_mels: 40}\n")
    new = load_recipe(path, kind=CTCRecipe)
    assert new.architecture == ConformerArchitecture()
    assert "num_hidden_layers: 18" in dump_recipe(new)
    with pytest.raises(IsthmusError, match="start_from brings its own front_end"):
        load_recipe(path, ["start_from=x"], kind=CTCRecipe)
    on = load_recipe(path, ["start_from=x", "front_end=null"], kind=CTCRecipe)
    assert (on.architecture, on.front_end, on.letters) == (None, None, None)
    path.write_text(dump_recipe(on))
    assert load_recipe(path, kind=CTCRecipe) == on
    path.write_text("name: lm\nstart_from: x\narchitecture: {hidden_size: 8}\n")
    with pytest.raises(IsthmusError, match="start_from brings its own architecture"):
        load_recipe(path, kind=LanguageRecipe)


def test_settings_that_would_do_nothing_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(IsthmusError, match=r"data\.spec_augment masks .* leave it out"):
        load_recipe(file, ["data.spec_augment={}"])
    path = tmp_path / "lm.yaml"
    path.write_text("name: lm\n")
    for override in ("data.train=[a]", "train.batch_size=4", "train.max_duration=9"):
        with pytest.raises(IsthmusError, match="unknown key"):
            load_recipe(path, [override], kind=LanguageRecipe)
        assert load_recipe(path, [override], kind=CTCRecipe)


def test_local_models_are_named_by_their_full_path(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/whisper", "isthmus/tiny-llama"):
        Path(name).mkdir(parents=True)
    changes = ["encoder.path=models/whisper", "llm.path=isthmus/tiny-llama"]
    stored = parse_yaml(dump_recipe(load_recipe(file, changes)))
    assert stored["encoder"]["path"] == str(tmp_path / "models/whisper")
    assert stored["llm"]["path"] == "isthmus/tiny-llama"
    assert "path: openai/whisper-tiny" in dump_recipe(load_recipe(file))
    assert str(tmp_path / "models") in dump_recipe(LanguageRecipe(name="x", start_from="models"))


def test_the_resolved_recipe_is_the_same_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["train.max_duration=60", "data.train=[a, {path: b, repeat: 2}]"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe


def test_a_recipe_cannot_be_changed(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(file).train.steps = 3


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(IsthmusError, match="tiny/projector"):
        load_recipe("tiny/projecter")


def test_not_yaml_and_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, where in (
        ("a: [1", r"line 1, column 6: 'a: \[1' is not valid YAML: expected"),
        ("a: 1\nb:\n\tc: 1\n", r"line 3, column 1: 'c: 1' is not valid YAML: found character"),
        ("a: \x01", r"'a: \\x01' is not valid YAML: .*special characters"),
    ):
        path.write_text(text)
        with pytest.raises(IsthmusError, match=where):
            load_recipe(path)
    path.write_text("- 1")
    with pytest.raises(IsthmusError, match="no settings"):
        load_recipe(path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\n")
    with pytest.raises(IsthmusError, match=r"(?s)encoder is missing.*llm is missing"):
        load_recipe(path)


def test_schema_describes_every_encoder_type() -> None:
    schema = str(Recipe.model_json_schema())
    for name in ("whisper", "hubert", "wavlm", "wav2vec2", "conformer", "fbank", "slam-llm"):
        assert name in schema

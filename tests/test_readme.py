"""The pages say what is so: commands parse, recipes are valid, tables are complete, paths exist.

What a block is stands behind its language: ```yaml recipe, ```json nemo, ```python runs.
"""

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import typer
import yaml
from lhotse import CutSet
from pydantic import BaseModel, TypeAdapter

import isthmus
from isthmus.cli import app
from isthmus.decoding.evaluate import Decoded, Evaluation
from isthmus.decoding.formats import transcript_dict
from isthmus.decoding.transcript import (
    Alternative,
    FinishReason,
    Segment,
    Transcript,
    Word,
)
from isthmus.errors import IsthmusError
from isthmus.lab.sweep import Sweep
from isthmus.model.llm import character_tokenizer
from isthmus.model.projector import build_projector
from isthmus.model.prompt import tokenise
from isthmus.recipe import CTCRecipe, Experiment, LanguageRecipe, Recipe, load_recipe
from isthmus.recipe_files import parse_yaml, shipped_recipes
from isthmus.scoring import compare, score_sets
from isthmus.scoring.normalise import NORMALISERS
from isthmus.speech.audio import AudioCode
from isthmus.speech.corpora import read_corpus
from isthmus.speech.formats import recognise
from isthmus.speech.prepare import KINDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted(DOCS.glob("*.md"))]
JOBS: dict[str, type[Experiment]] = {
    "train": Recipe,
    "pretrain-ctc": CTCRecipe,
    "pretrain-lm": LanguageRecipe,
}
MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "encoder": {"type": "whisper", "path": "openai/whisper-tiny"},
    "llm": {"path": "isthmus/tiny-llama-chat"},
}
REQUIRED = "required"
USAGE_ERROR: Any = typer.BadParameter.__base__  # of click, or of typer's own copy of it


@dataclass(frozen=True)
class Block:
    """A fenced block: where, what it is, and what is in it."""

    page: str
    mark: str
    text: str


def blocks(language: str) -> list[Block]:
    fence = re.compile(rf"^```{language}\b ?([^\n]*)\n(.*?)^```$", re.M | re.S)
    return [
        Block(page.name, mark, text)
        for page in PAGES
        for mark, text in fence.findall(page.read_text(encoding="utf-8"))
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


# --- commands


def command_lines() -> list[str]:
    """Lines of shell blocks, `isthmus …` and the like in the text, and those atop the recipes."""
    lines = [line for block in blocks("sh") for line in block.text.splitlines()]
    for page in PAGES:
        lines += re.findall(r"`((?:isthmus|make|python) [^`]+)`", prose(page))
    for path in shipped_recipes().values():
        lines += re.findall(r"^# (?:Run:)? +(isthmus .+)$", path.read_text(encoding="utf-8"), re.M)
    return sorted({line.strip() for line in lines if line.strip()})


def check_command(line: str, recipe: Path) -> None:
    """Raises what is wrong with a command line; `recipe` stands for files of the reader's own."""
    program, *words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    if program == "python" and words[:2] == ["-m", "isthmus"]:
        program, words = "isthmus", words[2:] or ["--help"]
    if program == "isthmus":
        check_isthmus(words, recipe)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\.\[(.+?)\]", line):
            assert set(extras.split(",")) <= known["optional-dependencies"].keys()
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    else:
        assert program in ("python3", "."), f"unknown program {program}"


def check_isthmus(words: list[str], recipe: Path) -> None:
    group: Any = typer.main.get_command(app)
    verb, *rest = words
    if verb.startswith("-"):
        assert verb == "--help" or any(verb in option.opts for option in group.params)
        return
    assert verb in group.commands, f"there is no isthmus {verb}"
    command = group.commands[verb]
    while rest and rest[0] in getattr(command, "commands", {}):  # a verb of several words
        command, rest = command.commands[rest[0]], rest[1:]
    known = {name for option in command.params for name in option.opts + option.secondary_opts}
    unknown = {word.partition("=")[0] for word in rest if word.startswith("-")} - known
    assert not unknown, f"isthmus {verb} knows no {unknown}"
    if all(word.startswith("-") for word in rest):
        return  # a verb or an option is spoken of, not a whole command
    given = command.make_context(verb, rest).params
    if verb in JOBS:
        file = given["recipe"] if given["recipe"] in shipped_recipes() else recipe
        load_recipe(file, given["overrides"] or [], kind=JOBS[verb])
    if verb == "cp":
        assert given["name"] in shipped_recipes()
    if verb == "prepare":
        assert given["kind"] in KINDS


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_commands_are_found() -> None:
    assert len(command_lines()) > 30


@pytest.mark.parametrize("line", command_lines())
def test_command_parses(line: str, minimal: Path) -> None:
    check_command(line, minimal)


@pytest.mark.parametrize(
    "line",
    [
        "isthmus trian my.yaml",
        "isthmus train my.yaml --resum",
        "isthmus train my.yaml train.stpes=4",
        "isthmus train tiny/projector train.steps=many",
        "isthmus transcribe a.wav --beam-size none",
        "isthmus score ref.jsonl",
        "isthmus cp tiny/projecter my.yaml",
        "isthmus prepare librispech a b",
        "make quikstart",
        'pip install -e ".[sinth]"',
        "rm -rf runs",
    ],
)
def test_a_wrong_command_would_be_seen(line: str, minimal: Path) -> None:
    with pytest.raises((AssertionError, IsthmusError, USAGE_ERROR)):
        check_command(line, minimal)


# --- recipes in blocks, and the tables of their keys


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(base[key], more[key]) for key in base.keys() & more if key == "data"}
    return base | more | both


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: f"{block.page}-{block.mark}")
def test_yaml_is_valid(block: Block) -> None:
    values = parse_yaml(block.text)
    if block.mark == "mean":  # of the worked example
        assert adapter().validate_python(values["projector"]).type == "mean"
        return
    if block.mark == "sweep":
        Sweep.model_validate(values)
        return
    assert block.mark in ("recipe", "part"), "say behind ```yaml what this is"
    Recipe.model_validate(values if block.mark == "recipe" else merged(MINIMAL, values))


Row = tuple[str, str]  # a key and its default as JSON


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def settings(model: type[BaseModel], prefix: str = "", tag: object = None) -> Iterator[Row]:
    """Each key with its default, through lists and unions; the `tag` of a union is required."""
    for name, field in model.model_fields.items():
        key, below, default = prefix + name, models_in(field.annotation), field.get_default()
        if name == tag or (field.is_required() and not below):
            yield key, REQUIRED
        elif not field.is_required() and not isinstance(default, BaseModel):
            yield key, json.dumps(default)
        # data.dev is written as data.train, an encoder of two as one, a projector within as one
        if key not in ("data.dev", "encoder.first", "encoder.second", "projector.inner"):
            for part in below:
                yield from settings(part, f"{key}.", field.discriminator)


def table_rows(page: Path) -> Iterator[list[str]]:
    """Cells of each row of a table, its heading's first cell in front."""
    heading = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            heading = ""
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        heading = heading or cells[0]
        yield [heading, *cells, ""]


def pairs(text: str) -> Iterator[Row]:
    """``name` value; `name` value`` as rows."""
    for item in text.split("; "):
        found = re.fullmatch(r"`(\w+)` (.+)", item)
        assert found, f"{item!r} is no `key` value"
        yield found[1], json.dumps(parse_yaml(found[2]))


def documented() -> Iterator[Row]:
    """The keys and defaults that the tables on data and recipes state."""
    for page in (DOCS / "recipes.md", DOCS / "data.md"):
        for heading, first, second, *more in table_rows(page):
            key = first.strip("`")
            if heading == "Effect" and first.startswith("`"):
                key = f"data.augment.{key}"
                yield key, "null"
                yield f"{key}_probability", second
                yield from ((f"{key}.{name}", value) for name, value in pairs(more[0]))
            elif heading == "Key" and key.endswith(".*"):
                yield from ((key[:-1] + name, value) for name, value in pairs(second))
            elif heading == "Key" and first.startswith("`"):
                assert more
                assert more[0], f"{key} has no meaning"
                yield key, second if second == REQUIRED else json.dumps(parse_yaml(second))


def test_tables_list_every_setting_with_its_default() -> None:
    actual = {row for kind in JOBS.values() for row in settings(kind)}
    stated = set(documented())
    assert len(actual) > 90
    assert actual - stated == set(), "missing or stale in docs/recipes.md or docs/data.md"
    assert stated - actual == set(), "docs/recipes.md or docs/data.md states what is not so"


def test_a_setting_without_a_row_would_be_seen() -> None:
    class Longer(Recipe):
        more: int = 3

    assert set(settings(Longer)) - set(documented()) == {("more", "3")}


def test_choices_are_named() -> None:
    """Each value of a closed choice stands in the row of its key."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for kind in JOBS.values():
        for key, values in choices(kind):
            rows = [line for line in text.splitlines() if key.rpartition(".")[2] in line]
            missing = [value for value in values if not any(str(value) in row for row in rows)]
            assert missing == [], f"{key} can also be {missing}"


def choices(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is Literal:
            yield prefix + name, get_args(field.annotation)
        for part in models_in(field.annotation):
            yield from choices(part, f"{prefix}{name}.")


# --- formats


@pytest.mark.parametrize("block", blocks("json") + blocks("csv"), ids=lambda block: block.mark)
def test_format_is_read(block: Block, tmp_path: Path) -> None:
    path = tmp_path / ("metadata.csv" if block.mark == "table" else "corpus.jsonl")
    path.write_text(block.text)
    assert recognise(path) == block.mark
    assert said(read_corpus(path))[0] == "turn on the light"


def test_kaldi_folder_is_read(tmp_path: Path) -> None:
    for block in blocks("text"):
        (tmp_path / block.mark).write_text(block.text)
    assert recognise(tmp_path) == "kaldi"
    assert said(read_corpus(tmp_path)) == ["and open the window"]


def said(cuts: CutSet) -> list[str]:
    return [cut.supervisions[0].text for cut in cuts]


def test_every_reason_is_explained() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    source = (ROOT / "src/isthmus/speech/corpora.py").read_text(encoding="utf-8")
    reasons = {*get_args(AudioCode), *re.findall(r'yield \(?\s*"(\w+)",', source)}
    assert {"no_text", "missing", "too_fast", "too_long"} <= reasons
    assert [reason for reason in sorted(reasons) if f"`{reason}`" not in text] == []
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []


# --- fields of the output


def test_every_field_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(next(block.text for block in blocks("json") if block.mark == "isthmus"))
    cut = next(iter(read_corpus(path)))
    word = Word("turn", 0.1, 0.4, 0.9)
    others = (Alternative("burn", -2.0),)
    segment = Segment(0, 2.74, "turn", words=(word,), alternatives=others, confidences=(0.9,))
    transcript = Transcript((segment,), 2.74)
    scores = score_sets({"a": ({"1": "turn on"}, {"1": "turn on"})})
    evaluation = Evaluation({"a": [Decoded(cut, transcript, 1.0)]}, scores, {})
    [written] = evaluation.write(tmp_path)
    found = transcript_dict(transcript)
    actual = {"file", "files", "error", "ctc", *found, *found["segments"][0]}
    actual |= {key for part in ("words", "alternatives") for key in found["segments"][0][part][0]}
    actual |= evaluation.to_dict().keys() | json.loads(written.read_text()).keys()
    actual |= {"a", "b", *compare(written, written, resamples=9).to_dict()}
    stated = {
        name
        for page in ("decoding.md", "scoring.md")
        for heading, first, *_ in table_rows(DOCS / page)
        if heading == "Field"
        for name in re.findall(r"`(\w+)`", first)
    }
    assert stated == actual
    text = (DOCS / "scoring.md").read_text(encoding="utf-8")
    assert [name for name in NORMALISERS if f"| `{name}` |" not in text] == []
    text = (DOCS / "decoding.md").read_text(encoding="utf-8")
    reasons = get_args(FinishReason)
    assert [reason for reason in reasons if f"| `{reason}` |" not in text] == []


# --- Python


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}-{block.mark}")
def test_python_compiles_and_names_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "isthmus":
            assert node.attr in isthmus.__all__


def example(name: str) -> Any:
    """A class or union that the worked examples define."""
    space: dict[str, Any] = {"__name__": "adding_a_part"}
    for block in blocks("python"):
        if block.mark == "runs":
            exec(compile(block.text, block.page, "exec"), space)
    return space[name]


def adapter() -> TypeAdapter[Any]:
    return TypeAdapter(example("ProjectorSettings"))


def test_the_worked_projector_keeps_the_contract() -> None:
    assert adapter().validate_python({"type": "linear", "hidden": 8}).type == "linear"
    projector = build_projector(
        adapter().validate_python({"type": "mean", "downsample_rate": 4}),
        SimpleNamespace(dim=3),
        SimpleNamespace(dim=5),
    )
    frames = torch.randn(3, 11, 3)
    lengths = torch.tensor([11, 7, 3])
    embeddings, counts = projector(frames, lengths)
    assert embeddings.shape == (3, 2, 5)
    assert counts.tolist() == [projector.output_length(n) for n in lengths.tolist()] == [2, 1, 0]
    alone, _ = projector(frames[1:2, :7], lengths[1:2])
    torch.testing.assert_close(embeddings[1, :1], alone[0])
    torch.testing.assert_close(embeddings[0, 1], projector.linear(frames[0, 4:8].mean(dim=0)))
    assert projector(frames[:, :3], lengths[2:].repeat(3))[0].shape == (3, 0, 5)


def test_the_worked_prompt_keeps_the_contract() -> None:
    prompt, tokenizer = example("QuestionPrompt")(question="What </s> now?"), character_tokenizer()
    training, decoding = tokenise(prompt, tokenizer, "yes"), tokenise(prompt, tokenizer)
    assert training[: len(decoding)] == decoding
    supervised = [token for piece in training if piece.loss for token in piece.tokens or []]
    assert supervised == [*tokenizer.encode("yes", add_special_tokens=False), 2]
    told = [token for piece in decoding for token in piece.tokens or []]
    assert tokenizer.eos_token_id not in told


# --- paths and links


def test_paths_exist() -> None:
    starts = r"(?:src|tests|docs|recipes|benchmarks)/"
    rooms = r"(?:speech|model|training|decoding|scoring|lab)/"
    found = 0
    for page in PAGES:
        text = prose(page)
        for path in re.findall(rf"`({starts}[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
            found += 1
        for path in re.findall(rf"`({rooms}[\w./-]*|\w+\.py)`", text):
            assert (ROOT / "src/isthmus" / path).exists(), f"{page.name} names {path}"
            found += 1
    assert found > 30


def test_the_tree_exists() -> None:
    tree = re.search(r"^```text tree\n(.*?)^```$", PAGES[0].read_text(), re.M | re.S)
    assert tree
    folder = ROOT
    for line in tree[1].splitlines():
        name = line.split()[0]
        base = folder if line.startswith(" ") else ROOT
        assert (base / name).exists(), f"the tree names {name}"
        if not line.startswith(" "):
            folder = ROOT / name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Headings as GitHub writes them in addresses."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def test_pages_are_short() -> None:
    for page in PAGES:
        lines = len(page.read_text(encoding="utf-8").splitlines())
        limit = {"README.md": 200, "RESULTS.md": 400}.get(page.name, 180)  # a record may be long
        assert lines <= limit, page.name

"""The rules of the house, read from the source: imports run one way, and all stays small and safe.

Every rule is a function of one parsed file that yields violations; the last tests plant a
violation of each and see that it is found.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "isthmus"

# From the bottom up: a module may import from its own row and from rows above it in this list.
ORDER = [
    {"errors"},
    {"text"},
    {"files"},
    {"speech"},
    {"settings"},
    {"model"},
    {"recipe", "recipe_files"},
    {"build"},
    {"runs"},
    {"scoring"},
    {"decoding"},
    {"serving"},
    {"training"},
    {"display", "doctor"},
    {"lab"},
    {"options", "verbs", "cli", "__main__"},
]
BUILDS = (["settings", "base"], "build")  # the one way up: settings build what they describe
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Scoring runs on machines that have none of these, so it may not reach them through a room either.
SCORING_WITHOUT = {"torch", "transformers", "lhotse", "accelerate", "peft"}
SCORING_ROOMS = {"scoring", "errors", "text"}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8


@dataclass(frozen=True)
class Source:
    """A Python file: `path` relative to the repository's root, and its text."""

    path: Path
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def module(self) -> list[str]:
        """Parts of the module's dotted name; those of a package's `__init__` name the package."""
        parts = list(self.path.with_suffix("").parts[1:])
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def package(self) -> list[str]:
        return self.module if self.path.name == "__init__.py" else self.module[:-1]

    @property
    def room(self) -> str | None:
        """The room or module right under the package; None for the package's own `__init__`."""
        return self.module[1] if len(self.module) > 1 else None


Rule = Callable[[Source], Iterator[str]]


def imported(source: Source) -> Iterator[tuple[int, list[str]]]:
    """Line and dotted name of every import, wherever it stands; `from a import b` gives `a.b`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = source.package[: len(source.package) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, [*base, alias.name]) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value).split(".")


def imports_run_one_way(source: Source) -> Iterator[str]:
    if source.module[0] != PACKAGE or source.room is None:
        return  # the package's own __init__ hands out names of every room, lazily
    if source.room not in RANK:
        yield f"{source.path}: {source.room} has no place in ORDER; give it one"
        return
    for line, name in imported(source):
        if name[0] != PACKAGE:
            continue
        target = name[1] if len(name) > 1 else ""
        if target not in RANK:
            yield f"{source.path}:{line}: import {'.'.join(name)} from the module that owns it"
        elif RANK[target] > RANK[source.room] and (source.module[1:], target) != BUILDS:
            yield f"{source.path}:{line}: {source.room} may not import {target}"


def scoring_is_light(source: Source) -> Iterator[str]:
    if source.module[:2] != [PACKAGE, "scoring"]:
        return
    for line, name in imported(source):
        if name[0] in SCORING_WITHOUT:
            yield f"{source.path}:{line}: scoring may not import {name[0]}"
        if name[0] == PACKAGE and name[1] not in SCORING_ROOMS:
            yield f"{source.path}:{line}: scoring may import no other room, not {name[1]}"


def files_are_short(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{source.path}: {lines} lines, past {MAX_FILE_LINES}: make it two files"


def functions_are_small(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{source.path}:{node.lineno}: {node.name} has {lines} lines"
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        parameters = [argument for argument in named if argument.arg not in ("self", "cls")]
        if len(parameters) > MAX_PARAMETERS:
            yield f"{source.path}:{node.lineno}: {node.name} has {len(parameters)} parameters"


def nothing_dangerous(source: Source) -> Iterator[str]:
    for line, name in imported(source):
        if name[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"):
            yield f"{source.path}:{line}: {name[0]} runs what it reads; store safetensors or JSON"
    nodes = list(ast.walk(source.tree))
    safe_loaders = {"SafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}
    for node in nodes:
        if isinstance(node, ast.ClassDef) and safe_loaders & set(map(ast.unparse, node.bases)):
            safe_loaders.add(node.name)
    for node in nodes:
        if isinstance(node, ast.Call):
            found = dangers(node, safe_loaders)
            yield from (f"{source.path}:{node.lineno}: {what}" for what in found)


def dangers(call: ast.Call, safe_loaders: set[str]) -> Iterator[str]:
    """What is dangerous about one call; YAML may be loaded by `safe_loaders` only."""
    function = ast.unparse(call.func)
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    if function in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system"):
        yield f"{function}() runs text"
    if function.split(".")[-1] in ("load", "load_all") and function.startswith("yaml."):
        loader = options.get("Loader") or "".join(ast.unparse(item) for item in call.args[1:2])
        if loader not in safe_loaders:
            yield f"{function}() makes any object: use yaml.safe_load"
    if function == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load() without weights_only=True runs what it reads"
    loads = function.split(".")[-1] in ("from_pretrained", "from_config")
    if options.get("trust_remote_code", "" if loads else "False") != "False":
        yield f"{function}() without trust_remote_code=False may run code from a download"
    if options.get("shell", "False") != "False":
        yield "shell=True hands text to a shell: give a list of arguments"
    if function.endswith(".extractall"):
        yield "extractall() writes wherever the archive says"


RULES: list[Rule] = [
    imports_run_one_way,
    scoring_is_light,
    files_are_short,
    functions_are_small,
    nothing_dangerous,
]


def sources() -> list[Source]:
    paths = sorted(
        path for folder in ("src", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    )
    return [Source(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps(rule: Rule) -> None:
    found = sources()
    assert len(found) > 10, "the source was not found, so nothing was checked"
    assert [violation for source in found for violation in rule(source)] == []


def circle(found: Sequence[Source]) -> list[str]:
    """Modules that import each other in a circle, the first one again as the last; or none."""
    modules = {".".join(source.module): source for source in found}
    graph = {
        name: {
            ".".join(target[:length])
            for _, target in imported(source)
            if (source.module[1:], target[-1]) != BUILDS
            for length in (len(target) - 1, len(target))
            if ".".join(target[:length]) in modules.keys() - {name, PACKAGE}
        }
        for name, source in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(sources()) == []


def test_a_planted_circle_is_found() -> None:
    texts = {
        "model/a.py": "from isthmus.model import b",
        "model/b.py": "def f():\n    from isthmus.model.c import thing",
        "model/c.py": "from ..model.a import other",
        "model/d.py": "from isthmus.model import a",
    }
    files = [planted(place, text) for place, text in texts.items()]
    assert {*circle(files)} == {"isthmus.model.a", "isthmus.model.b", "isthmus.model.c"}
    assert circle([planted("model/a.py", texts["model/a.py"])]) == []


# What the same program must not have loaded by its end.
HEAVY = ("torch", "transformers", "lhotse", "peft", "accelerate")
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
IMPORT = "import isthmus"
HELP = """
import sys
from isthmus.cli import main
sys.argv = ["isthmus", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


RECIPE = "from isthmus.recipe import load_recipe\nload_recipe('tiny/projector')"
FAULT = """
import sys
from isthmus.cli import main
sys.argv = ["isthmus", "train", "tiny/projector", "projector.type=linaer"]
try:
    main()
except SystemExit as end:
    assert end.code == 1, end.code
"""


@pytest.mark.parametrize(
    "program", [IMPORT, HELP, RECIPE, FAULT], ids=["import", "help", "recipe", "fault"]
)
def test_the_first_word_is_light(program: str) -> None:
    assert last_line(program) == "[]"


def test_loading_torch_would_be_seen() -> None:
    assert "torch" in last_line("import torch")


def last_line(program: str) -> str:
    command = [sys.executable, "-c", f"{program}\n{LOADED}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1]


LONG = "def long():\n" + "    x = 1\n" * 60
PLANTED = [
    (imports_run_one_way, "speech/audio.py", "from isthmus.model import projector"),
    (imports_run_one_way, "speech/audio.py", "import isthmus.model.llm as llm"),
    (imports_run_one_way, "speech/audio.py", "from ..training.loop import train"),
    (imports_run_one_way, "speech/audio.py", "from .. import recipe"),
    (imports_run_one_way, "speech/__init__.py", "from ..model import llm"),
    (imports_run_one_way, "speech/audio.py", "def f():\n    from isthmus import serving"),
    (imports_run_one_way, "speech/audio.py", "importlib.import_module('isthmus.cli')"),
    (imports_run_one_way, "speech/audio.py", "import isthmus"),
    (imports_run_one_way, "speech/audio.py", "from isthmus import Transcriber"),
    (imports_run_one_way, "decoding/a.py", "def f():\n    from isthmus.lab import report"),
    (imports_run_one_way, "lab/a.py", "from isthmus.verbs import training"),
    (imports_run_one_way, "attic/old.py", "x = 1"),
    (imports_run_one_way, "recipe.py", "if TYPE_CHECKING:\n    from isthmus.cli import main"),
    (scoring_is_light, "scoring/a.py", "def f():\n    import torch.nn"),
    (scoring_is_light, "scoring/a.py", "from lhotse import CutSet"),
    (scoring_is_light, "scoring/a.py", "from isthmus.speech import audio"),
    (files_are_short, "speech/audio.py", "x = 1\n" * 601),
    (functions_are_small, "speech/audio.py", LONG),
    (functions_are_small, "speech/audio.py", "async def f(a, b, c, d, e, *, f, g, h, i): ..."),
    (nothing_dangerous, "cli.py", "eval('1')"),
    (nothing_dangerous, "cli.py", "from pickle import loads"),
    (nothing_dangerous, "cli.py", "yaml.load(stream)"),
    (nothing_dangerous, "cli.py", "yaml.load(stream, Loader=yaml.UnsafeLoader)"),
    (nothing_dangerous, "cli.py", "class L(yaml.Loader): ...\nyaml.load(stream, L)"),
    (nothing_dangerous, "cli.py", "torch.load(path)"),
    (nothing_dangerous, "cli.py", "torch.load(path, weights_only=False)"),
    (nothing_dangerous, "cli.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
    (nothing_dangerous, "cli.py", "AutoModel.from_pretrained(name)"),
    (nothing_dangerous, "cli.py", "auto.from_config(config, **options)"),
    (nothing_dangerous, "cli.py", "load(name, trust_remote_code=choice)"),
    (nothing_dangerous, "cli.py", "subprocess.run(line, shell=True)"),
    (nothing_dangerous, "cli.py", "tarfile.open(path).extractall(folder)"),
]
ALLOWED = [
    (imports_run_one_way, "model/llm.py", "from isthmus.speech import audio\nfrom . import prompt"),
    (imports_run_one_way, "cli.py", "from isthmus import options\nfrom isthmus.errors import E"),
    (imports_run_one_way, "__init__.py", "from isthmus.decoding import Transcriber"),
    (scoring_is_light, "scoring/a.py", "import numpy\nfrom isthmus.errors import E"),
    (files_are_short, "speech/audio.py", "x = 1\n" * 600),
    (functions_are_small, "speech/audio.py", "def f(self, a, b, c, d, e, f, g, h): ..."),
    (nothing_dangerous, "cli.py", "model.eval()\nyaml.safe_load(x)\nyaml.load(x, yaml.SafeLoader)"),
    (nothing_dangerous, "cli.py", "class L(yaml.SafeLoader): ...\nyaml.load(stream, Loader=L)"),
    (nothing_dangerous, "cli.py", "torch.load(path, weights_only=True)"),
    (nothing_dangerous, "cli.py", "AutoModel.from_pretrained(name, trust_remote_code=False)"),
]


def planted(place: str, text: str) -> Source:
    return Source(Path("src", PACKAGE, place), text)


@pytest.mark.parametrize(("rule", "place", "text"), PLANTED)
def test_a_planted_violation_is_found(rule: Rule, place: str, text: str) -> None:
    assert len(list(rule(planted(place, text)))) == 1


@pytest.mark.parametrize(("rule", "place", "text"), ALLOWED)
def test_what_is_allowed_passes(rule: Rule, place: str, text: str) -> None:
    assert list(rule(planted(place, text))) == []

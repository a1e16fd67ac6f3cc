"""The files of recipes and sweeps, read as they are: where they lie, and the YAML in them.

What can be known of a recipe without torch, in which its settings are checked.
"""

import difflib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from isthmus.errors import IsthmusError, one_line, suggest


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone but YAML 1.1 believes."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Raises IsthmusError, with line and column, for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # a character that none may write has none
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        line = text.splitlines()[mark.line : mark.line + 1] if mark else []
        reason = getattr(error, "problem", None) or one_line(error)
        shown = "".join(line).strip()[:60] or text[-60:]
        raise IsthmusError(f"{where}{shown!r} is not valid YAML: {reason}.") from error


def read_yaml(file: Path) -> Any:
    """Raises IsthmusError, with the file, for what is no text and no YAML."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise IsthmusError(f"{file}: not UTF-8 text ({error}). Name a recipe.") from error
    except IsthmusError as error:
        raise IsthmusError(f"{file}: {error}") from error


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, by path or shipped name, and its settings with `a.b=c` overrides.

    Raises IsthmusError for what is no such file, no YAML, no settings or no override.
    """
    file = find_recipe(str(path))
    values = read_yaml(file) or {}
    if not isinstance(values, dict):
        raise IsthmusError(f"{file} holds no settings (key: value lines).")
    for override in overrides:
        _override(values, override)
    return file, values


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with isthmus, by name such as `tiny/projector`."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def find_recipe(name: str) -> Path:
    """The file `name`, or the shipped recipe of that name."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    short = name.removeprefix("recipes/").removesuffix(".yaml")
    if short in shipped:
        return shipped[short]
    near = difflib.get_close_matches(short, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else " `isthmus recipes` lists the shipped ones."
    raise IsthmusError(f"No recipe {name!r}: neither a file nor shipped.{hint}")


def shipped_sweeps() -> dict[str, Path]:
    """Sweeps that come with isthmus, by name such as `t4`."""
    package = Path(__file__).resolve().parent
    for folder in (package / "sweeps", package.parent.parent / "sweeps"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {}


def find_sweep(name: str) -> Path:
    """The file `name`, or the shipped sweep of that name."""
    shipped = shipped_sweeps()
    short = name.removeprefix("sweeps/").removesuffix(".yaml")
    if Path(name).is_file():
        return Path(name)
    if short in shipped:
        return shipped[short]
    hint = _holding(short) or suggest(short, shipped)
    raise IsthmusError(
        f"No sweep {name!r}: neither a file nor shipped.{hint} Shipped: {', '.join(shipped)}."
    )


def _holding(name: str) -> str:
    """A hint at the sweep that a table has its figures in, for `t9` of tables 9 and 10."""
    numbered = re.fullmatch(r"t(\d+)", name)
    for sweep, about in sweep_titles().items() if numbered else ():
        tables = about["source"].partition("table")[2]
        if numbered and numbered[1] in re.findall(r"\d+", tables):
            return f" Table {numbered[1]} is in {sweep!r}."
    return ""


def sweep_titles() -> dict[str, dict[str, Any]]:
    """Title, source and scales of each shipped sweep."""
    found = {}
    for name, file in shipped_sweeps().items():
        sweep = read_yaml(file)
        found[name] = {name: sweep[name] for name in ("title", "source")}
        found[name]["scales"] = list(sweep["scales"])
    return found


def as_override(key: str, value: Any) -> str:
    """A setting as one would type it in a shell, to change it: `a.b=c`, quoted where need be."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    text = text.strip().removesuffix("\n...")  # that ends a plain value
    return shlex.quote(f"{key}={text}")


def made_by(file: Path, path: str) -> str:
    """` Make it: isthmus synth …`, if the comments of a recipe say how `path` is made, else ""."""
    lines = file.read_text(encoding="utf-8").splitlines()
    commands = [
        line[line.index("isthmus") :]
        for line in lines
        if line.startswith("#") and f"isthmus synth {path} " in line
    ]
    return f" Make it: {commands[0]}" if commands else ""


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise IsthmusError(f"{override!r} is not an override. Write key.subkey=value.")
    *path, last = key.split(".")
    for name in path:
        below = values.setdefault(name, {})
        if not isinstance(below, dict):
            raise IsthmusError(f"{override!r}: {name} is a value, it has no key {last!r}.")
        values = below
    values[last] = parse_yaml(text)

"""The files of recipes, read as they are: where they lie, and the YAML in them.

What can be known of a recipe without torch, in which its settings are checked.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from isthmus.errors import IsthmusError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone but YAML 1.1 believes."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Raises IsthmusError for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise IsthmusError(f"{text[:60]!r} is not valid YAML: {where}.") from error


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, by path or shipped name, and its settings with `a.b=c` overrides.

    Raises IsthmusError for what is no such file, no YAML, no settings or no override.
    """
    file = find_recipe(str(path))
    try:
        values = parse_yaml(file.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise IsthmusError(f"{file}: not UTF-8 text ({error}). Name a recipe.") from error
    except IsthmusError as error:
        raise IsthmusError(f"{file}: {error}") from error
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

"""Commands whose options are the fields of a dataclass: one object, not twenty parameters."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

import typer
from typer.core import TyperGroup

Options = TypeVar("Options")


def takes(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a function of a `kind` into a command with a parameter for each of its fields.

    The fields are annotated as typer wants parameters to be.
    """

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            command(kind(**given))

        hints = get_type_hints(kind, include_extras=True)
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(kind)  # type: ignore[arg-type]  # a dataclass
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = dict(hints)
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


class WholeSummaries(TyperGroup):
    """Commands, listed with all that they say of themselves."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for command in self.commands.values():
            command.short_help = (command.help or "").partition("\n\n")[0]
        super().format_commands(ctx, formatter)


def limit(flag: str, text: str) -> Any:
    """An option of a positive number."""
    return typer.Option(f"--{flag}", min=1, help=text)


def switch(flag: str, text: str) -> Any:
    """An option that is on or off, and off unless given."""
    return typer.Option(f"--{flag}/--no-{flag}", help=text, show_default=False)


def completing(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion of an argument that is one of `names`; where none begins so, shells try files."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def with_hyphens(name: str) -> str:
    """The name of an option as we write it; whisper's underscores are taken, too."""
    return name.replace("_", "-")

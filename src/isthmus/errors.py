"""What goes wrong through something a user can change, and the nearest name to a misspelt one."""

import difflib
from collections.abc import Iterable


class IsthmusError(ValueError):
    """Base of every error a user can cause; it says what, where, the value and the remedy."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`, or `""` when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

"""What goes wrong through something a user can change, and the nearest name to a misspelt one."""

import difflib
import errno
import textwrap
from collections.abc import Iterable
from typing import ClassVar


class IsthmusError(ValueError):
    """Base of every error a user can cause; it says what, where, the value and the remedy."""

    exit_code: ClassVar[int] = 1


class RetryLater(IsthmusError):
    """Nothing is wrong with what was asked, and nothing was lost: the same command may succeed.

    The exit code is EX_TEMPFAIL of sysexits.h, by which a scheduler knows to start the job again.
    """

    exit_code: ClassVar[int] = 75


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def of_system(error: OSError) -> IsthmusError:
    """What the system says, in one line with the file; RetryLater where a disk is full."""
    file = f"{error.filename}: " if error.filename else ""
    what = (error.strerror or one_line(error)).rstrip(".")
    if error.errno in _NO_ROOM:
        remedy = "Make room, or name another place, then give the same command again."
        return RetryLater(f"{file}cannot be written: {what}. {remedy}")
    return IsthmusError(f"{file}{what}.")


def one_line(error: BaseException) -> str:
    """What a library says, in one line that is not too long."""
    return textwrap.shorten(str(error), 300).rstrip(".") or type(error).__name__


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name nearest to `name`, or `""` when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

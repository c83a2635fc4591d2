"""Exceptions and the warning whose messages are written for users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Invalid input: a flag, a file, a shape, a checkpoint.

    The message is one line: what was wrong, with its value, and what would work. Programs print it
    as ``error: …`` and exit with status 2.
    """


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run whose state is saved. The message is one line: the position, and how
    to resume. Programs print it and exit with ``cli.INTERRUPTED``.

    A BaseException, so that ``except Exception`` does not catch it.
    """


class Unavailable(Exception):
    """Something outside the program failed that a later start may find in order: a store that does
    not answer, a lock that another run has taken. The message is one line; programs print it as
    ``error: …`` and exit with ``cli.INTERRUPTED``.
    """


class Notice(UserWarning):
    """A warning for users, in one line; programs print it as ``warning: …``."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' with the known name closest to ``name``, or ' (one of: …)'; '' where
    none is known."""
    known = list(known)
    if not known:
        return ""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (one of: {', '.join(sorted(known))})"


def one_line(error: BaseException, limit: int = 160) -> str:
    """A library's message as one line of at most ``limit`` characters; the error's name if it has
    no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__

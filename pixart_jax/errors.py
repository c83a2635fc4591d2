"""The exceptions, and the one warning, that a person is meant to read."""


class UserError(Exception):
    """Something the user gave cannot be used: a flag, a file, a shape, a checkpoint.

    The message is one line: what was wrong, with its value, and what would do. Programs print it as
    ``error: …`` and exit with status 2; a library caller catches it as any exception.
    """


class Interrupted(KeyboardInterrupt):
    """A signal asked a run to stop, and what was to be saved is saved. The message is one line:
    where it stands, how it goes on.

    A program prints it and exits with ``program.INTERRUPTED``. No Exception, so that nothing that
    handles faults takes it for one.
    """


class Notice(UserWarning):
    """Something a person should know of though the work goes on. The message is one line; programs
    print it as ``warning: …``."""


def nearest(name: str, known) -> str:
    """' (did you mean 'x'?)' with the known name closest to ``name``, or ' (one of: …)' when none
    is close."""
    import difflib

    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (one of: {', '.join(sorted(known))})"

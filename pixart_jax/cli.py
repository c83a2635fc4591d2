"""What every program here does with its command line and with a person's mistakes.

``parse`` reads flags with tyro and turns whatever tyro rejects into one line that names the nearest
flag; ``run`` calls a program's main and turns a :class:`UserError`, a full disk or an unwritable
folder into one line on stderr and exit status 2, and a :class:`Notice` into one line, said once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence

from pixart_jax.errors import Interrupted, Notice, UserError, nearest

# Exit statuses; 0 is success, and a fault of the program, with its traceback, is Python's own 1.
GAVE_UP = 1  # a training run stopped itself: too many bad steps in a row
BAD_INPUT = 2  # what a person can put right, said in one line
# a signal stopped the run, its state is saved, the same command goes on (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 75
KILLED_BY_KEYBOARD = 130  # Ctrl-C where nothing had to be saved

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILE_TROUBLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)`` (the process's own arguments by default) and return the process's exit
    status.

    0 or what main returns; 2 with one line ``error: …`` on stderr for what a person can put right;
    75 with one line where a run was told to stop and saved itself; 130 when interrupted otherwise.
    Anything else is a fault of the program and keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _plain_notices():
            return main(argv) or 0
    # --help, and a program's own sys.exit, of which a text is for stderr
    except SystemExit as stop:
        if isinstance(stop.code, int | None):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return KILLED_BY_KEYBOARD
    except Exception as fault:
        line = as_line(fault)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return BAD_INPUT


@contextlib.contextmanager
def _plain_notices():
    """Notices as one line each, the same one once; other warnings as ever."""
    with warnings.catch_warnings():
        # "once" would be forgotten by the next catch_warnings of a library
        warnings.simplefilter("always", Notice)
        others, said = warnings.showwarning, set()

        def show(message, category, filename, lineno, file=None, line=None):
            if not issubclass(category, Notice):
                others(message, category, filename, lineno, file, line)
            elif str(message) not in said:
                said.add(str(message))
                from tqdm import tqdm

                # above a bar that is being drawn
                tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = show
        yield


def as_line(fault: BaseException) -> str | None:
    """The one line for a fault that its user can put right, or None.

    Looks through causes and groups: a disk that fills up under a writer thread arrives wrapped, or
    as text alone.
    """
    chain = list(_chain(fault))
    for link in chain:
        if isinstance(link, UserError):
            return " ".join(str(link).split())
    for link in chain:
        if (
            isinstance(link, OSError) and link.errno in _DISK_FULL
        ) or "No space left on device" in str(link):
            where = getattr(link, "filename", None)
            return (
                f"the disk is full{f' while writing {where}' if where else ''}: free some "
                "space and run the same command again"
            )
        if isinstance(link, OSError) and link.errno in _FILE_TROUBLE and link.filename is not None:
            return f"{link.filename}: {(link.strerror or 'cannot be used').lower()}"
        if "RESOURCE_EXHAUSTED" in str(link) and "emory" in str(link):
            return (
                "the device is out of memory, a smaller batch or image would fit: "
                f"{str(link).splitlines()[0][:200]}"
            )
    return None


def _chain(fault: BaseException):
    seen: set[int] = set()
    todo = [fault]
    while todo:
        link = todo.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]


def parse(shape, argv: Sequence[str], *, prog: str, description: str | None = None, **tyro_options):
    """``tyro.cli(shape)`` whose complaints are one line.

    shape: a dataclass or function whose fields are the flags (or give ``default=`` an instance to
    override). An unknown flag raises UserError with the nearest one; so does a value that does not
    parse. ``--help`` prints and exits as ever.
    """
    import tyro

    def call(arguments, **more):
        return tyro.cli(
            shape, args=list(arguments), prog=prog, description=description, **tyro_options, **more
        )

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            value, unknown = call(argv, return_unknown_args=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(
            f"{_first_sentence(complaint.getvalue())} ({prog} --help lists the flags)"
        ) from None
    if unknown:
        raise UserError(_unknown(unknown, _flags(call)))
    return value


def _first_sentence(box: str) -> str:
    """The text of tyro's box up to its rule, on one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    text = []
    for line in lines[1:]:
        if set(line) <= {"─"}:
            break
        text.append(line)
    return " ".join(" ".join(text).split()) or "the command line cannot be read"


def _flags(call) -> list[str]:
    """Every flag, read from the help text."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        call(["--help"])
    return sorted(
        set(re.findall(r"--[a-z0-9][a-z0-9._-]*", re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())))
    )


def _unknown(unknown: Sequence[str], flags: Sequence[str]) -> str:
    named = [token.split("=")[0] for token in unknown if token.startswith("-")]
    if not named:
        return f"unexpected argument {unknown[0]!r}: every option has a flag ({', '.join(flags)})"
    return f"unknown flag {named[0]}{nearest(named[0].replace('_', '-'), flags)}"

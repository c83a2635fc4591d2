"""The command line of every program: flags, one-line errors, signals and exit statuses.

:func:`parse` reads flags with tyro and reports what tyro rejects in one line. :func:`run` calls a
program's main; user errors, a full disk and unusable files become one line on stderr and exit
status 2, and each :class:`Notice` becomes one line, shown once. :func:`signals`, open from a
program's first line, ends it after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import re
import select
import signal
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from pixart_jax.errors import Interrupted, Notice, Unavailable, UserError, nearest
from pixart_jax.remote_path import Location, RemotePath, located

# Exit statuses. 0 is success; 1, with a traceback, is a bug.
GAVE_UP = 1  # training stopped itself: too many bad steps in a row
BAD_INPUT = 2
INTERRUPTED = 75  # the state is saved and the same command resumes (EX_TEMPFAIL of sysexits.h)
KILLED_BY_KEYBOARD = 130  # Ctrl-C where nothing had to be saved; SIGTERM: 143
GRACE = 5.0  # seconds from a signal to the end of the process, for cleaning up

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE_FILE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
_UNUSABLE_FILE |= {errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


def usage(prog: str, commands: Mapping[str, str]) -> str:
    """The help of a program of several commands. commands: name → what it does."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {what}" for name, what in commands.items()]
    lines += ["", f"{prog} COMMAND --help lists a command's flags."]
    return "\n".join([f"usage: {prog} COMMAND [flags]", "", *lines])


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)``, by default with the process's arguments; return the exit status.

    0 or what main returns; with ``error: …`` on stderr 2 for a user error and 75 for what is
    Unavailable; 75 for an interrupted run whose state is saved; 130 for Ctrl-C and 143 for SIGTERM
    elsewhere. Any other exception propagates.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _notices_as_lines():
            return main(argv) or 0
    except SystemExit as stop:  # --help, or sys.exit, whose text is for stderr
        if isinstance(stop.code, int | None):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        return end_by_signal()
    except Exception as error:
        if _received:  # an import or a callback turned KeyboardInterrupt into something else
            return end_by_signal()
        line = as_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return INTERRUPTED if isinstance(_for_users(error), Unavailable) else BAD_INPUT


_received: list[int] = []  # the signals that have asked this process to end


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """End the program after Ctrl-C or SIGTERM, even where Python loses KeyboardInterrupt: in a
    garbage-collection callback, in a library's import, or while C++ compiles.

    The first signal raises KeyboardInterrupt, so that files are closed and removed (during an
    import it ends the process at once; where Python ignores the exception it is raised again); a
    thread ends the process ``GRACE`` seconds later, or at a second signal. Signals that have a
    handler of their own (training's) or are ignored (nohup) are left alone. Afterwards a signal
    ends the process silently: its work is done.
    """
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    ]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        signal.set_wakeup_fd(writer)
        os.register_at_fork(after_in_child=_default_signals)  # of a worker that a library forks
        threading.Thread(target=_end_in_time, args=(reader,), daemon=True).start()
        for number in numbers:
            signal.signal(number, _on_signal)
        sys.unraisablehook = _raise_again
        yield
    except (KeyboardInterrupt, Exception):
        if not _received:
            raise
        raise SystemExit(end_by_signal()) from None
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        sys.unraisablehook = sys.__unraisablehook__
        _received.clear()


def end_by_signal() -> int:
    """Print that the program was stopped; return its exit status."""
    number = _received[0] if _received else signal.SIGINT
    line = b"terminated\n" if number == signal.SIGTERM else b"interrupted\n"
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", None)
    # not to sys.stderr: parse_known redirects it while tyro is imported
    os.write(2, (b"\n" if bars else b"") + line)
    return 128 + number


def _on_signal(number: int, frame: types.FrameType | None) -> None:
    _received.append(number)
    while frame is not None:
        # C extensions print, swallow or crash on an exception while they import
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(end_by_signal())
        frame = frame.f_back
    raise KeyboardInterrupt


def _raise_again(lost: Any) -> None:
    """Raise KeyboardInterrupt again where a callback or a destructor had it ignored."""
    if not _received or lost.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(lost)
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    again = (main, ctypes.py_object(KeyboardInterrupt))
    threading.Timer(0.05, ctypes.pythonapi.PyThreadState_SetAsyncExc, again).start()


def _end_in_time(reader: int) -> None:
    timeout = None
    while select.select([reader], [], [], timeout)[0]:
        number = int.from_bytes(os.read(reader, 1))
        if not number:  # the program has ended by itself
            os.close(reader)
            return
        if signal.getsignal(number) is _on_signal:
            if timeout is not None:
                break
            timeout = GRACE
    os._exit(end_by_signal())


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number, default in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, default)


@contextlib.contextmanager
def _notices_as_lines() -> Iterator[None]:
    """Print each Notice as one line, once; leave other warnings alone."""
    import tqdm

    # Python 3.12.0 to 3.12.2: a bar's monitor thread warns when the interpreter ends
    tqdm.tqdm.monitor_interval = 0
    with warnings.catch_warnings():
        # "once" would be reset by the next catch_warnings of a library
        warnings.simplefilter("always", Notice)
        show_others, shown = warnings.showwarning, set()

        def show(message, category, *where, **options):
            text = " ".join(str(message).split())
            if not issubclass(category, Notice):
                show_others(message, category, *where, **options)
            elif text not in shown:
                shown.add(text)
                tqdm.tqdm.write(f"warning: {text}", file=sys.stderr)  # above a progress bar

        warnings.showwarning = show
        yield


def as_line(error: BaseException) -> str | None:
    """The one line for an error that the user can fix; None for any other.

    Searches causes and exception groups: a full disk under a writer thread arrives wrapped, or as
    text alone.
    """
    if found := _for_users(error):
        return " ".join(str(found).split())
    for link in _chain(error):
        number, file = getattr(link, "errno", None), getattr(link, "filename", None)
        if number in _DISK_FULL or "No space left on device" in str(link):
            where = f" while writing {file}" if file else ""
            return f"the disk is full{where}: free some space and run the same command again"
        if isinstance(link, OSError) and number in _UNUSABLE_FILE and file is not None:
            return f"{file}: {(link.strerror or 'cannot be used').lower()}"
        if "RESOURCE_EXHAUSTED" in str(link) and "emory" in str(link):
            first = str(link).splitlines()[0][:200]
            return f"the device is out of memory, a smaller batch or image would fit: {first}"
    return None


def _for_users(error: BaseException) -> BaseException | None:
    links = _chain(error)
    return next((link for link in links if isinstance(link, UserError | Unavailable)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        pending += [link.__cause__, link.__context__, *getattr(link, "exceptions", ())]


def parse(shape, argv: Sequence[str], *, prog: str, description: str | None = None, **tyro_options):
    """``tyro.cli(shape)`` with one-line errors. ``--help`` prints and exits.

    shape: a dataclass or function whose fields are the flags; ``default=`` is an instance to
    override. Raises UserError for an unknown flag, with the nearest one, and for a bad value.
    """
    how = {"prog": prog, "description": description, **tyro_options}
    value, unknown = parse_known(shape, argv, **how)
    if unknown:
        raise UserError(_unknown(unknown, _flags(shape, how)))
    return value


def parse_known(shape, argv: Sequence[str], *, prog: str, **tyro_options) -> tuple[Any, list[str]]:
    """Like :func:`parse`, but return (value, arguments that it did not recognise)."""
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            how = {"prog": prog, "registry": _paths(), **tyro_options}
            return tyro.cli(shape, args=list(argv), return_unknown_args=True, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _tyro_message(stderr.getvalue())
        raise UserError(f"{message} ({prog} --help lists the flags)") from None


def _paths():
    """How tyro reads paths: flags of type Location take addresses of buckets too, others refuse
    them."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info):
        addresses = RemotePath in typing.get_args(info.type)
        if not addresses and info.type is not Path:
            return None

        def path_of(words: list[str]) -> Location | None:
            if words[0] == "None" and type(None) in typing.get_args(info.type):
                return None
            path = located(words[0])
            if isinstance(path, RemotePath) and not addresses:
                raise UserError(f"{path}: a local path is needed here, not a bucket's")
            return path

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=path_of,
            is_instance=lambda value: isinstance(value, PurePath | None),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _plain(terminal: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", terminal)


def _tyro_message(box: str) -> str:
    """The text of tyro's box up to its rule, on one line."""
    lines = [line.strip("│╭╮╰╯ ") for line in _plain(box).splitlines()[1:]]
    rule = next((n for n, line in enumerate(lines) if set(line) <= {"─"}), len(lines))
    return " ".join(" ".join(lines[:rule]).split()) or "the command line cannot be read"


def _flags(shape, how: dict[str, Any]) -> list[str]:
    """Every flag, from the help text."""
    import tyro

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(shape, args=["--help"], registry=_paths(), **how)
    return sorted(set(re.findall(r"--[a-z0-9][a-z0-9._-]*", _plain(text.getvalue()))))


def _unknown(unknown: Sequence[str], flags: Sequence[str]) -> str:
    named = [token.split("=")[0] for token in unknown if token.startswith("-")]
    if not named:
        return f"unexpected argument {unknown[0]!r}: every option has a flag ({', '.join(flags)})"
    return f"unknown flag {named[0]}{nearest(named[0].replace('_', '-'), flags)}"

"""A user's mistake is one line on stderr and exit status 2; a bug keeps its traceback."""

from __future__ import annotations

import dataclasses
import errno
from typing import Literal

import pytest

from pixart_jax import cli
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """A program."""

    model: str
    """Where."""
    batch_size: int = 4
    kind: Literal["plain", "rich"] = "plain"


def call(argv):
    print(cli.parse(Flags, argv, prog="it"))
    return 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--model x --batchsize 3", "unknown flag --batchsize (did you mean '--batch-size'?)"),
        ("--model x --batch_siz=3", "'--batch-size'"),
        ("--batch-size 3", "--model"),
        ("--model x --batch-size three", "three"),
        ("--model x --kind rch", "rich"),
        ("--model x stray", "unexpected argument 'stray'"),
        ("--model", "--model"),
    ],
)
def test_bad_command_lines_are_one_line(capsys, argv, says):
    assert cli.run(call, argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_good_command_lines_and_help(capsys):
    assert cli.run(call, ["--model", "x", "--batch_size", "7"]) == 0
    assert "batch_size=7" in capsys.readouterr().out
    assert cli.run(call, ["--help"]) == 0
    assert "--batch-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [(None, 0, ""), (7, 7, ""), ("no data here", 1, "no data here\n"), ("", 1, "\n")],
)
def test_a_recipe_s_own_exit_is_what_python_makes_of_it(capsys, code, status, said):
    def leaves(argv):
        raise SystemExit(code)

    assert cli.run(leaves, []) == status
    assert capsys.readouterr() == ("", said)


def wrapped(inner: Exception) -> Exception:
    outer = RuntimeError("a worker thread stopped")
    outer.__cause__ = inner
    return outer


FULL = OSError(errno.ENOSPC, "No space left on device", "out/a.png")
QUOTA = ExceptionGroup("tasks", [ValueError("x"), OSError(errno.EDQUOT, "Quota")])
MEMORY = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("two\nlines"), "two lines"),
        (FULL, "the disk is full while writing out/a.png"),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), "the disk is full"),
        (QUOTA, "the disk is full"),
        (ValueError("tensorstore: write failed: No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: permission denied"),
        (wrapped(UserError("that one")), "that one"),
        (MEMORY, "out of memory"),
    ],
)
def test_what_a_user_can_fix_is_one_line(capsys, error, says):
    def main(argv):
        raise error

    assert cli.run(main, []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0, [])


def test_interrupted(capfd):
    def main(argv):
        raise KeyboardInterrupt

    assert cli.run(main, []) == 130
    assert capfd.readouterr().err == "interrupted\n"

"""python -m pixart_jax: commands by name, imported only when called."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pixart_jax import __main__ as front
from pixart_jax import cli


def test_help_lists_the_commands_and_every_command_has_its_own(capsys):
    assert cli.run(front.main, ["--help"]) == 0
    listed = capsys.readouterr().out
    for name in front.COMMANDS:
        assert f"  {name} " in listed
    assert cli.run(front.main, ["convert", "--help"]) == 0
    assert "--heads" in capsys.readouterr().out
    assert cli.run(front.main, []) == 2


@pytest.mark.parametrize(
    "argv, says",
    [("convrt", "did you mean 'convert'"), ("convert a b --head 3", "did you mean '--heads'")],
)
def test_unknown_command_and_flag_name_the_nearest(capsys, argv, says):
    assert cli.run(front.main, argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_commands_are_imported_only_when_called(root):
    heavy = {"jax", "torch", "transformers", "tyro"}
    code = f"import sys, pixart_jax.__main__ as m; m.main(['--help']); assert not {heavy} & "
    how = {"cwd": root, "capture_output": True, "text": True, "env": os.environ}
    subprocess.run([sys.executable, "-c", f"{code} set(sys.modules)"], check=True, **how)
    done = subprocess.run([sys.executable, "-m", "pixart_jax", "nonsense"], **how)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'nonsense'")

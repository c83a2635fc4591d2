"""Ctrl-C and SIGTERM end a program at any moment, with one line and the signal's exit status."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def end(command: list[str], number: int, after: float, times: int = 1) -> tuple[int, str, float]:
    """Start a program, send it a signal ``after`` seconds from when it handles SIGTERM; its exit
    status, its stderr, and the seconds it took to end."""
    program = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    status = Path(f"/proc/{program.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 14 & 1:
        time.sleep(0.01)
    time.sleep(after)
    sent = time.monotonic()
    for _ in range(times):
        program.send_signal(number)
        time.sleep(0.3)
    err = program.communicate(timeout=60)[1]
    return program.returncode, err, time.monotonic() - sent


SAMPLE = ["sample.py", "--prompt", "x", "--num-images-per-prompt", "500"]
ENCODE = ["-m", "pixart_jax", "encode", "configs/photographs.py"]  # ends by itself within 2 s


@pytest.mark.parametrize(
    ("program", "after"),
    [*((SAMPLE, after) for after in (0.0, 0.1, 0.5, 1.5)), (ENCODE, 0.0), (ENCODE, 0.1)],
)
def test_ctrl_c_in_the_first_seconds_is_one_line(root, tmp_path, monkeypatch, program, after):
    monkeypatch.chdir(root)
    more = ["--out", str(tmp_path)] if program is SAMPLE else []
    status, err, seconds = end([sys.executable, *program, *more], signal.SIGINT, after)
    assert (status, err.splitlines()[-1:], "Traceback" in err) == (130, ["interrupted"], False)
    assert seconds < 10


LOSES = """
import sys, time
from pixart_jax import cli
cli.GRACE = float(sys.argv[1])
with cli.signals():
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted"), (15, "terminated")])
@pytest.mark.parametrize(("grace", "times"), [("0.5", 1), ("60", 2)], ids=["in time", "second"])
def test_a_lost_keyboard_interrupt_still_ends_the_program(number, line, grace, times):
    status, err, seconds = end([sys.executable, "-c", LOSES, grace], number, 0.2, times)
    assert (status, err) == (128 + number, f"{line}\n") and seconds < 10


CLEANS = """
import sys, time
from pixart_jax import cli
from pixart_jax.files import atomic_write
def main(argv):
    with atomic_write(argv[0]) as file:
        file.write(b"half")
        time.sleep(60)
with cli.signals():
    sys.exit(cli.run(main))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_half_written_file_is_removed(tmp_path, number):
    status, err, _ = end([sys.executable, "-c", CLEANS, str(tmp_path / "a.json")], number, 0.3)
    assert status == 128 + number and err.count("\n") == 1 and not list(tmp_path.iterdir())


IMPORTS = """
import sys
from pixart_jax import cli
def main(argv):
    try:
        cli._on_signal(2, None)
    except KeyboardInterrupt:
        raise ImportError("cannot import name 'x'")
with cli.signals():
    sys.exit(cli.run(main))
"""


def test_an_import_error_that_a_signal_caused_is_not_reported():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


REDIRECTS = """
import contextlib, io, sys
from pixart_jax import cli
sys.path.insert(0, sys.argv[1])
with cli.signals(), contextlib.redirect_stderr(io.StringIO()):
    import slow
"""


def test_the_line_is_printed_while_stderr_is_redirected(tmp_path):
    """cli.parse_known redirects it while tyro is imported."""
    (tmp_path / "slow.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)\n")
    command = [sys.executable, "-c", REDIRECTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


IGNORES = """
import os, sys, time
from pixart_jax import cli
class Ends:
    def __del__(self):
        os.kill(os.getpid(), 2)
        for _ in range(10000):
            pass
with cli.signals():
    Ends()
    try:
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("raised again")
        raise
"""


def test_an_interrupt_that_python_ignores_is_raised_again():
    """As in a destructor, or in JAX's garbage-collection callback."""
    done = subprocess.run([sys.executable, "-c", IGNORES], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "raised again\n")


def test_an_ignored_signal_stays_ignored():
    """nohup and a shell's background jobs ignore SIGINT."""
    code = "import signal, time\nsignal.signal(2, signal.SIG_IGN)\n"
    code += "from pixart_jax import cli\nwith cli.signals():\n    time.sleep(2)"
    assert end([sys.executable, "-c", code], signal.SIGINT, 0.2)[:2] == (0, "")

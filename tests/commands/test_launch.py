"""Several local processes of one program: what they are told, whose output and status is shown, and
that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart_jax.commands import launch
from pixart_jax.errors import UserError


def launcher(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "pixart_jax", "launch", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def program(folder: Path, text: str) -> Path:
    file = folder / "program.py"
    file.write_text(text)
    return file


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be counted does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


WAITS = """
import os, subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), inner.pid, flush=True)
time.sleep(600)
"""


def pids(child, count: int) -> list[int]:
    found = []
    while len(found) < 2 * count:
        line = (child.stderr if found else child.stdout).readline()
        assert line, child.communicate()
        if "pids" in line:
            found += map(int, line.split("pids ")[1].split())
    return found


def test_each_process_is_told_its_place_and_its_lines_carry_its_number(tmp_path):
    names = "JAX_PROCESS_ID JAX_NUM_PROCESSES JAX_COORDINATOR_ADDRESS XLA_FLAGS"
    text = "print(*(os.environ[n].split(':')[0] for n in {!r}.split()), sys.argv[1:])"
    file = program(tmp_path, f"import os, sys\n{text.format(names)}\n")
    child = launcher("--processes", 3, "--devices-per-process", 4, "--", file, "--flag", "a b")
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0
    lines = sorted((out + err).splitlines())
    flags = "--xla_force_host_platform_device_count=4 ['--flag', 'a b']"
    assert lines == [f"[{k}] {k} 3 localhost {flags}" for k in range(3)]
    assert out.splitlines() == lines[:1]


def test_logs_keep_every_process_s_output_and_the_first_one_s_is_shown_as_it_is(tmp_path):
    text = "print('I am', os.environ['JAX_PROCESS_ID']); print('oops', file=sys.stderr)"
    file = program(tmp_path, f"import os, sys\n{text}\n")
    child = launcher("--processes", 2, "--logs", tmp_path / "logs", "--", file)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, sorted(out.splitlines()), err) == (0, ["I am 0", "oops"], "")
    for k in range(2):
        lines = (tmp_path / "logs" / f"process-{k}.log").read_text().splitlines()
        assert sorted(lines) == [f"I am {k}", "oops"]


def test_the_first_bad_status_is_the_launcher_s_and_the_others_are_ended_in_time(tmp_path):
    text = "os.environ['JAX_PROCESS_ID'] == '1' and sys.exit(7)\ntime.sleep(600)"
    file = program(tmp_path, f"import os, sys, time\n{text}\n")
    began = time.monotonic()
    child = launcher("--processes", 3, "--patience", 1, "--", file)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 7 and time.monotonic() - began < 120
    assert "process 0, 2 still at work 1 s after another's end: killed" in err


def test_a_process_killed_by_the_kernel_is_named(tmp_path):
    text = "os.environ['JAX_PROCESS_ID'] == '0' and os.kill(os.getpid(), signal.SIGKILL)"
    file = program(tmp_path, f"import os, signal\n{text}\n")
    child = launcher("--", file)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 128 + signal.SIGKILL and "process 0 was killed by SIGKILL" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_every_process(tmp_path, number):
    file = program(
        tmp_path,
        "import signal, sys, time\n"
        "for n in (signal.SIGTERM, signal.SIGINT):\n"
        "    signal.signal(n, lambda n, _: (print('got', n, flush=True), sys.exit(75)))\n"
        # a signal between Python's last look and a long sleep would be handled after the sleep
        "print('ready', flush=True)\nfor _ in range(6000):\n    time.sleep(0.1)\n",
    )
    child = launcher("--", file)
    assert "ready" in child.stdout.readline() and "ready" in child.stderr.readline()
    child.send_signal(number)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 75
    assert f"[0] got {number.value}" in out and f"[1] got {number.value}" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_orphan_is_left_whatever_ends_the_launcher(tmp_path, number):
    child = launcher("--", program(tmp_path, WAITS))
    children = pids(child, 2)
    child.send_signal(number)
    child.wait(timeout=300)
    # a killed launcher takes its own children with it
    left = children if number != signal.SIGKILL else children[::2]
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    still = [pid for pid in left if alive(pid)]
    for pid in children:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    assert not still


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--processes", "2"], "which program"),
        (["--processes", "0", "--", "train.py"], "--processes 0: at least 1"),
        (["--devices-per-process", "0", "--", "train.py"], "--devices-per-process 0: at least 1"),
        (["--", "no_such_program.py"], "no program no_such_program.py"),
        (["--", "no-such-command"], "no program 'no-such-command'"),
        (["--proceses", "2", "--", "train.py"], "did you mean '--processes'"),
    ],
)
def test_a_mistake_is_one_line(argv, line, root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=line.replace("?", r"\?")):
        launch.main(argv)

"""How processes find each other, what a mistake there says, and that a lost one ends the others
with a line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import pytest

from pixart_jax.errors import UserError
from pixart_jax.parallel import DISTRIBUTED_ENV_VARS, processes
from pixart_jax.parallel.processes import PEER_LOST, DistributedOptions, pop_distributed_flags


def test_flags_are_taken_out_of_a_command_line_wherever_they_stand():
    argv = "configs/x.py --coordinator 10.0.0.1:1234 --workdir d --processes=4 --process_index 3"
    argv += " --mesh.fsdp 4 --peer-timeout 7.5"
    start, rest = pop_distributed_flags(argv.split(), {})
    assert start == DistributedOptions("10.0.0.1:1234", 4, 3, peer_timeout=7.5)
    assert rest == ["configs/x.py", "--workdir", "d", "--mesh.fsdp", "4"]


LAUNCHER = dict(zip(DISTRIBUTED_ENV_VARS, ("localhost:99", "2", "1")))
NONE = DistributedOptions(distributed="none")


@pytest.mark.parametrize(
    ("flags", "environment", "options"),
    [
        ("", LAUNCHER, DistributedOptions("localhost:99", 2, 1)),
        ("--distributed none", LAUNCHER, NONE),
        ("", {DISTRIBUTED_ENV_VARS[0]: "localhost:99"}, DistributedOptions()),
        (
            "--coordinator h:1 --processes 8 --process-index 0",
            LAUNCHER,
            DistributedOptions("h:1", 8, 0),
        ),
    ],
)
def test_the_environment_of_a_launcher_is_read_whole_or_not_at_all_and_flags_win(
    flags, environment, options
):
    assert pop_distributed_flags(flags.split(), environment)[0] == options


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--processes 2", "--process-index: give all three, or none"),
        ("--coordinator h:1 --processes 2", "give all three"),
        ("--coordinator h:1 --processes 2 --process-index 2", "the indices are 0 to 1"),
        ("--coordinator h:1 --processes 2 --process-index -1", "the indices are 0 to 1"),
        ("--coordinator h:1 --processes 0 --process-index 0", "--processes 0: at least 1"),
        ("--coordinator host --processes 2 --process-index 0", "HOST:PORT is needed"),
        ("--coordinator h:99999 --processes 2 --process-index 0", "HOST:PORT is needed"),
        ("--processes two", "argument --processes: invalid int value: 'two'"),
        ("--coordinator", "argument --coordinator: expected one argument"),
        ("--distributed nome", "--distributed 'nome': auto or none"),
        ("--peer-timeout 0", "--peer-timeout 0: at least 1 second"),
        ("--distributed none --coordinator h:1 --processes 2 --process-index 0", "or several?"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_would_do(flags, line):
    with pytest.raises(UserError, match=re.escape(line)):
        pop_distributed_flags(flags.split(), {})


def test_where_nothing_is_detected_one_process_goes_on_without_delay():
    program = """
        import time
        import jax
        from pixart_jax.parallel import processes
        began = time.perf_counter()
        processes.initialize(processes.pop_distributed_flags([])[0])
        assert time.perf_counter() - began < 20 and not jax.distributed.is_initialized() and jax.process_count() == 1
        print(processes.run_with_peers(lambda: 5))
    """  # noqa: E501
    clusters = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(clusters)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **how)
    assert done.returncode == 0 and done.stdout == "5\n", done.stderr


def test_what_a_cluster_that_cannot_be_joined_says_is_a_user_error(monkeypatch):
    def refuse(**_):
        raise RuntimeError("To enable automatic bootstrap in a K8s cluster,\njobs must be indexed")

    monkeypatch.setattr(processes.jax.distributed, "initialize", refuse)
    says = "jobs must be indexed.*--coordinator HOST:PORT.*--distributed none"
    with pytest.raises(UserError, match=says):
        processes.initialize(DistributedOptions())


def test_a_process_that_computes_already_is_alone_but_not_in_a_cluster(monkeypatch):
    jax.devices()
    processes.initialize(DistributedOptions())
    assert not jax.distributed.is_initialized()
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "a,b", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match="cannot join the other processes.*--distributed none"):
        processes.initialize(DistributedOptions())


# ---- real processes ----

# A run of two processes that add across their devices for ever; argv: PORT INDEX, then its flags.
RUN = """
import sys, time
from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.parallel import liveness, processes

def main(argv):
    index = argv[1]
    flags = ["--coordinator", f"localhost:{argv[0]}", "--processes", "2", "--process-index", index]
    start, rest = processes.pop_distributed_flags([*flags, *argv[2:]])
    processes.initialize(start)
    import jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.make_array_from_callback((jax.device_count(),), sharding, lambda i: np.ones(1, np.float32))
    add = jax.jit(lambda x: x * 0 + x.mean(), out_shardings=sharding)
    with liveness.report_failures():
        for step in range(int(rest[1]) if rest[1:] else 10**6):
            x = add(x)
            x.block_until_ready()
            liveness.report_step(step)
            if step == 0:
                print("running", flush=True)
            if rest[:1] == [f"user-{index}"] and step == 3:
                raise UserError("a flag is wrong")
            if rest[:1] == [f"bug-{index}"] and step == 3:
                raise ZeroDivisionError("a bug")
            if rest[:1] == [f"hang-{index}"] and step == 3:
                time.sleep(1000)
            time.sleep(0.02)
    return 0

sys.exit(processes.run_with_peers(lambda: cli.run(main)))
"""  # noqa: E501


@pytest.fixture
def pair(tmp_path):
    """start(*flags) → two processes that are at work; what is left of them at the end is killed."""
    started = []
    (tmp_path / "run.py").write_text(RUN)

    def start(*flags, wait: bool = True):
        from pixart_jax.commands.launch import free_port

        port = str(free_port())
        for index in "01":
            files = [open(tmp_path / f"{len(started)}.{name}", "w+") for name in ("out", "err")]  # noqa: SIM115
            environment = {**os.environ, "XLA_FLAGS": ""}
            command = [sys.executable, str(tmp_path / "run.py"), port, index, *flags]
            child = subprocess.Popen(command, stdout=files[0], stderr=files[1], env=environment)
            reads = [lambda file=file: (file.seek(0), file.read())[1] for file in files]
            child.out, child.err = reads
            started.append(child)
        deadline, both = time.monotonic() + 300, started[-2:]
        while wait and not all("running" in child.out() for child in both):
            alive = all(child.poll() is None for child in both)
            assert alive and time.monotonic() < deadline, [child.err() for child in both]
            time.sleep(0.05)
        return both

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
        child.wait()


def last_line(child) -> str:
    return [line for line in child.err().splitlines() if line][-1]


PATIENCE = 4.0
SLACK = 40.0  # of a machine that is busy with other tests: both are less than the default


@pytest.mark.parametrize(
    ("number", "lost"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
)
def test_a_dead_or_hung_process_ends_the_other_with_a_line_and_a_status_in_time(pair, number, lost):
    children = pair("--peer-timeout", str(PATIENCE))
    began = time.monotonic()
    children[lost].send_signal(number)
    left = children[1 - lost]
    assert left.wait(timeout=300) == PEER_LOST, left.err()
    assert time.monotonic() - began < PATIENCE + SLACK
    line = last_line(left)
    assert line.startswith(f"error: process {lost} of 2")
    assert "start all processes again with the same command" in line
    assert "has not answered for" in line or "is gone" in line


def test_a_mistake_on_one_process_alone_ends_both_at_once(pair):
    children = pair("user-1")
    assert children[1].wait(timeout=300) == 2 and last_line(children[1]) == "error: a flag is wrong"
    assert children[0].wait(timeout=300) == PEER_LOST
    assert "process 1 of 2 has ended with status 2" in last_line(children[0])


@pytest.mark.slow
def test_a_fault_of_the_program_keeps_its_traceback_and_ends_the_other(pair):
    children = pair("bug-0")
    assert children[0].wait(timeout=300) == 1
    assert "ZeroDivisionError: a bug" in children[0].err() and "Traceback" in children[0].err()
    assert children[1].wait(timeout=300) == PEER_LOST and "process 0 of 2" in last_line(children[1])


@pytest.mark.slow
def test_a_step_that_never_ends_though_all_processes_live_is_named(pair):
    children = pair("hang-1", "--stall-timeout", "2")
    for child in children:
        assert child.wait(timeout=300) == PEER_LOST
        line = last_line(child)
        assert "no step was done for" in line and "at step 3; what was saved holds" in line


def test_processes_that_are_done_end_together_with_status_0(pair):
    for child in pair("nothing", "5", wait=False):
        assert child.wait(timeout=300) == 0, child.err()


def test_a_coordinator_that_nobody_runs_is_named_in_time(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    from pixart_jax.commands.launch import free_port

    port, began = free_port(), time.monotonic()
    command = [sys.executable, tmp_path / "run.py", str(port), "1", "--start-timeout", "3"]
    how = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **how, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 2 and time.monotonic() - began < 150
    line = f"error: no coordinator at localhost:{port}, or not all of the 2 processes have come"
    assert done.stderr.splitlines()[-1].startswith(line)

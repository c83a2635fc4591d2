"""Programs compiled, each in a process of its own with its platform's settings and bounded memory
and time.

The process is ``python -m pixart_jax.planning.compilation TARGET RESULT CACHE``, all pickle files:
a PlanTarget, its CompiledStats or a UserError's text, and a folder of earlier results.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.metadata
import itertools
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write, cache_folder
from pixart_jax.parallel.chips import GIB
from pixart_jax.planning import topology as topologies
from pixart_jax.planning.collectives import collectives
from pixart_jax.planning.target import CompiledStats, Link, PlanTarget

if TYPE_CHECKING:
    from pixart_jax.planning.programs import Program

FORMAT = 4  # of cached results and of how a program is read; a new number forgets old results
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = (  # XLA's messages when a program does not fit: (wanted, available)
    re.compile(r"Used ([\d.]+[KMGTB])\w* of ([\d.]+[KMGTB])\w* hbm"),
    re.compile(r"\(([\d.]+[KMGTB])\w*\) exceeds available HBM \(([\d.]+[KMGTB])\w*\)"),
)


@dataclasses.dataclass(frozen=True)
class CompileLimits:
    """Of one compilation on this machine: memory and time."""

    gib: float = 4.0
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in ("gib", "seconds"):
            if not getattr(self, field) > 0:
                raise UserError(f"--compile-{field} {getattr(self, field)}: must be positive")


def compiled(target: PlanTarget, limits: CompileLimits) -> CompiledStats:
    """Compile the target's program in a process of its own, or read an earlier result.

    Raises UserError where it cannot be compiled, or not within the limits.
    """
    topologies.require_compiler(target.topology)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        given, result, log = (Path(folder) / name for name in ("target", "result", "log"))
        given.write_bytes(pickle.dumps(target))
        command = [sys.executable, "-m", __name__, given, result, cache_folder() / "plans"]
        environment = topologies.environment(target.topology)
        paths = [Path(__file__).resolve().parents[2], environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if str(path))
        with log.open("wb") as stream:
            child = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
            )
            try:
                _wait(child, f"{target.topology.name}, {target.label}", limits)
            finally:
                child.kill()
                child.wait()
        if not result.is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise UserError(
                f"{target.topology.name}, {target.label}: the compiling process ended with status "
                f"{child.returncode}: {lines[-1][:300] if lines else 'no output'}"
            )
        found = pickle.loads(result.read_bytes())
    if isinstance(found, str):
        raise UserError(found)
    return found


def _wait(child: subprocess.Popen, label: str, limits: CompileLimits) -> None:
    """Wait for the child; UserError once it passes a limit."""
    begun = time.monotonic()
    while child.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - begun > limits.seconds:
            raise UserError(
                f"{label}: not compiled in {limits.seconds:g} s; --compile-seconds allows more, a "
                "smaller batch or a remat policy takes less"
            )
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:  # no Linux, or just ended
            continue
        resident = re.search(r"VmRSS:\s*(\d+)", status)
        if resident and int(resident[1]) * 1024 > limits.gib * GIB:
            raise UserError(
                f"{label}: compiling takes more than {limits.gib:g} GiB of this machine's memory; "
                "--compile-gib allows more"
            )


# In the process that compiles.


def main(target: str, result: str, cache: str) -> None:
    if sys.platform == "linux":  # a killed command leaves no compiler behind
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    found: CompiledStats | str
    try:
        found = compile_here(pickle.loads(Path(target).read_bytes()), Path(cache))
    except UserError as error:
        found = str(error)
    Path(result).write_bytes(pickle.dumps(found))


def compile_here(target: PlanTarget, cache: Path) -> CompiledStats:
    """Trace, lower, look in the cache, compile."""
    import jax

    from pixart_jax.planning.programs import program

    made = program(target)
    lowered, compiler = made.traced.lower(), compiler_version(target)
    devices = [(d.id, d.device_kind) for d in made.mesh.devices.flat]
    parts = (FORMAT, target.topology, devices, made.counted, made.assumptions, compiler)
    key = hashlib.sha256(f"{parts}{lowered.as_text()}".encode()).hexdigest()[:32]
    file = cache / f"{key}.pickle"
    if file.is_file():
        return dataclasses.replace(pickle.loads(file.read_bytes()), cached=True)
    begun, busy = time.perf_counter(), time.process_time()
    changes: dict[str, Any] = {}
    compiled = None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        line = str(error).splitlines()[0][:300]
        match = next((m for pattern in _TOO_LARGE if (m := pattern.search(str(error)))), None)
        if match is None:
            raise UserError(f"{target.topology.name}: the compiler failed: {line}") from error
        wanted, available = (float(n[:-1]) * _UNITS[n[-1]] for n in match.groups())
        changes = {"wanted": wanted, "available": available}
    found = dataclasses.replace(
        stats(target, made, compiled),
        compile_seconds=time.perf_counter() - begun,
        compile_cpu_seconds=time.process_time() - busy,
        host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        compiler=compiler,
        **changes,
    )
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        pickle.dump(found, stream)
    return found


def stats(target: PlanTarget, made: Program, compiled: Any) -> CompiledStats:
    """Figures of a traced program and of its executable; None where it did not fit."""
    from pixart_jax.planning.matmul_cost import matmul_cost

    cost = matmul_cost(made.traced.jaxpr.jaxpr)
    found = CompiledStats(
        made.mesh.devices.flat[0].device_kind,
        made.counted,
        cost.flops,
        cost.bytes,
        whole_share=made.whole_share,
        assumptions=made.assumptions,
        remat=made.remat,
    )
    if compiled is None:
        return found
    memory = compiled.memory_analysis()
    sent = collectives(compiled.as_text(), made.mesh.axis_names, made.mesh.devices.shape)
    return dataclasses.replace(
        found,
        arguments=float(memory.argument_size_in_bytes),
        outputs=float(memory.output_size_in_bytes),
        aliased=float(memory.alias_size_in_bytes),
        temporaries=float(memory.temp_size_in_bytes),
        code=float(memory.generated_code_size_in_bytes),
        host=float(
            memory.host_argument_size_in_bytes
            + memory.host_output_size_in_bytes
            - memory.host_alias_size_in_bytes
            + memory.host_temp_size_in_bytes
        ),
        collectives=tuple(sent),
        links=tuple(link(target, made.mesh, axes) for axes in dict.fromkeys(c.axes for c in sent)),
    )


def link(target: PlanTarget, mesh: Any, axes: tuple[str, ...]) -> Link:
    """The wires under a combination of mesh axes, from the coordinates of the mesh's devices."""
    topology = target.topology
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = list(mesh.devices[index].flat)
    if topology.platform != "tpu":
        hosts = {device.id // topology.shape[0] for device in group}
        return Link(axes, len(group), 1, len(hosts))
    slices = [getattr(device, "slice_index", 0) for device in group]
    places = [device.coords for device, s in zip(group, slices) if s == slices[0]]
    links = 0
    for dimension, values in enumerate(itertools.islice(zip(*places), len(topology.shape))):
        different = len(set(values))
        ring = different == topology.shape[dimension] and topology.wraps(dimension)
        links += 0 if different == 1 else 2 if ring else 1
    return Link(axes, len(group), links, len(set(slices)))


def compiler_version(target: PlanTarget) -> str:
    package = topologies.COMPILERS[target.topology.platform]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} of jaxlib {importlib.metadata.version('jaxlib')}"


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Programs compiled, each in a process of its own with its platform's settings and bounded memory
and time.

The process is ``python -m pixart_jax.planning.compilation GIB CACHE``: it reads a pickled
PlanTarget from stdin and writes its CompiledStats, or a UserError's text, pickled to stdout. GIB
bounds its memory; CACHE is a folder of earlier results.
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
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write, cache_folder
from pixart_jax.parallel.chips import GIB
from pixart_jax.planning import topology as topologies
from pixart_jax.planning.collectives import Collective, collectives
from pixart_jax.planning.target import CompiledStats, PlanTarget

if TYPE_CHECKING:
    from pixart_jax.planning.programs import Program

FORMAT = 5  # of cached results and of how a program is read; a new number forgets old results
TOO_MUCH_MEMORY = 77  # exit status of the compiling process
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
    command = [sys.executable, "-m", __name__, str(limits.gib), str(cache_folder() / "plans")]
    environment = topologies.environment(target.topology)
    label = f"{target.topology.name}, {target.label}"
    paths = (str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    how: dict[str, Any] = {"input": pickle.dumps(target), "capture_output": True}
    try:
        done = subprocess.run(command, env=environment, timeout=limits.seconds, **how)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{label}: not compiled in {limits.seconds:g} s; --compile-seconds allows more"
        ) from None
    if done.returncode == TOO_MUCH_MEMORY:
        raise UserError(
            f"{label}: compiling takes over {limits.gib:g} GiB of memory; --compile-gib allows more"
        )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")[:300]
        raise UserError(
            f"{label}: the compiling process ended with status {done.returncode}: {last}"
        )
    found = pickle.loads(done.stdout)
    if isinstance(found, str):
        raise UserError(found)
    return found


# In the process that compiles.


def main(gib: str, cache: str) -> None:
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints is not part of the result
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the command
        threading.Thread(target=_limit_memory, args=(float(gib),), daemon=True).start()
    found: CompiledStats | str
    try:
        found = compile_here(pickle.loads(sys.stdin.buffer.read()), Path(cache))
    except UserError as error:
        found = str(error)
    with stdout:
        pickle.dump(found, stdout)


def _limit_memory(gib: float) -> None:
    """End this process once it holds more: XLA has no such limit, and the machine would swap."""
    page = resource.getpagesize()
    while int(Path("/proc/self/statm").read_text().split()[1]) * page < gib * GIB:
        time.sleep(0.2)
    os._exit(TOO_MUCH_MEMORY)


def compile_here(target: PlanTarget, cache: Path) -> CompiledStats:
    """Trace, lower, look in the cache, compile."""
    import jax

    from pixart_jax.planning.programs import program

    made = program(target)
    lowered, package = made.traced.lower(), topologies.COMPILERS[target.topology.platform]
    compiler = f"{package} {importlib.metadata.version(package)}"
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
        match = next((m for pattern in _TOO_LARGE if (m := pattern.search(str(error)))), None)
        if match is None:
            line = str(error).splitlines()[0][:300]
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
    kind, noted = made.mesh.devices.flat[0].device_kind, (made.assumptions, made.remat)
    found = CompiledStats(kind, made.counted, cost.flops, cost.bytes, *noted)
    if compiled is None:
        return found
    m = compiled.memory_analysis()
    host = m.host_argument_size_in_bytes + m.host_output_size_in_bytes
    host += m.host_temp_size_in_bytes - m.host_alias_size_in_bytes
    sent = collectives(compiled.as_text(), made.mesh.axis_names, made.mesh.devices.shape)
    return dataclasses.replace(
        found,
        arguments=float(m.argument_size_in_bytes),
        outputs=float(m.output_size_in_bytes),
        aliased=float(m.alias_size_in_bytes),
        temporaries=float(m.temp_size_in_bytes),
        code=float(m.generated_code_size_in_bytes),
        host=float(host),
        collectives=tuple(_placed(c, target, made.mesh) for c in sent),
    )


def _placed(c: Collective, target: PlanTarget, mesh: Any) -> Collective:
    """With its links and networks, from the coordinates of the mesh's devices."""
    topology = target.topology
    index = tuple(slice(None) if name in c.axes else 0 for name in mesh.axis_names)
    group = list(mesh.devices[index].flat)
    if topology.platform != "tpu":
        hosts = {device.id // topology.shape[0] for device in group}
        return dataclasses.replace(c, networks=len(hosts))
    slices = [getattr(device, "slice_index", 0) for device in group]
    places = [device.coords for device, s in zip(group, slices) if s == slices[0]]
    links = 0
    for dimension, values in enumerate(itertools.islice(zip(*places), len(topology.shape))):
        different = len(set(values))
        ring = different == topology.shape[dimension] and topology.wraps(dimension)
        links += 0 if different == 1 else 2 if ring else 1
    return dataclasses.replace(c, links=links, networks=len(set(slices)))


if __name__ == "__main__":
    main(*sys.argv[1:])

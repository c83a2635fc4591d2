"""The process that compiles one job: reads it from a file, writes what it found as JSON. Started by
compilation.compiled alone.

python -m pixart_jax.planning.worker JOB RESULT CACHE
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import pickle
import re
import resource
import signal
import sys
import time
from pathlib import Path

from pixart_jax.errors import UserError
from pixart_jax.planning.jobs import CompiledStats, Link, PlanTarget

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_OVER = (  # how XLA says that a program does not fit: (wanted, available)
    re.compile(r"Used ([\d.]+[KMGTB])\w* of ([\d.]+[KMGTB])\w* hbm"),
    re.compile(r"\(([\d.]+[KMGTB])\w*\) exceeds available HBM \(([\d.]+[KMGTB])\w*\)"),
)


def facts(job: PlanTarget, cache: Path) -> CompiledStats:
    """Trace, lower, look in the cache, compile."""
    import jax

    from pixart_jax.planning.arithmetic import products
    from pixart_jax.planning.programs import program

    begun = time.perf_counter()
    made = program(job)
    count = products(made.traced.jaxpr.jaxpr)
    lowered = made.traced.lower()
    text = lowered.as_text()
    traced = time.perf_counter() - begun
    compiler = version(job)
    kept = cache / f"{_name(job, made, text, compiler)}.json"
    if kept.is_file():
        return CompiledStats.from_json(
            json.loads(kept.read_text()), cached=True, trace_seconds=traced
        )

    begun, busy = time.perf_counter(), time.process_time()
    wanted = available = None
    message, collectives, sizes, compiled = (
        "",
        (),
        dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code", "host"), 0.0),
        None,
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as fault:
        over = next((found for pattern in _OVER if (found := pattern.search(str(fault)))), None)
        if over is None:
            raise UserError(
                f"{job.topology.name}: the compiler failed: {str(fault).splitlines()[0][:300]}"
            ) from fault
        wanted, available = (float(n[:-1]) * _UNITS[n[-1]] for n in over.groups())
        message = str(fault).splitlines()[0][:300]
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    if compiled is not None:
        collectives, sizes = read(compiled, made.mesh)
    found = CompiledStats(
        device_kind=made.mesh.devices.flat[0].device_kind,
        counted=made.counted,
        **sizes,
        wanted=wanted,
        available=available,
        message=message,
        flops=count.flops,
        product_bytes=count.bytes,
        collectives=tuple(collectives),
        links=tuple(links(job, made.mesh, [c.axes for c in collectives])),
        whole_share=made.whole_share,
        assumptions=made.assumptions,
        remat=made.remat,
        trace_seconds=traced,
        compile_seconds=seconds,
        compile_cpu_seconds=busy,
        host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        compiler=compiler,
    )
    _keep(kept, found)
    return found


def read(compiled, mesh):
    """(collectives, the compiler's memory figures in bytes a device) of an executable."""
    from pixart_jax.planning.collectives import collectives

    memory = compiled.memory_analysis()
    sizes = {
        "arguments": float(memory.argument_size_in_bytes),
        "outputs": float(memory.output_size_in_bytes),
        "aliased": float(memory.alias_size_in_bytes),
        "temporaries": float(memory.temp_size_in_bytes),
        "code": float(memory.generated_code_size_in_bytes),
        "host": float(
            memory.host_argument_size_in_bytes
            + memory.host_output_size_in_bytes
            - memory.host_alias_size_in_bytes
            + memory.host_temp_size_in_bytes
        ),
    }
    return collectives(compiled.as_text(), mesh.axis_names, mesh.devices.shape), sizes


def links(job: PlanTarget, mesh, wanted) -> list[Link]:
    """The wires under each combination of mesh axes, read from the coordinates of the mesh's
    devices."""
    found = []
    for axes in dict.fromkeys(map(tuple, wanted)):
        index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
        group = list(mesh.devices[index].flat)
        if job.topology.platform == "tpu":
            networks = len({getattr(d, "slice_index", 0) for d in group})
            coordinates = [
                d.coords
                for d in group
                if getattr(d, "slice_index", 0) == getattr(group[0], "slice_index", 0)
            ]
            count = 0
            for dimension, values in enumerate(
                itertools.islice(zip(*coordinates), len(job.topology.shape))
            ):
                different = len(set(values))
                whole = different == job.topology.shape[dimension]
                count += (
                    0 if different == 1 else 2 if whole and job.topology.wraps(dimension) else 1
                )
        else:
            networks = len({d.id // job.topology.shape[0] for d in group})
            count = 1
        found.append(Link(axes, len(group), count, networks))
    return found


def version(job: PlanTarget) -> str:
    """The compiler whose results these are."""
    package = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin", "cpu": "jaxlib"}[job.topology.platform]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} of jaxlib {importlib.metadata.version('jaxlib')}"


def _name(job: PlanTarget, made, text: str, compiler: str) -> str:
    """Of the program, the places of its devices, and the compiler."""
    devices = [(d.id, d.device_kind) for d in made.mesh.devices.flat]
    parts = (
        FORMAT,
        job.topology,
        devices,
        sorted(made.counted.items()),
        made.assumptions,
        compiler,
        text,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


# of the kept JSON and of what is read from a program; a higher one forgets what was kept
FORMAT = 3


def _keep(path: Path, found: CompiledStats) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{time.time_ns()}")
    draft.write_text(json.dumps(found.to_json()))
    draft.replace(path)


def main(job: str, result: str, cache: str) -> None:
    _end_with_parent()
    try:
        found = {"facts": facts(pickle.loads(Path(job).read_bytes()), Path(cache)).to_json()}
    except UserError as fault:
        found = {"error": str(fault)}
    Path(result).write_text(json.dumps(found))


def _end_with_parent() -> None:
    """On Linux, so that a killed command leaves no compiler behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(*sys.argv[1:])

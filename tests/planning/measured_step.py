"""The real step of small_run on 8 simulated devices: how many bytes this process grows by from
before its arrays are made to the step's height. Prints JSON. Needs XLA's 8 host devices.

All is compiled and run once before the first reading, so that the compiler's memory and the
runtime's are in both; the allocator gives freed memory back at once (MALLOC_MMAP_THRESHOLD_ in the
environment, malloc_trim). The system's high-water mark is set back once the arrays lie where they
belong, and read after two steps: the memory of simulated devices is the process's own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))
import small_run

from benchmarks.plans import arrays
from pixart_jax.planning import programs, topology
from pixart_jax.planning.target import PlanTarget


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def settle() -> None:
    """What was freed goes back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def main(fsdp: int, remat: str) -> None:
    count, config = small_run.DEVICES, small_run.get_config(remat=remat)
    where, mesh = topology.parse(f"cpu:{count}"), (count // fsdp, fsdp, 1, 1)
    target = PlanTarget(where, config, 0, mesh, small_run.BUCKET)
    program = programs.program(target)
    compiled = program.traced.lower().compile()

    def steps(state, batch, key) -> float:
        for _ in range(2):
            state, metrics = compiled(state, batch, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    steps(*arrays(target, program))
    settle()
    before = status("VmRSS")
    held = arrays(target, program)
    settle()
    made_of_arrays = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss = steps(*held)
    grown = status("VmHWM") - before
    print(json.dumps({"grown": grown, "arrays": made_of_arrays - before, "loss": loss}))


main(int(sys.argv[1]), sys.argv[2])

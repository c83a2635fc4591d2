"""Hardware by name: what ``--topology`` takes, and JAX's devices of it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re

from pixart_jax.errors import UserError, nearest
from pixart_jax.parallel.chips import CHIPS, Chip

# Slices that Google Cloud offers, by generation, in chips.
_3D = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"
_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
SHAPES: dict[str, tuple[str, ...]] = {
    "v4": tuple(_3D.split()),
    "v5e": tuple(_2D.split()),
    "v5p": (*_3D.split(), "8x16x16", "16x16x16"),
    "v6e": tuple(_2D.split()),
    "tpu7x": tuple(_3D.split()),
}
GPUS = ("h100", "h200")
KINDS = (*SHAPES, *GPUS, "cpu")
LARGEST_HOST = 8  # GPUs that NVLink joins
LARGEST_CPU = 512  # simulated devices

COMPILERS = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin", "cpu": "jaxlib"}  # by platform


@dataclasses.dataclass(frozen=True)
class Topology:
    """name: as given. kind: a row of parallel.chips.CHIPS, or 'cpu'. shape: chips of a slice along
    the torus's dimensions, GPUs of a host, or simulated devices of the CPU. slices: TPU slices, or
    hosts of GPUs, joined by a network."""

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip | None:
        """Its row of the table; None for a CPU."""
        return CHIPS.get(self.kind)

    @property
    def platform(self) -> str:
        return "cpu" if self.kind == "cpu" else "cuda" if self.kind in GPUS else "tpu"

    @property
    def jax_platform(self) -> str:
        """As jax.Device.platform."""
        return "gpu" if self.platform == "cuda" else self.platform

    @property
    def size(self) -> int:
        """JAX devices in all; a chip of TPU7x is two."""
        return math.prod(self.shape) * (2 if self.kind == "tpu7x" else 1) * self.slices

    @property
    def label(self) -> str:
        several = self.slices > 1 and self.platform == "tpu"
        return f"{self.name} × {self.slices} slices" if several else self.name

    def wraps(self, dimension: int) -> bool:
        """Whether a dimension of the torus is closed to a ring: 16 chips of v5e and v6e; multiples
        of 4 in the 3D generations, whose optical switches close every dimension of whole cubes."""
        side = self.shape[dimension]
        if len(self.shape) == 2:
            return side == 16
        return all(n % 4 == 0 for n in self.shape) and side >= 4


def _forms(kind: str) -> str:
    """The names of a kind's topologies."""
    if kind in SHAPES:
        return ", ".join(f"{kind}:{shape}" for shape in SHAPES[kind])
    if kind == "cpu":
        return f"cpu:N is N simulated devices, 1 to {LARGEST_CPU}"
    return (
        f"{kind}:1 … {kind}:{LARGEST_HOST} is one host's GPUs, {kind}:{LARGEST_HOST}xN is N hosts"
    )


def parse(text: str, slices: int = 1) -> Topology:
    """'v5e:16x16', 'v5p:4x4x4', 'h200:8', 'h200:8x4' (four hosts of eight), 'cpu:8' → the topology;
    UserError lists those that exist."""
    kind, _, shape = text.partition(":")
    if slices < 1:
        raise UserError(f"--slices {slices}: at least 1")
    if shape in SHAPES.get(kind, ()):
        return Topology(text, kind, tuple(map(int, shape.split("x"))), slices)
    numbers = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", shape)
    devices, hosts = (int(n or 1) for n in numbers.groups()) if numbers else (0, 0)
    largest = LARGEST_HOST if kind in GPUS else LARGEST_CPU if kind == "cpu" and hosts == 1 else 0
    if not 1 <= devices <= largest:
        near = "" if kind in KINDS else nearest(kind, KINDS)
        known = [_forms(kind)] if kind in KINDS else map(_forms, KINDS)
        raise UserError(f"topology {text!r} does not exist{near}; there are {'; '.join(known)}")
    if slices > 1:
        hint = f"; several hosts are {kind}:{devices}x{slices}" if kind in GPUS else ""
        raise UserError(f"--slices is for TPUs{hint}")
    return Topology(text, kind, (devices,), hosts)


def wanted_compiler(platform: str) -> str:
    """The requirement of the compiler that fits the installed JAX: 'libtpu==0.0.42.*' as JAX's own
    metadata has it, or 'jax-cuda13-plugin==…' of JAX's own version."""
    package = COMPILERS[platform]
    if platform == "tpu":
        for line in importlib.metadata.requires("jax") or ():
            requirement = line.partition(";")[0].strip()
            if re.match(r"libtpu\b", requirement):
                return requirement
    return f"{package}=={importlib.metadata.version('jax')}"


def compiler_error(platform: str, found: str | None) -> str | None:
    """Why the compiler's version ``found`` (None: not installed) cannot be used, with the command
    that installs the right one; None where it can."""
    package, wanted = COMPILERS[platform], wanted_compiler(platform)
    version = wanted.partition("==")[2]
    if found and (found == version or version[-1] == "*" and found.startswith(version[:-1])):
        return None
    command = f"pip install '{wanted}'"
    if platform == "cuda":
        pjrt = wanted.replace("plugin", "pjrt")
        command = f"pip install --no-deps {pjrt} {wanted} nvidia-cudnn-cu13"
    state = f"is {found}" if found else "is not installed"
    jax = importlib.metadata.version("jax")
    return f"{package}, which compiles for it, {state}; JAX {jax} needs: {command}"


def require_compiler(topology: Topology) -> None:
    """Raise UserError, with the command that installs it, where the compiler is missing."""
    found = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version(COMPILERS[topology.platform])
    if topology.platform != "cpu" and (error := compiler_error(topology.platform, found)):
        raise UserError(f"{topology.name}: {error}")


def environment(topology: Topology) -> dict[str, str]:
    """The variables of a process that compiles for a topology."""
    own = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "LIBTPU_INIT_ARGS")
    found = {name: value for name, value in os.environ.items() if name not in own}
    found |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # results are cached, not executables
    }
    if topology.platform == "cpu":
        found["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.size}"
    if topology.platform == "cuda":
        found["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"  # its autotuning needs the GPU
    return found


def devices(topology: Topology) -> list:
    """JAX's devices of the topology, in a process with ``environment``. Those of a CPU are real."""
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        return list(jax.devices()[: topology.size])
    options: dict = {"platform": topology.platform, "topology_name": topology.name}
    if topology.platform == "cuda":
        shape = f"1x{topology.slices}x{topology.shape[0]}"
        speed = int(CHIPS[topology.kind].hbm_bandwidth)
        board = _GPU.format(bandwidth=speed, **_GPU_FIELDS[topology.kind])
        options = {"platform": "cuda", "target_config": board, "topology": shape}
    else:
        if topology.kind == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip
        if math.prod(topology.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if topology.slices > 1:
            options["num_slices"] = topology.slices
    return list(topologies.get_topology_desc(**options).devices)


_GPU_FIELDS: dict[str, dict] = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "memory": 85_520_809_984},
    "h200": {"name": "NVIDIA H200", "memory": 151_397_597_184},
}
# What XLA asks of a GPU before it compiles for it (stream_executor's GpuTargetConfig), SXM boards.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  name: "{name}" driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""  # noqa: E501

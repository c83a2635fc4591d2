"""Hardware by name: what `--topology` takes, how many devices it is, and the devices that JAX
compiles for without having them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

from pixart_jax.errors import UserError, nearest
from pixart_jax.parallel.chips import CHIPS, Chip

# Slices that Google Cloud lends, by generation, in chips.
SHAPES: dict[str, tuple[str, ...]] = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": (
        "2x2x1",
        "2x2x2",
        "2x2x4",
        "2x4x4",
        "4x4x4",
        "4x4x8",
        "4x8x8",
        "8x8x8",
        "8x8x16",
        "8x16x16",
        "16x16x16",
    ),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
GPUS = ("h100", "h200")
LARGEST_HOST = 8  # GPUs that NVLink joins
LARGEST_CPU = 512  # simulated devices

LIBTPU = "pip install 'jax[tpu]'"
CUDA = (
    "pip install --no-deps jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version} "
    "nvidia-cudnn-cu13"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """name: as given. kind: a row of parallel.chips.CHIPS, or 'cpu'. shape: chips of a slice along
    the torus's dimensions; of a GPU host, its GPUs; of the CPU, its simulated devices. slices: TPU
    slices, or hosts of GPUs, joined by a network."""

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
    def devices_per_slice(self) -> int:
        return math.prod(self.shape) * (2 if self.kind == "tpu7x" else 1)

    @property
    def size(self) -> int:
        """JAX devices in all."""
        return self.devices_per_slice * self.slices

    @property
    def label(self) -> str:
        return self.name + (
            f" × {self.slices} slices" if self.slices > 1 and self.platform == "tpu" else ""
        )

    def wraps(self, dimension: int) -> bool:
        """Whether a dimension of the torus is closed to a ring: 16 chips of v5e and v6e; multiples
        of 4 in the 3D generations, whose optical switches close every dimension of whole cubes."""
        side = self.shape[dimension]
        if len(self.shape) == 2:
            return side == 16
        return all(n % 4 == 0 for n in self.shape) and side >= 4


def parse(text: str, slices: int = 1) -> Topology:
    """'v5e:16x16', 'v5p:4x4x4', 'h200:8', 'h200:8x4' (four hosts of eight), 'cpu:8' → the topology;
    UserError lists those that exist."""
    kind, _, shape = text.partition(":")
    if slices < 1:
        raise UserError(f"--slices {slices}: at least 1")
    if kind in SHAPES:
        if shape not in SHAPES[kind]:
            raise UserError(
                f"topology {text!r} does not exist; of {kind} there are "
                f"{', '.join(f'{kind}:{s}' for s in SHAPES[kind])}"
            )
        return Topology(text, kind, tuple(map(int, shape.split("x"))), slices)
    numbers = re.fullmatch(r"(\d+)(?:x(\d+))?", shape)
    if kind in GPUS:
        if not numbers or not 1 <= int(numbers[1]) <= LARGEST_HOST or int(numbers[2] or 1) < 1:
            raise UserError(
                f"topology {text!r} does not exist; {kind}:1 … {kind}:8 is one host's GPUs, "
                f"{kind}:8xN is N hosts of 8"
            )
        if slices > 1:
            raise UserError(
                f"--slices is for TPUs; several hosts of GPUs are {kind}:{numbers[1]}x{slices}"
            )
        return Topology(text, kind, (int(numbers[1]),), int(numbers[2] or 1))
    if kind == "cpu":
        if not numbers or numbers[2] or not 1 <= int(numbers[1]) <= LARGEST_CPU:
            raise UserError(
                f"topology {text!r} does not exist; cpu:N is N simulated devices, 1 to "
                f"{LARGEST_CPU}"
            )
        if slices > 1:
            raise UserError("--slices is for TPUs; simulated devices have no network between them")
        return Topology(text, kind, (int(numbers[1]),))
    known = [f"{name}:{example}" for name, (*_, example) in SHAPES.items()] + [
        "h100:8",
        "h200:8x2",
        "cpu:8",
    ]
    raise UserError(
        f"topology {text!r} does not exist{nearest(kind, [*SHAPES, *GPUS, 'cpu'])}: "
        f"GENERATION:CHIPS of {', '.join(SHAPES)}, "
        f"{' or '.join(GPUS)}:GPUSxHOSTS, or cpu:N; for example {', '.join(known)}"
    )


def require_compiler(topology: Topology) -> None:
    """UserError with the command that installs it where the compiler of a platform is not here."""
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{topology.name}: TPU programs are compiled by libtpu, which is not installed here: "
            f"{LIBTPU}"
        )
    if topology.platform == "cuda" and not all(
        map(_found, ("jax_plugins.xla_cuda13", "jax_cuda13_plugin"))
    ):
        import jax

        command = CUDA.format(version=jax.__version__)
        raise UserError(
            f"{topology.name}: CUDA programs are compiled by JAX's CUDA plugin, which is not "
            f"installed here: {command}"
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def environment(topology: Topology) -> dict[str, str]:
    """The variables of a process that compiles for a topology: no device of its own is looked for,
    no server asked."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "LIBTPU_INIT_ARGS")
    }
    found |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    found["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # results are kept, not executables
    if topology.platform == "cpu":
        found["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.size}"
    if topology.platform == "cuda":
        found["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"  # its autotuning needs the GPU
    return found


def devices(topology: Topology) -> list:
    """JAX's devices of the topology, to be called in a process with ``environment``. On a CPU they
    are real ones."""
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        return list(jax.devices()[: topology.size])
    if topology.platform == "cuda":
        shape = f"1x{topology.slices}x{topology.shape[0]}"
        described = topologies.get_topology_desc(
            platform="cuda", target_config=_GPU.format(**_GPU_FIELDS[topology.kind]), topology=shape
        )
        return list(described.devices)
    options = {}
    if topology.kind in ("v4",):
        options["chip_config_name"] = "megacore"  # one device a chip, as these generations run
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    return list(described.devices)


_GPU_FIELDS = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "bandwidth": 3_350_000_000_000,
        "memory": 85_520_809_984,
    },
    "h200": {"name": "NVIDIA H200", "bandwidth": 4_800_000_000_000, "memory": 151_397_597_184},
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

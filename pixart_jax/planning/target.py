"""What is planned, one program of a run on one mesh of one topology, and its compiled figures."""

from __future__ import annotations

import dataclasses

from pixart_jax.config import Config, StageConfig
from pixart_jax.parallel.mesh import AXES
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.planning.collectives import Collective
from pixart_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class SamplingWorkload:
    """height, width: pixels. sampling: with its defaults filled in."""

    batch: int
    height: int
    width: int
    sampling: SamplingConfig
    dtype: str = "bfloat16"

    @property
    def steps(self) -> int:
        return int(self.sampling.steps or 0)

    @property
    def evaluations(self) -> int:
        """Of the model, in all steps."""
        return 2 * self.steps - 1 if self.sampling.solver == "heun" else self.steps

    @property
    def passes(self) -> int:
        """Forward passes of an image at each evaluation."""
        return 1 if self.sampling.guidance == 1 else 2


@dataclasses.dataclass(frozen=True)
class PlanTarget:
    """The program to compile. mesh: sizes of the four axes, none −1. bucket: (height, width) in
    pixels of a train step. sampling: not None for the sampler, whose part is 'denoise' (the scan
    over the steps) or 'decode' (the VAE)."""

    topology: Topology
    config: Config
    stage: int
    mesh: tuple[int, int, int, int]
    bucket: tuple[int, int] = (0, 0)
    sampling: SamplingWorkload | None = None
    part: str = "step"

    @property
    def stage_config(self) -> StageConfig:
        return self.config.stages[self.stage]

    @property
    def axes(self) -> dict[str, int]:
        return dict(zip(AXES, self.mesh, strict=True))

    @property
    def label(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in self.axes.items() if size > 1)
        return axes or "one device"

    @property
    def batch(self) -> int:
        return self.sampling.batch if self.sampling else self.stage_config.batch_size

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.sampling.height, self.sampling.width) if self.sampling else self.bucket

    def tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of a size in pixels."""
        side = 8 * self.config.model.patch_size
        return (size[0] // side) * (size[1] // side)

    def with_mesh_and_batch(self, mesh: tuple[int, int, int, int], batch: int) -> PlanTarget:
        if self.sampling is not None:
            sampling = dataclasses.replace(self.sampling, batch=batch)
            return dataclasses.replace(self, mesh=mesh, sampling=sampling)
        stages = list(self.config.stages)
        stages[self.stage] = dataclasses.replace(self.stage_config, batch_size=batch)
        config = dataclasses.replace(self.config, stages=tuple(stages))
        return dataclasses.replace(self, mesh=mesh, config=config)


@dataclasses.dataclass(frozen=True)
class CompiledStats:
    """Figures of a compiled program: bytes on one device unless a unit is given.

    counted: bytes by kind, from shapes and shardings. flops, product_bytes: of all devices
    together, from the traced program. arguments … host: the compiler's; zero where it ran out of
    memory, when ``wanted`` is what it asked for. compile_cpu_seconds: of all cores together.
    host_peak: of the compiling process. remat: the policy, chosen where the config says "auto".
    """

    device_kind: str
    counted: dict[str, float]
    flops: float
    product_bytes: float
    assumptions: tuple[str, ...] = ()
    remat: str = ""
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    temporaries: float = 0.0
    code: float = 0.0
    host: float = 0.0
    wanted: float | None = None
    available: float | None = None
    collectives: tuple[Collective, ...] = ()
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0
    host_peak: float = 0.0
    compiler: str = ""
    cached: bool = False

    @property
    def total(self) -> float:
        """Peak bytes on a device."""
        if self.wanted is not None:
            return self.wanted
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

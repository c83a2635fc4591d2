"""What there is to compile: one program of a run or of a drawing, on one mesh of one topology; and
what is known of it afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

from pixart_jax.config import Config, MeshConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import AXES
from pixart_jax.planning.topology import Topology

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class SamplingWorkload:
    """A batch of images to be drawn: pixels, steps, guidance (1: no second pass), solver, dtype of
    the computation."""

    batch: int
    height: int
    width: int
    steps: int
    guidance: float
    solver: str = "dpm++"
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class PlanTarget:
    """The program to compile. mesh: sizes of all four axes, none of them −1. bucket: (height,
    width) in pixels of a train step;
    drawing: of the sampler's, part 'denoise' (the scan over the steps) or 'decode' (the VAE)."""

    topology: Topology
    config: Config
    stage: int
    mesh: tuple[int, int, int, int]
    bucket: tuple[int, int] = (0, 0)
    drawing: SamplingWorkload | None = None
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


def resolve_mesh(mesh: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Sizes of the axes on so many devices, −1 filled in; UserError where they do not use exactly
    these."""
    sizes = [getattr(mesh, axis) for axis in AXES]
    others = 1
    for size in sizes:
        others *= 1 if size == -1 else size
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // others)
    product = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    if product != devices:
        asked = " × ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(
            f"mesh {asked} does not fit {devices} devices: the product must be {devices}; sizes "
            f"that divide it: {fits} (-1: the rest)"
        )
    return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Link:
    """What a collective over these mesh axes runs on. links: one-way links of the torus that a
    device has in their directions (2 a dimension that closes to a ring, 1 a line), or 1 of a
    switch; 0 within a chip. networks: slices or hosts that the group spans."""

    axes: tuple[str, ...]
    group: int
    links: int
    networks: int


@dataclasses.dataclass(frozen=True)
class CompiledStats:
    """What a compiled program is, for each device. Bytes but where a unit is said.

    counted: bytes by kind from shapes and shardings. arguments, outputs, aliased, temporaries,
    code: the compiler's, zero where it gave up for want of memory, when ``wanted`` is what it asked
    for. flops, product_bytes: of all devices together, from the traced program.
    """

    device_kind: str
    counted: dict[str, float]
    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    code: float
    host: float
    wanted: float | None
    available: float | None
    message: str
    flops: float
    product_bytes: float
    collectives: tuple
    links: tuple[Link, ...]
    whole_share: float  # of the parameters' bytes that every device holds whole
    assumptions: tuple[str, ...]
    trace_seconds: float
    compile_seconds: float
    # of all cores together: what the clock above would be on one core with nothing else to do
    compile_cpu_seconds: float
    host_peak: float  # of the compiling process
    compiler: str
    cached: bool = False
    # the policy of the program, chosen where the config says "auto"; "" of a drawing
    remat: str = ""

    @property
    def total(self) -> float:
        """Bytes a device at the step's height."""
        if self.wanted is not None:
            return self.wanted
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], **changes) -> CompiledStats:
        from pixart_jax.planning.collectives import Collective

        found = [Collective(**{**c, "axes": tuple(c["axes"])}) for c in values["collectives"]]
        links = tuple(Link(**{**link, "axes": tuple(link["axes"])}) for link in values["links"])
        return cls(
            **{
                **values,
                "collectives": tuple(found),
                "links": links,
                "assumptions": tuple(values["assumptions"]),
                **changes,
            }
        )

"""FLOPs and bytes of the matrix products and convolutions of a traced program.

``compiled.cost_analysis()`` counts a loop's body once; here a scan counts as often as it runs.
What remat computes again is in the traced program of the gradient, so it is counted as it will run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from pixart_jax.models.remat import CUDNN_BACKWARD, CUDNN_FORWARD

_CUDNN_PRODUCTS = {CUDNN_FORWARD: 2, CUDNN_BACKWARD: 5}  # of queries × keys × head size
_UNUSED_RULES = ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "cond_jaxpr")


@dataclasses.dataclass(frozen=True)
class MatmulCost:
    """flops: 2·m·n·k summed. bytes: of operands and results, each read or written once a product,
    as if all else were fused into them."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: MatmulCost) -> MatmulCost:
        return MatmulCost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> MatmulCost:
        return MatmulCost(self.flops * times, self.bytes * times)


def matmul_cost(jaxpr: jax.extend.core.Jaxpr) -> MatmulCost:
    """Of one execution on all devices together. A while loop of unknown length counts once; of a
    conditional the most expensive branch counts."""
    total = MatmulCost()
    for equation in _used(jaxpr):
        name, parameters = equation.primitive.name, equation.params
        shapes: list[tuple[int, ...]] = [
            getattr(v.aval, "shape", ()) for v in (*equation.invars[:2], *equation.outvars[:1])
        ]
        if name == "dot_general":
            contracted = parameters["dimension_numbers"][0][0]
            depth = math.prod(shapes[0][axis] for axis in contracted)
            total += MatmulCost(2.0 * math.prod(shapes[2]) * depth, _bytes(equation))
        elif name == "conv_general_dilated":
            kernel, output = shapes[1], parameters["dimension_numbers"].rhs_spec[0]
            flops = 2.0 * math.prod(shapes[2]) * math.prod(kernel) / kernel[output]
            total += MatmulCost(flops, _bytes(equation))
        elif name in _CUDNN_PRODUCTS:  # each: queries [b, n, k, h] with keys [b, m, k, h]
            one = 2.0 * math.prod(shapes[0]) * shapes[1][1]
            total += MatmulCost(one * _CUDNN_PRODUCTS[name], _bytes(equation))
        elif name == "pallas_call":  # every cell of the grid; memory as of one product
            cells = math.prod(parameters["grid_mapping"].grid)
            flops = sum(matmul_cost(inner).flops for inner in _inner(parameters)) * cells
            total += MatmulCost(flops, _bytes(equation))
        elif name == "cond":
            branches = (matmul_cost(branch.jaxpr) for branch in parameters["branches"])
            total += max(branches, key=lambda cost: cost.flops)
        else:
            times = parameters["length"] if name == "scan" else 1
            if name == "shard_map":  # its shapes are those of one device's part
                mesh = parameters["mesh"]
                times = math.prod(mesh.shape[axis] for axis in parameters["newly_manual_axes"])
            total += sum((matmul_cost(inner) for inner in _inner(parameters)), MatmulCost()) * times
    return total


def _used(jaxpr: jax.extend.core.Jaxpr) -> list:
    """The equations that a result depends on or that have effects; the compiler drops the others,
    such as a kernel that remat would run again for nothing."""
    needed = {id(variable) for variable in jaxpr.outvars}
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            found.append(equation)
            needed |= {id(variable) for variable in equation.invars}
    return found[::-1]


def _inner(parameters: dict) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for name, value in parameters.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if name not in _UNUSED_RULES and hasattr(item, "eqns"):
                yield item


def _bytes(equation: Any) -> float:
    arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
    return float(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays))

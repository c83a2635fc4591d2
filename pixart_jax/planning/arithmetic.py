"""The arithmetic of a traced program: its matrix products and convolutions counted, loops, kernels
and recomputation with them.

XLA's own count takes a loop's body once; here a scan counts as often as it turns. What remat
computes again stands in the traced program of the gradient, so it is counted as it will run.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from pixart_jax.models.remat import CUDNN_BACKWARD, CUDNN_FORWARD

# products of queries × keys × head in each kernel
_OF_CUDNN = {CUDNN_FORWARD: 2, CUDNN_BACKWARD: 5}


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


def products(jaxpr: jax.extend.core.Jaxpr) -> MatmulCost:
    """Of one execution over all devices together. A while loop of unknown length counts once, of a
    conditional the dearest branch."""
    total = MatmulCost()
    for equation in _used(jaxpr):
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name in _OF_CUDNN:
            total += _attention(equation) * _OF_CUDNN[name] + MatmulCost(0.0, _bytes(equation))
        # the grid's cells one by one; memory is moved as of one product
        elif name == "pallas_call":
            cells = math.prod(parameters["grid_mapping"].grid)
            flops = sum(products(inner).flops for inner in _inner(parameters)) * cells
            total += MatmulCost(flops, _bytes(equation))
        elif name == "cond":
            total += max(
                (products(branch.jaxpr) for branch in parameters["branches"]), key=lambda p: p.flops
            )
        else:
            times = parameters["length"] if name == "scan" else 1
            if name == "shard_map":  # what each device of the mesh does, in shapes of its part
                mesh = parameters["mesh"]
                times = math.prod(mesh.shape[axis] for axis in parameters["newly_manual_axes"])
            total += sum((products(inner) for inner in _inner(parameters)), MatmulCost()) * times
    return total


def _used(jaxpr: jax.extend.core.Jaxpr) -> list:
    """The equations that a result depends on, or that write somewhere, as within a kernel; a
    compiler drops the others, such as a kernel that remat runs again for nothing."""
    needed = {id(variable) for variable in jaxpr.outvars}
    found = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(variable) in needed for variable in equation.outvars):
            found.append(equation)
            needed |= {id(variable) for variable in equation.invars}
    return found[::-1]


def _inner(parameters: dict):
    for name, value in parameters.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "cond_jaxpr"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr


def _dot(equation) -> MatmulCost:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return MatmulCost(2.0 * math.prod(result.shape) * depth, _bytes(equation))


def _attention(equation) -> MatmulCost:
    """One product of attention's two: every query [b, n, k, h] with every key [b, m, k, h]."""
    queries, keys = (variable.aval for variable in equation.invars[:2])
    return MatmulCost(2.0 * math.prod(queries.shape) * keys.shape[1])


def _convolution(equation) -> MatmulCost:
    kernel, result = equation.invars[1].aval, equation.outvars[0].aval
    numbers = equation.params["dimension_numbers"]
    out_features = kernel.shape[numbers.rhs_spec[0]]
    return MatmulCost(
        2.0 * math.prod(result.shape) * math.prod(kernel.shape) / out_features, _bytes(equation)
    )


def _bytes(equation) -> float:
    return float(
        sum(
            math.prod(v.aval.shape) * v.aval.dtype.itemsize
            for v in [*equation.invars, *equation.outvars]
        )
    )

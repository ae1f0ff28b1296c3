"""Counts what a traced program says and XLA's text of the compiled one does not: operations, with loop bodies counted
once per iteration, and what kernels read and write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def product_flops(jaxpr: Any) -> int:
    """Operations of the matrix products of a traced program, in kernels too. Unlike `accounting`, it excludes the
    blocks that attention skips, and includes the scores that it recomputes. A conditional counts as the mean of the
    branches that multiply at all, because dense and banded layers alternate."""
    return _total(jaxpr, _flops)


def kernel_bytes(jaxpr: Any) -> int:
    """Bytes that the kernels of a traced program read from and write to HBM."""
    return _total(jaxpr, _kernel_bytes)


def _total(jaxpr: Any, count: Callable[[Any], int | None]) -> int:
    """The sum of `count` over the equations of all devices; None is the sum of the equations within one."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if (own := count(equation)) is not None:
            total += own
        elif name == "cond":
            branches = [found for branch in parameters["branches"] if (found := _total(branch.jaxpr, count))]
            total += sum(branches) // max(1, len(branches))
        else:
            times = 1
            if name == "scan":
                times = parameters["length"]
            elif name == "shard_map":  # within it, shapes are those of one device
                times = parameters["mesh"].size
            inner = (getattr(value, "jaxpr", value) for value in parameters.values())
            total += times * sum(_total(part, count) for part in inner if hasattr(part, "eqns"))
    return total


def _flops(equation: Any) -> int | None:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * terms
    if equation.primitive.name == "pallas_call":
        return _steps(equation) * product_flops(equation.params["jaxpr"])
    return None


def _kernel_bytes(equation: Any) -> int | None:
    """Of a kernel, the bytes of each operand's block times the steps between which the block changes."""
    if equation.primitive.name != "pallas_call":
        return None
    total, grid = 0, equation.params["grid_mapping"].grid
    for mapping in equation.params["grid_mapping"].block_mappings:
        index = mapping.index_map_jaxpr.jaxpr
        if index.eqns:  # the block is the next one that is not masked: one per step
            fetched = _steps(equation)
        else:
            places = [i for i, axis in enumerate(index.invars[: len(grid)]) if axis in index.outvars]
            fetched = math.prod(grid[: max(places, default=-1) + 1])
        sizes = (getattr(size, "block_size", 1) for size in mapping.block_shape)
        total += fetched * math.prod(sizes) * mapping.array_aval.dtype.itemsize
    return total


def _steps(equation: Any) -> int:
    """Steps of Splash's grid [..., n, w] that compute something: masks are bands of blocks, in whose row i, counted
    from the corner, min(i + 1, w) of the n blocks are not wholly masked."""
    mapping = equation.params["grid_mapping"]
    queries, width = mapping.block_mappings[0], mapping.grid[-1]
    n = queries.array_aval.shape[-2] // queries.block_shape[-2].block_size
    return math.prod(mapping.grid) // (n * width) * sum(min(i + 1, width) for i in range(n))

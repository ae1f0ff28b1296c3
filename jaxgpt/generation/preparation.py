"""Conversion of a model to the form that decodes fastest."""

from __future__ import annotations

from typing import Any

import jax

from jaxgpt.checks import did_you_mean
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.cpu import kernel, sequences
from jaxgpt.errors import ConfigError
from jaxgpt.model import GPT, cast_params, check_model, unstack_layers
from jaxgpt.parallel import sharding

# Bytes of parameters from which on the kernel is worth building unasked: with fewer, a text takes a few seconds anyway.
LARGE = 2**26


def prepare(model: GPT, params: Any, dtype: str | None = None) -> tuple[GPT, Any]:
    """Converts a model and its parameters to the form that `generate` decodes fastest, in `dtype`.

    Layers are unstacked (`scan_layers=False`), because a scan copies the stacked cache for every token. Matrices are
    already [out, in], the order in which one token's products read them. If the C++ kernel is built, decoding uses it
    (`native_kernel=True`), and so may what is not decoding (`native_sequences=True`, see `jaxgpt.cpu.sequences`). If it
    is not, and parameters are too large for a processor's cache, a separate process builds it for later ones, where
    there is a compiler (`jaxgpt.cpu.kernel`). What is already in that form is returned unchanged.

    Args:
        model: the model.
        params: its parameters; not modified.
        dtype: "float32" or "bfloat16" (parameters and operands of matrix products), or "int8" (matrices only;
            operands stay in `model.compute.dtype`); default: unchanged.

    Raises:
        ConfigError: for another dtype.
    """
    check_model("prepare(model, params, dtype)", model, params)
    compute = model.compute
    if dtype is not None and dtype not in PARAM_DTYPES:
        raise ConfigError(
            f"dtype must be one of {', '.join(PARAM_DTYPES)}, not {dtype!r}{did_you_mean(dtype, PARAM_DTYPES)}"
        )
    if compute.scan_layers:
        params = unstack_layers(params)
    if dtype is not None:
        if compute.param_dtype != dtype:
            params = cast_params(params, dtype)
        compute = compute.replace(param_dtype=dtype, dtype=compute.dtype if dtype == "int8" else dtype)
    one_cpu = jax.default_backend() == "cpu" and sharding.mesh_of(params) is None
    native_kernel = one_cpu and kernel.available()
    parameter_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if one_cpu and not native_kernel and parameter_bytes >= LARGE:
        kernel.build_in_background()
    native_sequences = native_kernel and sequences.preferred(compute.dtype)
    compute = compute.replace(scan_layers=False, native_kernel=native_kernel, native_sequences=native_sequences)
    return GPT(model.config, compute), params

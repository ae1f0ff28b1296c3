"""The form of a model's parameters that decodes fastest."""

from __future__ import annotations

from typing import Any

import jax

from jaxgpt.checks import did_you_mean
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.cpu import kernel
from jaxgpt.errors import ConfigError
from jaxgpt.model import GPT, cast_params, unstack_layers
from jaxgpt.parallel import sharding


def prepare(model: GPT, params: Any, dtype: str | None = None) -> tuple[GPT, Any]:
    """A model and its parameters in the form that `generate` decodes with fastest, in `dtype`.

    Layers come apart (`scan_layers=False`): a scan copies the stacked cache for every token. Matrices are [out, in]
    already, which is how one token's products read them. Where `jaxgpt build-kernel` has been run, products of few
    rows use what it built (`native_kernel=True`). What is in that form already is returned as it is.

    Args:
        model: the model.
        params: its parameters; not modified.
        dtype: "float32", "bfloat16" (parameters and the operands of products), or "int8" (matrices;
            operands stay in `model.compute.dtype`); default: as they are.

    Raises:
        ConfigError: for another dtype.
    """
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
    return GPT(model.config, compute.replace(scan_layers=False, native_kernel=one_cpu and kernel.available())), params

"""The layers that have parameters, with the dtype, shape and initial value of each. All weights are [out, in].

Sizes as in `gpt.py`; R rows of a table, O outputs.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.checks import short_repr
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.model import ops
from jaxgpt.parallel import lay, stored_layout

WEIGHT_STD = 0.02  # GPT-2's initialisation: Radford et al. 2019, section 2.3, and its released code


class ConfiguredModule(nn.Module):
    """A module that is made from a config, and refuses anything else.

    Attributes:
        config: what the GPT is that it belongs to.
        compute: how it is run.
    """

    config: GPTConfig
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        name = type(self).__name__
        if not isinstance(self.config, GPTConfig):
            raise TypeError(
                f"{name} is made from a GPTConfig, not {short_repr(self.config)}: {name}(GPTConfig.preset('gpt2')) for "
                "new parameters, or jaxgpt.load('gpt2') for a model with trained ones"
            )
        if not isinstance(self.compute, ComputeConfig):
            raise TypeError(f"{name}'s second argument is a ComputeConfig, not {short_repr(self.compute)}")
        super().__post_init__()


class Linear(nn.Module):
    """y = x W^T + b, with W `[*out, in]` and b `[*out]`. Returns the activations' type.

    Attributes:
        out: output sizes; more than one gives as many output axes.
        use_bias: whether to add b.
        compute: dtypes of the parameters and of the product.
        std: standard deviation of the initial weights.
    """

    out: tuple[int, ...]
    use_bias: bool = True
    compute: ComputeConfig = ComputeConfig()
    std: float = WEIGHT_STD

    def __call__(self, x_BxTxD: Array) -> Array:
        return ops.linear(x_BxTxD, *self._parameters(x_BxTxD.shape[-1]), self.compute)

    def activated(self, x_BxTxD: Array, activation: str) -> Array:
        """A function of y, by its name in the config, as the next product reads it: it may be rounded for that."""
        y = None
        if self.compute.native_sequences:
            y = ops.activated_linear(x_BxTxD, *self._parameters(x_BxTxD.shape[-1]), self.compute, activation)
        return ops.activation(activation)(self(x_BxTxD)) if y is None else y

    @nn.compact
    def _parameters(self, D: int) -> tuple[ops.Matrix, Array | None]:
        matrix, bias = _matrix(self, (*self.out, D), self.std), None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.out, vector_dtype(self.compute)).astype(jnp.float32)
        return matrix, bias


class Embedding(nn.Module):
    """A table of vectors [rows, width]. The caller must check that ids are in it: XLA does not raise."""

    rows: int
    width: int
    std: float
    compute: ComputeConfig = ComputeConfig()

    def setup(self):
        self.weight, self.scale, _ = _matrix(self, (self.rows, self.width), self.std)

    def __call__(self, ids: Array) -> Array:
        # The barrier keeps XLA on CPU from converting the whole table before it gathers the rows.
        x = lax.optimization_barrier(lay(self.weight, "RW")[ids]).astype(jnp.float32)
        return x if self.scale is None else x * self.scale[ids][..., None]

    def head(self, x_BxTxD: Array) -> Array:
        """Uses the table as an output layer: x times each of its rows, float32 [B, T, rows]."""
        return ops.product(x_BxTxD, ops.Matrix(self._by_row(), self.scale), self.compute)

    def table(self) -> Array:
        """The table as one floating-point array."""
        weight = self._by_row()
        return weight if self.scale is None else weight.astype(jnp.float32) * self.scale[:, None]

    def _by_row(self) -> Array:
        """The weight with its rows spread over "tensor", for a product; in two steps, each of which XLA can do."""
        return lay(lay(self.weight, "RW"), "VD")


class LayerNorm(ConfiguredModule):
    """`ops.layer_norm` with a learned scale and shift, both [D]; there is a shift only if the config has biases.
    Returns the activations' type."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = vector_dtype(self.compute)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], dtype)
        shift = self.param("shift", nn.initializers.zeros, x.shape[-1:], dtype) if self.config.bias else None
        native_kernel = self.compute.native_kernel
        y = ops.layer_norm(x, scale, shift, self.config.layer_norm_eps, native_kernel=native_kernel)
        return y.astype(self.compute.activation_dtype)


class Dropout(nn.Module):
    """`ops.dropout` with keys from the "dropout" rng."""

    rate: float

    def __call__(self, x: Array, deterministic: bool) -> Array:
        return ops.dropout(x, self.rate, dropout_key(self, self.rate, deterministic))


def dropout_key(module: nn.Module, rate: float, deterministic: bool) -> Array | None:
    """The module's own key for one dropout; None if nothing is dropped."""
    return None if deterministic or rate == 0 else module.make_rng("dropout")


def normal(std: float) -> nn.initializers.Initializer:
    """N(0, std), drawn in float32 whatever the parameters' dtype: a draw in bfloat16 has only 128 distinct values."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def residual_std(config: GPTConfig) -> float:
    """Initial standard deviation of the two projections into the residual stream, 0.02 / sqrt(2 L): L blocks add 2 L
    terms, and this keeps their sum's variance independent of depth."""
    return WEIGHT_STD / math.sqrt(2 * config.n_layers)


def vector_dtype(compute: ComputeConfig) -> jnp.dtype:
    """The dtype of biases and of LayerNorm's scales and shifts: the parameters', but float32 instead of int8."""
    return jnp.dtype("float32" if compute.param_dtype == "int8" else compute.param_dtype)


def _matrix(module: nn.Module, shape: tuple[int, ...], std: float) -> ops.Matrix:
    """Declares a weight `[*out, in]` and, if weights are int8, one scale per row, `[*out]`."""
    dtype, stored = module.compute.param_dtype, stored_layout("/".join((*module.path, "weight")))
    if dtype != "int8":
        weight = module.param("weight", normal(std), shape, jnp.dtype(dtype))
        if weight.dtype == jnp.int8:
            raise ConfigError("int8 parameters need the model that jaxgpt.prepare returns with them")
        return ops.Matrix(weight, None, stored)

    # 127 steps of std / 32 reach about four standard deviations.
    def draw(key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.clip(jnp.round(32 * jax.random.normal(key, shape)), -127, 127).astype(jnp.int8)

    weight = module.param("weight", draw, shape)
    if weight.dtype != jnp.int8:
        raise ConfigError(f"param_dtype is int8 and the parameters are {weight.dtype}: jaxgpt.prepare converts both")
    scale = module.param("weight_scale", nn.initializers.constant(std / 32), shape[:-1], jnp.float32)
    return ops.Matrix(weight, scale, stored)

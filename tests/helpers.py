"""Plain functions that several test modules share."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.accounting import Flops
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.model import reference
from jaxgpt.model.gpt import GPT

TINY = GPTConfig(vocab_size=97, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0)
# An odd number of layers, of which the middle one is banded; the band's width divides none of the sizes.
ALTERNATING = TINY.replace(n_layers=3, attention_pattern="alternating", attention_window=5)
# Three layers with three scales of the scores, and a band in the middle one.
SCALED = ALTERNATING.replace(scale_attn_by_inverse_layer_idx=True)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform == "win32", reason="no C++ compiler"
)


def grid(strength: int, **axes: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """`pytest.mark.parametrize` over every combination of the axes' values, most of them in the exhaustive tier.

    The default tier runs a subset in which every combination of values of any `strength` axes occurs: each value with
    1, each pair of values with 2. So the default tier finds a fault that shows with one or two options.

    Args:
        strength: the number of axes of which the subset covers every combination.
        axes: the test's arguments, each with its values, or with a mapping from names (for the test's id) to values.
    """
    values = [axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes.values()]
    cases = list(itertools.product(*values))
    # What each case covers: for every choice of `strength` axes, the values that it gives them.
    shown = {case: set(itertools.combinations(enumerate(case), strength)) for case in cases}
    missing, default = set().union(*shown.values()), set()
    while missing:  # greedily the case that covers most of what is missing: nearly the fewest, and always the same
        best = max(cases, key=lambda case: len(shown[case] & missing))
        default.add(best)
        missing -= shown[best]
    parameters = [
        pytest.param(
            *(named[name] for named, name in zip(values, case, strict=True)),
            id="-".join(case),
            marks=[] if case in default else [pytest.mark.exhaustive],
        )
        for case in cases
    ]
    return pytest.mark.parametrize(list(axes), parameters)


def exhaustive(*values: Any, id: str | None = None) -> Any:
    """A case of `pytest.mark.parametrize` that runs only in the exhaustive tier."""
    return pytest.param(*values, id=id, marks=pytest.mark.exhaustive)


def make_model(config: GPTConfig = TINY, seed: int = 0, **compute: Any) -> tuple[GPT, dict[str, Any]]:
    """A model and random parameters in which every leaf matters: biases and shifts are not 0, scales not 1.

    The weights are larger than at initialisation, so that attention is not uniform, activations leave their
    linear region, and greedy choices are not ties. `compute` holds fields of `ComputeConfig`.
    """
    model = GPT(config, ComputeConfig(**compute))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        noise = rng.normal(size=shape.shape)
        if name == "scale":
            value = 1 + 0.2 * noise
        elif name in ("bias", "shift"):
            value = 0.2 * noise
        elif path[0].key in ("tok_emb", "pos_emb", "out_head"):
            value = 0.3 * noise
        else:
            value = noise / np.sqrt(shape.shape[-1])
        return jnp.asarray(value, shape.dtype)

    return model, jax.tree_util.tree_map_with_path(leaf, shapes)


def make_model_that_draws(token: int, config: GPTConfig) -> tuple[GPT, dict[str, Any]]:
    """A model that gives one id nearly all the probability, whatever it reads."""
    model, params = make_model(config.replace(tie_embeddings=False))
    D, V = config.emb_dim, config.vocab_size
    norm = {"scale": jnp.zeros(D), "shift": jnp.ones(D)}
    return model, {**params, "final_norm": norm, "out_head": {"weight": jnp.zeros((V, D)).at[token].set(9.0)}}


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """Formats tables of plain values as TOML, which writes such values as JSON does."""
    lines = []
    for name, table in tables.items():
        lines += [
            f"[{name}]",
            *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()),
            "",
        ]
    return "\n".join(lines)


def random_ids(config: GPTConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Uniform ids [batch, length], int32."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def to_numpy(tree: Any) -> Any:
    """Converts a tree to float64 NumPy arrays, for the reference."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def cross_entropy(model: GPT, params: dict[str, Any], ids: jax.Array | np.ndarray) -> jax.Array:
    """Mean next-token cross-entropy of ids [B, T], from `apply` alone, so that it can be differentiated."""
    log_probs_BxTxV = jax.nn.log_softmax(model.apply({"params": params}, ids[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_probs_BxTxV, jnp.asarray(ids)[:, 1:, None], axis=-1))


def logits_error(model: GPT, params: dict[str, Any], ids: np.ndarray) -> float:
    """Largest absolute difference between the model's logits and the reference's."""
    # A new function each time, so that nothing compiled for an equal model is reused.
    got = np.asarray(jax.jit(lambda params, ids: model.apply({"params": params}, ids))(params, ids))
    return float(np.abs(got - reference.gpt(to_numpy(params), model.config, ids)).max())


def stack_blocks(params: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """The same parameters in the layout of `scan_layers=True`: one subtree with a leading axis [L, ...]."""
    blocks = [params[f"trf_blocks_{i}"] for i in range(n_layers)]
    rest = {name: child for name, child in params.items() if not name.startswith("trf_blocks_")}
    return {**rest, "trf_blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def gradient_errors(model: GPT, params: dict[str, Any], ids: np.ndarray) -> dict[str, float]:
    """For each parameter, the difference between the loss's slope along a random direction and a finite difference of
    the reference's loss, relative to the larger of that slope and 0.02."""
    gradients = jax.jit(jax.grad(lambda params: cross_entropy(model, params, ids)))(params)
    exact = to_numpy(params)
    leaves, treedef = jax.tree.flatten(exact)
    rng, step, errors = np.random.default_rng(1), 1e-5, {}
    for i, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(gradients)):
        direction = rng.normal(size=leaves[i].shape)

        def loss_at(distance: float, i: int = i, direction: np.ndarray = direction) -> float:
            leaf = leaves[i] + distance * direction
            return reference.loss(jax.tree.unflatten(treedef, [*leaves[:i], leaf, *leaves[i + 1 :]]), model.config, ids)

        slope = (loss_at(step) - loss_at(-step)) / (2 * step)
        got = float(np.sum(np.asarray(gradient, np.float64) * direction))
        errors["/".join(key.key for key in path)] = abs(got - slope) / max(abs(slope), 0.02)
    return errors


def product_flops(jaxpr: Any) -> Flops:
    """Operations of every matrix product in a jaxpr, counting a loop's body once. Products with a batch axis are
    attention's."""
    linear = attention = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops = 2 * math.prod(equation.outvars[0].aval.shape) * terms
            linear, attention = linear + (0 if batch else flops), attention + (flops if batch else 0)
        # Only one branch runs; the branches of `platform_dependent` hold the same products.
        branches = equation.params.get("branches", ())[:1]
        for value in (*equation.params.values(), *branches):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found = product_flops(inner)
                linear, attention = linear + found.linear, attention + found.attention
    return Flops(linear, attention)

"""Samplers: from logits to a token id. They are small frozen dataclasses, hashable so that a compiled loop can be
specialised for one.

    Greedy()
    Temperature(0.8)
    Temperature(0.8) | TopK(50) | TopP(0.95)          # applied from left to right

Sizes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.checks import short_repr
from jaxgpt.generation.keys import threefry

# Finite, like every mask here, so that arithmetic with it never gives NaN.
REMOVED = -1e30


class Sampler:
    """Draws an id from softmax(filter(logits)). Subclasses define what `filter` does to the logits."""

    @property
    def draws(self) -> bool:
        """Whether the result is random and needs a key; if not, it is the arg-max."""
        return True

    def filter(self, logits: Array) -> Array:
        """Float32 logits [..., V] to float32 logits [..., V]. Removed ids get `REMOVED`; the likeliest id is
        never removed."""
        return logits

    def __call__(self, logits: Array, key: Array | None = None) -> Array:
        """Ids [B] from logits [B, V] and one key per row, [B]; or one id from logits [V] and a key.

        Of several equal largest logits, the arg-max is the lowest id. Row b draws what `key[b]` draws alone, whatever
        the keys' implementation.
        """
        logits = logits.astype(jnp.float32)
        if not self.draws:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw: Callable[..., Array] = jax.random.categorical
        if logits.ndim > 1:
            draw = jax.vmap(draw)
        return draw(None if key is None else threefry(key), self.filter(logits)).astype(jnp.int32)

    def __or__(self, then: Sampler) -> Sampler:
        if not isinstance(then, Sampler):
            return NotImplemented
        return Chain((*_parts(self), *_parts(then)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, vars(self).values()))})"


@dataclasses.dataclass(frozen=True, repr=False)
class Chain(Sampler):
    """Filters applied from left to right; usually written with `|`."""

    parts: tuple[Sampler, ...]

    @property
    def draws(self) -> bool:
        return all(part.draws for part in self.parts)

    def filter(self, logits: Array) -> Array:
        for part in self.parts:
            logits = part.filter(logits)
        return logits

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


@dataclasses.dataclass(frozen=True, repr=False)
class Greedy(Sampler):
    """Picks the likeliest id; of equals, the lowest."""

    @property
    def draws(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, repr=False)
class Temperature(Sampler):
    """Divides logits by `value`: below 1 sharpens the distribution, above 1 flattens it. 0 is greedy.

    Raises:
        ValueError: if `value` is negative, NaN or infinite.
    """

    value: float

    def __post_init__(self):
        _check_number("temperature", self.value, "0 or more", lambda value: value >= 0)

    @property
    def draws(self) -> bool:
        return self.value > 0

    def filter(self, logits: Array) -> Array:
        # Relative to the largest logit and bounded, so that a tiny temperature neither overflows nor divides by zero.
        scale = min(1 / float(self.value), 1e30) if self.draws else 1e30
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)
        return jnp.maximum(relative * scale, REMOVED)


@dataclasses.dataclass(frozen=True, repr=False)
class TopK(Sampler):
    """Keeps the `k` likeliest ids, and any as likely as the k-th. A `k` above V keeps all.

    Source: Fan et al. 2018.

    Raises:
        ValueError: if `k` is not an integer of 1 or more.
    """

    k: int

    def __post_init__(self):
        if isinstance(self.k, bool) or not hasattr(self.k, "__index__") or operator.index(self.k) < 1:
            raise ValueError(f"top_k must be an integer of 1 or more, not {short_repr(self.k)}")

    def filter(self, logits: Array) -> Array:
        if self.k >= logits.shape[-1]:
            return logits
        return _keep_likeliest(logits, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= self.k)


@dataclasses.dataclass(frozen=True, repr=False)
class TopP(Sampler):
    """Keeps the nucleus: the fewest likeliest ids with a total probability of at least `p`, and any as likely as
    the least likely of them.

    Source: Holtzman et al. 2020.

    Raises:
        ValueError: if `p` is outside (0, 1].
    """

    p: float

    def __post_init__(self):
        _check_number("top_p", self.p, "above 0 and at most 1", lambda p: 0 < p <= 1)

    def filter(self, logits: Array) -> Array:
        if self.p == 1:
            return logits
        probabilities = jax.nn.softmax(logits, axis=-1)
        p = max(float(self.p), 1e-37)  # still above 0 in float32

        def enough(kept: Array) -> Array:
            return jnp.sum(jnp.where(kept, probabilities, 0.0), axis=-1, keepdims=True) >= p

        return _keep_likeliest(logits, enough)


@dataclasses.dataclass(frozen=True, repr=False)
class MinP(Sampler):
    """Keeps the ids with at least `p` times the probability of the likeliest. 0 keeps all.

    Source: Nguyen et al. 2024.

    Raises:
        ValueError: if `p` is outside [0, 1].
    """

    p: float

    def __post_init__(self):
        _check_number("min_p", self.p, "from 0 to 1", lambda p: 0 <= p <= 1)

    def filter(self, logits: Array) -> Array:
        if self.p == 0:
            return logits
        floor = jnp.max(logits, axis=-1, keepdims=True) + math.log(self.p)
        return jnp.where(logits >= floor, logits, REMOVED)


def from_options(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Sampler:
    """Builds a sampler from options named as in transformers and applied in its order: temperature, top_k, top_p,
    min_p. `None` skips an option; temperature 0 is greedy.

    Raises:
        ValueError: naming the option that is out of range.
    """
    sampler: Sampler = Temperature(temperature)
    options: tuple[tuple[Any, Any], ...] = ((TopK, top_k), (TopP, top_p), (MinP, min_p))
    for kind, value in options:
        if value is not None:
            sampler = sampler | kind(value)
    return sampler if sampler.draws else Greedy()


def _parts(sampler: Sampler) -> tuple[Sampler, ...]:
    return sampler.parts if isinstance(sampler, Chain) else (sampler,)


def _keep_likeliest(logits: Array, enough: Callable[[Array], Array]) -> Array:
    """Removes the ids below the highest threshold that keeps `enough`, a function of the mask of kept ids.

    The threshold is found exactly, bit by bit, in 32 passes: sorting the vocabulary takes much longer, and so does
    `lax.top_k`.
    """
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 equals 0.0 but has other bits
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    # Floats are ordered as sign and magnitude; this orders them as unsigned integers.
    order = lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def refine(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= candidate), candidate, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.zeros_like(order[..., :1]))
    return jnp.where(order >= threshold, logits, REMOVED)


def _check_number(name: str, value: float, expected: str, good: Callable[[float], bool]) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        fits = number and math.isfinite(value) and good(value)
    except OverflowError:  # an integer too large for a float
        fits = False
    if not fits:
        raise ValueError(f"{name} must be {expected}, not {short_repr(value)}")

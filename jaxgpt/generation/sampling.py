"""Samplers: from logits to a token id. They are small frozen dataclasses, and pytrees: a compiled loop is specialised
for their structure (which ones, in which order), while their numbers are its arguments.

    Greedy()
    Temperature(0.8)
    Temperature(0.8) | TopK(50) | TopP(0.95)          # applied from left to right

The controls in `controls.py` may also look at the text so far. They come before all filters, wherever they are written.

Sizes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.checks import short_repr
from jaxgpt.generation.keys import threefry

# Finite, like every mask here, so that arithmetic with it never gives NaN.
REMOVED = -1e30

FLOAT32_MAX = float(jnp.finfo(jnp.float32).max)


def _derived(static: bool = False) -> Any:
    """A field that `__post_init__` computes from the others, on the host in float64."""
    return dataclasses.field(init=False, repr=False, compare=False, metadata={"static": static})


def _flatten(sampler: Sampler) -> tuple[list[Any], tuple[Any, ...]]:
    leaves: list[Any] = []
    static: list[Any] = []
    for field in dataclasses.fields(sampler):
        (static if field.metadata.get("static") else leaves).append(getattr(sampler, field.name))
    return leaves, tuple(static)


def _unflatten(cls: type[Sampler], static: tuple[Any, ...], leaves: Iterable[Any]) -> Sampler:
    """Without `__init__`, because leaves may be anything: traced numbers, or a tree's axes."""
    sampler, static_values, values = object.__new__(cls), iter(static), iter(leaves)
    for field in dataclasses.fields(cls):
        value = next(static_values if field.metadata.get("static") else values)
        object.__setattr__(sampler, field.name, value)
    return sampler


@dataclasses.dataclass(frozen=True, repr=False)
class Sampler:
    """Draws an id from softmax(filter(control(logits))). Subclasses define one of the two; only a `Control` has the
    second.

    A subclass is a frozen dataclass. Its fields are the leaves of the pytree, so `filter` may find traced numbers in
    them; a field with `metadata={"static": True}` is part of the structure instead.
    """

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        jax.tree_util.register_pytree_node(cls, _flatten, functools.partial(_unflatten, cls))

    @property
    def draws(self) -> bool:
        """Whether the result is random and needs a key; if not, it is the arg-max."""
        return True

    def filter(self, logits: Array) -> Array:
        """Float32 logits [..., V] to float32 logits [..., V]. Removed ids get `REMOVED`; the likeliest id is
        never removed."""
        return logits

    @property
    def sees_text(self) -> bool:
        """Whether `control` needs the text so far."""
        return False

    def control(self, logits_BxV: Array, history: Any) -> Array:
        """The model's float32 logits, changed by the text so far, a `History`; the likeliest id may be another one."""
        return logits_BxV

    def check(self, vocab_size: int) -> None:
        """Raises a ValueError if the sampler names an id outside the vocabulary."""

    def __call__(self, logits: Array, key: Array | None = None, history: Any = None) -> Array:
        """Ids [B] from logits [B, V] and one key per row, [B]; or one id from logits [V] and a key. A sampler that
        `sees_text` takes rows, and their `History`.

        Of several equal largest logits, the arg-max is the lowest id. Row b draws what `key[b]` draws alone, whatever
        the keys' implementation.
        """
        logits = self.control(logits.astype(jnp.float32), history)
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
        shown = [repr(getattr(self, field.name)) for field in dataclasses.fields(self) if field.repr]
        return f"{type(self).__name__}({', '.join(shown)})"


jax.tree_util.register_pytree_node(Sampler, _flatten, functools.partial(_unflatten, Sampler))


class Control(Sampler):
    """A sampler that changes the model's own logits, by the text so far unless it says otherwise."""

    @property
    def sees_text(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, repr=False)
class Chain(Sampler):
    """First the controls, then the filters, each from left to right; usually written with `|`."""

    parts: tuple[Sampler, ...]

    @property
    def draws(self) -> bool:
        return all(part.draws for part in self.parts)

    def filter(self, logits: Array) -> Array:
        for part in self.parts:
            logits = part.filter(logits)
        return logits

    @property
    def sees_text(self) -> bool:
        return any(part.sees_text for part in self.parts)

    def control(self, logits_BxV: Array, history: Any) -> Array:
        for part in self.parts:
            logits_BxV = part.control(logits_BxV, history)
        return logits_BxV

    def check(self, vocab_size: int) -> None:
        for part in self.parts:
            part.check(vocab_size)

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
    scale: float = _derived()
    random: bool = _derived(static=True)

    def __post_init__(self):
        value = number("temperature", self.value, "0 or more", lambda value: value >= 0)
        if isinstance(value, jax.core.Tracer):
            assign(self, scale=jnp.minimum(1 / value, 1e30), random=True)
        else:  # in float64
            assign(self, value=value, scale=min(1 / value, 1e30) if value else 1e30, random=value > 0)

    @property
    def draws(self) -> bool:
        return self.random

    def filter(self, logits: Array) -> Array:
        # Relative to the largest logit and bounded, so that a tiny temperature neither overflows nor divides by zero.
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)
        return jnp.maximum(relative * self.scale, REMOVED)


@dataclasses.dataclass(frozen=True, repr=False)
class TopK(Sampler):
    """Keeps the `k` likeliest ids, and any as likely as the k-th. A `k` above V keeps all.

    Source: Fan et al. 2018.

    Raises:
        ValueError: if `k` is not an integer of 1 or more.
    """

    k: int

    def __post_init__(self):
        assign(self, k=integer("top_k", self.k, 1))

    def filter(self, logits: Array) -> Array:
        return _keep_likeliest(logits, functools.partial(jnp.ones_like, dtype=jnp.int32), self.k)


@dataclasses.dataclass(frozen=True, repr=False)
class TopP(Sampler):
    """Keeps the nucleus: the fewest likeliest ids with a total probability of at least `p`, and any as likely as
    the least likely of them.

    Source: Holtzman et al. 2020.

    Raises:
        ValueError: if `p` is outside (0, 1].
    """

    p: float
    limits: bool = _derived(static=True)

    def __post_init__(self):
        p = number("top_p", self.p, "above 0 and at most 1", lambda p: 0 < p <= 1)
        assign(self, p=p, limits=isinstance(p, jax.core.Tracer) or p < 1)

    def filter(self, logits: Array) -> Array:
        if not self.limits:
            return logits
        # Above 0 in float32 too; and for a traced 1 more than there is, as the sum of all may be a little less or more.
        enough = jnp.where(self.p < 1, jnp.maximum(self.p, 1e-37), 2.0)
        return _keep_likeliest(logits, functools.partial(jax.nn.softmax, axis=-1), enough)


@dataclasses.dataclass(frozen=True, repr=False)
class MinP(Sampler):
    """Keeps the ids with at least `p` times the probability of the likeliest. 0 keeps all.

    Source: Nguyen et al. 2024.

    Raises:
        ValueError: if `p` is outside [0, 1].
    """

    p: float
    log_p: float = _derived()

    def __post_init__(self):
        p = number("min_p", self.p, "from 0 to 1", lambda p: 0 <= p <= 1)
        if isinstance(p, jax.core.Tracer):
            assign(self, log_p=jnp.log(p))
        else:  # in float64
            assign(self, p=p, log_p=math.log(p) if p else -math.inf)

    def filter(self, logits: Array) -> Array:
        floor = jnp.max(logits, axis=-1, keepdims=True) + self.log_p
        return jnp.where(logits >= floor, logits, REMOVED)


def simplest(sampler: Sampler) -> Sampler:
    """The sampler without what does not matter: where nothing is drawn at random, no filter does."""
    if sampler.draws:
        return sampler
    controls = tuple(part for part in _parts(sampler) if isinstance(part, Control))
    return Chain((*controls, Greedy())) if controls else Greedy()


def _parts(sampler: Sampler) -> tuple[Sampler, ...]:
    return sampler.parts if isinstance(sampler, Chain) else (sampler,)


def _keep_likeliest(logits: Array, weigh: Callable[[Array], Array], enough: Array | float) -> Array:
    """Removes the ids below the highest threshold that keeps `enough` weight, or none if there is not as much. `weigh`
    gives the ids' weights.

    The threshold is found exactly, bit by bit, in 32 passes: sorting the vocabulary takes much longer, and so does
    `lax.top_k`.
    """
    weights = weigh(logits)
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 equals 0.0 but has other bits
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    # Floats are ordered as sign and magnitude; this orders them as unsigned integers.
    order = lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def refine(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
        kept = jnp.sum(jnp.where(order >= candidate, weights, jnp.zeros_like(weights)), axis=-1, keepdims=True)
        return jnp.where(kept >= enough, candidate, threshold)

    threshold = lax.fori_loop(0, 32, refine, jnp.zeros_like(order[..., :1]))
    return jnp.where(order >= threshold, logits, REMOVED)


def number(name: str, value: Any, expected: str, good: Callable[[float], bool]) -> Any:
    """The value as a float, limited to the largest of 32 bits; a traced one as it is. Raises a ValueError unless it is
    finite and `good`."""
    if isinstance(value, jax.core.Tracer):
        return value
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        fits = fits and math.isfinite(value) and good(value)
    except OverflowError:  # an integer too large for a float
        fits = False
    if not fits:
        raise ValueError(f"{name} must be {expected}, not {short_repr(value)}")
    return max(-FLOAT32_MAX, min(float(value), FLOAT32_MAX))


def integer(name: str, value: Any, least: int) -> Any:
    """The value as an int of 32 bits, limited to the largest; a traced one as it is. Raises a ValueError unless it is
    an integer of `least` or more."""
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name} must be an integer of {least} or more, not {short_repr(value)}")
    return min(operator.index(value), 2**31 - 1)


def assign(sampler: Sampler, **values: Any) -> None:
    """Sets fields of a frozen dataclass, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(sampler, name, value)

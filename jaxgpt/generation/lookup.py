"""Prompt-lookup decoding of one text: several ids per reading of the weights, and the same ids as without it.

Reading the weights is what a token costs. Where a text repeats itself, or quotes its prompt, its next ids are likely
those that followed the last time. These drafts are read together with the last id, and ids are then drawn one after the
other, as always and with the same keys, for as long as the id drawn is the one that was read.

The ids are the same bit for bit because the arithmetic is: the C++ kernel (`jaxgpt.cpu.kernel`) gives a row the same
result alone as among others. XLA does not, so there is no lookup without the kernel.

Drafts that fail cost time, so each has to be paid for in advance: with what drafts have saved, and with `ALLOWANCE` for
each id. For n ids the readings therefore take, wherever drafts fail, at most 1.02 n readings of one id, and what the
drafts of one reading cost, which is granted at the start. That holds where reading T ids takes no longer than
1 + 0.2 (T - 1) readings of one; on the processor measured it takes less (see `DRAFT_COST`).

Source: Saxena 2023, "Prompt Lookup Decoding"; verification by exact match instead of Leviathan et al. 2023, so that
sampling draws the same ids too.

Sizes: T ids per reading, S columns of the text, N new ids.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxgpt.checks import whole_number
from jaxgpt.cpu import kernel
from jaxgpt.errors import KernelError
from jaxgpt.generation.decode import DecodeState, draw
from jaxgpt.generation.history import History
from jaxgpt.generation.sampling import Sampler
from jaxgpt.model import GPT, leaves
from jaxgpt.parallel import to_device

# How many ids of the text's end must have occurred before, and how many more are preferred.
SHORTEST, LONGEST = 3, 8
# In hundredths of a reading of one id: what each draft adds to a reading (measured with AVX2: products take 4 to 8 in
# float32, 1 to 12 in bfloat16 and 2 to 17 in int8, more the more ids there are), and what each id may take more than
# without lookup.
DRAFT_COST, ALLOWANCE = 20, 2
# How many readings' drafts may fail in a row where earlier ones have paid for them.
MOST_FAILURES = 4


class Lookup:
    """Lookup in one generation, from one call of `decode_tokens` to the next.

    Args:
        lookup: ids per reading of the weights, the last one drawn included.
        model: the prepared model.
        params: its parameters.
        rows: of the generation.

    Raises:
        ValueError: unless `lookup` is an integer from 2 to the most that the kernel takes; for several rows; if weights
            are float32 and products are not, which the kernel leaves to XLA.
        KernelError: if the model does not use the kernel.
    """

    def __init__(self, lookup: Any, model: GPT, params: Any, rows: int):
        number = whole_number("lookup", lookup, 1)
        if not 2 <= number <= kernel.MOST_ROWS:
            raise ValueError(f"lookup must be from 2 to {kernel.MOST_ROWS}, the ids per reading, not {lookup}")
        if rows > 1:
            raise ValueError(f"lookup continues one text at a time, not {rows}: call it once per text")
        if not model.compute.native_kernel:
            raise KernelError(
                "lookup needs the C++ kernel, without which ids would depend on how many are read at once: run "
                f"`jaxgpt build-kernel`, on one CPU and without {kernel.VARIABLE}=0, or leave lookup out"
            )
        weights = [leaf for name, leaf in leaves(params).items() if name.endswith("weight")]
        dtype = model.compute.dtype
        if dtype != "float32" and any(weight.dtype == jnp.float32 for weight in weights):
            raise ValueError(
                f"lookup needs weights in the type of the products, which the kernel does not round to {dtype}: "
                f'model, params = jaxgpt.prepare(model, params, "{dtype}")'
            )
        self._drafting = to_device(_Drafting.first(number - 1), params)

    @property
    def accepted(self) -> int:
        """How many drafts were drawn."""
        return int(jax.device_get(self._drafting.accepted))

    def decode_tokens(
        self, model: GPT, params: Any, state: DecodeState, steps: Array, most: Array, **options: Any
    ) -> tuple[DecodeState, tuple[Array, Any]]:
        """As `decode.decode_tokens` from a cache, but a last reading may draw more than `steps` ids, `most` in all."""
        state, self._drafting, new = _decode_tokens(model, params, state, self._drafting, steps, most, **options)
        return state, new


@struct.dataclass
class _Drafting:
    """The drafts for the next reading. Whether there are any does not change which ids are drawn.

    Attributes:
        ids_N: what to read after the last id drawn.
        there: whether to read it; if not, the last id is read alone.
        credit: what drafts may cost, in hundredths of a reading.
        accepted: drafts drawn so far.
    """

    ids_N: Any
    there: Any
    credit: Any
    accepted: Any

    @classmethod
    def first(cls, N: int) -> _Drafting:
        """For the first reading, on the host: no drafts, and credit for one reading with N of them."""
        return cls(np.zeros(N, np.int32), np.bool(False), np.int32(DRAFT_COST * N), np.int32(0))

    def after(self, state: Any, drawn: Array) -> _Drafting:
        """For the next reading, after one that has drawn so many ids and left this `DecodeState`."""
        N = self.ids_N.size
        cost = DRAFT_COST * N
        saved = 100 * (drawn - 1) + ALLOWANCE * drawn - jnp.where(self.there, cost, 0)
        credit = jnp.minimum(self.credit + saved, MOST_FAILURES * cost)
        ids_N, found = draft(state.history, N)
        there = found & (credit >= cost) & (state.memory.length + N < state.memory.slots)
        return _Drafting(ids_N, there, credit, self.accepted + drawn - 1)


@functools.partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("state",))
def _decode_tokens(
    model: GPT,
    params: Any,
    state: DecodeState,
    drafting: _Drafting,
    steps: Array,
    most: Array,
    *,
    chunk: int,
    sampler: Sampler,
) -> tuple[DecodeState, _Drafting, tuple[Array, Any]]:
    start, longest = state.drawn, drafting.ids_N.size + 1

    def empty(x_1: Array) -> Array:
        return jnp.zeros((1, chunk + longest - 1, *x_1.shape[1:]), x_1.dtype)

    def put(x_1xN: Array, x_1: Array, n: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x_1xN, x_1[:, None], n, axis=1)

    def read(T: int, carry: Any) -> Any:
        """Reads T ids, the last one drawn and drafts, and draws ids for as long as they are those that were read."""
        state, drafting, new = carry
        memory, before = state.memory, state.drawn
        ids_T = jnp.concatenate([state.token_B, drafting.ids_N])[:T]
        features: Any = model.apply({"params": params}, ids_T[None], cache=memory, method="features")
        x_1xTxD, written = features
        logits_1xTxV: Any = model.apply({"params": params}, x_1xTxD, method="logits")

        def is_read(carry: Any) -> Array:
            state, _ = carry
            t = state.drawn - before
            same = (t < T) & (state.token_B[0] == ids_T[t])
            return same & (state.drawn - start < most) & ~state.done_B[0]

        def draw_next(carry: Any) -> Any:
            state, new = carry
            n, t = state.drawn - start, state.drawn - before
            logits_1xV = lax.dynamic_index_in_dim(logits_1xTxV, t, axis=1, keepdims=False)
            state = draw(state, logits_1xV, sampler, state.top)
            return state, jax.tree.map(functools.partial(put, n=n), new, (state.token_B, state.logprobs))

        # Without the cache, which XLA would copy.
        state, new = lax.while_loop(is_read, draw_next, (dataclasses.replace(state, memory=None), new))
        drawn = state.drawn - before
        # The slots of drafts that were not drawn are written anew.
        state = dataclasses.replace(state, memory=written.replace(length=memory.length + drawn))
        return state, drafting.after(state, drawn), new

    def goes_on(carry: Any) -> Array:
        state, _, _ = carry
        return (state.drawn - start < steps) & ~state.done_B[0]

    def readings(carry: Any) -> Any:
        # Two loops instead of a condition, whose branches XLA gives copies of the cache.
        carry = lax.while_loop(lambda carry: goes_on(carry) & ~carry[1].there, functools.partial(read, 1), carry)
        return lax.while_loop(lambda carry: goes_on(carry) & carry[1].there, functools.partial(read, longest), carry)

    new = jax.tree.map(empty, (state.token_B, state.logprobs))
    return lax.while_loop(goes_on, readings, (state, drafting, new))


def draft(history: History, N: int) -> tuple[Array, Array]:
    """What followed the longest sequence of ids, at most `LONGEST`, that the text of one row ends with and holds
    before; of several as long the last.

    Returns:
        (ids_N, found): whether there is one of at least `SHORTEST` ids. A continuation that reaches the end of the text
        goes on periodically.
    """
    ids_S, end = history.ids_BxS[0], history.length - 1
    column_S = jnp.arange(ids_S.size)
    same_S, run_S = column_S < end, jnp.zeros(ids_S.size, jnp.int32)
    for j in range(LONGEST):
        same_S &= (jnp.roll(ids_S, j) == ids_S[end - j]) & (column_S - j >= history.start_B[0])
        run_S += same_S.astype(jnp.int32)
    match = jnp.argmax(run_S * ids_S.size + column_S)
    return ids_S[match + 1 + jnp.arange(N) % (end - match)], run_S[match] >= SHORTEST

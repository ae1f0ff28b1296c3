"""Shapes for batches of rows of many lengths: few shapes, because each is compiled, with little padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# At most so many shapes per call, whatever the lengths.
MOST_SHAPES = 6
# Padding that costs about as much as one more compilation, in tokens: a call of fewer tokens uses coarse shapes, which
# other calls use too.
TOKENS_PER_SHAPE = 2048
# Finely rounded shapes of which every pair is compared; if there are more, they are rounded coarsely first.
MOST_PAIRED = 300


class Shape(NamedTuple):
    """The padded sizes of one prompt and its continuations.

    Attributes:
        prompt: ids of the prompt, P.
        tail: ids per continuation that are read after the prompt, N.
        tails: continuations per prompt, K.
    """

    prompt: int
    tail: int
    tails: int

    @property
    def slots(self) -> int:
        """Cache slots that a prompt and its continuations take, or its tokens if it needs no cache."""
        return max(self.prompt, self.tails * (self.prompt + self.tail)) if self.tail else self.prompt


def choose_shapes(sizes: list[Shape], context: int) -> list[Shape]:
    """A shape for each prompt that holds it, of at most `MOST_SHAPES` different ones, with lengths up to `context`.

    Sizes are rounded up a little, and then the two shapes whose union adds the least padding are made one, as long as
    there are too many or the padding costs less than a compilation.
    """
    largest_3 = np.array([context, context, np.iinfo(np.int64).max])
    sizes_Nx3 = np.array(sizes, np.int64).reshape(-1, 3)
    for rounded_Nx3 in (_round_up(sizes_Nx3), _powers_of_two(sizes_Nx3)):
        shapes_Sx3, shape_N, counts_S = np.unique(
            np.minimum(rounded_Nx3, largest_3), axis=0, return_inverse=True, return_counts=True
        )
        if len(shapes_Sx3) <= MOST_PAIRED:
            break
    shape_N = shape_N.reshape(-1)
    while len(shapes_Sx3) > 1:
        union_SxSx3 = np.maximum(shapes_Sx3[:, None], shapes_Sx3[None])
        one_way_SxS = counts_S[:, None] * (_tokens(union_SxSx3) - _tokens(shapes_Sx3)[:, None])
        added_SxS = one_way_SxS + one_way_SxS.T
        np.fill_diagonal(added_SxS, np.iinfo(np.int64).max)
        kept, dropped = sorted(divmod(int(np.argmin(added_SxS)), len(shapes_Sx3)))
        if len(shapes_Sx3) <= MOST_SHAPES and added_SxS[kept, dropped] > TOKENS_PER_SHAPE:
            break
        shapes_Sx3[kept] = union_SxSx3[kept, dropped]
        counts_S[kept] += counts_S[dropped]
        shapes_Sx3, counts_S = np.delete(shapes_Sx3, dropped, axis=0), np.delete(counts_S, dropped)
        shape_N = np.where(shape_N == dropped, kept, shape_N - (shape_N > dropped))
    for shape_3, count in zip(shapes_Sx3, counts_S, strict=True):
        for axis in range(3):
            coarse_3 = shape_3.copy()
            coarse_3[axis] = np.minimum(_powers_of_two(shape_3), largest_3)[axis]
            if count * (_tokens(coarse_3) - _tokens(shape_3)) <= TOKENS_PER_SHAPE:
                shape_3[axis] = coarse_3[axis]
    chosen = [Shape(*shape_3) for shape_3 in shapes_Sx3.tolist()]
    return [chosen[i] for i in shape_N.tolist()]


def prompts_per_batch(shape: Shape, prompts: int, batch_tokens: int, multiple: int = 1) -> int:
    """How many of so many prompts to process at once: a multiple of `multiple`, with about `batch_tokens` slots at
    most, but at least one."""
    batches = -(-prompts * shape.slots // max(batch_tokens, shape.slots))
    size = np.array(-(-prompts // batches))
    rounded = _powers_of_two(size)
    if batches > 1 or (rounded - size) * _tokens(np.array(shape)) > TOKENS_PER_SHAPE:
        rounded = _round_up(size)
    return -(-int(rounded) // multiple) * multiple


def _tokens(shapes_x3: np.ndarray) -> np.ndarray:
    """Tokens that are read per prompt."""
    return shapes_x3[..., 0] + shapes_x3[..., 1] * shapes_x3[..., 2]


def _round_up(sizes: np.ndarray) -> np.ndarray:
    """Each size rounded up to one of four per power of two: ..., 8, 10, 12, 14, 16, 20, ..."""
    below = np.maximum(sizes - 1, 7)
    step = 1 << np.maximum(np.floor(np.log2(below)).astype(np.int64) - 2, 0)
    return -(-sizes // step) * step


def _powers_of_two(sizes: np.ndarray) -> np.ndarray:
    """Each size rounded up to a power of two, or 0."""
    return np.where(sizes > 0, 1 << np.ceil(np.log2(np.maximum(sizes, 1))).astype(np.int64), 0)

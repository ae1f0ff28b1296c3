"""What happens inside a model while it reads a text: attention weights, the residual stream, and the logit lens.

After every block, the lens shows what the model would predict if it stopped there: it applies the final norm and the
output head to the residual stream at that point (nostalgebraist 2020, "interpreting GPT: the logit lens").

Sizes: T tokens, H heads, L blocks, N = L + 1 places to look (the embeddings, then after each block), V vocabulary,
D emb_dim, K tokens reported per place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt.checks import as_ids, brief, check_ids, whole_number
from jaxgpt.model import GPT, check_model
from jaxgpt.parallel import to_device
from jaxgpt.tokenizer import Tokenizer


@brief
@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """What `look_inside` saw. NumPy arrays on the host; all except the ids are float32.

    Attributes:
        ids_T: the ids that the model read.
        attention_LxHxTxT: weights, [layer, head, query, key]. Rows sum to 1; what a query cannot see is exactly 0.
        residual_NxTxD: the residual stream: the sum of the embeddings, then the output of each block.
        top_ids_NxTxK: the K likeliest next ids at each place and position, the likeliest first. The last place is
            the model's own prediction.
        top_probabilities_NxTxK: their probabilities.
        true_probabilities_NxS: the probability at each place of the id that actually comes next; S = T - 1.
    """

    ids_T: np.ndarray
    attention_LxHxTxT: np.ndarray
    residual_NxTxD: np.ndarray
    top_ids_NxTxK: np.ndarray
    top_probabilities_NxTxK: np.ndarray
    true_probabilities_NxS: np.ndarray


def look_inside(model: GPT, params: Any, ids: Any, *, top: int = 5) -> Inside:
    """Reads `ids` once and reports what happened. Compiles once per model and length.

    Holds 4 L H T^2 bytes of attention weights in memory, and the logits of one place at a time.

    Args:
        model: the model, in any form: scanned, bfloat16, int8, prepared.
        params: its parameters.
        ids: one row of ids [T], not empty, within the context.
        top: how many of the likeliest tokens to report, K; the whole vocabulary if it has fewer.

    Raises:
        ValueError: for ids that are not integers in the vocabulary; for no ids, or more than the context holds; for
            `top` below 1.
        FloatingPointError: if the logits are NaN or infinite.
    """
    check_model("look_inside(model, params, ids)", model, params)
    config = model.config
    ids_T = check_ids(as_ids(ids, "ids"), "ids", config.vocab_size)
    if not len(ids_T):
        raise ValueError("no ids: a model must read something, such as end-of-text")
    if len(ids_T) > config.context_length:
        raise ValueError(f"{len(ids_T)} ids do not fit context_length={config.context_length}: shorten the text")
    if whole_number("top", top) < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    seen = jax.device_get(_look(model, params, to_device(ids_T[None], params), min(top, config.vocab_size)))
    attention, residual, top_ids, top_probabilities, true_probabilities = seen
    if not np.isfinite(top_probabilities).all():
        place, position = np.argwhere(~np.isfinite(top_probabilities))[0, :2]
        raise FloatingPointError(
            f"the logits {place_name(place, len(residual))}, position {position}, are NaN or infinite: "
            "the parameters hold such values, or overflow"
        )
    return Inside(ids_T, attention, residual, top_ids, top_probabilities, true_probabilities)


def lens_logits(model: GPT, params: Any, x_BxTxD: Array) -> Array:
    """The final norm and the output head, applied to a residual stream: float32 logits [B, T, V]."""
    logits: Any = model.apply({"params": params}, x_BxTxD, method=lambda gpt, x: gpt.logits(gpt.final_norm(x)))
    return logits


def place_name(place: int, places: int) -> str:
    """Where the lens looks, in words: 0 is before the first of the `places` - 1 blocks."""
    if place == 0:
        return "at the embeddings"
    return f"after block {place - 1}" + (" (the model)" if place == places - 1 else "")


def token_labels(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each id as readable text: spaces as ␣, control characters and bytes that form no character as escapes, and an id
    that the tokenizer does not have as its placeholder."""
    labels = []
    for i in ids:
        text = tokenizer.decode_bytes([int(i)], placeholders=True).decode("utf-8", errors="backslashreplace")
        labels.append("".join("␣" if c == " " else c if c.isprintable() else ascii(c)[1:-1] for c in text))
    return labels


@functools.partial(jax.jit, static_argnums=(0, 3))
def _look(model: GPT, params: Any, ids_1xT: Array, top: int) -> tuple[Array, ...]:
    _, state = model.apply({"params": params}, ids_1xT, mutable=["intermediates"])
    inside = state["intermediates"]
    if model.compute.scan_layers:
        (attention_Lx1xHxTxT,), (outputs_Lx1xTxD,) = (
            inside["trf_blocks"]["att"]["weights"],
            inside["trf_blocks"]["output"],
        )
    else:
        blocks = [inside[f"trf_blocks_{i}"] for i in range(model.config.n_layers)]
        attention_Lx1xHxTxT = jnp.stack([block["att"]["weights"][0] for block in blocks])
        outputs_Lx1xTxD = jnp.stack([block["output"][0] for block in blocks])
    residual_Nx1xTxD = jnp.concatenate([inside["embedded"][0][None], outputs_Lx1xTxD])

    def read(x_1xTxD: Array) -> tuple[Array, Array, Array]:
        probabilities_TxV = jax.nn.softmax(lens_logits(model, params, x_1xTxD)[0])
        top_TxK, ids_TxK = lax.top_k(probabilities_TxV, top)
        true_S = jnp.take_along_axis(probabilities_TxV[:-1], ids_1xT[0, 1:, None], axis=-1)[:, 0]
        return ids_TxK, top_TxK, true_S

    return attention_Lx1xHxTxT[:, 0], residual_Nx1xTxD[:, 0], *lax.map(read, residual_Nx1xTxD)

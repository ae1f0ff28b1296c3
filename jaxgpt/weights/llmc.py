"""llm.c's `.bin`: a header of 256 int32, then bare tensors in one type. Read only.

    0        20240326
    1        3 for float32, 5 for bfloat16
    2 to 6   context length, vocabulary, layers, heads, width
    7        rows of the token embedding: the vocabulary, padded to a multiple of 128

The weights are [out, in], and the output head is the token embedding. No text contains the ids of the added rows, which
are left out.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxgpt.accounting import count_parameters
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError
from jaxgpt.weights import nanogpt
from jaxgpt.weights.layout import Checkpoint, Row, entries
from jaxgpt.weights.tensors import Tensor, read_pieces

MAGIC = struct.pack("<i", 20240326)
HEADER = 1024  # bytes
DTYPES = {3: "float32", 5: "bfloat16"}


def recognises(start: bytes) -> bool:
    """Whether a file that begins so is in this format. A safetensors file's header would need 4 GB for that."""
    return start.startswith(MAGIC) and start[4:8] not in (b"", b"\0\0\0\0")


def read(path: Path, start: bytes, overrides: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint in a file that begins with `start`.

    Raises:
        CheckpointError: for a version that is not read, or if the file is not exactly as long as its header says.
        ConfigError: for sizes that no model has.
    """
    size = path.stat().st_size
    if size < HEADER:
        raise CheckpointError(path, f"a file of llm.c of {size:,} bytes: its header alone has {HEADER:,}")
    version, context_length, vocab_size, n_layers, n_heads, emb_dim, n_rows = struct.unpack("<7i", start[4:32])
    if version not in DTYPES:
        raise CheckpointError(
            path,
            f"a file of llm.c of version {version}: expected 3 (float32) or 5 (bfloat16). Write it again with an llm.c "
            "of June 2024 or later",
        )
    fields = {"context_length": context_length, "vocab_size": vocab_size, "n_layers": n_layers, "n_heads": n_heads}
    config, dtype = GPTConfig.from_dict({**fields, "emb_dim": emb_dim}, source=str(path)), DTYPES[version]
    padding = n_rows - vocab_size
    count = count_parameters(config).total + padding * emb_dim
    expected = HEADER + count * jnp.dtype(dtype).itemsize
    if padding < 0 or size != expected:
        raise CheckpointError(
            path,
            f"its header says {n_rows:,} rows for {vocab_size:,} ids, and {expected:,} bytes; it has {size:,}: copy or "
            "download it again",
        )
    rows = nanogpt.linear_rows(padding)
    return Checkpoint(path, config, rows, tensors=lambda: _tensors(path, config, rows, dtype))


def _tensors(path: Path, config: GPTConfig, rows: tuple[Row, ...], dtype: str) -> dict[str, Tensor]:
    tensors, offset = {}, HEADER
    # The tensors are in the order of the table, each for all layers before the next.
    for entry in entries(config, "float32", rows):
        shape = entry.outside_shape
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        read = functools.partial(read_pieces, path, ((offset, size),), dtype, shape)
        tensors[entry.names[0]] = Tensor(shape, dtype, read)
        offset += size
    return tensors

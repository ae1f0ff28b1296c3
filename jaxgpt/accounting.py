"""Computes what a GPT costs from its config alone: exact numbers of parameters, bytes and floating-point operations.

Needs no arrays and no JAX: a 175-billion-parameter model is counted as quickly as a small one.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable

from jaxgpt.checks import did_you_mean
from jaxgpt.config import GPTConfig
from jaxgpt.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

MIB = 1024**2
GIB = 1024**3

# Peak of matrix products in bfloat16, in operations per second, by the name that JAX gives a device (`device_kind`).
# TPUs: https://cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e). GPUs: NVIDIA's data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters, by component.

    Attributes:
        tok_emb: the token embedding, V D; also the output head if the two are tied.
        pos_emb: the position embedding, C D.
        attention: the four projections of all blocks.
        feed_forward: the two feed-forward layers of all blocks.
        norms: two LayerNorms per block, and the final one.
        out_head: the output head, V D; 0 if it is tied to the token embedding.
    """

    tok_emb: int = 0
    pos_emb: int = 0
    attention: int = 0
    feed_forward: int = 0
    norms: int = 0
    out_head: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(dataclasses.astuple(self))

    @property
    def without_embeddings(self) -> int:
        """All parameters except the two embeddings and the output head: N in Kaplan et al. 2020."""
        return self.attention + self.feed_forward + self.norms


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of the matrix products; a multiplication plus an addition counts as two.

    Attributes:
        linear: operations of the linear layers and the output head.
        attention: operations of the scores, q k^T, and of the weighted sums of values. By convention these are counted
            in full, as if each query saw all T positions, or in a banded layer the full width of the band.
            `causal_attention_flops` counts only the positions that a query does see, about half in a dense layer.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.linear + self.attention


def parameter_shapes(config: GPTConfig) -> Shapes:
    """Shape of every parameter by its path ("trf_blocks_0/att/qkv/weight"), in the order in which data flows.

    This is the tree with one subtree per block, regardless of `scan_layers`, which stacks the same leaves on a
    leading axis [L, ...] under `trf_blocks`.
    """
    D, F, V, C = config.emb_dim, config.ffn_dim, config.vocab_size, config.context_length

    def norm(name: str) -> Shapes:
        return {f"{name}/scale": (D,), **({f"{name}/shift": (D,)} if config.bias else {})}

    def linear(name: str, weight: tuple[int, ...], bias: bool) -> Shapes:
        return {f"{name}/weight": weight, **({f"{name}/bias": weight[:-1]} if bias else {})}

    block = {
        **norm("norm1"),
        **linear("att/qkv", (3, D, D), config.qkv_bias),
        **linear("att/out_proj", (D, D), config.bias),
        **norm("norm2"),
        **linear("ff/fc_in", (F, D), config.bias),
        **linear("ff/fc_out", (D, F), config.bias),
    }
    shapes: Shapes = {"tok_emb/weight": (V, D), "pos_emb/weight": (C, D)}
    for i in range(config.n_layers):
        shapes |= {f"trf_blocks_{i}/{name}": shape for name, shape in block.items()}
    shapes |= norm("final_norm")
    if not config.tie_embeddings:
        shapes["out_head/weight"] = (V, D)
    return shapes


# The pattern of all linear layers of the blocks, for `select`.
LINEAR_LAYERS = "att, ff"


def select(patterns: str, paths: Iterable[str], what: str = "parameter") -> list[str]:
    """The paths that match one of several patterns, separated by commas, in the order of `paths`.

    A pattern is a path, or consecutive parts of one; * stands for any text. So "tok_emb", "trf_blocks_0", "att/qkv" and
    "trf_blocks_1*/ff" all match parameters.

    Args:
        patterns: the patterns.
        paths: paths such as "trf_blocks_0/att/qkv/weight".
        what: what the paths are of, for the error.

    Raises:
        ConfigError: if there is no pattern, or for one that matches nothing; names the nearest that does.
    """
    paths, found = list(paths), set()
    wanted = [pattern for text in patterns.split(",") if (pattern := text.strip())]
    if not wanted:
        raise ConfigError(f"expected patterns of paths such as {LINEAR_LAYERS!r}, not {patterns!r}")
    for pattern in wanted:
        matching = [path for path in paths if any(fnmatch.fnmatchcase(part, pattern) for part in _stretches(path))]
        if not matching:
            known = dict.fromkeys(part for path in paths for part in _stretches(path))
            blocks = next((part for part in known if part.startswith("trf_blocks")), "")
            hint = (
                did_you_mean(pattern, known) or f" (such as {', '.join(filter(None, ['tok_emb', blocks, 'att/qkv']))})"
            )
            raise ConfigError(f"{pattern!r} matches no {what}{hint}")
        found.update(matching)
    return [path for path in paths if path in found]


def _stretches(path: str) -> list[str]:
    """All consecutive parts of a path, the path included."""
    parts = path.split("/")
    return ["/".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]


def select_matrices(patterns: str, paths: Iterable[str]) -> list[str]:
    """`select` among the matrices, whose paths end in "/weight"."""
    return select(patterns, (path for path in paths if path.endswith("/weight")), "matrix")


def count_adapters(config: GPTConfig, rank: int, matrices: str = LINEAR_LAYERS) -> int:
    """Parameters of LoRA adapters (`jaxgpt.lora`): r (out + in) for each matrix, and query, key and value are three.

    Raises:
        ConfigError: as `select`.
    """
    shapes = parameter_shapes(config)
    return sum(
        math.prod(shape[:-2]) * rank * (shape[-2] + shape[-1])
        for shape in (shapes[path] for path in select_matrices(matrices, shapes))
    )


def count_parameters(config: GPTConfig) -> Counts:
    """Counts parameters by component; an array that is used twice (a tied head) counts once."""
    counts = dict.fromkeys((field.name for field in dataclasses.fields(Counts)), 0)
    for path, shape in parameter_shapes(config).items():
        counts[_component(path)] += math.prod(shape)
    return Counts(**counts)


def _component(path: str) -> str:
    parts = path.split("/")
    name = parts[1] if parts[0].startswith("trf_blocks") else parts[0]
    return {"att": "attention", "ff": "feed_forward", "norm1": "norms", "norm2": "norms", "final_norm": "norms"}.get(
        name, name
    )


def parameter_bytes(config: GPTConfig, dtype: str = "float32") -> int:
    """Bytes of all parameters stored in `dtype`. With int8 only matrices are int8, each with one float32 scale per
    row, and all other parameters are float32.

    Raises:
        ConfigError: for a dtype that is not one of `DTYPE_BYTES`.
    """
    size = _itemsize(dtype)
    if dtype != "int8":
        return count_parameters(config).total * size
    shapes = parameter_shapes(config).items()
    return sum(
        math.prod(shape) + 4 * math.prod(shape[:-1]) if path.endswith("/weight") else 4 * math.prod(shape)
        for path, shape in shapes
    )


def training_bytes(config: GPTConfig, trained: int | None = None, added: int = 0, frozen: str = "float32") -> int:
    """Bytes of parameters, gradients and AdamW's two moments, without activations: 16 per parameter that is trained,
    which is float32, and those of its type per frozen one.

    Args:
        config: the model.
        trained: how many parameters are trained; by default all.
        added: how many of these the model itself does not have, such as adapters.
        frozen: the type of the others.
    """
    total = count_parameters(config).total
    trained = total if trained is None else trained
    return 16 * trained + DTYPE_BYTES[frozen] * (total + added - trained)


def format_bytes(size: float) -> str:
    """A size in GiB or, below 1/8 of one, in MiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 8 else f"{size / MIB:,.1f} MiB"


def forward_flops(config: GPTConfig, batch: int, length: int) -> Flops:
    """Operations of one forward pass over [B, T] ids, including logits at every position.

    linear = 2 B T (L (4 D^2 + 2 D F) + V D), which is 2 B T (12 L D^2 + V D) for F = 4 D;
    attention = 4 B T^2 D L, where each banded layer has T min(W, T) instead of T^2, with W its window.
    Source: Kaplan et al. 2020, table 1, with attention over all T positions.

    Raises:
        ValueError: if `batch` or `length` is not positive, or `length` exceeds the context.
    """
    body, head = _linear_flops(config, batch, length)
    return Flops(linear=body + head, attention=_attention_flops(config, batch, length))


def training_flops(config: GPTConfig, batch: int, length: int, remat: str = "none") -> Flops:
    """Operations of one training step over [B, T] ids: the forward pass, and twice as many for the backward pass.

    With `remat="block"` the backward pass repeats each block's forward pass, except its last product, fc_out, whose
    result no gradient needs. That makes four times the forward operations for a block's other products, and three
    times for fc_out and the output head. With "dots" the products of the linear layers are kept, and only attention
    counts four times. Scores that attention recomputes to save memory are not counted. Utilisation as usually
    quoted excludes recomputation: use three times `forward_flops` for it.
    """
    body, head = _linear_flops(config, batch, length)
    fc_out = 2 * batch * length * config.n_layers * config.emb_dim * config.ffn_dim
    again = body - fc_out if remat == "block" else 0
    passes = 3 if remat == "none" else 4
    return Flops(linear=3 * (body + head) + again, attention=passes * _attention_flops(config, batch, length))


def causal_attention_flops(config: GPTConfig, batch: int, length: int) -> int:
    """`forward_flops(...).attention` without masked positions. It counts exactly the pairs of a query and a key that
    the query sees: W (W + 1) / 2 + (T - W) W in a banded layer, with W = min(window, T), and T (T + 1) / 2 in a dense
    layer.

    Raises:
        ValueError: as `forward_flops`.
    """
    _check_sizes(config, batch, length)
    pairs = sum(width * (width + 1) // 2 + (length - width) * width for width in _widths(config, length))
    return 4 * batch * pairs * config.emb_dim


def cache_bytes(config: GPTConfig, batch: int, slots: int, dtype: str) -> int:
    """Bytes of the keys and values of a cache: 2 L B S D elements of `dtype`, and for int8 2 L B S H scales in float32.
    `Cache.empty` documents its dtype.

    Raises:
        ValueError: if `batch` or `slots` is not positive.
        ConfigError: for a dtype that is not one of `DTYPE_BYTES`.
    """
    _check_positive(batch=batch, slots=slots)
    scales = 4 * config.n_heads if dtype == "int8" else 0
    return 2 * config.n_layers * batch * slots * (config.emb_dim * _itemsize(dtype) + scales)


def _linear_flops(config: GPTConfig, batch: int, length: int) -> tuple[int, int]:
    """Returns the operations of the linear layers as (all blocks, output head)."""
    _check_sizes(config, batch, length)
    L, D, F, V = config.n_layers, config.emb_dim, config.ffn_dim, config.vocab_size
    return 2 * batch * length * L * (4 * D**2 + 2 * D * F), 2 * batch * length * V * D


def _attention_flops(config: GPTConfig, batch: int, length: int) -> int:
    return 4 * batch * length * sum(_widths(config, length)) * config.emb_dim


def _widths(config: GPTConfig, length: int) -> list[int]:
    """For each layer, the largest number of positions that a query sees."""
    band = min(config.attention_window, length)
    return [band if i in config.banded_layers else length for i in range(config.n_layers)]


def _check_sizes(config: GPTConfig, batch: int, length: int) -> None:
    _check_positive(batch=batch, length=length)
    if length > config.context_length:
        raise ValueError(f"length {length} is beyond context_length={config.context_length}")


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    return DTYPE_BYTES[dtype]

"""The GPT, as small `flax.linen` modules over a plain dict of parameters.

Module and parameter names are the book's where the book has them. All weights are [out, in]. Sizes:

    B batch    T sequence    D emb_dim    H heads    K head_dim    F ffn_dim    V vocabulary    C context
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.config import GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.model import ops
from jaxgpt.model.attention import attention
from jaxgpt.model.cache import Cache, read, write
from jaxgpt.parallel.mesh import BATCH
from jaxgpt.parallel.sharding import constrain, is_distributed

WEIGHT_STD = 0.02  # GPT-2's initialisation: Radford et al. 2019, section 2.3, and its released code


class Linear(nn.Module):
    """y = x W^T + b, with W `[*out, in]` in the config's `param_dtype`. Returns float32.

    Attributes:
        config: types.
        out: output sizes; more than one gives as many output axes.
        use_bias: whether there is a b.
        std: standard deviation of the initial weights.
    """

    config: GPTConfig
    out: tuple[int, ...]
    use_bias: bool
    std: float = WEIGHT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight, scale = _matrix(self, (*self.out, x.shape[-1]), self.std)
        if len(self.out) == 2 and scale is None and is_distributed():
            # With the weight's first axes made one, XLA would gather all of it in the backward pass.
            y = ops.dot("BTD,NOD->BTNO", x, weight, self.config.dtype)
        else:
            # One product whatever the number of output axes: XLA on CPU transposes the weight otherwise.
            flat_scale = None if scale is None else scale.reshape(-1)
            y = ops.linear(x, weight.reshape(-1, x.shape[-1]), flat_scale, self.config.dtype, self.config.native_kernel)
            y = y.reshape(*x.shape[:2], *self.out)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, self.out, vector_dtype(self.config)).astype(jnp.float32)
        return y


class Embedding(nn.Module):
    """A table of `rows` vectors [rows, D]. Ids outside the table are the caller's error: XLA does not raise."""

    config: GPTConfig
    rows: int
    std: float

    def setup(self):
        self.weight, self.scale = _matrix(self, (self.rows, self.config.emb_dim), self.std)

    def __call__(self, ids: Array) -> Array:
        # The barrier keeps XLA on CPU from converting the whole table before it takes the rows.
        x = lax.optimization_barrier(constrain(self.weight, None, "tensor")[ids]).astype(jnp.float32)
        return x if self.scale is None else x * self.scale[ids][..., None]

    def head(self, x_BxTxD: Array) -> Array:
        """The table as an output layer: x times each of its rows, float32."""
        return ops.linear(x_BxTxD, self._by_row(), self.scale, self.config.dtype, self.config.native_kernel)

    def table(self) -> Array:
        """The table as one floating-point array."""
        weight = self._by_row()
        return weight if self.scale is None else weight.astype(jnp.float32) * self.scale[:, None]

    def _by_row(self) -> Array:
        """The weight with its rows over "tensor", for a product; in the two steps that XLA knows to make."""
        return constrain(constrain(self.weight, None, "tensor"), "tensor", None)


class LayerNorm(nn.Module):
    """`ops.layer_norm` with a learned scale and shift, both [D]."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kind = vector_dtype(self.config)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], kind)
        shift = self.param("shift", nn.initializers.zeros, x.shape[-1:], kind) if self.config.bias else None
        return ops.layer_norm(x, scale, shift, self.config.layer_norm_eps)


class Dropout(nn.Module):
    """`ops.dropout` from the "dropout" rng."""

    rate: float

    def __call__(self, x: Array, deterministic: bool) -> Array:
        return ops.dropout(x, self.rate, None if deterministic or not self.rate else self.make_rng("dropout"))


class FeedForward(nn.Module):
    """fc_out(activation(fc_in(x))): D -> F -> D."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        cfg = self.config
        h_BxTxF = Linear(cfg, (cfg.ffn_dim,), cfg.bias, name="fc_in")(x_BxTxD)
        h_BxTxF = constrain(ops.activation(cfg.activation)(h_BxTxF), BATCH, None, "tensor")
        return Linear(cfg, (cfg.emb_dim,), cfg.bias, residual_std(cfg), name="fc_out")(h_BxTxF)


class MultiHeadAttention(nn.Module):
    """Causal self-attention. Query, key and value weights are one array [3, D, D], in that order."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        cache: Cache | None = None,
        layer: Any = None,
        deterministic: bool = True,
        banded: bool | Array = False,
    ) -> tuple[Array, Any]:
        """Returns (y_BxTxD, layer). With a cache, `layer` is this block's (k, v) in it, and comes back written.
        `banded` says whether the config's `attention_window` counts here; an array does where a scan alternates."""
        cfg = self.config
        B, T, D = x_BxTxD.shape
        qkv_BxTx3xD = Linear(cfg, (3, D), cfg.qkv_bias, name="qkv")(x_BxTxD)
        q, k, v = (
            constrain(
                part_BxTx1xD.reshape(B, T, cfg.n_heads, cfg.head_dim).swapaxes(1, 2), BATCH, "tensor", None, None
            )  # [B, H, T, K]
            for part_BxTx1xD in jnp.split(qkv_BxTx3xD, 3, axis=2)
        )
        slot, start_B, dtype = 0, None, cfg.dtype
        if cache is not None:
            layer = write(layer, k, v, cache.length)
            slot, start_B = cache.length, cache.start_B
            # At a slot known to be 0 there is nothing in the cache but these tokens: attend to them as they are.
            if not (isinstance(slot, int) and slot == 0):
                k, v = read(layer)
                dtype = k.dtype.name  # converting a cache would cost more than the products with it
        drop = not deterministic and cfg.drop_rate_attn > 0
        dropout_key = self.make_rng("dropout") if drop else None
        inspected = self.is_mutable_collection("intermediates")

        def attend(window: int | None) -> tuple[Array, list[Array]]:
            weights: list[Array] = []
            context_BxHxTxK = attention(
                q,
                k,
                v,
                dtype=dtype,
                window=window,
                query_slot=slot,
                start_B=start_B,
                drop_rate=cfg.drop_rate_attn,
                dropout_key=dropout_key,
                inspect=weights.append if inspected else None,
            )
            return context_BxHxTxK, weights

        if isinstance(banded, bool):
            context_BxHxTxK, weights = attend(cfg.attention_window if banded else None)
        else:
            # One of two static patterns, not one mask that depends on data: so the band's blocks still skip what they
            # cannot see, and a scan still compiles each pattern once whatever the depth. (Without rematerialisation
            # the backward pass keeps room for what either of them keeps: about a tenth more memory.)
            context_BxHxTxK, weights = lax.cond(banded, lambda: attend(cfg.attention_window), lambda: attend(None))
        for weights_BxHxTxS in weights:
            self.sow("intermediates", "weights", weights_BxHxTxS)
        context_BxHxTxK = constrain(context_BxHxTxK, BATCH, "tensor", None, None)
        context_BxTxD = context_BxHxTxK.swapaxes(1, 2).reshape(B, T, D)
        y = Linear(cfg, (D,), cfg.bias, residual_std(cfg), name="out_proj")(context_BxTxD)
        return y, layer


class TransformerBlock(nn.Module):
    """Pre-norm block: x + drop(att(norm1(x))), then x + drop(ff(norm2(x)))."""

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        cache: Cache | None = None,
        layer: Any = None,
        deterministic: bool = True,
        banded: bool | Array = False,
    ) -> tuple[Array, Any]:
        """Returns (x_BxTxD, layer), as `MultiHeadAttention` does."""
        cfg = self.config
        drop_shortcut = Dropout(cfg.drop_rate_shortcut)
        with jax.named_scope("attention"):
            x = LayerNorm(cfg, name="norm1")(x_BxTxD)
            x, layer = MultiHeadAttention(cfg, name="att")(x, cache, layer, deterministic, banded)
            x_BxTxD = x_BxTxD + drop_shortcut(x, deterministic)
        with jax.named_scope("feed_forward"):
            x = FeedForward(cfg, name="ff")(LayerNorm(cfg, name="norm2")(x_BxTxD))
            x_BxTxD = x_BxTxD + drop_shortcut(x, deterministic)
        x_BxTxD = constrain(x_BxTxD, BATCH, None, None)
        self.sow("intermediates", "output", x_BxTxD)
        return x_BxTxD, layer


class GPT(nn.Module):
    """Token ids [B, T] to float32 logits [B, T, V].

        model = GPT(config)
        params = model.init(jax.random.key(0), ids)["params"]        # a plain nested dict
        logits = model.apply({"params": params}, ids)

    Dropout needs `deterministic=False` and `rngs={"dropout": key}`. With `mutable=["intermediates"]`, `apply`
    also returns every intermediate: the embeddings, each block's attention weights and output, the final norm.

    Ids must lie in [0, V) and T within the context: on device nothing checks that. `jaxgpt.generate` and the
    trainer check on the host.
    """

    config: GPTConfig

    def setup(self):
        cfg = self.config
        self.tok_emb = Embedding(cfg, cfg.vocab_size, cfg.embedding_std)
        self.pos_emb = Embedding(cfg, cfg.context_length, cfg.embedding_std / 2)
        self.drop_emb = Dropout(cfg.drop_rate_emb)
        Block = _block(cfg)
        self.trf_blocks: Any = Block(cfg) if cfg.scan_layers else [Block(cfg) for _ in range(cfg.n_layers)]
        self.final_norm = LayerNorm(cfg)
        if not cfg.tie_embeddings:
            self.out_head = Embedding(cfg, cfg.vocab_size, WEIGHT_STD)

    def __call__(self, ids_BxT: Array, *, deterministic: bool = True) -> Array:
        x_BxTxD, _ = self.features(ids_BxT, deterministic=deterministic)
        return self.logits(x_BxTxD)

    def features(
        self, ids_BxT: Array, *, cache: Cache | None = None, deterministic: bool = True
    ) -> tuple[Array, Cache | None]:
        """All of the model but the output head.

        Returns:
            (x_BxTxD, cache): the final norm's output, float32, and the cache with these T tokens in it.
        """
        T = ids_BxT.shape[1]
        if self.config.context_length < T:
            raise ValueError(
                f"{T} tokens do not fit context_length={self.config.context_length}: crop them to the last "
                f"{self.config.context_length}, as jaxgpt.generate does"
            )
        positions = jnp.arange(T) if cache is None else cache.positions_BxT(T)
        with jax.named_scope("embed"):
            x_BxTxD = self.drop_emb(self.tok_emb(ids_BxT) + self.pos_emb(positions), deterministic)
        x_BxTxD = constrain(x_BxTxD, BATCH, None, None)
        self.sow("intermediates", "embedded", x_BxTxD)
        layers = None if cache is None else cache.layers
        banded_layers = self.config.banded_layers
        if self.config.scan_layers:
            banded = jnp.array([i in banded_layers for i in range(self.config.n_layers)]) if banded_layers else False
            x_BxTxD, layers = self.trf_blocks(x_BxTxD, cache, layers, deterministic, banded)
        else:
            written = []
            for i, block in enumerate(self.trf_blocks):
                layer = None if layers is None else layers[i]
                x_BxTxD, layer = block(x_BxTxD, cache, layer, deterministic, i in banded_layers)
                written.append(layer)
            layers = written
        x_BxTxD = self.final_norm(x_BxTxD)
        self.sow("intermediates", "normed", x_BxTxD)
        return x_BxTxD, None if cache is None else dataclasses.replace(cache, layers=layers, length=cache.length + T)

    def logits(self, x_BxTxD: Array) -> Array:
        """The output head: [B, T, D] to float32 logits [B, T, V]."""
        with jax.named_scope("out_head"):
            return constrain(self._head().head(x_BxTxD), BATCH, None, "tensor")

    def head_weight(self) -> Array:
        """The output head's matrix [V, D]: the token embedding's own when they are tied."""
        return self._head().table()

    def _head(self) -> Embedding:
        return self.tok_emb if self.config.tie_embeddings else self.out_head


def normal(std: float) -> nn.initializers.Initializer:
    """N(0, std), drawn in float32 whatever the parameters' type: drawn in bfloat16 it has 128 distinct values."""
    return lambda key, shape, kind: (std * jax.random.normal(key, shape, jnp.float32)).astype(kind)


def _matrix(module: nn.Module, shape: tuple[int, ...], std: float) -> tuple[Array, Array | None]:
    """Declares a weight `[*out, in]` and, where weights are int8, the scale `[*out]` of each of its rows."""
    kind = module.config.param_dtype
    if kind != "int8":
        weight = module.param("weight", normal(std), shape, jnp.dtype(kind))
        if weight.dtype == jnp.int8:
            raise ConfigError("int8 parameters need the model that jaxgpt.prepare returns with them")
        return weight, None

    # 127 steps of std / 32 reach to four deviations.
    def draw(key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.clip(jnp.round(32 * jax.random.normal(key, shape)), -127, 127).astype(jnp.int8)

    weight = module.param("weight", draw, shape)
    if weight.dtype != jnp.int8:
        raise ConfigError(f"param_dtype is int8 and the parameters are {weight.dtype}: jaxgpt.prepare converts both")
    return weight, module.param("weight_scale", nn.initializers.constant(std / 32), shape[:-1], jnp.float32)


def vector_dtype(config: GPTConfig) -> jnp.dtype:
    """Type of biases, LayerNorm's scales and shifts: the parameters', but never int8."""
    return jnp.dtype("float32" if config.param_dtype == "int8" else config.param_dtype)


def residual_std(config: GPTConfig) -> float:
    """Initial deviation of the two projections into the residual stream, 0.02 / sqrt(2 L): L blocks add 2 L
    terms, and this keeps their sum's variance independent of depth."""
    return WEIGHT_STD / math.sqrt(2 * config.n_layers)


def _block(config: GPTConfig) -> type[nn.Module]:
    """`TransformerBlock` with the config's rematerialisation, and scanned over L if it says so."""
    Block: Any = TransformerBlock
    alternates = config.scan_layers and bool(config.banded_layers)  # then `banded` is data, one value a layer
    if config.remat != "none":
        policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims if config.remat == "dots" else None
        # Argument 4 is `deterministic`, 5 `banded` (0 is self). A scan cannot be undone by common subexpression
        # elimination.
        static = (4,) if alternates else (4, 5)
        Block = nn.remat(Block, policy=policy, static_argnums=static, prevent_cse=not config.scan_layers)
    if config.scan_layers:
        Block = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, nn.broadcast, 0 if alternates else nn.broadcast),
            length=config.n_layers,
        )
    return Block

"""The GPT of the book's chapter 4, as small `flax.linen` modules over a plain dict of parameters.

Modules and parameters are named as in the book, where the book has them. Sizes:

    B batch    T sequence    D emb_dim    H heads    K head_dim    F ffn_dim    V vocabulary    C context
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt.checks import check_batch, check_starts
from jaxgpt.model import ops, stack
from jaxgpt.model.attention import attend
from jaxgpt.model.cache import Cache, remember
from jaxgpt.model.layers import (
    WEIGHT_STD,
    ConfiguredModule,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    dropout_key,
    residual_std,
)
from jaxgpt.parallel import lay


class FeedForward(ConfiguredModule):
    """fc_out(activation(fc_in(x))): D -> F -> D."""

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        cfg = self.config
        fc_in = Linear((cfg.ffn_dim,), cfg.bias, self.compute, name="fc_in")
        h_BxTxF = lay(fc_in.activated(x_BxTxD, cfg.activation), "BTF")
        return Linear((cfg.emb_dim,), cfg.bias, self.compute, residual_std(cfg), name="fc_out")(h_BxTxF)


class MultiHeadAttention(ConfiguredModule):
    """Causal self-attention. Query, key and value weights are one array [3, D, D], in that order."""

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        cache: Cache | None = None,
        layer: Any = None,
        deterministic: bool = True,
        banded: bool | Array = False,
        scale: float | Array | None = None,
        start_BxT: Array | None = None,
    ) -> tuple[Array, Any]:
        """Returns (y_BxTxD, layer). With a cache, `layer` is this block's (k, v) pair in it, returned updated.
        `banded` says whether the config's `attention_window` applies here; `scale` is this block's of the config's
        `attention_scales`, by default the first; `start_BxT` is that of `GPT.features`."""
        cfg = self.config
        B, T, D = x_BxTxD.shape
        qkv_BxTx3xD = Linear((3, D), cfg.qkv_bias, self.compute, name="qkv")(x_BxTxD)
        q, k, v = (
            lay(part_BxTx1xD.reshape(B, T, cfg.n_heads, cfg.head_dim).swapaxes(1, 2), "BHTK").astype(jnp.float32)
            for part_BxTx1xD in jnp.split(qkv_BxTx3xD, 3, axis=2)
        )
        seen, layer = remember(cache, layer, k, v, self.compute.dtype, start_BxT)
        context_BxHxTxK, weights_BxHxTxS = attend(
            q,
            seen,
            # Initialisation only needs shapes, and its ids may have any.
            backend="auto" if self.is_initializing() else self.compute.attention,
            window=cfg.attention_window,
            banded=banded,
            scale=cfg.attention_scales[0] if scale is None else scale,
            drop_rate=cfg.drop_rate_attn,
            dropout_key=dropout_key(self, cfg.drop_rate_attn, deterministic),
            return_weights=self.is_mutable_collection("intermediates"),
            custom_derivatives=self.compute.custom_derivatives,
            native_kernel=self.compute.native_kernel,
            native=self.compute.native_sequences,
        )
        self.sow("intermediates", "weights", weights_BxHxTxS)
        context_BxTxD = lay(context_BxHxTxK, "BHTK").swapaxes(1, 2).reshape(B, T, D).astype(qkv_BxTx3xD.dtype)
        return Linear((D,), cfg.bias, self.compute, residual_std(cfg), name="out_proj")(context_BxTxD), layer


class TransformerBlock(ConfiguredModule):
    """Pre-norm block: x + drop(att(norm1(x))), then x + drop(ff(norm2(x)))."""

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        cache: Cache | None = None,
        layer: Any = None,
        deterministic: bool = True,
        banded: bool | Array = False,
        scale: float | Array | None = None,
        start_BxT: Array | None = None,
    ) -> tuple[Array, Any]:
        """Returns (x_BxTxD, layer), as `MultiHeadAttention` does."""
        cfg, compute = self.config, self.compute
        drop_shortcut = Dropout(cfg.drop_rate_shortcut)
        x = lay(LayerNorm(cfg, compute, name="norm1")(x_BxTxD), "BTD")
        attention = MultiHeadAttention(cfg, compute, name="att")
        x, layer = attention(x, cache, layer, deterministic, banded, scale, start_BxT)
        x_BxTxD = lay(x_BxTxD + drop_shortcut(x, deterministic), "BPD")
        x = lay(LayerNorm(cfg, compute, name="norm2")(x_BxTxD), "BTD")
        x = FeedForward(cfg, compute, name="ff")(x)
        x_BxTxD = lay(x_BxTxD + drop_shortcut(x, deterministic), "BPD")
        self.sow("intermediates", "output", x_BxTxD)
        return x_BxTxD, layer


class GPT(ConfiguredModule):
    """Token ids [B, T] to float32 logits [B, T, V].

        model = GPT(config)
        params = model.init(jax.random.key(0), ids)["params"]        # a plain nested dict
        logits = model.apply({"params": params}, ids)

    Dropout needs `deterministic=False` and `rngs={"dropout": key}`. With `mutable=["intermediates"]`, `apply`
    also returns every intermediate: the embeddings, each block's attention weights and output, the final norm.

    Ids must lie in [0, V), which nothing checks on device: `jaxgpt.generate` and the trainer check it on the host.
    T must not exceed the context.

    Where a row holds several documents, `start_BxT` says for each token at which index its document starts. Attention
    and positions then restart with each document, as if it were alone in its row.
    """

    def setup(self):
        cfg, compute = self.config, self.compute
        self.tok_emb = Embedding(cfg.vocab_size, cfg.emb_dim, cfg.embedding_std, compute)
        self.pos_emb = Embedding(cfg.context_length, cfg.emb_dim, cfg.embedding_std / 2, compute)
        self.drop_emb = Dropout(cfg.drop_rate_emb)
        self.trf_blocks: Any = stack.make_blocks(TransformerBlock, cfg, compute)
        self.final_norm = LayerNorm(cfg, compute)
        if not cfg.tie_embeddings:
            self.out_head = Embedding(cfg.vocab_size, cfg.emb_dim, WEIGHT_STD, compute)

    def __call__(self, ids_BxT: Array, *, start_BxT: Array | None = None, deterministic: bool = True) -> Array:
        x_BxTxD, _ = self.features(ids_BxT, start_BxT=start_BxT, deterministic=deterministic)
        return self.logits(x_BxTxD)

    def features(
        self,
        ids_BxT: Array,
        *,
        cache: Cache | None = None,
        start_BxT: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Cache | None]:
        """Everything except the output head.

        Returns:
            (x_BxTxD, cache): the final norm's output, in the activations' type, and the cache with these T
                tokens in it.

        Raises:
            ValueError: for a `start_BxT` that is not int32 of the ids' shape, or with a cache.
        """
        T = check_batch(ids_BxT, self.config.context_length)
        if cache is not None:
            positions = cache.positions_BxT(T)
        elif start_BxT is not None:
            check_starts(start_BxT, ids_BxT)
            positions = jnp.arange(T)[None] - start_BxT
        else:
            positions = jnp.arange(T)
        x_BxTxD = self.tok_emb(ids_BxT)
        x_BxTxD = x_BxTxD + ops.widen(self.pos_emb(positions), x_BxTxD)
        x_BxTxD = lay(self.drop_emb(x_BxTxD, deterministic).astype(self.compute.activation_dtype), "BPD")
        self.sow("intermediates", "embedded", x_BxTxD)
        x_BxTxD, layers = stack.apply_blocks(self.trf_blocks, x_BxTxD, cache, deterministic, self.config, start_BxT)
        x_BxTxD = lay(self.final_norm(x_BxTxD), "BTD")
        self.sow("intermediates", "normed", x_BxTxD)
        return x_BxTxD, None if cache is None else cache.advance(layers, T)

    def logits(self, x_BxTxD: Array) -> Array:
        """The output head: [B, T, D] to float32 logits [B, T, V]."""
        return lay(self._head().head(x_BxTxD), "BTV")

    def head_weight(self) -> Array:
        """The output head's matrix [V, D]; the token embedding's if they are tied."""
        return self._head().table()

    def _head(self) -> Embedding:
        return self.tok_emb if self.config.tie_embeddings else self.out_head

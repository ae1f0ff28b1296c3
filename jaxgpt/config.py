"""`GPTConfig` (what a GPT is), `ComputeConfig` (how it is run) and the published presets. Both configs are frozen,
hashable, validated dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import did_you_mean, short_repr
from jaxgpt.errors import ConfigError
from jaxgpt.fields import check, documented, from_table, setting, to_table
from jaxgpt.textfile import read_json, read_toml
from jaxgpt.tokenizer import BUILTIN, NAME_FORM, is_name

DTYPES = ("float32", "bfloat16")
PARAM_DTYPES = (*DTYPES, "int8")
ATTENTION = ("auto", "reference", "blocked", "native", "cudnn", "splash")

_BRANCH_RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape and the switches of a GPT. Fields that the book has too are named as in the book."""

    # The limits on sizes are far above anything published, and low enough that a typo or a hostile file cannot exhaust
    # memory.
    vocab_size: int = setting(50257, low=1, high=2**24, help="Number of token ids, V.")
    context_length: int = setting(1024, low=1, high=2**22, help="Most positions that the model can see at once, C.")
    emb_dim: int = setting(768, low=1, high=2**17, help="Width of the residual stream, D; a multiple of n_heads.")
    n_heads: int = setting(12, low=1, high=2**12, help="Attention heads, H.")
    n_layers: int = setting(12, low=1, high=2**12, help="Transformer blocks, L.")
    drop_rate: float = setting(
        0.1, low=0, below=1, help="Default of drop_rate_emb, drop_rate_attn and drop_rate_shortcut."
    )
    qkv_bias: bool = setting(
        True, help="Whether the query, key and value projections have biases; they do in GPT-2, but not in the book."
    )
    tie_embeddings: bool = setting(
        True, help="Whether the output head is the token embedding's matrix; it is in GPT-2, but not in the book."
    )
    bias: bool = setting(
        True, help="Whether all other linear layers and the LayerNorms have biases; nanoGPT can turn them off."
    )
    activation: str = setting(
        "gelu_tanh",
        choices=("gelu_tanh", "gelu", "relu", "silu", "tanh"),
        help="Activation of the feed-forward layer: GPT-2's tanh form of GELU, the exact form with erf, ReLU, SiLU "
        "(also called swish), or tanh.",
    )
    layer_norm_eps: float = setting(1e-5, above=0, below=1, help="Added to the variance under LayerNorm's square root.")
    # __post_init__ fills in derived defaults, so readers of a config always find a number.
    ffn_dim: int = setting(derived="4 * emb_dim", low=1, high=2**20, help="Width of the feed-forward layer, F.")
    # Brown et al. only say "alternating dense and locally banded sparse attention patterns [...] similar to the Sparse
    # Transformer"; a band is the local half of the Sparse Transformer's pattern, without its strides.
    attention_pattern: str = setting(
        "dense",
        choices=("dense", "alternating"),
        help="In dense layers, each position attends to itself and to all positions before it. With alternating, that "
        "holds for layers 0, 2, 4, ...; layers 1, 3, 5, ... see a band of attention_window positions, as in GPT-3 "
        "(Brown et al. 2020, section 2.1).",
    )
    attention_window: int = setting(
        256,
        low=1,
        high=2**22,
        help="Positions that a query of a banded layer sees: its own and those just before it. The GPT-3 paper does "
        "not say how many; 256 is the width in GPT-Neo, its open replication (Black et al. 2021).",
    )
    # These two have transformers' names.
    scale_attn_weights: bool = setting(
        True, help="Whether attention's scores are divided by the square root of a head's width."
    )
    scale_attn_by_inverse_layer_idx: bool = setting(
        False,
        help="Whether attention's scores in layer i, counted from 0, are also divided by i + 1, as in Stanford's "
        "GPT-2s, BioMedLM and CodeParrot.",
    )
    drop_rate_emb: float = setting(derived="drop_rate", low=0, below=1, help="Dropout after the sum of the embeddings.")
    drop_rate_attn: float = setting(derived="drop_rate", low=0, below=1, help="Dropout on the attention weights.")
    drop_rate_shortcut: float = setting(derived="drop_rate", low=0, below=1, help="Dropout on each residual branch.")
    embedding_std: float = setting(
        0.02,
        above=0,
        high=10,
        help="Standard deviation of the initial token embeddings; position embeddings get half of it. GPT-2 uses 0.02. "
        "The book uses PyTorch's 1.0, with which a tied head would start out absurdly confident.",
    )
    tokenizer: str = setting(
        "gpt2",
        words="gpt2, bytes, none, or a name by content",
        help="Tokenizer of the text, by name; checkpoints store it, and the files of one that is not in the package. "
        "In a config file or --set, also what jaxgpt.get_tokenizer reads: a directory, a file, or a name on the hub.",
    )

    def __post_init__(self):
        derived = {"ffn_dim": lambda: 4 * self.emb_dim} | dict.fromkeys(_BRANCH_RATES, lambda: self.drop_rate)
        check(self, only=("emb_dim", "drop_rate"))  # before anything is derived from them
        for name, default in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())
        check(self)
        if self.emb_dim % self.n_heads:
            raise ConfigError(f"emb_dim must be a multiple of n_heads: {self.emb_dim} is not one of {self.n_heads}")
        if not is_name(self.tokenizer):
            raise ConfigError(
                f"tokenizer must be {NAME_FORM} (jaxgpt.get_tokenizer(path).name), not {short_repr(self.tokenizer)}"
                f"{did_you_mean(self.tokenizer, BUILTIN)}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.emb_dim // self.n_heads

    @property
    def banded_layers(self) -> range:
        """The layers whose attention is banded; none if the window covers the whole context."""
        banded = self.attention_pattern == "alternating" and self.attention_window < self.context_length
        return range(1, self.n_layers if banded else 0, 2)

    @property
    def attention_scales(self) -> tuple[float, ...]:
        """What each layer multiplies its scores q k^T by, length L."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        by_depth = self.scale_attn_by_inverse_layer_idx
        return tuple(scale / (i + 1) if by_depth else scale for i in range(self.n_layers))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """Returns a published configuration by name, with `overrides` applied; `PRESETS` has the names.

        Raises:
            ConfigError: for an unknown name or an invalid override.
        """
        return cls.from_fields({**overrides, "preset": name}, source=f"preset {name}")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> GPTConfig:
        """Builds a config from plain values, refusing keys that are not fields.

        Raises:
            ConfigError: naming `source`, and the unknown key or the invalid field.
        """
        return from_table(cls, fields, source)

    @classmethod
    def from_file(cls, path: str | Path) -> GPTConfig:
        """Reads a config from the `[model]` table of a TOML file, or from a JSON object.

        A `preset` key in the table starts from that preset; the other keys override it.

        Raises:
            ConfigError: if the file is missing, does not parse, or holds an unknown key or invalid field.
        """
        fields = read_toml(path).get("model") if Path(path).suffix != ".json" else read_json(path)
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: expected a [model] table (TOML) or one object (JSON)")
        return cls.from_fields(fields, source=str(path))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], source: str) -> GPTConfig:
        """Like `from_dict`, except that a `preset` key may name a preset for the other keys to override, and that
        `tokenizer` may be anything that `get_tokenizer` takes."""
        if isinstance(given := fields.get("tokenizer"), str) and not is_name(given):
            from jaxgpt.tokenizer import get_tokenizer  # here, because it needs NumPy

            try:
                fields = {**fields, "tokenizer": get_tokenizer(given).name}
            except ConfigError as error:
                raise ConfigError(f"{source}: tokenizer: {error}") from None
        if "preset" not in fields:
            return cls.from_dict(fields, source=source)
        name = fields["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            hint = did_you_mean(name, PRESETS)
            raise ConfigError(f"{source}: no preset {short_repr(name)}{hint} (known: {', '.join(PRESETS)})")
        overrides = {key: value for key, value in fields.items() if key != "preset"}
        return cls.from_dict({**PRESETS[name], **overrides}, source=source)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON or TOML."""
        return to_table(self)

    def replace(self, **changes: Any) -> GPTConfig:
        """Returns a copy with fields changed. `ffn_dim` and the branch dropout rates follow `emb_dim` and `drop_rate`
        if they had their default values."""
        fields = self.to_dict()
        if self.ffn_dim == 4 * self.emb_dim:
            fields["ffn_dim"] = None
        for name in _BRANCH_RATES:
            if fields[name] == self.drop_rate:
                fields[name] = None
        return type(self).from_dict({**fields, **changes})


@documented
@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a GPT is run. Except for rounding, none of these fields changes what it computes."""

    dtype: str = setting(
        "float32",
        choices=DTYPES,
        help="Type of the operands of matrix products. Products accumulate in float32, and LayerNorm, softmax, logits "
        "and loss are always float32.",
    )
    activation_dtype: str = setting(
        "float32",
        choices=DTYPES,
        help="Type of the residual stream and of all that passes from one layer to the next, in which devices also "
        "exchange what mesh.tensor adds up. bfloat16 halves what is kept, moved and sent, and costs accuracy.",
    )
    param_dtype: str = setting(
        "float32",
        choices=PARAM_DTYPES,
        help="Type in which parameters are initialised and stored; only float32 can be trained, but LoRA adapters may "
        "belong to a bfloat16 model. With int8, matrices are int8 with one float32 weight_scale per output, and all "
        "other parameters are float32.",
    )
    scan_layers: bool = setting(
        False,
        help="Whether to scan over one block with stacked parameters [L, ...] instead of tracing L blocks, so that "
        "compile time does not grow with depth.",
    )
    remat: str = setting(
        "none",
        choices=("none", "block", "dots"),
        help="What the backward pass recomputes instead of storing: nothing, whole blocks, or everything except the "
        "linear layers' products (dots).",
    )
    custom_derivatives: bool = setting(
        True,
        help="Whether to use hand-written derivatives, which are the fastest in reverse mode. Forward mode (jax.jvp, "
        "jax.jacfwd, jax.hessian) needs them off; the derivatives are then JAX's own.",
    )
    attention: str = setting(
        "auto",
        choices=ATTENTION,
        help="What computes attention: plain XLA (reference), XLA in blocks of queries (blocked), or one kernel, "
        "ours on CPUs (native), cuDNN's on NVIDIA GPUs (cudnn) or Splash on TPUs (splash). What is asked for by name "
        "raises where it cannot compute what is needed: cuDNN and Splash have no float32 and no dropout of the "
        "attention weights, and native and Splash no decoding with a cache. The default, auto, takes the platform's "
        "kernel for whole sequences wherever that can, and else blocked.",
    )
    native_sequences: bool = setting(
        False,
        help="Whether a CPU computes attention over whole sequences, and multiplies large matrices, with the C++ "
        "kernel, as far as AVX2, AVX-512, AMX or Intel's MKL make that faster than XLA. jaxgpt.prepare turns it on "
        "there, and so does the trainer for a new run, which keeps to it. It has no second derivatives, "
        'remat="dots" computes its products again, and it is never saved with a model.',
    )
    native_kernel: bool = setting(
        False,
        help="Whether decoding on a CPU uses the C++ kernel of jaxgpt.cpu.kernel. jaxgpt.prepare turns it "
        "on where the kernel is built; it is not for training, and is never saved.",
    )

    def __post_init__(self):
        check(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> ComputeConfig:
        """Builds a config from plain values, refusing keys that are not fields.

        Raises:
            ConfigError: naming `source`, and the unknown key or the invalid field.
        """
        return from_table(cls, fields, source)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON or TOML."""
        return to_table(self)

    def replace(self, **changes: Any) -> ComputeConfig:
        """Returns a copy with fields changed."""
        return type(self).from_dict({**self.to_dict(), **changes})

    def portable(self) -> ComputeConfig:
        """Returns a copy without what other machines may lack: the native kernel, and attention by name."""
        return self.replace(native_sequences=False, native_kernel=False, attention="auto")


def _sizes(n_layers: int, emb_dim: int, n_heads: int, **more: Any) -> dict[str, Any]:
    return {"n_layers": n_layers, "emb_dim": emb_dim, "n_heads": n_heads, **more}


_BOOK = {"qkv_bias": False, "tie_embeddings": False}
_GPT3 = {"context_length": 2048, "drop_rate": 0.0, "attention_pattern": "alternating"}

# GPT-2: Radford et al. 2019, table 2 (the parameter counts there, 117M to 1542M, are an early miscount by the
# authors). The book's variants untie the head and drop the Q/K/V biases.
# GPT-3: Brown et al. 2020, table 2.1, except where the heads do not divide d_model: 13B has d_model 5120 (the table
# says 5140) and 1.3B has 16 heads of 128 (the table says 24). Section 2.1 describes the alternating attention.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": _sizes(12, 768, 12),
    "gpt2-medium": _sizes(24, 1024, 16),
    "gpt2-large": _sizes(36, 1280, 20),
    "gpt2-xl": _sizes(48, 1600, 25),
    "book-124m": _sizes(12, 768, 12, **_BOOK),
    "book-355m": _sizes(24, 1024, 16, **_BOOK),
    "book-774m": _sizes(36, 1280, 20, **_BOOK),
    "book-1558m": _sizes(48, 1600, 25, **_BOOK),
    "gpt3-125m": _sizes(12, 768, 12, **_GPT3),
    "gpt3-350m": _sizes(24, 1024, 16, **_GPT3),
    "gpt3-760m": _sizes(24, 1536, 16, **_GPT3),
    "gpt3-1.3b": _sizes(24, 2048, 16, **_GPT3),
    "gpt3-2.7b": _sizes(32, 2560, 32, **_GPT3),
    "gpt3-6.7b": _sizes(32, 4096, 32, **_GPT3),
    "gpt3-13b": _sizes(40, 5120, 40, **_GPT3),
    "gpt3-175b": _sizes(96, 12288, 96, **_GPT3),
}

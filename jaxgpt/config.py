"""`GPTConfig`: what a GPT is, as a frozen, hashable, validated dataclass; and the published presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import check_type, did_you_mean, short_repr
from jaxgpt.errors import ConfigError
from jaxgpt.textfile import read_json, read_toml

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
DTYPES = ("float32", "bfloat16")
PARAM_DTYPES = (*DTYPES, "int8")
TOKENIZERS = ("gpt2", "bytes")
ATTENTION_PATTERNS = ("dense", "alternating")
REMAT_POLICIES = ("none", "block", "dots")

# Far above anything published, far below what would exhaust memory by a typo or a hostile file.
_SIZE_LIMITS = {
    "vocab_size": 2**24,
    "context_length": 2**22,
    "emb_dim": 2**17,
    "n_heads": 2**12,
    "n_layers": 2**12,
    "ffn_dim": 2**20,
    "attention_window": 2**22,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape and the switches of a GPT. Field names are the book's where the book has them.

    Attributes:
        vocab_size: number of token ids, V.
        context_length: most positions the model can see at once, C.
        emb_dim: width of the residual stream, D.
        n_heads: attention heads, H; must divide `emb_dim`.
        n_layers: transformer blocks, L.
        drop_rate: default of the three dropout rates below.
        qkv_bias: whether the query, key and value projections have biases. (GPT-2: yes; the book: no.)
        tie_embeddings: whether the output head is the token embedding. (GPT-2: yes; the book: no.)
        bias: whether all other linear layers and the LayerNorms have biases. (nanoGPT can switch them off.)
        activation: "gelu_tanh" (GPT-2), "gelu" (exact, by erf) or "relu".
        layer_norm_eps: added to the variance inside the root.
        ffn_dim: width of the feed-forward layer, F; by default 4 * `emb_dim`.
        attention_pattern: "dense" (every position sees all before it, in every layer), or "alternating": dense in
            layers 0, 2, 4, ... and in a band in layers 1, 3, 5, ..., as GPT-3 has it (Brown et al. 2020, section
            2.1). The paper says no more than "alternating dense and locally banded sparse attention patterns [...]
            similar to the Sparse Transformer"; a band is the local half of that one's pattern, without its strides.
        attention_window: positions that a banded layer's query sees: itself and those just before it. The paper does
            not give GPT-3's; 256 is that of GPT-Neo, its open replication (Black et al. 2021). Unused where dense.
        drop_rate_emb: dropout after the embedding sum.
        drop_rate_attn: dropout on the attention weights.
        drop_rate_shortcut: dropout on each residual branch.
        param_dtype: type the parameters are initialised and stored in. "int8", not for training, is that of the
            matrices, each with a float32 `weight_scale` for every output; the other parameters are float32 then.
        dtype: type of the operands of matrix products. Everything else, the residual stream, LayerNorm,
            softmax, logits and loss, is float32 always, and products accumulate in float32.
        embedding_std: standard deviation that token embeddings are initialised with; position embeddings have
            half of it. (GPT-2: 0.02; the book: PyTorch's 1.0, with which a tied head would start absurdly sure.)
        tokenizer: name for `jaxgpt.get_tokenizer`; it travels with a checkpoint.
        scan_layers: one scanned block with parameters stacked on a leading axis [L, ...] instead of L
            blocks: compile time no longer grows with depth.
        remat: what the backward pass recomputes instead of storing: "none", whole blocks ("block"), or
            everything but the linear layers' products ("dots").
        native_kernel: on a CPU, products of few rows by the kernel of `jaxgpt.cpu.kernel`. `jaxgpt.prepare` sets it
            where that is built; it is not for training, and not saved.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = True
    tie_embeddings: bool = True
    bias: bool = True
    activation: str = "gelu_tanh"
    layer_norm_eps: float = 1e-5
    # The None defaults are resolved in __post_init__, so a reader always finds a number.
    ffn_dim: int = None  # type: ignore[assignment]
    attention_pattern: str = "dense"
    attention_window: int = 256
    drop_rate_emb: float = None  # type: ignore[assignment]
    drop_rate_attn: float = None  # type: ignore[assignment]
    drop_rate_shortcut: float = None  # type: ignore[assignment]
    param_dtype: str = "float32"
    dtype: str = "float32"
    embedding_std: float = 0.02
    tokenizer: str = "gpt2"
    scan_layers: bool = False
    remat: str = "none"
    native_kernel: bool = False

    def __post_init__(self):
        derived = {"ffn_dim": lambda: 4 * self.emb_dim} | dict.fromkeys(_BRANCH_RATES, lambda: self.drop_rate)
        for name in ("emb_dim", "drop_rate"):
            self._check_type(name)  # before anything is derived from it
        for name, default in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default())
        self._validate()

    @property
    def head_dim(self) -> int:
        """Width of one attention head, K."""
        return self.emb_dim // self.n_heads

    @property
    def banded_layers(self) -> range:
        """The layers whose attention is banded; none where the band would hold the whole context."""
        banded = self.attention_pattern == "alternating" and self.attention_window < self.context_length
        return range(1, self.n_layers if banded else 0, 2)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """A published configuration by name, with any field overridden; see `PRESETS` for the names.

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
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                raise ConfigError(f"{source}: unknown key {short_repr(key)}{did_you_mean(key, known)}")
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

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
        """Like `from_dict`, but a `preset` key names the preset that the other keys override."""
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
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> GPTConfig:
        """A copy with fields changed; `ffn_dim` and the branch dropout rates that stood at their
        defaults follow `emb_dim` and `drop_rate`."""
        fields = self.to_dict()
        if self.ffn_dim == 4 * self.emb_dim:
            fields["ffn_dim"] = None
        for name in _BRANCH_RATES:
            if fields[name] == self.drop_rate:
                fields[name] = None
        return type(self).from_dict({**fields, **changes})

    def _check_type(self, name: str) -> None:
        check_type(name, getattr(self, name), _FIELD_TYPES[name])

    def _validate(self) -> None:
        for name in _FIELD_TYPES:
            self._check_type(name)
        for name, limit in _SIZE_LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name} must be from 1 to {limit}, not {short_repr(getattr(self, name))}")
        for name in ("drop_rate", *_BRANCH_RATES):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {short_repr(getattr(self, name))}")
        if not 0 < self.layer_norm_eps < 1:
            raise ConfigError(f"layer_norm_eps must lie between 0 and 1, not {short_repr(self.layer_norm_eps)}")
        if not 0 < self.embedding_std <= 10:
            raise ConfigError(f"embedding_std must be above 0 and at most 10, not {short_repr(self.embedding_std)}")
        if self.emb_dim % self.n_heads:
            raise ConfigError(f"emb_dim must be a multiple of n_heads: {self.emb_dim} is not one of {self.n_heads}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                hint = did_you_mean(value, allowed)
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {short_repr(value)}{hint}")


_FIELD_TYPES = {field.name: str(field.type) for field in dataclasses.fields(GPTConfig)}
_BRANCH_RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")
_CHOICES = {
    "activation": ACTIVATIONS,
    "attention_pattern": ATTENTION_PATTERNS,
    "param_dtype": PARAM_DTYPES,
    "dtype": DTYPES,
    "tokenizer": TOKENIZERS,
    "remat": REMAT_POLICIES,
}


def _sizes(n_layers: int, emb_dim: int, n_heads: int, **more: Any) -> dict[str, Any]:
    return {"n_layers": n_layers, "emb_dim": emb_dim, "n_heads": n_heads, **more}


_BOOK = {"qkv_bias": False, "tie_embeddings": False}
_GPT3 = {"context_length": 2048, "drop_rate": 0.0, "attention_pattern": "alternating"}

# GPT-2: Radford et al. 2019, table 2 (the paper's parameter counts there, 117M to 1542M, are its own early
# miscount). The book's variants untie the head and drop the Q/K/V biases.
# GPT-3: Brown et al. 2020, table 2.1, except where its row does not divide: 13B has d_model 5120 (the table
# says 5140) and 1.3B has 16 heads of 128 (the table says 24). Section 2.1 has the alternating attention.
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

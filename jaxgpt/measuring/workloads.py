"""The workloads of `jaxgpt benchmark`: what is measured, and the speed that the machine's limits allow it."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxgpt import accounting
from jaxgpt.config import GPTConfig

# Ids of a prompt, and ids to continue it with.
PROMPT, NEW = 32, 128
# Ids of a text to continue with lookup, and ids per reading there.
LOOKUP_PROMPT, LOOKUP = 128, 8
QUESTIONS = 100
# Batches per repetition.
FED = 50
CHARACTER_MODEL = {
    "vocab_size": 65,
    "context_length": 256,
    "emb_dim": 384,
    "n_heads": 6,
    "n_layers": 6,
    "drop_rate": 0.2,
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Something to measure.

    Attributes:
        kind: "decode" (`PROMPT` ids in, `NEW` ids out), "prompt" (`length` ids in, one out: the time to the first
            token), "copy" and "mislead" (`LOOKUP_PROMPT` ids in, `NEW` out, with lookup: a text that repeats its prompt
            with changes, and one that misleads every guess), "forward" (logits at every position), "score" (the
            `questions` of a benchmark), "train" (a whole optimizer step), "feed" (batches of a token file, without a
            model), or one of `LIMITS`.
        preset: the model; "character" is `CHARACTER_MODEL`.
        dtype: type of the parameters while decoding, and of the operands of matrix products.
        batch: number of rows; of questions to score.
        length: tokens per row.
        platform: where it runs, as JAX names it.
    """

    kind: str
    preset: str = "gpt2"
    dtype: str = "float32"
    batch: int = 1
    length: int = 1024
    platform: str = "cpu"

    @property
    def name(self) -> str:
        """Its name on the command line."""
        if self.kind in ("read", "launch"):
            return self.kind
        if self.kind == "matmul":
            return f"matmul-{self.dtype}"
        model = "character-" if self.preset == "character" else ""
        if self.kind in ("decode", "copy", "mislead", "score"):
            size = f"{self.batch}"
        else:
            size = f"{self.length}" if self.kind == "prompt" else f"{self.batch}x{self.length}"
        if self.kind == "feed":
            return f"{self.kind}-{size}"
        return f"{model}{self.kind}-{size}-{self.dtype}"

    @property
    def prompt_length(self) -> int:
        """Ids that each row of a workload that generates starts with."""
        if self.kind == "prompt":
            return self.length
        return PROMPT if self.kind == "decode" else LOOKUP_PROMPT

    @property
    def new_tokens(self) -> int:
        """Ids that each row of a workload that generates gets."""
        return 1 if self.kind == "prompt" else NEW

    @property
    def tokens(self) -> int:
        """Tokens that one repetition generates, reads or trains on; a question's prompt counts for each of its
        continuations, as if it were read so often."""
        if self.kind == "score":
            return sum(
                len(prompt) + len(ids) for prompt, choices in zip(*questions(self), strict=True) for ids in choices
            )
        times = FED if self.kind == "feed" else 1
        return times * self.batch * (self.new_tokens if self.kind in ("decode", "copy", "mislead") else self.length)

    def config(self) -> GPTConfig:
        """The model's config."""
        if self.preset == "character":
            return GPTConfig(**CHARACTER_MODEL)  # type: ignore[arg-type]
        return GPTConfig.preset(self.preset, drop_rate=0.0)


def questions(work: Workload) -> tuple[list[Any], list[list[Any]]]:
    """Prompts, and four continuations of each, of random ids; of HellaSwag's lengths (80 tokens together, with a
    standard deviation of 30)."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompts, continuations = [], []
    for total in np.clip(rng.normal(80, 30, work.batch), 24, 170).astype(int):
        about = int(total * rng.uniform(0.2, 0.4))
        lengths = np.maximum(2, about + rng.integers(-3, 4, 4))
        prompts.append(rng.integers(0, work.config().vocab_size, total - about))
        continuations.append([rng.integers(0, work.config().vocab_size, length) for length in lengths])
    return prompts, continuations


# The kinds of workloads that measure what the machine can do at most.
LIMITS = ("read", "matmul", "launch")


def workloads(preset: str, platform: str = "cpu") -> list[Workload]:
    """All workloads for a preset on a platform, starting with the machine's limits."""
    if platform != "cpu":
        return [dataclasses.replace(work, platform=platform) for work in _on_accelerators(preset, platform)]
    return [
        Workload("read"),
        Workload("matmul", dtype="float32"),
        Workload("matmul", dtype="bfloat16"),
        Workload("launch"),
        *(
            Workload("decode", preset, dtype, batch)
            for batch in (1, 8, 32)
            for dtype in ("float32", "bfloat16", "int8")
        ),
        *(Workload(kind, preset, dtype) for kind in ("copy", "mislead") for dtype in ("float32", "bfloat16", "int8")),
        *(Workload("prompt", preset, dtype, 1, length) for length in (512, 1024) for dtype in ("float32", "bfloat16")),
        *(Workload("forward", preset, dtype, 4, 1024) for dtype in ("float32", "bfloat16")),
        *(Workload("score", preset, dtype, QUESTIONS) for dtype in ("float32", "bfloat16")),
        *(Workload("train", preset, dtype, 2, 512) for dtype in ("float32", "bfloat16")),
        *(Workload("train", "character", dtype, 32, 256) for dtype in ("float32", "bfloat16")),
        Workload("feed", preset, batch=64, length=1024),
    ]


def _on_accelerators(preset: str, platform: str) -> list[Workload]:
    tensor_cores = ("tf32",) if platform == "gpu" else ()
    return [
        Workload("read"),
        *(Workload("matmul", dtype=dtype) for dtype in ("float32", *tensor_cores, "bfloat16")),
        Workload("launch"),
        *(Workload("decode", preset, "bfloat16", batch) for batch in (1, 8, 64)),
        Workload("prompt", preset, "bfloat16", 1, 1024),
        *(Workload("forward", preset, dtype, 32, 1024) for dtype in ("float32", "bfloat16")),
        Workload("score", preset, "bfloat16", QUESTIONS),
        Workload("train", preset, "bfloat16", 32, 1024),
        Workload("train", "character", "bfloat16", 64, 256),
    ]


def limit(work: Workload, read_bytes_per_s: float, flops_per_s: dict[str, float]) -> tuple[float, str] | None:
    """Returns (tokens/s that the machine allows, the formula), or None if no limit applies."""
    config = work.config()
    if work.kind in ("decode", "copy", "mislead"):
        # Embeddings are looked up, not read, except that a tied one is read as the head.
        counts, size = accounting.count_parameters(config), accounting.parameter_bytes(config, work.dtype)
        unread = counts.pos_emb + (0 if config.tie_embeddings else counts.tok_emb)
        weights = size - unread * size / counts.total
        cache_dtype = "float32" if work.platform == "cpu" else work.dtype  # see `model.default_dtype`
        mean_length = work.prompt_length + work.new_tokens // 2
        cache = accounting.cache_bytes(config, work.batch, mean_length, cache_dtype)
        rate, formula = (
            work.batch * read_bytes_per_s / (weights + cache),
            "read bandwidth / (bytes of weights + of the mean cache)",
        )
        if work.kind == "copy":
            return LOOKUP * rate, f"ids per reading, {LOOKUP} x {formula}"
        return rate, f"rows x {formula}"
    if work.kind == "score":
        prompts, choices = questions(work)
        scored = sum(len(ids) for group in choices for ids in group)
        whole, head = accounting.forward_flops(config, 1, 1).linear, 2 * config.vocab_size * config.emb_dim
        needed = (sum(map(len, prompts)) + scored) * (whole - head) + scored * head
        formula = "tokens x matrix product FLOP/s / FLOPs that read each prompt once and score what follows it"
        return work.tokens * flops_per_s[work.dtype] / needed, formula
    if work.kind == "feed":
        return read_bytes_per_s / 2, "read bandwidth / 2 bytes per id"
    if work.kind == "prompt":
        whole, head = accounting.forward_flops(config, 1, work.length).linear, 2 * config.vocab_size * config.emb_dim
        needed = whole - (work.length - 1) * head + accounting.causal_attention_flops(config, 1, work.length)
        formula = "tokens x matrix product FLOP/s / FLOPs that read the prompt, causal, with one position's logits"
        return work.length * flops_per_s[work.dtype] / needed, formula
    if work.kind in ("forward", "train"):
        passes = 3 if work.kind == "train" else 1
        linear = accounting.forward_flops(config, work.batch, work.length).linear
        needed = passes * (linear + accounting.causal_attention_flops(config, work.batch, work.length))
        factor = "3 x " if passes == 3 else ""
        formula = f"tokens x matrix product FLOP/s / ({factor}FLOPs of a forward pass, causal)"
        return work.tokens * flops_per_s[work.dtype] / needed, formula
    return None

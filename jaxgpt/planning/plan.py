"""What training and decoding need of a TPU pod, without one: memory, operations, bytes moved, and the time they imply.

With the extra [tpu], XLA compiles the step that `jaxgpt train` runs, and `generation/decode.py`'s, for the chips of
the pod, from shapes alone; without it the figures are formulae. Either way the time is a roofline's: each chip's
operations, its memory's traffic and its links' traffic at full speed, all three at once at best and one after another
at worst.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt import accounting
from jaxgpt.checks import did_you_mean
from jaxgpt.config import PRESETS
from jaxgpt.errors import ConfigError
from jaxgpt.parallel import AXES, MeshConfig
from jaxgpt.textfile import read_toml
from jaxgpt.training import TrainConfig, override

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, by its documentation.

    Attributes:
        flops: peak of matrix products in bfloat16, operations a second.
        hbm_bytes: main memory.
        hbm_bandwidth: of that, bytes a second.
        link_bandwidth: of one link to a neighbour, one way, bytes a second. A torus axis has two.
        ring: what a slice's axis must be a multiple of to close to a ring.
        most: chips of the largest slice.
        slices: those smaller than `ring` along some axis; beyond, any axes that are multiples of it.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    ring: int
    most: int
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Operations, memory and slices: https://cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e). Links: the table in "How to
# Scale Your Model", part 2, https://jax-ml.github.io/scaling-book/tpus, which agrees with the two-way totals of
# Google's pages for v5e (400 GB/s), v5p (1,200) and v6e (800).
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 4.5e10, 4, 4096, _DEEP),
    "v5e": Chip(197e12, 16 * GIB, 0.819e12, 5e10, 16, 256, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 1e11, 4, 6144, _DEEP),
    "v6e": Chip(918e12, 32 * GIB, 1.64e12, 1e11, 16, 256, _FLAT),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod: "v5e:4x8" is 32 chips of v5e."""

    name: str
    chip: Chip
    axes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Chips."""
        return math.prod(self.axes)

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Reads "v5e:4x8".

        Raises:
            ConfigError: for a chip or a slice that there is not; says which there are.
        """
        kind, _, shape = name.partition(":")
        if kind not in CHIPS:
            raise ConfigError(f"no TPU {kind!r}{did_you_mean(kind, CHIPS)} (known: {', '.join(CHIPS)}, as in v5e:4x8)")
        chip, axes = CHIPS[kind], tuple(int(n) for n in shape.split("x") if n.isdecimal())
        rings = chip.slices is _DEEP and re.fullmatch(r"\d+x\d+x\d+", shape) and not any(n % chip.ring for n in axes)
        if shape not in chip.slices and not (rings and 0 < math.prod(axes) <= chip.most):
            more = f", or AxBxC of multiples of {chip.ring}, up to {chip.most:,} chips" if chip.slices is _DEEP else ""
            raise ConfigError(f"{kind} has no slice {shape!r} (known: {', '.join(chip.slices)}{more})")
        return cls(name, chip, axes)

    def bandwidth(self, spanned: Sequence[int]) -> float:
        """Bytes a second that a chip can send in a group that spans so many chips of each axis: two links an axis
        where it closes to a ring, and one where it does not, or is not spanned whole."""
        chip = self.chip
        links = sum(
            2 if n == axis and n % chip.ring == 0 else 1 for n, axis in zip(spanned, self.axes, strict=True) if n > 1
        )
        return max(1, links) * chip.link_bandwidth


@dataclasses.dataclass
class Cost:
    """What one step (of training, or a token a row of decoding) costs a chip.

    Attributes:
        memory: bytes by what they hold.
        flops: operations of the matrix products.
        hbm_bytes: read from and written to HBM.
        wire_bytes: sent to other chips, by the kind of collective.
        wire_seconds: what that takes, one collective after another.
        does_not_fit: the compiler's reason, where it could not place the program.
    """

    memory: dict[str, float]
    flops: float
    hbm_bytes: float
    wire_bytes: dict[str, float]
    wire_seconds: float
    does_not_fit: str = ""


def compiler_available() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def resolve(
    source: str, topology: Topology, mesh: str | None = None, overrides: Sequence[str] = (), batch: int | None = None
) -> tuple[TrainConfig, dict[str, Any]]:
    """The run to plan, and which of its fields the plan chose because the config does not say.

    Args:
        source: a preset's name, or a TOML file.
        topology: the slice.
        mesh: as in `--mesh`; default: the config's, and if it has none, fsdp=-1.
        overrides: as in `--set`.
        batch: rows a step; default: the config's, and if it has none, one a part of the batch.

    Raises:
        ConfigError: for a config that is not good, or a mesh that does not fit the slice, the model or the batch.
    """
    tables = override({"model": {"preset": source}} if source in PRESETS else read_toml(source), overrides)
    if mesh is not None:
        tables["mesh"] = dataclasses.asdict(MeshConfig.parse(mesh))
    elif not tables["mesh"]:
        tables["mesh"] = {"fsdp": -1}
    if batch is not None:
        tables["train"]["batch_size"] = batch
    # A deep model that stores everything, or unrolls its layers, is no plan.
    chosen: dict[str, Any] = {}
    for key, value in {"scan_layers": True, "remat": "block", "dtype": "bfloat16"}.items():
        if key not in tables["compute"]:
            chosen[f"compute.{key}"] = tables["compute"][key] = value
    data, fsdp, tensor = MeshConfig.from_dict(tables["mesh"], f"{source} [mesh]").resolve(topology.size)
    if data * fsdp * tensor != topology.size:
        raise ConfigError(
            f"a mesh of data={data},fsdp={fsdp},tensor={tensor} has {data * fsdp * tensor} chips, and {topology.name} "
            f"{topology.size}: they must be equal (-1 for one axis makes them so)"
        )
    tables["mesh"] = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if "batch_size" not in tables["train"]:
        rows = data * fsdp * tables["train"].get("grad_accumulation", 1)
        chosen["batch_size"] = tables["train"]["batch_size"] = rows
    config = TrainConfig.from_dict(tables, source)
    check(config)
    if "loss_chunk" not in tables["train"]:
        # Logits in float32 for as many positions as a gibibyte a chip holds. A chunk more is an exchange more.
        rows = config.batch_size // config.grad_accumulation
        positions = int(GIB // (4 * rows / (data * fsdp) * config.model.vocab_size / tensor))
        if positions < config.T:
            chosen["loss_chunk"] = rows * max(1, positions)
            config = dataclasses.replace(config, loss_chunk=chosen["loss_chunk"])
    return config, chosen


def check(config: TrainConfig, rows: int | None = None) -> None:
    """Raises ConfigError unless the mesh divides the model, and the rows (default: a micro-batch's)."""
    from jax.sharding import AbstractMesh

    from jaxgpt.parallel import sharding

    rows = config.batch_size // config.grad_accumulation if rows is None else rows
    mesh: Any = AbstractMesh(config.mesh.resolve(0), AXES)
    sharding.check(mesh, config.model, rows)


def model_flops(config: TrainConfig) -> int:
    """Operations of a step without what is computed twice: what utilisation (MFU) is counted in."""
    return 3 * accounting.forward_flops(config.model, config.batch_size, config.T).total


def analytic_training(config: TrainConfig, topology: Topology) -> Cost:
    """A training step, from formulae. P parameters, L layers of width D; mesh d x f x t; rows x T tokens a part.

    Memory: parameters 4 P / (f t), Adam's moments 8, gradients 4; a layer's input, 4 rows T D, for each layer with
    remat "block", and else what the products give too; the widest layer's own, and the logits twice. Exchanges:
    weights gathered over f once forward and once backward in the compute type, gradients scattered in float32, and
    reduced over d; over t, two reductions a layer of [rows, T, D] in float32 forward, two backward, and one more
    where the backward pass recomputes the block (Narayanan et al. 2021, section 2.3).
    """
    model, compute, (d, f, t) = config.model, config.compute, config.mesh.resolve(0)
    L, D, F, V, T = model.n_layers, model.emb_dim, model.ffn_dim, model.vocab_size, config.T
    P, rows = accounting.count_parameters(model).total, config.batch_size / config.grad_accumulation / (d * f)
    item = accounting.DTYPE_BYTES[compute.dtype]
    tokens, shard = rows * T, P / (f * t)
    products = (5 * D + F) / t
    scores = rows * model.n_heads / t * T
    kept = tokens * 4 * (D + (0 if compute.remat == "block" else products * (1 if compute.remat == "dots" else 2)))
    positions = (
        min(T, max(1, config.loss_chunk * config.grad_accumulation // config.batch_size)) if config.loss_chunk else T
    )
    logits, layer = rows * positions * V / t * 4, (P / L) * item / t
    memory = {
        "parameters": 4 * shard,
        "optimizer": 8 * shard,
        "gradients": 4 * shard,
        "activations": L * kept + tokens * 4 * (3 * D + 2 * products) + 2 * logits + 2 * layer,
    }
    micro, passes = config.grad_accumulation, 4 if compute.remat == "block" else 3
    sent = {
        "all-gather": (2 * micro * (f - 1) / f * P / t * item, "fsdp"),
        "reduce-scatter": (micro * (f - 1) / f * P / t * 4, "fsdp"),
        "all-reduce": (2 * (d - 1) / d * 4 * shard, "data"),
        "all-reduce (tensor)": (micro * (passes + 1) * L * 2 * (t - 1) / t * tokens * D * 4, "tensor"),
    }
    hbm = 28 * shard + 2 * micro * passes * (P / t * item + L * (tokens * (2 * D + products) + scores * T / 2) * 4)
    flops = accounting.training_flops(model, config.batch_size, T, compute.remat).total / (d * f * t)
    return _analytic(config, topology, memory, flops, hbm, sent)


def analytic_decoding(config: TrainConfig, topology: Topology, rows: int) -> Cost:
    """A token for each row at the end of a full context, from formulae: bfloat16 weights, gathered over fsdp, and
    the cache of the rows and heads a chip has; two reductions a layer over tensor."""
    model, (d, f, t) = config.model, config.mesh.resolve(0)
    C, weights = model.context_length, accounting.parameter_bytes(model, "bfloat16") / t
    cache = accounting.cache_bytes(model, rows, C, "bfloat16") / (d * f * t)
    linear = accounting.forward_flops(model, rows, 1).linear
    attention = accounting.forward_flops(model, rows, C).attention / C
    sent = {
        "all-gather": ((f - 1) / f * weights, "fsdp"),
        "all-reduce (tensor)": (model.n_layers * 4 * (t - 1) / t * rows / (d * f) * model.emb_dim * 4, "tensor"),
    }
    memory = {"parameters": weights / f, "cache": cache}
    return _analytic(config, topology, memory, (linear + attention) / (d * f * t), weights + cache, sent)


def _analytic(config, topology, memory, flops, hbm, sent) -> Cost:
    """The mesh's tensor axis takes one axis of the torus, and the others share the rest."""
    d, f, t = config.mesh.resolve(0)
    axes = sorted(topology.axes)
    rest = axes[1:] if t > 1 and len(axes) > 1 else axes
    spans = {"tensor": [axes[0]], "fsdp": rest if d == 1 else rest[-1:], "data": rest if f == 1 else rest[:1]}
    seconds = 0.0
    for size, axis in sent.values():
        span = [*spans[axis], *[1] * (len(axes) - len(spans[axis]))]
        whole = dataclasses.replace(topology, axes=tuple(span))
        seconds += size / whole.bandwidth(span)
    return Cost(memory, flops, hbm, {kind: size for kind, (size, _) in sent.items() if size}, seconds)


def roofline(cost: Cost, topology: Topology, tokens: int, useful_flops: float) -> dict[str, Any]:
    """The bounds that a cost sets: seconds, tokens a second of the whole slice, and the utilisation of its peak (MFU).
    Of a program that the compiler could not place only the memory."""
    chip, total = topology.chip, sum(cost.memory.values())
    bounds: dict[str, Any] = {
        "memory_bytes": {**cost.memory, "total": total},
        "fits": not cost.does_not_fit and total <= chip.hbm_bytes,
    }
    if cost.does_not_fit:
        return bounds | {"does_not_fit": cost.does_not_fit}
    seconds = {
        "compute": cost.flops / chip.flops,
        "memory": cost.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": cost.wire_seconds,
    }
    times = {"overlapped": max(seconds.values()), "in_turn": sum(seconds.values())}
    return bounds | {
        "flops": cost.flops,
        "hbm_bytes": cost.hbm_bytes,
        "wire_bytes": cost.wire_bytes,
        "seconds": seconds | times,
        "bound_by": max(seconds, key=lambda part: seconds[part]),
        "tokens_per_s": {way: tokens / time for way, time in times.items()},
        "mfu": {way: useful_flops / topology.size / chip.flops / time for way, time in times.items()},
    }


def make_plan(
    config: TrainConfig, topology: Topology, decode_batch: int | None = None, quick: bool = False
) -> dict[str, Any]:
    """The whole plan, as plain values ready for JSON: for "training" and "decoding" the roofline of the formulae,
    "analytic", and where the compiler is installed that of the compiled program, "compiled". Bytes are bytes.

    Args:
        config: the run, of `resolve`.
        topology: the slice.
        decode_batch: rows to decode; 0 for no decoding; default: one a part of the batch.
        quick: compile with little optimisation. Memory and exchanges are about right then, traffic with HBM is not.

    Raises:
        ConfigError: if the mesh does not divide `decode_batch`.
        RuntimeError: if the compiler fails for another reason than memory.
    """
    data, fsdp, _ = config.mesh.resolve(0)
    rows = data * fsdp if decode_batch is None else decode_batch
    check(config, rows)
    tokens = config.batch_size * config.T
    parts = {"training": (analytic_training(config, topology), tokens, model_flops(config))}
    if rows:
        once = accounting.forward_flops(config.model, rows, 1).total
        parts["decoding"] = (analytic_decoding(config, topology, rows), rows, once)
    report = {
        name: {"tokens": n, "analytic": roofline(cost, topology, n, useful)}
        for name, (cost, n, useful) in parts.items()
    }
    if compiler_available():
        for name, cost in _compiled(config, topology, rows, quick).items():
            _, n, useful = parts[name]
            report[name]["compiled"] = roofline(cost, topology, n, useful)
    return report


def _compiled(config: TrainConfig, topology: Topology, rows: int, quick: bool) -> dict[str, Cost]:
    """`jaxgpt.planning.compile` in a process of its own: its devices are no others', and libtpu is loud."""
    # No TPU is touched: neither looked for in the cloud's metadata, nor kept from other processes by a lock.
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | quiet
    # The package may be found by the way this process was started.
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    task = {"config": config.to_dict(), "topology": topology.name, "decode_batch": rows, "quick": quick}
    done = subprocess.run(
        [sys.executable, "-m", "jaxgpt.planning.compile"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"the TPU compiler failed: {done.stderr.strip()[-2000:]}")
    return {name: Cost(**cost) for name, cost in json.loads(done.stdout.splitlines()[-1]).items()}

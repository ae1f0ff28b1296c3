"""Estimates what training and decoding need on a TPU pod slice or on nodes of NVIDIA GPUs, with none at hand: memory,
operations, bytes moved, and the time that follows from them.

With the extra [tpu], XLA compiles the step that `jaxgpt train` runs and that of `generation/decode.py` for the chips
of the slice, from shapes alone; without it, and for GPUs, the numbers come from formulae. Either way the time is a
roofline estimate: each chip's operations, memory traffic and link traffic run at full speed, all three overlapped at
best and one after another at worst.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt import accounting, startup
from jaxgpt.checks import did_you_mean
from jaxgpt.config import PRESETS
from jaxgpt.errors import ConfigError
from jaxgpt.parallel import AXES, MeshConfig
from jaxgpt.planning.chips import Topology
from jaxgpt.textfile import read_toml
from jaxgpt.training import TrainConfig, check_tables, override

GIB = accounting.GIB


@dataclasses.dataclass
class Cost:
    """What one step (of training, or of decoding one token per row) costs per chip.

    Attributes:
        memory: bytes by what they hold.
        flops: operations of the matrix products.
        hbm_bytes: bytes read from and written to HBM.
        wire_bytes: bytes sent to other chips, by type of collective and the axes of the mesh that it spans, such as
            "all-gather (fsdp)".
        wire_seconds: time that sending takes, one collective after another.
        does_not_fit: the compiler's reason, if the program does not fit in memory.
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
    """Returns the run to plan, and the fields that the plan chose because the config does not set them.

    Args:
        source: a preset's name, or a TOML file.
        topology: the slice.
        mesh: as in `--mesh`; default: the config's, and if it has none, fsdp=-1.
        overrides: as in `--set`.
        batch: rows per step; default: the config's, and if it has none, one row per shard of the batch.

    Raises:
        ConfigError: for an invalid config, or a mesh that does not fit the slice, the model or the batch.
    """
    if not os.path.exists(source) and source not in PRESETS and (hint := did_you_mean(source, PRESETS)):
        raise ConfigError(f"{source}: no such file or preset{hint}")
    tables = override({"model": {"preset": source}} if source in PRESETS else read_toml(source), overrides)
    check_tables(tables, source)
    if mesh is not None:
        tables["mesh"] = dataclasses.asdict(MeshConfig.parse(mesh))
    elif not tables["mesh"]:
        tables["mesh"] = {"fsdp": -1}
    if batch is not None:
        tables["train"]["batch_size"] = batch
    # A deep model that stores all activations or unrolls its layers is not worth planning.
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
    if config.lora.rank or config.freeze:
        raise ConfigError(f"{source}: a plan is for the training of whole models, without lora and freeze")
    check(config)
    if "loss_chunk" not in tables["train"]:
        # As many positions as have float32 logits of one GiB per chip. More chunks would mean more communication.
        rows = config.batch_size // config.grad_accumulation
        positions = int(GIB // (4 * rows / (data * fsdp) * config.model.vocab_size / tensor))
        if positions < config.T:
            chosen["loss_chunk"] = rows * max(1, positions)
            config = dataclasses.replace(config, loss_chunk=chosen["loss_chunk"])
    return config, chosen


def check(config: TrainConfig, rows: int | None = None) -> None:
    """Raises ConfigError unless the mesh divides the model and the rows (default: those of a micro-batch)."""
    from jaxgpt.parallel import sharding

    rows = config.batch_size // config.grad_accumulation if rows is None else rows
    sharding.check(_mesh(config), config.model, rows)


def attention(config: TrainConfig, platform: str = "tpu") -> str:
    """The backend of attention that training on TPUs or GPUs uses.

    Raises:
        ConfigError: if the config asks for one that cannot compute it.
    """
    from jaxgpt.training import attention_backend

    return attention_backend(config, _mesh(config, platform))


def _mesh(config: TrainConfig, platform: str = "tpu") -> Any:
    """The config's mesh, of devices that need not be there."""
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind=platform.upper(), num_cores=None, platform=platform)
    return AbstractMesh(config.mesh.resolve(0), AXES, abstract_device=device)


def model_flops(config: TrainConfig) -> int:
    """Operations of a step without recomputation, as the utilisation (MFU) counts them."""
    return 3 * accounting.forward_flops(config.model, config.batch_size, config.T).total


# How far the formulae for training are at most from the compiled programs of docs/scaling.md.
ANALYTIC_ERROR = {"memory": 0.39, "tokens_per_s": 0.1}


class Kernel(NamedTuple):
    """What the formulae know of a kernel of attention.

    Attributes:
        block: queries, and keys, that it takes at a time.
        lanes: float32 numbers per query in its other arrays, such as a row's sum of exponentials.
        backward_products: products of the backward pass.
        rereads: whether each block of queries reads the keys and values that it sees from HBM again.
    """

    block: int
    lanes: int
    backward_products: int
    rereads: bool


# Splash as in the compiled programs: its two backward passes both recompute the scores. cuDNN's has one such pass (Dao
# 2023, FlashAttention-2, algorithm 2); a head's keys and values stay in the GPU's L2 cache.
KERNELS = {"splash": Kernel(512, 128, 7, True), "cudnn": Kernel(128, 1, 5, False)}
# Queries that `model.attention.blocked` takes at a time.
QUERY_BLOCK = 128
# On-chip memory, where XLA keeps what fits: v5e's, by "How to Scale Your Model", part 2; taken for all chips.
VMEM = 128 * 2**20


def analytic_training(config: TrainConfig, topology: Topology) -> Cost:
    """Costs of a training step, from formulae: P parameters, L layers of width D, mesh d x f x t, and rows x T tokens
    per shard of the batch.

    Memory: parameters 4 P / (f t), Adam's moments 8 P / (f t), gradients 4 P / (f t); for each layer its input,
    rows T D / t, and except with remat "block" the results of its products too, in the activations' type; the
    activations inside the widest layer, and its products' results as operands again, in the compute type; four blocks
    of attention's scores, unless a kernel keeps them on the chip; the logits; and over f, in float32, the embedding's
    table, gathered, and its gradient, not yet scattered.

    Operations: the linear layers' as `accounting.training_flops` counts them. Attention's are those of the blocks that
    are not wholly masked: two products forward, and five backward, which recompute the scores; Splash's two backward
    passes recompute them twice, with seven products.

    HBM: `_hbm_bytes`.

    Communication: over f, weights are gathered once forward and once backward in the compute
    dtype, and gradients are scattered in float32; over d, gradients are reduced; over t, each layer gathers and
    scatters [rows, T, D] in the activations' type twice forward and twice backward, and if the backward pass recomputes
    the block gathers it twice and scatters it once more (Korthikanti et al. 2022, section 4.2.2): together they send
    what as many all-reduces would.
    """
    model, compute, (d, f, t) = config.model, config.compute, config.mesh.resolve(0)
    L, D, F, V, T = model.n_layers, model.emb_dim, model.ffn_dim, model.vocab_size, config.T
    P, rows = accounting.count_parameters(model).total, config.batch_size / config.grad_accumulation / (d * f)
    item = accounting.DTYPE_BYTES[compute.dtype]
    tokens, shard, micro = rows * T, P / (f * t), config.grad_accumulation
    products = (5 * D + F) / t
    act = accounting.DTYPE_BYTES[compute.activation_dtype]
    kept = (
        tokens * act * (D / t + (0 if compute.remat == "block" else products * (1 if compute.remat == "dots" else 2)))
    )
    logits, layer = rows * _positions(config) * V / t * 4, (P / L) * item / t
    kernel = KERNELS.get(attention(config, topology.platform))
    scores = 0 if kernel else rows * model.n_heads / t * min(QUERY_BLOCK, T) * T * 4
    memory = {
        "parameters": 4 * shard,
        "optimizer": 8 * shard,
        "gradients": 4 * shard,
        "activations": L * kept + tokens * (act * (3 * D + products) + item * products) + 2 * layer + 4 * scores,
        "embedding and logits": logits + 2 * (f > 1) * V * D / t * 4,
    }
    recomputes = compute.remat == "block"
    positions = micro * L * (t - 1) / t * tokens * D * act
    sent = {
        ("all-gather", "fsdp"): 2 * micro * (f - 1) / f * P / t * item,
        ("reduce-scatter", "fsdp"): micro * (f - 1) / f * P / t * 4,
        ("all-reduce", "data"): 2 * (d - 1) / d * 4 * shard,
        ("all-gather", "tensor"): (4 + 2 * recomputes) * positions,
        ("reduce-scatter", "tensor"): (4 + recomputes) * positions,
    }
    linear = accounting.training_flops(model, config.batch_size, T, compute.remat).linear
    forwards = 1 if compute.remat == "none" else 2
    backward = kernel.backward_products if kernel else 5
    scored = 2 * config.batch_size * D * _pairs(config, kernel) * (2 * forwards + backward)
    hbm_bytes = _hbm_bytes(config, topology.platform)
    return _analytic(config, topology, memory, (linear + scored) / (d * f * t), hbm_bytes, sent)


def _hbm_bytes(config: TrainConfig, platform: str = "tpu") -> float:
    """Bytes that a chip reads and writes in HBM per training step. The optimizer reads and writes parameters and
    moments, and reads gradients: 28 bytes per parameter. The rest happens per micro-batch and pass (forward,
    recomputation, and backward, which counts twice):

    - weights are written when gathered, and read;
    - a layer's input, its norms' results and its products' results are written and read, in the activations' type;
    - attention: `_attention_bytes`;
    - logits are written, and read for their sum and for the two gradients; each chunk of them adds to the head's.
    """
    model, compute, (d, f, t) = config.model, config.compute, config.mesh.resolve(0)
    L, D, F, V, T = model.n_layers, model.emb_dim, model.ffn_dim, model.vocab_size, config.T
    P, rows = accounting.count_parameters(model).total, config.batch_size / config.grad_accumulation / (d * f)
    passes = 4 if compute.remat == "block" else 3
    tokens = rows * T
    weights = 2 * passes * P / t * accounting.DTYPE_BYTES[compute.dtype]
    act = accounting.DTYPE_BYTES[compute.activation_dtype]
    block = 2 * passes * L * tokens * (2 * D + (5 * D + F) / t) * act
    chunks = math.ceil(T / _positions(config))
    loss = 4 * tokens * V / t * 4 + 2 * chunks * V * D / t * 4
    scores = _attention_bytes(config, platform)
    return 28 * P / (f * t) + config.grad_accumulation * (weights + block + scores + loss)


def _attention_bytes(config: TrainConfig, platform: str = "tpu") -> float:
    """Bytes that attention reads and writes in HBM per micro-batch.

    Block by block: scores are three times written or read in float32 per forward pass, to make them, to sum their
    exponentials and to weigh the values, and five times in the backward pass; there each block of queries also adds to
    the gradients of the keys and values that it sees, of which the summands and the sums are written and read, unless
    both sums fit in on-chip memory.

    In Splash, three kernels read and write per query and head: forward q, the result and the queries' positions;
    backward q, its gradient and the result's, those of the keys and values, and twice some lanes. Keys and values, or
    q and the result's gradient, are read again for each block of the others. cuDNN's are taken to do the same, but to
    read these once (`Kernel.rereads`).
    """
    model, (d, f, t), T = config.model, config.mesh.resolve(0), config.T
    rows, K = config.batch_size / config.grad_accumulation / (d * f), model.head_dim
    kernel = KERNELS.get(attention(config, platform))
    forwards, pairs = (1 if config.compute.remat == "none" else 2), _pairs(config, kernel)
    if kernel:
        item, lanes = accounting.DTYPE_BYTES[config.compute.dtype], 4 * kernel.lanes
        queries = model.n_layers * T
        again = pairs / kernel.block if kernel.rereads else queries
        forward = queries * (2 * K * item + lanes) + again * 2 * K * item
        backward = queries * (7 * K * item + 2 * lanes) + again * 4 * K * item
        return rows * model.n_heads / t * (forwards * forward + backward)
    fits = 2 * rows * T * model.emb_dim / t * 4 < VMEM
    sums = 0 if fits else 4 * 2 * K / min(QUERY_BLOCK, T)
    return rows * model.n_heads / t * pairs * 4 * (3 * forwards + 5 + sums)


def _positions(config: TrainConfig) -> int:
    """Positions of every row whose logits exist at a time: those of the chunks that `head_cross_entropy` makes."""
    if not config.loss_chunk:
        return config.T
    longest = min(config.T, max(1, config.loss_chunk * config.grad_accumulation // config.batch_size))
    return math.ceil(config.T / math.ceil(config.T / longest))


def _pairs(config: TrainConfig, kernel: Kernel | None) -> float:
    """Pairs of a query and a key, over all layers, of which attention computes the scores for one row and head: a block
    of queries meets the keys that any of them sees."""
    model, T = config.model, config.T
    block = min(kernel.block if kernel else QUERY_BLOCK, T)
    dense, band = T * (T + block) / 2, T * min(model.attention_window + block, (T + block) / 2)
    return sum(band if i in model.banded_layers else dense for i in range(model.n_layers))


def analytic_decoding(config: TrainConfig, topology: Topology, rows: int) -> Cost:
    """Costs of decoding one token per row at the end of a full context, from formulae: bfloat16 weights, gathered over
    fsdp; the cache of the rows and heads on a chip; and two reductions per layer over tensor."""
    model, (d, f, t) = config.model, config.mesh.resolve(0)
    C, weights = model.context_length, accounting.parameter_bytes(model, "bfloat16") / t
    cache = accounting.cache_bytes(model, rows, C, "bfloat16") / (d * f * t)
    linear = accounting.forward_flops(model, rows, 1).linear
    attention = accounting.forward_flops(model, rows, C).attention / C
    sent = {
        ("all-gather", "fsdp"): (f - 1) / f * weights,
        ("all-reduce", "tensor"): model.n_layers * 4 * (t - 1) / t * rows / (d * f) * model.emb_dim * 4,
    }
    memory = {"parameters": weights / f, "cache": cache}
    return _analytic(config, topology, memory, (linear + attention) / (d * f * t), weights + cache, sent)


def _analytic(config, topology, memory, flops, hbm, sent) -> Cost:
    """The cost of what is `sent`: bytes, by kind and mesh axis."""
    bandwidth = topology.mesh_bandwidth(config.mesh.resolve(0))
    seconds = sum(size / bandwidth[axis] for (_, axis), size in sent.items())
    return Cost(memory, flops, hbm, {f"{kind} ({axis})": size for (kind, axis), size in sent.items() if size}, seconds)


def roofline(cost: Cost, topology: Topology, tokens: int, useful_flops: float) -> dict[str, Any]:
    """The bounds that follow from a cost: seconds, tokens per second of the whole slice, and utilisation of its peak
    (MFU). For a program that does not fit, only the memory."""
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
    """Returns the whole plan as plain values, ready for JSON. "training" and "decoding" each hold the roofline from the
    formulae, "analytic", and if the compiler is installed, that of the program compiled for TPUs, "compiled". Sizes are
    in bytes.

    Args:
        config: the run, from `resolve`.
        topology: the slice.
        decode_batch: rows to decode; 0 for no decoding; default: one row per shard of the batch.
        quick: compile with little optimisation. Memory and communication are then about right, HBM traffic is not.

    Raises:
        ConfigError: if the mesh does not divide `decode_batch`.
        RuntimeError: if the compiler fails for a reason other than memory.
    """
    data, fsdp, _ = config.mesh.resolve(0)
    rows = data * fsdp if decode_batch is None else decode_batch
    check(config, rows)
    tokens = config.batch_size * config.T
    parts = {"training": (analytic_training(config, topology), tokens, model_flops(config))}
    if rows:
        once = accounting.forward_flops(config.model, rows, 1).total
        parts["decoding"] = (analytic_decoding(config, topology, rows), rows, once)
    report: dict[str, Any] = {
        name: {"tokens": n, "analytic": roofline(cost, topology, n, useful)}
        for name, (cost, n, useful) in parts.items()
    }
    if topology.platform == "tpu" and compiler_available():
        for name, cost in _compiled(config, topology, rows, quick).items():
            least, n, useful = parts[name]
            report[name]["compiled"] = roofline(cost, topology, n, useful)
            if name == "decoding" and not cost.does_not_fit:
                report[name]["compiled"]["times_weights_and_cache"] = cost.hbm_bytes / least.hbm_bytes
    return report


# The chips of one host of a pod: of the kind on which small models, bound by memory traffic, train fastest.
HOST = "v5p:2x2x1"


def host_takes(preset: str) -> float:
    """Tokens per second that one host of a pod takes in training, at most: the upper bound of the formulae for `HOST`,
    with 16 rows per chip."""
    topology = Topology.parse(HOST)
    config, _ = resolve(preset, topology, batch=16 * topology.size)
    cost, tokens = analytic_training(config, topology), config.batch_size * config.T
    return roofline(cost, topology, tokens, model_flops(config))["tokens_per_s"]["overlapped"]


def _compiled(config: TrainConfig, topology: Topology, rows: int, quick: bool, train: bool = True) -> dict[str, Cost]:
    """Runs `jaxgpt.planning.compile` in a separate process, because it sets up other devices and libtpu is noisy."""
    # No TPU is touched: do not look for one in the cloud's metadata, and do not lock it against other processes.
    quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    task = {"config": config.to_dict(), "topology": topology.name, "decode_batch": rows, "quick": quick, "train": train}
    done = subprocess.run(
        [sys.executable, "-m", "jaxgpt.planning.compile"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=startup.child_environment(**quiet),
    )
    if done.returncode:
        raise RuntimeError(f"the TPU compiler failed: {done.stderr.strip()[-2000:]}")
    return {name: Cost(**cost) for name, cost in json.loads(done.stdout.splitlines()[-1]).items()}

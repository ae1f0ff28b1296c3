"""Compiles training and decoding for the TPUs of a slice, from shapes alone, for `jaxgpt.planning.plan`.

Run as a program (`python -m jaxgpt.planning.compile`), it reads a task as JSON from stdin and prints costs as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.generation import DecodeState, Greedy, decode_tokens, prefill
from jaxgpt.model import GPT
from jaxgpt.parallel import BATCH, sharding
from jaxgpt.planning.chips import Topology
from jaxgpt.planning.hlo import Program
from jaxgpt.planning.plan import Cost
from jaxgpt.planning.traced import kernel_bytes, product_flops
from jaxgpt.training import TrainConfig, abstract_state, jit_step

# XLA's lowest effort takes a sixth of the time. Memory and communication come out about the same, but HBM traffic is
# two to three times as large: less is fused, and less is kept in on-chip memory.
QUICK = {"exec_time_optimization_effort": -1.0}
# Tokens per call of the compiled decoding loop, as in `generation.session`: at its start and end, XLA converts the
# cache between two layouts.
CHUNK = 32


def main() -> None:
    """Reads the task, compiles, and prints the costs."""
    task = json.load(sys.stdin)
    config, topology = TrainConfig.from_dict(task["config"]), Topology.parse(task["topology"])
    # By default a host has 2x2 chips, which do not divide a slice of one.
    host = {"chips_per_host_bounds": (1, 1, 1)} if topology.size == 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host).devices
    mesh = sharding.make_mesh(config.mesh, devices)
    cost = functools.partial(_cost, topology, mesh, QUICK if task["quick"] else {})
    costs = {"training": cost(*training(config, mesh))} if task["train"] else {}
    if rows := task["decode_batch"]:
        costs["decoding"] = cost(*decoding(config, mesh, rows), runs=CHUNK)
    print(json.dumps({name: dataclasses.asdict(cost) for name, cost in costs.items()}))


def training(config: TrainConfig, mesh: Mesh) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns the trainer's step, its arguments as shapes, and those arguments that stay in memory, by name."""
    state = abstract_state(config, mesh)
    ids = jax.ShapeDtypeStruct(
        (config.batch_size, config.T + 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(BATCH))
    )
    step = jit_step(config, mesh)
    return step, (state, ids), {"parameters": state["params"], "optimizer": state["opt_state"]}


def decoding(config: TrainConfig, mesh: Mesh, rows: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns the same as `training`, for `decode_tokens` at the end of a full context, of a model in the form that
    `generation.prepare` gives it: with layers unstacked, because a scan over them copies the cache for every token."""
    model = GPT(config.model, config.compute.replace(param_dtype="bfloat16", remat="none", scan_layers=False))
    C = model.config.context_length
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    params = sharding.abstract(params, sharding.shardings(mesh, params))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    read = functools.partial(prefill, model, slots=C, sampler=Greedy(), cache_dtype="bfloat16")
    state: DecodeState = jax.eval_shape(read, params, ints((rows, 1)), ints((rows,)), ints(()), None, ints((0,)))

    def layout(leaf: Any) -> NamedSharding:
        parts = ((BATCH,) if rows > 1 else ()) + (("tensor", None, None) if leaf.ndim > 1 else ())
        return NamedSharding(
            mesh, PartitionSpec(*(None,) * (leaf.ndim - len(parts)), *parts) if leaf.ndim else PartitionSpec()
        )

    state = sharding.abstract(state, jax.tree.map(layout, state))
    step = jax.jit(functools.partial(decode_tokens, model, chunk=CHUNK, sampler=Greedy()), donate_argnums=1)
    arguments = (params, state, ints(()))
    return step, arguments, {"parameters": params, "cache": state.memory}


def _cost(
    topology: Topology, mesh: Mesh, options: Any, step: Any, arguments: Any, kept: dict[str, Any], runs: int = 1
) -> Cost:
    """What the compiled step costs per chip; if it makes several `runs`, the cost of one."""
    memory = {name: float(sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))) for name, tree in kept.items()}
    traced = step.trace(*arguments)
    flops, in_kernels = (count(traced.jaxpr.jaxpr) / mesh.size / runs for count in (product_flops, kernel_bytes))
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Cost(memory, flops, 0, {}, 0, does_not_fit=" ".join(str(error).split())[:400])
    size = compiled.memory_analysis()
    arguments_bytes = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
    memory |= {
        "temporary": float(size.temp_size_in_bytes),
        "program and padding": float(size.generated_code_size_in_bytes + arguments_bytes - sum(memory.values())),
    }
    traffic = Program(compiled.as_text()).traffic()
    sent: dict[str, float] = {}
    seconds = 0.0
    places = [device.coords for device in mesh.devices.flat]
    for kind, wire_bytes, group in traffic.collectives.values():
        spanned = [len(set(along)) for along in zip(*(places[i][: len(topology.axes)] for i in group), strict=True)]
        name = f"{kind} ({', '.join(axes_of(group, mesh))})"
        sent[name] = sent.get(name, 0) + wire_bytes / runs
        seconds += wire_bytes / runs / topology.bandwidth(spanned)
    return Cost(memory, flops, traffic.hbm_bytes / runs + in_kernels, sent, seconds)


def axes_of(group: tuple[int, ...], mesh: Mesh) -> list[str]:
    """The axes of a mesh along which the devices of a group, numbered in the mesh's order, differ."""
    places = zip(mesh.axis_names, np.unravel_index(group, mesh.devices.shape), strict=True)
    return [str(name) for name, along in places if len(set(along.tolist())) > 1]


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


if __name__ == "__main__":
    main()

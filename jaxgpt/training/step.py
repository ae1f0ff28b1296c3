"""One training step: the state, its initial value, and the jitted function from one state to the next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.generation import as_key
from jaxgpt.model import GPT, backend_of
from jaxgpt.parallel import BATCH, sharding
from jaxgpt.training import trainable
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.loss import inputs_and_labels, model_loss
from jaxgpt.training.optimizer import clipping, make_optimizer, schedule
from jaxgpt.training.packing import separator_id

TrainState = dict[str, Any]

# Streams of random numbers that must not overlap, whatever the seed.
INIT, DROPOUT, SAMPLE, ADAPTERS = range(4)


def stream_key(config: TrainConfig, stream: int) -> Array:
    """The key of one of the run's streams of random numbers: `INIT`, `DROPOUT`, `SAMPLE` or `ADAPTERS`."""
    return jax.random.fold_in(as_key(config.seed), stream)


def init_state(config: TrainConfig, params: Any = None, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step:

        params, opt_state   the parameters that are trained (of LoRA, the adapters), and the optimizer's state
        ema_params          the moving average of these parameters, if the config asks for one
        frozen              the other parameters, if there are any (of LoRA, all that the model has)
        step                steps taken, int32
        updates             how many of them changed the parameters
        bad                 how many of the latest in a row did not

    Args:
        config: the run's config.
        params: start from these instead of drawing new ones.
        mesh: the mesh to lay it out over. Every array is created in parts: no device ever holds all of it.
    """
    if params is not None and mesh is not None:
        params = sharding.shard(params, mesh)
    layout = None if mesh is None else sharding.shardings(mesh, abstract_state(config))
    return jax.jit(functools.partial(_initial, config), out_shardings=layout)(params)


def _initial(config: TrainConfig, params: Any = None) -> TrainState:
    if params is None:
        params = GPT(config.model, config.compute).init(stream_key(config, INIT), jnp.zeros((1, 1), jnp.int32))[
            "params"
        ]
    trained, frozen = trainable.split(config, params, stream_key(config, ADAPTERS))
    state = {"params": trained, "opt_state": make_optimizer(config).init(trained)}
    if config.ema_decay:
        state["ema_params"] = trained
    if frozen:
        state["frozen"] = frozen
    return state | {name: jnp.int32(0) for name in ("step", "updates", "bad")}


def abstract_state(config: TrainConfig, mesh: Mesh | None = None) -> TrainState:
    """The shapes, types and, with a mesh, layouts of `init_state`, without allocating it."""
    state = jax.eval_shape(functools.partial(_initial, config))
    return state if mesh is None else sharding.abstract(state, sharding.shardings(mesh, state))


def saved_state(config: TrainConfig, state: TrainState) -> TrainState:
    """The part of a state that a checkpoint holds: with LoRA, the frozen model stays where the run started from."""
    return {name: part for name, part in state.items() if not (config.lora.rank and name == "frozen")}


def eval_params(config: TrainConfig, state: TrainState, average: bool = True) -> Any:
    """The parameters of the model to evaluate, sample from and export: those trained, as their moving average if there
    is one, together with the frozen ones; adapters are merged.

    Args:
        config: the run's config.
        state: its state.
        average: whether to use the moving average.
    """
    trained, frozen = state["params"], state.get("frozen", {})
    if average:
        trained = state.get("ema_params", trained)
    if not config.lora.rank:
        return trainable.whole(config, trained, frozen)
    return _jit_whole(config, sharding.mesh_of(frozen))(trained, frozen)


@functools.lru_cache(maxsize=4)  # what is compiled for one evaluation serves the next
def _jit_whole(config: TrainConfig, mesh: Mesh | None) -> Any:
    layout = None if mesh is None else sharding.shardings(mesh, abstract_state(config)["frozen"])
    return jax.jit(functools.partial(trainable.whole, config), out_shardings=layout)


def attention_backend(config: TrainConfig, mesh: Any) -> str:
    """The backend of attention that a step uses on a mesh, or None for one device; nothing is computed.

    Raises:
        ConfigError: if the config asks for one that cannot compute it.
    """
    rows, dropout = config.batch_size // config.grad_accumulation, config.model.drop_rate_attn > 0
    documents = config.separate_documents
    return backend_of(config.model, config.compute, rows, config.T, dropout, mesh, documents)


def make_step(config: TrainConfig) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """The optimizer step, not yet jitted: (state, ids [B, T + 1]) -> (state, metrics).

    Gradients are those of the mean loss over all labels that count, whatever the number of micro-batches.
    A step whose loss or gradient is not finite changes neither the parameters nor the optimizer's state.

    The metrics are "loss", "grad_norm" (before clipping), "learning_rate" and "bad", as in the state.
    """
    model, tx = GPT(config.model, config.compute), make_optimizer(config)
    rates = (config.model.drop_rate_emb, config.model.drop_rate_attn, config.model.drop_rate_shortcut)
    separator = separator_id(config.model) if config.separate_documents else None

    def losses_and_grads(trained: Any, frozen: Any, ids_BxT1: Array, key: Array) -> tuple[Array, Array, Any]:
        def losses(trained):
            dropout_key = key if any(rates) else None
            inputs_BxT, labels_BxT = inputs_and_labels(ids_BxT1, records=bool(config.template))
            with trainable.applied(config, trained, frozen) as params:
                return model_loss(
                    model,
                    params,
                    inputs_BxT,
                    labels_BxT,
                    chunk=config.loss_chunk,
                    dropout_key=dropout_key,
                    separator=separator,
                )

        (total, count), grads = jax.value_and_grad(losses, has_aux=True)(trained)
        return total, count, grads

    def accumulated(trained: Any, frozen: Any, ids_BxT1: Array, key: Array) -> tuple[Array, Array, Any]:
        if config.grad_accumulation == 1:
            return losses_and_grads(trained, frozen, ids_BxT1, key)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, losses_and_grads(trained, frozen, *micro)), None

        # Rows are taken with a stride, so that a micro-batch has rows on every device.
        micro_ids = ids_BxT1.reshape(-1, config.grad_accumulation, ids_BxT1.shape[1]).swapaxes(0, 1)
        micro_keys = jax.random.split(key, config.grad_accumulation)
        zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        return lax.scan(add, zero, (micro_ids, micro_keys))[0]

    def step(state: TrainState, ids_BxT1: Array) -> tuple[TrainState, dict[str, Array]]:
        params, frozen = state["params"], state.get("frozen", {})
        key = jax.random.fold_in(stream_key(config, DROPOUT), state["step"])
        total, count, grads = accumulated(params, frozen, ids_BxT1, key)
        loss, grad_norm = total / count, optax.tree.norm(grads) / count
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        trained = {name: state[name] for name in ("params", "opt_state", "ema_params") if name in state}

        def updated(before: TrainState) -> TrainState:
            # One factor for the mean and for clipping, so that no second tree of gradients is ever held.
            factor = clipping(config, grad_norm) / count
            scaled = jax.tree.map(lambda g: g * factor, grads)
            updates, opt_state = tx.update(scaled, before["opt_state"], before["params"])
            after = {"params": optax.apply_updates(before["params"], updates), "opt_state": opt_state}
            if config.ema_decay:
                decay = config.ema_decay
                after["ema_params"] = jax.tree.map(
                    lambda a, p: decay * a + (1 - decay) * p, before["ema_params"], after["params"]
                )
            return after

        # A branch, not a choice between the elements of two results: XLA would then compute the moments twice, for
        # themselves and for the parameters, and copy the old ones, which the second computation still reads.
        new = lax.cond(finite, updated, lambda before: before, trained)
        bad = jnp.where(finite, 0, state["bad"] + 1)
        counters = {"step": state["step"] + 1, "updates": state["updates"] + finite.astype(jnp.int32), "bad": bad}
        learning_rate = schedule(config, config.learning_rate)(state["updates"])
        if frozen:
            new["frozen"] = frozen
        return new | counters, {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "bad": bad}

    return step


# Steps that one program does at most, and seconds that it takes at most if it does several: a signal waits for its end.
MOST_AT_ONCE, LONGEST = 8, 6.0


def steps_at_once(seconds: float) -> int:
    """How many steps of so many seconds one program does."""
    return max(1, min(MOST_AT_ONCE, int(LONGEST / seconds)))


def several_at_once(mesh: Mesh | None) -> bool:
    """Whether a run's program may do several steps."""
    return mesh is None and jax.default_backend() == "cpu"


def jit_steps(config: TrainConfig) -> Any:
    """`make_step` several times in one program, for one CPU: (state, ids [S, B, T + 1], count) -> (state, metrics, each
    [S]). The first `count` batches are trained on, one after another; the metrics of the others are 0. It donates the
    state.

    Whenever a program runs, XLA asks the system for the memory that it computes in, and the system clears it. That
    takes a sixth of a step of GPT-2 small in bfloat16 on an AMD EPYC (Zen 5), and steps of one program share it.
    `count` is an argument, so that a step has the same bits however many others come with it.
    """
    step = make_step(config)

    def steps(state: TrainState, ids_SxBxT1: Array, count: Array) -> tuple[TrainState, dict[str, Array]]:
        def body(i: Array, carried: Any) -> Any:
            state, metrics = carried
            if "frozen" in state:
                # As if it changed: XLA would round it to bfloat16 before the first step, and keep both.
                frozen, i = lax.optimization_barrier((state["frozen"], i))
                state = state | {"frozen": frozen}
            state, new = step(state, ids_SxBxT1[i])
            return state, {name: metrics[name].at[i].set(new[name]) for name in metrics}

        _, metrics = jax.eval_shape(step, state, ids_SxBxT1[0])
        none = {name: jnp.zeros(len(ids_SxBxT1), metric.dtype) for name, metric in metrics.items()}
        return lax.fori_loop(0, count, body, (state, none))

    return jax.jit(steps, donate_argnums=0)


def jit_step(config: TrainConfig, mesh: Mesh | None = None) -> Any:
    """`make_step`, jitted; it donates the state. With a mesh, the state keeps its layout."""
    layout = None
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())
        layout = (sharding.shardings(mesh, abstract_state(config)), everywhere)
    return jax.jit(make_step(config), donate_argnums=0, out_shardings=layout)


def compiled_step(config: TrainConfig, mesh: Mesh | None, state: TrainState) -> Any:
    """The compiled function that does a run's steps, of `jit_steps` or `jit_step`, for a state or its shapes. No batch
    is made, which may be too large."""
    layout = None if mesh is None else NamedSharding(mesh, PartitionSpec(BATCH, None))
    ids_BxT1 = jax.ShapeDtypeStruct((config.batch_size, config.T + 1), jnp.int32, sharding=layout)
    if not several_at_once(mesh):
        return jit_step(config, mesh).lower(state, ids_BxT1).compile()
    ids_SxBxT1 = jax.ShapeDtypeStruct((MOST_AT_ONCE, *ids_BxT1.shape), jnp.int32)
    return jit_steps(config).lower(state, ids_SxBxT1, jax.ShapeDtypeStruct((), jnp.int32)).compile()

"""The trainer: one jitted step over an explicit state, a loop that resumes bit for bit."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPTConfig
from jaxgpt.data import Tokens, batch, check_enough, open_tokens
from jaxgpt.errors import CheckpointError, TrainingError
from jaxgpt.evaluation import evaluate
from jaxgpt.loss import head_cross_entropy
from jaxgpt.model import GPT
from jaxgpt.optim import optimizer, schedule
from jaxgpt.progress import TrainProgress
from jaxgpt.run import Run
from jaxgpt.sampling import Temperature
from jaxgpt.text import generate_text
from jaxgpt.train_config import TrainConfig
from jaxgpt.weights import load

State = dict[str, Any]

# Streams of random numbers that must not meet, whatever the seed.
_INIT, _DROPOUT, _SAMPLE = range(3)


def init_state(config: TrainConfig, params: Any = None) -> State:
    """The state before the first step: {"params", "opt_state", "step"} and, with averaging, "average".

    Args:
        config: the run.
        params: start from these instead of drawing new ones.
    """
    if params is None:
        ids_BxT = jnp.zeros((1, 1), jnp.int32)
        params = jax.jit(GPT(config.model).init)(_key(config, _INIT), ids_BxT)["params"]
    state = {"params": params, "opt_state": optimizer(config).init(params), "step": jnp.int32(0)}
    if config.average_decay:
        state["average"] = jax.tree.map(jnp.copy, params)  # a copy, because the step donates its state
    return state


def abstract_state(config: TrainConfig) -> State:
    """The shapes and types of `init_state`, without allocating it."""
    return jax.eval_shape(functools.partial(init_state, config))


def eval_params(state: State) -> Any:
    """The parameters to evaluate, sample from and export: the moving average if there is one."""
    return state.get("average", state["params"])


def batch_loss(
    model: GPT, params: Any, ids_BxT1: Array, *, dropout_key: Array | None, chunk: int
) -> tuple[Array, Array]:
    """(sum of losses in nats, count) of predicting ids[:, 1:] from ids[:, :-1]."""

    def apply(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    x_BxTxD, _ = apply("features", ids_BxT1[:, :-1], deterministic=dropout_key is None, rngs=rngs)
    head_VxD = apply("head_weight")
    return head_cross_entropy(x_BxTxD, head_VxD, ids_BxT1[:, 1:], dtype=model.config.dtype, chunk=chunk)


def make_step(config: TrainConfig) -> Callable[[State, Array], tuple[State, dict[str, Array]]]:
    """The optimiser step, not yet jitted: (state, ids [B, T + 1]) -> (state, {"loss", "grad_norm"}).

    Gradients are those of the mean loss over all tokens of the batch, however many micro-batches it is taken in.
    A step whose loss or gradient is not finite leaves all but the step's number as it was.
    """
    model, tx = GPT(config.model), optimizer(config)
    rates = (config.model.drop_rate_emb, config.model.drop_rate_attn, config.model.drop_rate_shortcut)

    def losses_and_grads(params: Any, ids_BxT1: Array, key: Array) -> tuple[Array, Array, Any]:
        dropout_key = key if any(rates) else None
        loss = functools.partial(batch_loss, model, dropout_key=dropout_key, chunk=config.loss_chunk)
        (losses, count), grads = jax.value_and_grad(lambda p: loss(p, ids_BxT1), has_aux=True)(params)
        return losses, count, grads

    def accumulated(params: Any, ids_BxT1: Array, key: Array) -> tuple[Array, Array, Any]:
        if config.accumulate == 1:
            return losses_and_grads(params, ids_BxT1, key)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, losses_and_grads(params, *micro)), None

        micro_ids = ids_BxT1.reshape(config.accumulate, -1, ids_BxT1.shape[1])
        micro_keys = jax.random.split(key, config.accumulate)
        zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return lax.scan(add, zero, (micro_ids, micro_keys))[0]

    def step(state: State, ids_BxT1: Array) -> tuple[State, dict[str, Array]]:
        params = state["params"]
        key = jax.random.fold_in(_key(config, _DROPOUT), state["step"])
        losses, count, grads = accumulated(params, ids_BxT1, key)
        loss = losses / count
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state["opt_state"], params)
        new = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        if config.average_decay:
            decay = config.average_decay
            new["average"] = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["average"], new["params"])
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, {k: state[k] for k in new})
        return {**new, "step": state["step"] + 1}, {"loss": loss, "grad_norm": grad_norm}

    return step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: steps done.
        params: the parameters to use, `eval_params`.
        config: the model's config.
        val_loss: of the last evaluation, in nats a token; None if there was none.
        stopped_by: the signal that ended it early, saved; None if it ran to its end.
    """

    step: int
    params: Any
    config: GPTConfig
    val_loss: float | None
    stopped_by: signal.Signals | None


def train(
    config: TrainConfig,
    data: str | Path | Tokens,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    init_from: str | None = None,
    tensorboard: bool = False,
) -> TrainResult:
    """Trains a model into the directory `out` (see `run.py` for what is written there).

    Args:
        config: the run. With `init_from`, the shape of its model gives way to the checkpoint's.
        data: a token file, a text file or tokens.
        out: the run's directory.
        resume: continue from the last good checkpoint in `out`; bit for bit what an uninterrupted run gives.
        force: resume even though config or data differ from the run's.
        init_from: anything `jaxgpt.load` takes, to fine-tune.
        tensorboard: write the metrics for TensorBoard too.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, for what cannot be used.
        TrainingError: if the loss stays not finite. The last good checkpoint is kept.
    """
    params = None
    if init_from is not None:
        config, params = _fine_tune(config, init_from)
    tokens = data if isinstance(data, Tokens) else open_tokens(data, config.model)
    train_N, val_N = tokens.split(config.val_fraction)
    check_enough(len(train_N), config, "training")
    if config.val_fraction:
        check_enough(len(val_N), config, "validation")
    run = Run(out)
    with run.locked():
        if tensorboard:
            run.write_tensorboard()
        if resume:
            run.check_resume(config, tokens, force)
        else:
            run.start(config, tokens)
        checkpoints = Checkpoints(run.checkpoints, config.keep)
        with contextlib.closing(checkpoints):
            return _Loop(config, train_N, val_N, run, checkpoints, params).run(resume)


class _Loop:
    """One call of `train`: what its steps share."""

    def __init__(self, config, train_N, val_N, run, checkpoints, params):
        self.config, self.train_N, self.val_N = config, train_N, val_N
        self.out, self.checkpoints = run, checkpoints
        self.model = GPT(config.model.replace(remat="none"))
        self.initial_params = params
        self.val_loss: float | None = None
        self.bad_steps = 0

    def run(self, resume: bool) -> TrainResult:
        config = self.config
        if resume and self.checkpoints.steps():
            with TrainProgress(config.steps, 0) as progress:
                start, state = self.checkpoints.restore_latest(abstract_state(config), progress.say)
            self.checkpoints.discard_after(start)
        else:
            start, state = 0, init_state(config, self.initial_params)
        self.initial_params = None
        self.out.truncate_metrics(start)
        step_fn = jax.jit(make_step(config), donate_argnums=0)
        done = start
        running: collections.deque = collections.deque()  # (step, metrics) still on the device
        with TrainProgress(config.steps, start) as self.progress, _signals() as received:
            self.clock = time.perf_counter(), start
            while done < config.steps and not received:
                ids_BxT1 = batch(self.train_N, config, done)  # made while the device works on the step before
                state, metrics = step_fn(state, ids_BxT1)
                done += 1
                running.append((done, metrics))
                if len(running) > 1:
                    self.record(*running.popleft())
                if self.due(config.eval_interval, done) or self.due(config.checkpoint_interval, done):
                    while running:
                        self.record(*running.popleft())
                    self.pause(done, state)
            while running:
                self.record(*running.popleft())
            if received and done not in self.checkpoints.steps():
                self.checkpoints.save(done, state)
                self.progress.say(f"stopped by {received[0].name}: saved step {done}, --resume continues")
        self.out.plot_losses()
        return TrainResult(done, eval_params(state), config.model, self.val_loss, received[0] if received else None)

    def due(self, interval: int, step: int) -> bool:
        return step % interval == 0 or step == self.config.steps

    def record(self, step: int, metrics: dict[str, Array]) -> None:
        """Waits for a step to end; logs it; stops a run that has gone bad."""
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.progress.say(f"step {step}: loss {loss}, gradient norm {grad_norm}; the step was left out")
            if self.bad_steps >= self.config.bad_steps:
                raise TrainingError(
                    f"{self.bad_steps} steps in a row, up to {step}, had a loss or gradient that is not finite; the "
                    f"last checkpoint in {self.out.checkpoints} is good. Lower the learning rate, or look at the data"
                )
        if not self.due(self.config.log_interval, step):
            return
        now = time.perf_counter()
        seconds = (now - self.clock[0]) / (step - self.clock[1])  # a step
        self.clock = now, step
        rate = self.config.batch_size * self.config.window / seconds
        # The schedule counts from 0: its value at step - 1 is what made this step.
        learning_rate = float(schedule(self.config, self.config.learning_rate)(step - 1))
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        self.out.append({**line, "tokens_per_second": round(rate, 1)})
        self.progress.update(step, loss, rate, seconds * (self.config.steps - step))

    def pause(self, step: int, state: State) -> None:
        """Evaluates, samples and saves, as the intervals say. None of it touches the training's random numbers."""
        config, loss = self.config, None
        params = eval_params(state)
        if self.due(config.eval_interval, step) and config.val_fraction:
            evaluation = evaluate(self.model, params, self.val_N, max_windows=config.eval_windows)
            self.val_loss = loss = evaluation.loss
            self.out.append({"step": step, "val_loss": loss, "val_tokens": evaluation.tokens})
            self.progress.say(f"step {step}  validation loss {loss:.4f}  ({evaluation.tokens:,} tokens)")
        if self.due(config.eval_interval, step) and config.sample_tokens:
            self.progress.say(self.sample(step, params))
        if self.due(config.checkpoint_interval, step) and self.bad_steps == 0:
            self.checkpoints.save(step, state, loss)
        self.clock = time.perf_counter(), step

    def sample(self, step: int, params: Any) -> str:
        config, key = self.config, jax.random.fold_in(_key(self.config, _SAMPLE), step)
        prompt, length = config.sample_prompt, config.sample_tokens
        return generate_text(self.model, params, prompt, length, sampler=Temperature(0.8), key=key)[0]


def load_run(directory: str | Path, step: int | str = "best", *, param_dtype: str = "float32") -> tuple[int, GPT, Any]:
    """A run's model as it stood at a checkpoint: (step, model, params), with the averaged parameters if it has them.

    Args:
        directory: the run's directory; nothing in it is changed.
        step: a step that has a checkpoint, "latest", or "best": the one with the lowest validation loss (the latest,
            where none was evaluated).
        param_dtype: type of the parameters returned.

    Raises:
        CheckpointError: if there is no such checkpoint or it is damaged.
    """
    run = Run(directory)
    config = run.config()
    with contextlib.closing(Checkpoints(run.checkpoints, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise CheckpointError(run.checkpoints, "no checkpoint yet")
        chosen: Any = {"latest": steps[-1], "best": checkpoints.best_step() or steps[-1]}.get(str(step), step)
        if chosen not in steps:
            raise CheckpointError(run.checkpoints, f"no checkpoint of step {step}; there are {steps}")
        params = eval_params(checkpoints.restore(chosen, abstract_state(config)))
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    return chosen, GPT(config.model.replace(param_dtype=param_dtype)), params


def _fine_tune(config: TrainConfig, source: str) -> tuple[TrainConfig, Any]:
    """The run's config with the checkpoint's architecture, and the checkpoint's parameters."""
    how = ("drop_rate", "drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut", "param_dtype", "dtype")
    overrides = {name: getattr(config.model, name) for name in (*how, "scan_layers", "remat")}
    model, params = load(source, **overrides)
    return dataclasses.replace(config, model=model.config), params


def _key(config: TrainConfig, stream: int) -> Array:
    return jax.random.fold_in(jax.random.key(config.seed), stream)


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects the first SIGINT or SIGTERM, so that the loop can save; a second one acts as it usually does."""
    received: list[signal.Signals] = []
    usual: dict[signal.Signals, Any] = {}

    def receive(number, _frame):
        received.append(signal.Signals(number))
        for name, handler in usual.items():
            signal.signal(name, handler)

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            usual[name] = signal.signal(name, receive)
    except ValueError:
        pass  # signals belong to the main thread; in another one, the caller handles them
    try:
        yield received
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)

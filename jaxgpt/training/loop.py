"""The steps of a run: a loop over `step.py`'s that logs, evaluates, saves, and stops on a signal."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import shlex
import signal
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.checks import brief
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.data import Ids, Mixture, Records, Verification
from jaxgpt.errors import MissingExtraError, TrainingError
from jaxgpt.generation import Temperature, generate_text
from jaxgpt.model import GPT
from jaxgpt.parallel import BATCH, check_memory, distributed
from jaxgpt.training import signals
from jaxgpt.training.batches import AHEAD, ReadAhead, batch
from jaxgpt.training.checkpoints import Checkpoints
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.evaluation import Evaluation, evaluate
from jaxgpt.training.progress import TrainProgress
from jaxgpt.training.run_directory import Run
from jaxgpt.training.speed import Clock
from jaxgpt.training.step import (
    MOST_AT_ONCE,
    SAMPLE,
    TrainState,
    compiled_step,
    eval_params,
    jit_step,
    saved_state,
    several_at_once,
    steps_at_once,
    stream_key,
)

LESS_MEMORY = (
    "raise grad_accumulation, set compute.remat=block or loss_chunk, shorten seq_len, lower batch_size, or train only "
    "adapters (lora.rank=16)"
)


@brief
@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: steps done.
        params: the parameters to use, `eval_params`.
        config: what the model is.
        compute: how to run it: `GPT(config, compute)` takes these parameters.
        val_loss: of the last evaluation, in nats per token; None if there was none.
        stopped_by: the signal on which it saved and stopped early; None if it ran to its end.
    """

    step: int
    params: Any
    config: GPTConfig
    compute: ComputeConfig
    val_loss: float | None
    stopped_by: signal.Signals | None


class Loop:
    """One call of `train`: the state that its steps share."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh | None,
        train_data: Mixture,
        val_N: Ids | Records,
        run: Run,
        checkpoints: Checkpoints,
        progress: TrainProgress,
        verification: Verification,
    ):
        self.config, self.mesh, self.val_N = config, mesh, val_N
        self.run, self.checkpoints, self.progress, self.verification = run, checkpoints, progress, verification
        self.train_data = train_data
        ahead = MOST_AT_ONCE if several_at_once(mesh) else AHEAD
        self.read = ReadAhead(lambda step, rows: batch(train_data, config, step, rows), config.steps, ahead)
        # A sample is decoded, which not every backend of attention can do.
        self.model = GPT(config.model, config.compute.replace(remat="none", attention="auto"))
        self.clock = Clock(config, mesh)
        self.step_seconds: float | None = None
        self.val_losses, self.evaluated = run.val_losses(), run.evaluated()
        self.exhausted = self.out_of_patience()

    def train(self, start: int, state: TrainState) -> TrainResult:
        config, done, stop = self.config, start, None
        if self.mesh is not None:
            step_fn = jit_step(config, self.mesh)
        elif start < config.steps:
            step_fn = compiled_step(config, self.mesh, state)
            check_memory(step_fn, LESS_MEMORY)
        running: collections.deque = collections.deque()  # (steps, metrics) still on the device
        self.clock.start(start)
        with signals.collected() as received:
            while done < config.steps and not self.exhausted and not (stop := self.stop(received, done)):
                steps = range(done + 1, done + 1 + self.at_once(done))
                state, metrics = step_fn(state, *self.batches(steps))
                done += len(steps)
                running.append((steps, metrics))
                while len(running) > (1 if len(steps) == 1 else 0):
                    self.record(*running.popleft())
                if self.due(config.eval_interval, done) or self.due(config.checkpoint_interval, done):
                    while running:
                        self.record(*running.popleft())
                    distributed.rest()
                    self.pause(done, state)
                    if done < config.steps:
                        distributed.alive()
            while running:
                self.record(*running.popleft())
            distributed.rest()
            if (stop or self.exhausted) and done not in self.checkpoints.steps() and self.healthy(state):
                self.save(done, state)
            self.checkpoints.finish()
            self.run.flush()
            if unread := self.verification.unread:
                self.progress.say(f"verified while training: all shards but {unread:,}; --verify reads them all first")
            if stop:
                self.progress.say(f"stopped by {stop.name} at step {done}: {self.run.resume_command} continues")
            else:
                self.progress.say(self.last_line(done))
        try:
            _plot_losses(self.run)
        except Exception as error:  # a missing picture must not fail a finished run
            self.progress.say(f"the losses could not be drawn: {error}")
        last_val_loss = self.val_losses[max(self.val_losses)] if self.val_losses else None
        return TrainResult(done, eval_params(self.config, state), config.model, config.compute, last_val_loss, stop)

    def last_line(self, step: int) -> str:
        """Says which checkpoint is best, where it is, and what to do with it."""
        best = self.checkpoints.best_step()
        ended = "done"
        if self.exhausted and step < self.config.steps:
            ended = (
                f"stopped at step {step:,}: no better validation loss in {self.config.patience} evaluations "
                f"({self.run.resume_command} --set patience=0 continues)"
            )
        which = (
            f"the last step, {step:,}"
            if best is None
            else f"step {best:,}, validation loss {self.val_losses[best]:.4f}"
        )
        directory, prompt = str(self.run.directory), self.config.sample_prompt or "The"
        return (
            f"{ended}. Best: {which}, in {directory}. To try it: jaxgpt generate --model {shlex.quote(directory)} "
            f"--prompt {shlex.quote(prompt)}"
        )

    def at_once(self, done: int) -> int:
        """How many steps come next in one program: on one CPU several, up to the next one that ends in more than its
        metrics, once it is known how long a step takes."""
        config = self.config
        if not several_at_once(self.mesh) or self.step_seconds is None:
            return 1
        intervals = config.log_interval, config.eval_interval, config.checkpoint_interval
        until_due = min(interval - done % interval for interval in intervals)
        return min(steps_at_once(self.step_seconds), until_due, config.steps - done)

    def batches(self, steps: range) -> tuple[Any, ...]:
        """What the step function takes besides the state."""
        if not several_at_once(self.mesh):
            return (self.global_batch(steps[0] - 1),)
        ids_SxBxT1 = np.zeros((MOST_AT_ONCE, self.config.batch_size, self.config.T + 1), np.int32)
        for i, step in enumerate(steps):
            ids_SxBxT1[i] = self.global_batch(step - 1)
        return ids_SxBxT1, np.int32(len(steps))

    def global_batch(self, step: int) -> Any:
        """The ids [B, T + 1] of a step; with a mesh, each process reads the rows that its devices hold."""
        config, mesh = self.config, self.mesh
        if mesh is None:
            return self.read(step)
        layout = NamedSharding(mesh, PartitionSpec(BATCH, None))
        shape = (config.batch_size, config.T + 1)

        @functools.cache  # devices along `tensor` hold the same rows
        def rows(start: int | None, stop: int | None) -> Any:
            return self.read(step, slice(start, stop))

        def part(index: Any) -> Any:
            return rows(index[0].start, index[0].stop)

        return jax.make_array_from_callback(shape, layout, part)

    def stop(self, received: list[signal.Signals], step: int) -> signal.Signals | None:
        """The signal to stop on, if any. All processes must stop after the same step, so they ask each other, and only
        at logged steps, because asking waits for the devices."""
        if jax.process_count() > 1 and not self.due(self.config.log_interval, step):
            return None
        number = distributed.highest(received[0] if received else 0)
        return signal.Signals(number) if number else None

    def due(self, interval: int, step: int) -> bool:
        return step % interval == 0 or step == self.config.steps

    def record(self, steps: range, metrics: dict[str, Array]) -> None:
        """Waits for steps to end and logs them; stops the run after too many bad ones."""
        metrics = jax.device_get(metrics)
        distributed.alive()
        for i, step in enumerate(steps):
            self.record_step(step, {name: np.ravel(metric)[i] for name, metric in metrics.items()})

    def record_step(self, step: int, metrics: dict[str, Any]) -> None:
        loss, grad_norm, rate, bad = (float(metrics[k]) for k in ("loss", "grad_norm", "learning_rate", "bad"))
        if bad:
            self.progress.say(f"step {step}: loss {loss}, gradient norm {grad_norm}; the step was skipped")
        if bad >= self.config.bad_steps:
            raise TrainingError(
                f"{bad:.0f} steps in a row, up to {step}, had a loss or gradient that is not finite; the checkpoints "
                f"in {self.run.checkpoints} are good. Lower the learning rate, or look at the data"
            )
        if not self.due(self.config.log_interval, step):
            return
        self.verification.check()
        self.checkpoints.check()
        speed = self.clock.look(step)
        self.step_seconds = speed.seconds
        tokens = step * self.config.batch_size * self.config.T
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate, "tokens": tokens}
        shares = {} if speed.share is None else {"mfu": round(speed.share, 4)}
        self.run.append({**line, "tokens_per_second": round(speed.tokens, 1), **shares})
        left = speed.seconds * (self.config.steps - step)
        self.progress.update(step, loss, tokens, speed.tokens, left, speed.share)

    def pause(self, step: int, state: TrainState) -> None:
        """Evaluates, saves and samples, as the intervals say. None of this affects the training's random numbers."""
        config, loss, improved = self.config, None, False
        evaluating = self.due(config.eval_interval, step)
        if evaluating and len(self.val_N):
            evaluation = self.validate(eval_params(self.config, state), config.eval_sequences)
            loss = evaluation.loss
            improved = loss < min(self.val_losses.values(), default=math.inf)
            self.run.append({"step": step, "val_loss": loss, "val_tokens": evaluation.tokens})
            self.progress.say(f"step {step}  validation loss {loss:.4f}  ({evaluation.tokens:,} tokens)")
            if math.isfinite(loss):
                self.val_losses[step] = loss
            self.evaluated.append(step)
            self.exhausted = self.out_of_patience()
        # Processes that read the run's earlier losses at different times must not save at different steps.
        improved = bool(distributed.highest(improved))
        if (improved or self.due(config.checkpoint_interval, step)) and self.healthy(state):
            self.save(step, state, loss)
        if evaluating and config.sample_tokens and self.healthy(state):
            self.progress.say(self.sample(step, eval_params(self.config, state)))
        self.clock.start(step)

    def save(self, step: int, state: TrainState, loss: float | None = None) -> None:
        """Starts to write a checkpoint. The metrics up to it outlast the process before it does."""
        self.run.flush()
        self.checkpoints.save(step, saved_state(self.config, state), loss)

    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations have all been no better than one before them. Known from the run's
        metrics, so a resumed run stops where the undisturbed one does."""
        best = min(self.val_losses, key=self.val_losses.__getitem__, default=0)
        without = sum(step > best for step in self.evaluated)
        # Processes may see the shared metrics at different times, and must stop together.
        return bool(distributed.highest(0 < self.config.patience <= without))

    def validate(self, params: Any, sequences: int, batch_size: int = 8) -> Evaluation:
        ids_N = self.val_N if len(self.val_N) else self.train_data.ids[0]
        return evaluate(
            self.model,
            params,
            ids_N,
            seq_len=self.config.T,
            max_sequences=sequences,
            batch_size=batch_size,
            separate_documents=self.config.separate_documents,
        )

    def healthy(self, state: TrainState) -> bool:
        """Whether the parameters give a finite loss. The training loss is that of the parameters before its step, so
        it does not show when the last update has ruined them."""
        return math.isfinite(
            self.validate(eval_params(self.config, state, average=False), sequences=1, batch_size=1).loss
        )

    def sample(self, step: int, params: Any) -> str:
        config, key = self.config, jax.random.fold_in(stream_key(self.config, SAMPLE), step)
        prompt, length = config.sample_prompt, config.sample_tokens
        return generate_text(self.model, params, prompt, length, sampler=Temperature(0.8), key=key)[0]


def _plot_losses(run: Run) -> None:
    """Writes loss.png, if the extra [plot] is installed."""
    if not run.writes:
        return
    try:
        from jaxgpt.pictures import style
    except MissingExtraError:
        return
    from jaxgpt.training import curves

    curve = curves.from_metrics(run.name, run.read_metrics())
    with run.storage.writing(run.directory / "loss.png") as path:
        style.save(curves.draw([curve], panels=("loss",)), path)

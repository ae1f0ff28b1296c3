"""`train`: starts a run, or resumes one. Everything is checked, and other trainers are kept out, before `Loop` does the
first step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxgpt import notebook
from jaxgpt.checks import short_repr
from jaxgpt.data import Source, Tokens, Verification
from jaxgpt.errors import TrainingError
from jaxgpt.parallel import distributed, memory_errors, sharding
from jaxgpt.training import trackers
from jaxgpt.training.checkpoints import Checkpoints, fingerprint, import_orbax
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.loop import LESS_MEMORY, Loop, TrainResult
from jaxgpt.training.models import base_params, initial_params
from jaxgpt.training.preparation import absolute, first_line, notes, prepare, starting_point, with_native_sequences
from jaxgpt.training.progress import TrainProgress
from jaxgpt.training.run_directory import Run
from jaxgpt.training.step import abstract_state, init_state, saved_state

Data = str | Path | Tokens | Source


def train(
    config: TrainConfig | None,
    data: Data | Sequence[Data] | None,
    out: str | Path,
    *,
    val_data: Data | Sequence[Data] | None = None,
    tokenizer: str | Path | None = None,
    text_key: str | None = None,
    allow_special: bool = False,
    skip_bad: bool = False,
    verify: bool = False,
    resume: bool = False,
    force: bool = False,
    init_from: str | None = None,
    log_to: Sequence[str] = (),
) -> TrainResult:
    """Trains a model into the directory `out` (`run_directory.py` documents the files that it writes).

    It runs on the devices of `config.mesh`. If `jaxgpt.parallel.distributed` has joined several processes, each must
    call this with the same arguments and a directory that all of them see; each reads its own rows of every batch, and
    the first process writes.

    Args:
        config: the run's config. With `init_from`, its model is the checkpoint's; fields that were set must agree with
            it, except for the dropout rates and a shorter `context_length`.
        data: what to train on: a path (a token file of any program, a text, a directory or a pattern of these; also in
            the form "NAME=PATH:WEIGHT"), `Tokens`, a `Source`, or a list of several.
        out: the run's directory.
        val_data: what to validate on (of a source that has a validation split, that); by default the validation split
            that came with the data or, where none did, the last `val_fraction` of each source.
        tokenizer: what made the ids of files that do not say; by default these are refused.
        text_key: where records of JSON or Parquet have their text; by default under "text". Those without it that have
            a prompt and a response, or the turns of a chat, are read by a template, and the responses alone are learned
            (`config.template`).
        allow_special: whether special tokens in texts, such as `<|endoftext|>`, are tokens.
        skip_bad: leave out, and count, records that cannot be used instead of raising.
        verify: read all data before the first step, and check hashes and ids. Otherwise this happens during the
            training, unless the data is small.
        resume: continue from the last good checkpoint in `out`; bit for bit as if the run had not been interrupted.
            The run knows its config, its data and its `init_from`: None means those. Others are refused, except for
            more `steps` and for settings that do not change what is computed, such as the mesh.
        force: resume even though config or data differ from the run's.
        init_from: the model to fine-tune: anything `jaxgpt.load` takes; by default the config's. A resumed run
            remembers it.
        log_to: where the metrics also go: any of "tensorboard", "wandb" and "trackio" (see `trackers.py`).

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, for input that cannot be used.
        TrainingError: if the loss or gradient stays NaN or infinite. The last good checkpoint is kept.
        OutOfMemoryError: if a step needs more memory than there is, as a rule before the first one.
    """
    if not isinstance(config, TrainConfig) and not (resume and config is None):
        raise TypeError(f"train takes a TrainConfig, such as TrainConfig.from_file(path), not {short_repr(config)}")
    if not isinstance(data, (str, os.PathLike, Tokens, Source, list, tuple)) and not (resume and data is None):
        raise TypeError(
            f"train takes a path or tokens, not {short_repr(data)}: Tokens.from_ids(ids, tokenizer) makes tokens"
        )
    run = Run(out, writes=distributed.is_primary())
    alone = TrainingError("another process failed before the first step; its own message says why")
    with contextlib.ExitStack() as held:
        with distributed.fail_together(alone):
            run.storage.check_writable()
            began = run.config() if resume else None
            init_from = starting_point(config, init_from) if began is None else absolute(init_from)
            if began is not None:
                config = began if config is None else config.fill(began.model)
                data, val_data = run.data(data, val_data)
                init_from = run.init_from() if init_from is None else init_from
                tokenizer = config.model.tokenizer if tokenizer is None else tokenizer
            assert config is not None  # so mypy sees what the checks above have made sure of
            config, mesh, corpus, train_data, val_N = prepare(
                config,
                data,
                init_from,
                resume=began is not None,
                validation=val_data,
                tokenizer=tokenizer,
                text_key=text_key,
                allow_special=allow_special,
                skip_bad=skip_bad,
            )
            config = with_native_sequences(config, mesh, began)
            part = jax.process_index(), jax.process_count()
            verification = Verification(corpus, config.model.vocab_size, at_once=verify, part=part)
            import_orbax()
            trackers.check(log_to, run.directory)
            held.enter_context(run.locked())
            if resume and not force:
                run.check_resume(config, corpus, init_from)
            elif not resume:
                run.check_new()
            run.make()
        distributed.check_same("their arguments or their data", (config, corpus.identity, resume, force, init_from))
        with distributed.fail_together(alone):
            run.check_shared()
            val_losses = run.val_losses()
        checkpoints = held.enter_context(contextlib.closing(Checkpoints(run.checkpoints, config.keep, val_losses)))
        held.enter_context(notebook.only_bar())  # an evaluation or a sample has none of its own
        progress = held.enter_context(TrainProgress(config.steps, quiet=not run.writes))
        distributed.check_same("the checkpoints that they see", checkpoints.steps())
        continued = resume and bool(checkpoints.steps())
        params = base = None
        with distributed.fail_together(alone):
            if config.lora.rank and began is not None and began.lora.rank:
                params = base_params(run, config, init_from, mesh)
            elif init_from is not None and not continued:
                params = initial_params(config, init_from, mesh)
            if config.lora.rank:
                base = fingerprint(params)
        # From here on, processes exchange arrays.
        held.enter_context(distributed.end_together(f"this one ends too; {run.resume_command} continues"))
        held.enter_context(memory_errors(LESS_MEMORY))
        if continued:
            expected = saved_state(config, abstract_state(config, mesh))
            start, state = checkpoints.restore_latest(expected, progress.say)
            if params is not None:
                state["frozen"] = params if mesh is None else sharding.shard(params, mesh)
        else:
            start, state = 0, init_state(config, params, mesh)
        del params  # the state holds them
        with distributed.fail_together(alone):
            run.describe(config, corpus, init_from, base)
            run.truncate_metrics(start)
            held.enter_context(run.logging_to(log_to, start, config))
        if start >= config.steps:
            progress.say(
                f"the run is finished: step {start:,} of {config.steps:,}; to train longer: {run.resume_command} "
                f"--set steps={2 * start}"
            )
        else:
            progress.say(first_line(config, mesh, train_data, len(val_N), init_from, start))
            for note in notes(config, began, corpus):
                progress.say(note)
        held.enter_context(verification.running())
        loop = Loop(config, mesh, train_data, val_N, run, checkpoints, progress, verification)
        held.callback(loop.read.close)
        held.callback(distributed.rest)
        return loop.train(start, state)

"""Several processes that run one program: joining, agreeing, and deciding who writes files. All of it builds on JAX's
`jax.distributed`; in a program with one process every function here is trivial."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import ConfigError

LOOPBACK = "127.0.0.1:8476"


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
    """Joins this process to the others; must be called before anything else that uses JAX.

    Args:
        coordinator: HOST:PORT of process 0; by default JAX_COORDINATOR_ADDRESS, or else `LOOPBACK` if the next two
            are given.
        processes: number of processes. Without it, JAX takes every setting from the cluster that it detects (Slurm,
            Open MPI, Kubernetes, Cloud TPU).
        process: index of this process, from 0. On a host with several accelerators, let the environment give each
            process its own (for example with CUDA_VISIBLE_DEVICES).
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: if the numbers are inconsistent, there is no cluster, or not all processes join in time.
    """
    if (processes is None) != (process is None):
        raise ConfigError("--processes and --process go together: how many there are, and which one this is")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"--process must be from 0 to {processes - 1}, not {process}")
    if timeout < 1:
        raise ConfigError(f"--join-timeout must be 1 second or more, not {timeout}")
    bind = detection = None
    if processes is None:
        who = "this process"
    else:
        who = f"process {process} of {processes}"
        detection = "deactivate"
        coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        if coordinator is None:
            coordinator = bind = LOOPBACK  # JAX's coordinator listens on every interface by default
    # That service intercepts SIGTERM, which then would neither save nor even end a run.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            # JAX aborts the process at its own timeout, so that timeout is longer than the one below.
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method=detection,
                initialization_timeout=timeout + 3600,
                coordinator_bind_address=bind,
            )
        except Exception as error:  # whatever cluster detection raises, not having joined is an error
            failures.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(timeout)
    if joining.is_alive():
        raise ConfigError(
            f"{who} waited {timeout} s at {coordinator or 'the coordinator'} for the others: has each been started "
            "with the same --processes and --coordinator and its own --process?"
        )
    if failures and processes is None:
        raise ConfigError(
            f"this process joined no cluster: {failures[0]} Where JAX detects none, give --processes, --process and "
            "--coordinator HOST:PORT"
        )
    if failures:
        raise ConfigError(f"{who} could not join at {coordinator}: {failures[0]}")
    if processes is not None and jax.process_count() != processes:
        raise ConfigError(
            f"{who} joined, but its devices ({jax.default_backend()}) know of only {jax.process_count()} processes"
        )


def is_primary() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def highest(value: int) -> int:
    """The largest `value` over all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def check_same(what: str, value: Any) -> None:
    """Raises ConfigError, in every process, unless all of them pass a value with the same `repr`."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(repr(value).encode()).digest()
    everyones = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    differing = np.flatnonzero((everyones != everyones[0]).any(axis=-1))
    if differing.size:
        raise ConfigError(f"processes 0 and {differing[0]} differ in {what}: start all alike, on the same files")


@contextlib.contextmanager
def fail_together(otherwise: Exception) -> Iterator[None]:
    """For code that may fail in one process and not in another: all processes leave it together, and if it fails in
    one, it fails in all. (Otherwise the others would wait for the failed one at their next exchange.) Leaving it is an
    exchange itself, so the code inside must contain none.

    Raises:
        `otherwise`, in processes where only others failed; those that failed raise their own error.
    """
    try:
        yield
    except Exception:
        highest(1)
        raise
    if highest(0):
        raise otherwise


# Seconds from one look for a failure to the next, for a process that fails itself to say so first, and to leave.
_LOOK, _GRACE, _LEAVE = 1.0, 5.0, 10.0
_blocks = itertools.count()


@contextlib.contextmanager
def end_together(advice: str) -> Iterator[None]:
    """For code in which processes wait for one another: if it fails in one, the others end, within some 15 seconds.

    They would otherwise wait in an exchange with the failed one, where no exception can reach them, until JAX notices
    that it is gone, which takes minutes. So a thread looks for failures, and ends the process with exit code 1 after
    writing which process failed, and `advice`, to stderr. A process that fails too meanwhile raises its own error.
    """
    if jax.process_count() == 1:
        yield
        return
    # The store of keys and values of jax.distributed, for which there is no public name.
    from jax._src.distributed import global_state

    client: Any = global_state.client
    key, left = f"jaxgpt/failed/{next(_blocks)}", threading.Event()
    watching = threading.Thread(target=_watch, args=(client, key, left, advice), daemon=True)
    watching.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one failed first, or nobody is left to tell
            client.key_value_set(key, str(jax.process_index()))
        raise
    finally:
        left.set()


def _watch(client: Any, key: str, left: threading.Event, advice: str) -> None:
    """Ends this process if another has failed; until it has `left` the block."""
    failed = None
    while failed is None:
        if left.wait(_LOOK):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such key
            failed = client.key_value_try_get(key)
    if left.wait(_GRACE):
        return
    print(
        f"jaxgpt: error: process {failed} failed, and its own message says why: {advice}", file=sys.stderr, flush=True
    )
    # The failed process waits for the others before it exits.
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(_LEAVE)
    os._exit(1)

"""Several processes that run one program: joining, agreeing, and who writes the files. All of it is JAX's own engine
(`jax.distributed`); a program of one process needs none of it, and every function here is then trivial."""

from __future__ import annotations

import contextlib
import hashlib
import os
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
    """Joins this process to the others; must come before anything else that uses JAX.

    Args:
        coordinator: HOST:PORT of process 0; by default JAX_COORDINATOR_ADDRESS, or else `LOOPBACK` where the next two
            are given.
        processes: how many there are. Without it, all is as the cluster that JAX finds itself in says (Slurm, Open
            MPI, Kubernetes, Cloud TPU).
        process: which of them this is, from 0. On a host with several accelerators, let the environment give each
            process its own (CUDA_VISIBLE_DEVICES, say).
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: if the numbers make no sense, there is no cluster, or not everyone came in time.
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
            coordinator = bind = LOOPBACK  # JAX's coordinator listens on every interface unless told
    # It would take SIGTERM for itself, and so keep a run from being saved, or even ended, by it.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def join() -> None:
        try:
            # Where JAX's own time runs out it aborts the process, so it gets more than it will be given.
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method=detection,
                initialization_timeout=timeout + 3600,
                coordinator_bind_address=bind,
            )
        except Exception as error:  # whatever the detection of a cluster raises: not to have joined is an error
            failures.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(timeout)
    if joining.is_alive():
        raise ConfigError(
            f"{who} waited {timeout} s at {coordinator or 'the coordinator'} for the others: is each of them started, "
            "with the same --processes and --coordinator and a --process of its own?"
        )
    if failures and processes is None:
        raise ConfigError(
            f"this process joined no cluster: {failures[0]} Where JAX detects none, say --processes and --process, and "
            "--coordinator HOST:PORT"
        )
    if failures:
        raise ConfigError(f"{who} could not join at {coordinator}: {failures[0]}")
    if processes is not None and jax.process_count() != processes:
        raise ConfigError(
            f"{who} joined, but its devices ({jax.default_backend()}) know of {jax.process_count()} processes only"
        )


def is_primary() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def highest(value: int) -> int:
    """The largest of what the processes bring."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def check_same(what: str, value: Any) -> None:
    """Raises ConfigError, in every process, unless all of them bring a value with the same `repr`."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(repr(value).encode()).digest()
    everyones = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    differing = np.flatnonzero((everyones != everyones[0]).any(axis=-1))
    if differing.size:
        raise ConfigError(f"processes 0 and {differing[0]} differ in {what}: start them alike, on the same files")


@contextlib.contextmanager
def fail_together(otherwise: Exception) -> Iterator[None]:
    """For what may fail in one process and not in another: it ends when all have come to its end, and where it fails
    in one, it fails in all. (Left to itself, each would wait for the others at their next exchange.) It is an exchange
    itself, so there must be none within it.

    Raises:
        `otherwise`, where only other processes failed; in these, what they raised.
    """
    try:
        yield
    except Exception:
        highest(1)
        raise
    if highest(0):
        raise otherwise

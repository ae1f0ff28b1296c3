"""Several processes that run one program: joining, agreeing, and who writes the files. All of it is JAX's own engine
(`jax.distributed`); a program of one process needs none of it, and every function here is then trivial."""

from __future__ import annotations

import threading

import jax
import numpy as np

from jaxgpt.errors import ConfigError

LOOPBACK = "127.0.0.1:8476"


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
    """Joins this process to the others; must come before anything else that uses JAX.

    Args:
        coordinator: HOST:PORT of process 0; by default that of the cluster JAX finds itself in, or `LOOPBACK`.
        processes: how many there are; by default the cluster's number.
        process: which of them this is, from 0.
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: if the numbers make no sense, or not everyone came in time.
    """
    if (processes is None) != (process is None):
        raise ConfigError("--processes and --process go together: how many there are, and which one this is")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"--process must be from 0 to {processes - 1}, not {process}")
    if timeout < 1:
        raise ConfigError(f"--join-timeout must be 1 second or more, not {timeout}")
    bind = None
    if processes is not None and coordinator is None:
        coordinator = bind = LOOPBACK  # JAX's coordinator listens on every interface unless told
    failures: list[Exception] = []

    def join() -> None:
        try:
            # Where JAX's own time runs out it aborts the process, so it gets more than it will be given.
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
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
            f"process {process} of {processes} waited {timeout} s at {coordinator} for the others: is each of them "
            "started, with the same --processes and --coordinator and a --process of its own?"
        )
    if failures and processes is None:
        raise ConfigError(
            f"no cluster that JAX knows: say --processes and --process, and --coordinator HOST:PORT ({failures[0]})"
        )
    if failures:
        raise ConfigError(f"process {process} of {processes} could not join at {coordinator}: {failures[0]}")


def is_primary() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def highest(value: int) -> int:
    """The largest of what the processes bring."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))

"""One of several processes that train together; started by tests/test_distributed.py.

python distributed_worker.py ADDRESS PROCESSES PROCESS DIRECTORY MESH start|crash|resume

With "crash", process 1 kills itself before the fourth step. Prints the most rows of a batch that it has read, and
process 0 leaves the parameters in DIRECTORY/params.npz.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys

import jax
import numpy as np

from jaxgpt import distributed


def main() -> None:
    address, processes, process, directory, mesh, mode = sys.argv[1:]
    distributed.initialize(address, int(processes), int(process), timeout=60)

    from jax.experimental import multihost_utils
    from test_sharding import RUN, tokens

    from jaxgpt import data, trainer
    from jaxgpt.train_config import MeshConfig

    read = []

    def batch(ids_N, config, step, rows=slice(None)):
        if (mode, process, step) == ("crash", "1", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        windows = data.batch(ids_N, config, step, rows)
        read.append(len(windows))
        return windows

    trainer.batch = batch
    config = dataclasses.replace(RUN, steps=6, log_interval=1, mesh=MeshConfig.parse(mesh))
    result = trainer.train(config, tokens(), directory, resume=mode == "resume")
    print(f"rows {max(read)}")
    params = multihost_utils.process_allgather(result.params, tiled=True)
    if process == "0":
        np.savez(f"{directory}/params.npz", *jax.tree.leaves(params))


if __name__ == "__main__":
    main()

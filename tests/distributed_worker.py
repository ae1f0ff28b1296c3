"""One of several processes that train together; started by tests/test_distributed.py.

python distributed_worker.py ADDRESS PROCESSES PROCESS DIRECTORY MESH RESUME
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np

from jaxgpt import distributed

if __name__ == "__main__":
    address, processes, process, directory, mesh, resume = sys.argv[1:]
    distributed.initialize(address, int(processes), int(process), timeout=60)

    from test_sharding import RUN, tokens

    from jaxgpt import data
    from jaxgpt.train_config import MeshConfig
    from jaxgpt.trainer import train

    read = []
    whole = data.batch
    import jaxgpt.trainer

    def batch(ids_N, config, step, rows=slice(None)):
        got = whole(ids_N, config, step, rows)
        read.append(len(got))
        return got

    jaxgpt.trainer.batch = batch
    config = dataclasses.replace(RUN, steps=6, log_interval=1, mesh=MeshConfig.parse(mesh))
    result = train(config, tokens(), directory, resume=resume == "resume")
    print(f"rows {max(read)} of {config.batch_size}")
    from jax.experimental import multihost_utils

    params = multihost_utils.process_allgather(result.params, tiled=True)
    if process == "0":
        np.savez(f"{directory}/params.npz", *jax.tree.leaves(params))

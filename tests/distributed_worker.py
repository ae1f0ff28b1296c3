"""One of several processes that train together; started by tests/test_distributed.py.

python distributed_worker.py ADDRESS PROCESSES PROCESS DIRECTORY MESH MODE

MODE is one of:

    crash   process 1 kills itself before the fourth step
    resume  trains to the end; process 0 writes the parameters to DIRECTORY/params.npz
    faults  as "resume", after one attempt in which process 1 has no data and one that a SIGTERM to process 1 stops;
            at the end process 1 cannot read the latest checkpoint

Prints one line per attempt: the error, or the step and the largest number of rows of a batch that were read.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys

import jax
import numpy as np

from jaxgpt.parallel import distributed


def main() -> None:
    address, processes, process, directory, mesh, mode = sys.argv[1:]
    distributed.initialize(address, int(processes), int(process), timeout=60)

    from jax.experimental import multihost_utils
    from test_sharding import RUN, tokens

    from jaxgpt.parallel.mesh import MeshConfig
    from jaxgpt.training import batches, trainer
    from jaxgpt.training import checkpoints as checkpoint
    from jaxgpt.training import loop as steps

    config = dataclasses.replace(RUN, steps=6, log_interval=1, mesh=MeshConfig.parse(mesh))
    deadly, read = {}, []  # step: the signal that process 1 sends itself before that step

    def batch(data, config, step, rows=slice(None)):
        ids_BxT1 = batches.batch(data, config, step, rows)
        read.append(len(ids_BxT1))
        return ids_BxT1

    def global_batch(loop, step, make=steps.Loop.global_batch):
        if mode == "crash" and step == 3:
            loop.checkpoints.finish()  # of step 2, which would otherwise be lost with the process
        if process == "1" and step in deadly:
            os.kill(os.getpid(), deadly.pop(step))
        return make(loop, step)

    steps.batch, steps.Loop.global_batch = batch, global_batch

    def train(source):
        try:
            result = trainer.train(config, source, directory, resume=mode != "crash")
        except (ValueError, RuntimeError) as error:
            print(f"{type(error).__name__}: {error}")
            return None
        print(f"step {result.step} rows {max(read)} stopped by {result.stopped_by}")
        return result

    if mode == "crash":
        deadly[3] = signal.SIGKILL
    if mode == "faults":
        train(tokens() if process == "0" else f"{directory}/missing")
        deadly[4] = signal.SIGTERM
        train(tokens())
        if process == "1":
            handler = checkpoint.import_orbax().StandardCheckpointHandler
            restore = handler.restore

            def failing(self, path, *args, **kwargs):
                if path.parent.name == "5":
                    raise OSError("a disk that only this process has")
                return restore(self, path, *args, **kwargs)

            handler.restore = failing
    result = train(tokens())
    params = multihost_utils.process_allgather(result.params, tiled=True)
    if process == "0":
        np.savez(f"{directory}/params.npz", *jax.tree.leaves(params))


if __name__ == "__main__":
    main()

"""Several real processes that train together over loopback: their result, a crash, and a process that never joins."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_sharding import RUN, assert_close, tokens

from jaxgpt.cli import main
from jaxgpt.errors import ConfigError
from jaxgpt.parallel import distributed
from jaxgpt.training.loop import train
from jaxgpt.training.run_directory import Run

pytestmark = pytest.mark.usefixtures("compiled_quickly")

WORKER = Path(__file__).with_name("distributed_worker.py")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(processes, directory, mesh, mode):
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), address, str(processes), str(i), str(directory), mesh, mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Processes reuse what those of earlier tests have compiled.
            env={
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
        )
        for i in range(processes)
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("processes", "mesh", "mode"), [(2, "fsdp=2", "faults"), (4, "data=2,tensor=2", "resume")])
def test_processes_that_lose_one_and_start_again_end_as_a_single_one(tmp_path, processes, mesh, mode):
    crashing = start(processes, tmp_path / "run", mesh, "crash")
    assert crashing[1].wait(timeout=180) == -signal.SIGKILL
    for process in crashing:  # they wait for the lost process
        process.kill()
        process.communicate()
    assert saved_steps(tmp_path / "run") == [2]

    resumed = start(processes, tmp_path / "run", mesh, mode)
    done = [process.communicate(timeout=180) for process in resumed]
    assert [process.returncode for process in resumed] == [0] * processes, done[0][1]
    said, *silent = [err for _, err in done]
    printed = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in done]
    # If the batch is sharded over data or fsdp, each process reads only its part.
    assert {lines[-1] for lines in printed} == {f"step 6 rows {RUN.batch_size // 2} stopped by None"}
    if mode == "faults":
        # A fault in one process ends the others too, immediately and in the same state.
        assert printed[0][0] == "TrainingError: another process failed before the first step; its own message says why"
        assert printed[1][0].startswith("DataError: ")
        assert printed[1][0].endswith("missing: cannot be read: No such file or directory")
        stopped = f"step 5 rows {RUN.batch_size // 2} stopped by {signal.SIGTERM!s}"
        assert [lines[1] for lines in printed] == [stopped] * processes
        assert "5: another process could not read it; falling back to the checkpoint before it" in said.replace(
            "\n", " "
        )
    # Only one process prints and writes.
    assert said
    assert silent == [""] * (processes - 1)
    assert [line["step"] for line in Run(tmp_path / "run").read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert saved_steps(tmp_path / "run")[-1] == 6

    alone = train(dataclasses.replace(RUN, steps=6, log_interval=1), tokens(), tmp_path / "alone")
    with np.load(tmp_path / "run" / "params.npz") as saved:
        assert_close(list(saved.values()), jax.tree.leaves(alone.params))


def saved_steps(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


ONE_FAILS = """
import sys, time
from jaxgpt.parallel import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout=60)
with distributed.end_together("what now"):
    if sys.argv[2] == sys.argv[3]:
        raise ValueError("a damaged shard")
    time.sleep(100)  # as an exchange with the other one
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_alone_ends_the_others(failing):
    command = [sys.executable, "-c", ONE_FAILS, f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen([*command, str(i), str(failing)], stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "ValueError: a damaged shard" in said[failing]
    other = said[1 - failing]
    assert f"jaxgpt: error: process {failing} failed, and its own message says why: what now\n" in other


class Store(dict):
    """Stands for the keys and values that processes share."""

    def key_value_set(self, key, value):
        self[key] = value

    def key_value_try_get(self, key):
        if key not in self:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self[key]


@pytest.fixture
def store(monkeypatch):
    """This process is the first of two, and would say so when it ends."""
    from jax._src.distributed import global_state

    def ended(code):
        store["ended"] = code

    store = Store()
    monkeypatch.setattr(global_state, "client", store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(distributed.os, "_exit", ended)
    monkeypatch.setattr(distributed, "_blocks", itertools.count())
    for name in ("_LOOK", "_GRACE", "_LEAVE"):
        monkeypatch.setattr(distributed, name, 0.05)
    return store


def test_a_process_that_fails_says_so_to_the_others(store):
    with pytest.raises(ValueError, match="mine"), distributed.end_together(""):
        raise ValueError("mine")
    with distributed.end_together(""):
        pass
    assert store == {"jaxgpt/failed/0": "0"}


def test_a_process_ends_when_another_fails_unless_it_leaves_itself(store, capsys, monkeypatch):
    with distributed.end_together("what now"):
        store["jaxgpt/failed/0"] = "1"
        for _ in range(100):
            if "ended" in store:
                break
            time.sleep(0.05)
    assert store.pop("ended") == 1
    assert "process 1 failed, and its own message says why: what now" in capsys.readouterr().err
    monkeypatch.setattr(distributed, "_GRACE", 60)
    with distributed.end_together(""):
        store["jaxgpt/failed/1"] = "1"
        time.sleep(0.2)
    assert "ended" not in store


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[model]\ntokenizer = "bytes"\nvocab_size = 257\ncontext_length = 16\nemb_dim = 8\nn_heads = 2\n')
    (tmp_path / "text").write_text("a text " * 100)
    return path


@pytest.mark.exhaustive
def test_a_process_that_never_joins_is_told_after_the_timeout(config_file, tmp_path):
    command = [sys.executable, "-m", "jaxgpt", "train", str(config_file)]
    options = {"--data": tmp_path / "text", "--out": tmp_path / "run", "--join-timeout": 3, "--processes": 2}
    options |= {"--process": 0, "--coordinator": f"127.0.0.1:{free_port()}"}
    arguments = [str(part) for pair in options.items() for part in pair]
    done = subprocess.run([*command, "--distributed", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-1000:]
    assert "jaxgpt: error: process 0 of 2 waited 3 s at 127.0.0.1:" in done.stderr
    assert "has each been started" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_a_process_that_has_joined():
    """JAX's preemption service would swallow the signal."""
    program = (
        "import os, signal, time; from jaxgpt.parallel import distributed;"
        f"distributed.initialize('127.0.0.1:{free_port()}', 1, 0);"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--distributed", "--processes", "2"], "--processes and --process go together"),
        (["--distributed", "--processes", "2", "--process", "2"], "--process must be from 0 to 1, not 2"),
        (["--distributed", "--join-timeout", "0"], "--join-timeout must be 1 second or more, not 0"),
        (["--processes", "2", "--process", "0"], "--processes belongs to --distributed"),
        (["--join-timeout", "3"], "--join-timeout belongs to --distributed"),
        (["--distributed"], "Where JAX detects none, give --processes, --process and --coordinator"),
        (["--mesh", "tensor=8"], "tensor=8 does not divide n_heads=2"),
    ],
)
def test_bad_arguments_are_told(config_file, tmp_path, capsys, arguments, told):
    data = ["--data", str(tmp_path / "text"), "--out", str(tmp_path / "run")]
    assert main(["train", str(config_file), *data, *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_mesh_without_every_process_is_refused(monkeypatch):
    from jaxgpt.parallel import sharding
    from jaxgpt.parallel.mesh import MeshConfig

    @dataclasses.dataclass(frozen=True)
    class Device:
        process_index: int

    with pytest.raises(ConfigError, match="has 2 of the 4 devices, and none of process 1's"):
        sharding.make_mesh(MeshConfig(data=2), [Device(0), Device(0), Device(1), Device(1)])


def test_alone_there_is_nothing_to_wait_for():
    assert distributed.is_primary()
    assert distributed.highest(7) == 7
    with pytest.raises(KeyError, match="mine"), distributed.fail_together(ValueError("another's")):
        raise KeyError("mine")

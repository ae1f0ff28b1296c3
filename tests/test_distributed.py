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
from jaxgpt.training.run_directory import Run
from jaxgpt.training.trainer import train

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
        # Adam divides a gradient by its size, and so turns the rounding of one that is almost 0 into a part of a step.
        assert_close(list(saved.values()), jax.tree.leaves(alone.params), atol=5e-5)


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


STRAGGLER = """
import sys, time
from jaxgpt.parallel import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), timeout=60, stall_timeout=5)
distributed.highest(0)
if sys.argv[2] == "0":
    distributed.alive()
else:
    time.sleep(600)  # a step that takes too long, in a process that is not lost
distributed.highest(1)
print("together")
"""


@pytest.mark.exhaustive
def test_a_process_that_waits_for_a_straggler_ends_after_the_stall_timeout():
    command = [sys.executable, "-c", STRAGGLER, f"127.0.0.1:{free_port()}"]
    waiting, straggler = (
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    )
    try:
        out, err = waiting.communicate(timeout=300)
    finally:
        for process in (waiting, straggler):
            process.kill()
            process.communicate()
    assert (waiting.returncode, "together" in out) == (1, False), err
    assert "Timeout (0:00:05)!" in err
    assert "in highest" in err  # the stack says what it waits for


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


@pytest.mark.exhaustive
def test_processes_that_lose_one_restart_by_themselves_and_end_as_undisturbed(config_file, tmp_path):
    settings = [
        f"--set={setting}" for setting in ("steps=24", "checkpoint_interval=5", "eval_interval=24", "log_interval=1")
    ]
    settings += ["--set=batch_size=4", "--set=model.n_layers=1", "--mesh=fsdp=2"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "jaxgpt", "train", str(config_file), "--data", str(tmp_path / "text"), *settings]
    alone = subprocess.run(
        [*command[:-1], "--out", str(tmp_path / "alone")], capture_output=True, text=True, timeout=180, env=environment
    )
    assert alone.returncode == 0, alone.stderr[-1000:]
    together = [
        *command,
        "--distributed",
        "--restarts=2",
        "--stall-timeout=20",
        "--processes=2",
        "--out",
        str(tmp_path / "run"),
    ]
    together.append(f"--coordinator=127.0.0.1:{free_port()}")
    processes = [
        subprocess.Popen(
            [*together, f"--process={i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for i in range(2)
    ]
    run = Run(tmp_path / "run")
    while not run.metrics.exists() or len(run.read_metrics()) < 8:
        assert processes[0].poll() is None, processes[0].communicate()[1][-2000:]
        time.sleep(0.05)
    supervisor = processes[1].pid
    (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "the process ended with exit code 137; restarts left: 1" in said[1]
    losses, undisturbed = (
        {line["step"]: line["loss"] for line in of.read_metrics() if "loss" in line}
        for of in (run, Run(tmp_path / "alone"))
    )
    assert list(losses) == list(range(1, 25))
    np.testing.assert_allclose(list(losses.values()), list(undisturbed.values()), rtol=1e-4)


PARTS = """
import sys
import jax, numpy as np, tensorstore
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxgpt.parallel import MeshConfig, distributed, make_mesh
from jaxgpt.training.checkpoints import Checkpoints

address, process, directory, saved = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
distributed.initialize(address, 2, int(process), timeout=60)
layouts = {
    "rows": (MeshConfig(fsdp=4), P("fsdp")),
    "columns": (MeshConfig(fsdp=4), P(None, "fsdp")),
    "both": (MeshConfig(fsdp=2, tensor=2), P("fsdp", "tensor")),
    "replicas": (MeshConfig(data=4), P()),
}
layouts = {name: NamedSharding(make_mesh(mesh), spec) for name, (mesh, spec) in layouts.items()}
values = np.random.default_rng(0).random((1024, 2048), np.float32)  # 8 MiB that hardly compress

def moved(what):
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/" + what)
    return sum(value["value"] for metric in found for value in metric["values"])

checkpoints = Checkpoints(Path(directory))
checkpoints.save(1, {"x": jax.make_array_from_callback(values.shape, layouts[saved], values.__getitem__)})
checkpoints.finish()
print("written", moved("bytes_written") / values.nbytes)
for name, layout in layouts.items():
    before = moved("bytes_read")
    restored = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=layout)})["x"]
    print(name, (moved("bytes_read") - before) / values.nbytes)
    assert restored.sharding == layout
    for shard in restored.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("saved", ["rows", "columns", "both", "replicas"])
def test_each_process_writes_and_reads_only_its_part_of_a_checkpoint(tmp_path, saved):
    """Half of the array each, whatever axes the two meshes cut."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PARTS, address, str(i), str(tmp_path / "checkpoints"), saved],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err[-2000:]
        moved = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
        assert set(moved) == {"written", "rows", "columns", "both", "replicas"}
        assert all(0.4 < float(part) < 0.5 for part in moved.values()), moved


SUPERVISED = """
import argparse, os, signal, sys
from pathlib import Path
from jaxgpt.cli import restarts

restarts._PAUSE = 0
count, endings, left = Path(sys.argv[1]) / "count", sys.argv[2].split(","), int(sys.argv[3])
args = argparse.Namespace(restarts=left, out=sys.argv[1], resume=None)
vars(args).update(config="c", set=["a=1"], data=["d"], val_data=None)
if (code := restarts.supervise(args)) is not None:
    sys.exit(code)
begun = count.read_text() if count.exists() else ""
count.write_text(begun + f"{args.resume or args.out} {args.config} {args.data}\\n")
ending = endings[begun.count("\\n")]
if ending == "run":
    Path(sys.argv[1], "run.json").write_text("{}")
    sys.exit(1)
if ending.startswith("-"):
    os.kill(os.getpid(), int(ending[1:]))
sys.exit(int(ending))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("endings", "restarts", "code", "attempts"),
    [
        ("1,-9,0", 5, 0, 3),
        ("1,1,1", 1, 1, 2),
        ("2,0", 5, 2, 1),  # bad input
        ("143,0", 5, 143, 1),  # a signal, after which it has saved
        ("-15,0", 5, 143, 1),
    ],
)
def test_a_lost_process_is_replaced(tmp_path, endings, restarts, code, attempts):
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED, tmp_path, endings, str(restarts)], stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "count").read_text().splitlines() == [f"{tmp_path} c ['d']"] * attempts
    assert done.stderr.count("the process ended with exit code") == attempts - 1


def test_a_new_process_resumes_a_run_that_has_begun(tmp_path):
    subprocess.run([sys.executable, "-c", SUPERVISED, tmp_path, "run,0", "1"], check=True, capture_output=True)
    assert (tmp_path / "count").read_text().splitlines() == [f"{tmp_path} c ['d']", f"{tmp_path} None None"]


def test_a_process_without_progress_ends_with_its_stacks():
    program = (
        "import time; from jaxgpt.parallel import distributed; import jax;"
        "distributed._stall_timeout = 1; jax.process_count = lambda: 2;"
        "distributed.alive(); distributed.rest(); time.sleep(1.5); print('rested', flush=True);"
        "distributed.alive(); time.sleep(20); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "rested\n")
    assert "Timeout (0:00:01)!" in done.stderr


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
        (["--distributed", "--stall-timeout", "0"], "--stall-timeout must be 1 second or more, not 0"),
        (["--restarts", "-1"], "--restarts must be 0 or more, not -1"),
        (["--processes", "2", "--process", "0"], "--processes belongs to --distributed"),
        (["--join-timeout", "3"], "--join-timeout belongs to --distributed"),
        (["--stall-timeout", "3"], "--stall-timeout belongs to --distributed"),
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

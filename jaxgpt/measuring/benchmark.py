"""`jaxgpt benchmark`: measures how fast this machine runs the model, in `workloads`.

Each workload runs in a separate process, so that only the workload itself warms anything up, and the peak memory is
its alone: `python -m jaxgpt.measuring.benchmark WORKLOAD PRESET` prints one JSON object. `peers` runs other programs
the same way.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt import startup
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.measuring.workloads import FED, LIMITS, LOOKUP, Workload, questions, workloads

# Seconds that a process may take.
LONGEST = 1800.0
# Ids of the file that batches are read from.
FEED_IDS = 2**25
# Generates the bundled model's first text, as the README's first command does.
START_UP = ["generate", "--prompt", "ROMEO:", "--max-new-tokens", "64"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a process measured: the median time of the repetitions, and its peak memory."""

    seconds: float
    peak_bytes: int


def run_in_process(module: str, name: str, preset: str, *arguments: str, timeout: float = LONGEST) -> dict[str, Any]:
    """Returns the JSON object that `python -m module NAME PRESET ...` prints last.

    Raises:
        RuntimeError: if it fails, with the end of its stderr, or takes longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", module, name, preset, *arguments]
    try:
        environment = startup.child_environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name}: no result within {timeout:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-500:] or f'exit {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


class Repeated(NamedTuple):
    """A call that does a workload several times."""

    call: Callable[[], Any]
    times: int


def timed(
    run: Callable[[], Any], repeats: int, warm_up: int, pick: Callable[[list[float]], float] = statistics.median
) -> float:
    """Seconds that `run` takes: the median of the repetitions, or whatever `pick` returns for them."""
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return pick(seconds)


def measure(work: Workload, profile: Path | None = None) -> tuple[Measurement, list[tuple[str, float]]]:
    """Runs a workload in this process. Returns the measurement, and with `profile` its ten costliest operations in
    ms."""
    import jax

    from jaxgpt.measuring import limits

    sizes = limits.sizes(work.platform)
    make: dict[str, Callable[[Workload], Callable[[], Any] | Repeated]] = {
        "decode": _generate,
        "prompt": _generate,
        "copy": _look_up,
        "mislead": _look_up,
        "forward": _forward,
        "score": _score,
        "train": _train,
        "feed": _feed,
        "read": lambda work: limits.read(sizes.read_bytes),
        "matmul": lambda work: limits.matmul(sizes.matrix, work.dtype),
        "launch": lambda work: limits.launch(),
    }
    made = make[work.kind](work)
    run, times = made if isinstance(made, Repeated) else (made, 1)
    # A limit is the best time observed.
    seconds = timed(run, 30, 2, min) if work.kind in LIMITS else timed(run, repeats=3, warm_up=2) / times
    peak = limits.peak_device_bytes() or peak_bytes()  # before tracing adds to it
    costliest: list[tuple[str, float]] = []
    if profile is not None:
        with jax.profiler.trace(str(profile)):
            run()
        costliest = costliest_operations(profile, times)
    return Measurement(seconds, peak), costliest


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What /proc/cpuinfo calls the units that products run on, the widest first, and what others do.
_UNITS = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}


def processor() -> str:
    """The processor's name, cores and widest vector units, as far as the system tells."""
    known: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", known.get("Features", "")).split()
    units = next((f", {name}" for flag, name in _UNITS.items() if flag in flags), "")
    name = known.get("model name") or platform.processor() or platform.machine()
    return f"{name}, {cores()} cores{units}"


def peak_bytes() -> int:
    """The peak memory of this process."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def costliest_operations(directory: Path, runs: int = 1, most: int = 10) -> list[tuple[str, float]]:
    """The compiled operations that took longest in a trace, excluding what they call: (kind and how many, ms), of one
    of so many equal runs."""
    from jax.profiler import ProfileData

    trace = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    own: dict[str, float] = collections.defaultdict(float)
    times: dict[str, int] = collections.defaultdict(int)
    for line in (line for plane in ProfileData.from_file(str(trace)).planes for line in plane.lines):
        events = [event for event in line.events if "hlo_op" in dict(event.stats)]
        callers: list[tuple[float, str]] = []
        for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
            kind, end = event.name.split(".")[0], event.start_ns + event.duration_ns
            while callers and callers[-1][0] <= event.start_ns:
                callers.pop()
            if callers and end <= callers[-1][0]:
                own[callers[-1][1]] -= event.duration_ns
            own[kind] += event.duration_ns
            times[kind] += 1
            callers.append((end, kind))
    ranked = sorted(own, key=own.__getitem__, reverse=True)[:most]
    return [(f"{kind} x {times[kind] // runs}", own[kind] / 1e6 / runs) for kind in ranked]


def _generate(work: Workload) -> Callable[[], Any]:
    import numpy as np

    from jaxgpt.generation import generate

    model, params = model_and_params(work.config(), ComputeConfig(param_dtype=work.dtype), work.dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (work.batch, work.prompt_length))
    return lambda: generate(model, params, ids, work.new_tokens)


def _look_up(work: Workload) -> Callable[[], Any]:
    from jaxgpt.generation import generate
    from jaxgpt.measuring.scripts import Script, copying, misleading

    model, params = model_and_params(work.config(), ComputeConfig(param_dtype=work.dtype), work.dtype)
    prompt, new = work.prompt_length, work.new_tokens
    text = copying(prompt, new, work.config().vocab_size) if work.kind == "copy" else misleading()
    sampler = Script.of(text[prompt:])
    return lambda: generate(model, params, [text[:prompt]], new, sampler=sampler, lookup=LOOKUP)


def _forward(work: Workload) -> Callable[[], Any]:
    import jax
    import numpy as np

    model, params = model_and_params(work.config(), ComputeConfig(), work.dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (work.batch, work.length))
    forward = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    return lambda: forward(params, ids).block_until_ready()


def _score(work: Workload) -> Callable[[], Any]:
    from jaxgpt.scoring import score

    model, params = model_and_params(work.config(), ComputeConfig(dtype=work.dtype), None)
    prompts, continuations = questions(work)
    return lambda: score(model, params, prompts, continuations)


def _train(work: Workload) -> Callable[[], Any] | Repeated:
    import jax
    import numpy as np

    from jaxgpt.training import MOST_AT_ONCE, TrainConfig, init_state, jit_step, jit_steps, steps_at_once

    model = work.config()
    config = TrainConfig(model=model, compute=_compute(work), batch_size=work.batch, seq_len=work.length)
    shape = MOST_AT_ONCE, work.batch, work.length + 1
    ids = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
    state = init_state(config)

    def run(step: Callable[..., Any], *batches: Any) -> None:
        nonlocal state
        state, metrics = step(state, *batches)
        jax.block_until_ready(metrics)

    if work.platform != "cpu":
        return functools.partial(run, jit_step(config), ids[0])
    several = functools.partial(run, jit_steps(config), ids)
    count = steps_at_once(timed(lambda: several(1), repeats=1, warm_up=1))  # as the trainer does
    return Repeated(lambda: several(count), count)


def _feed(work: Workload) -> Callable[[], Any]:
    """Reads `FED` batches one after another, as a run does while its device works, from a file of `FEED_IDS` ids that
    the system has in memory."""
    import numpy as np

    from jaxgpt.data import FileIds
    from jaxgpt.training import ReadAhead, TrainConfig, batch

    config = TrainConfig(model=work.config(), batch_size=work.batch, seq_len=work.length)
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    file = Path(directory.name) / "train.bin"
    np.random.default_rng(0).integers(0, config.model.vocab_size, FEED_IDS, np.uint16).tofile(file)
    ids_N = FileIds(file, "<u2", 0, FEED_IDS)

    def run() -> None:
        read = ReadAhead(lambda step, rows: batch(ids_N, config, step, rows), FED)
        for step in range(FED):
            read(step)
        read.close()

    return run


def model_and_params(config: GPTConfig, compute: ComputeConfig, dtype: str | None) -> tuple[Any, Any]:
    """A model with random parameters, in the form that decodes fastest in `dtype`.

    They are drawn one by one: `model.init` takes more memory than decoding does, and would be the peak that is told.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt.generation import prepare
    from jaxgpt.model import GPT

    model, rng = GPT(config, compute), np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= 32 if leaf.dtype == jnp.int8 else 0.02
        return jax.block_until_ready(jnp.asarray(values.astype(leaf.dtype, copy=False)))

    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return prepare(model, jax.tree.map(draw, shapes), dtype)


def limit_rates(seconds: dict[str, float], platform: str) -> tuple[float, dict[str, float], float]:
    """From the seconds that the workloads of `LIMITS` took, by name: bytes read per second, operations per second of
    the products of each type, and the seconds to start a program and wait for it."""
    from jaxgpt.measuring import limits

    sizes = limits.sizes(platform)
    flops = {
        name.partition("-")[2]: 2 * sizes.matrix**3 / took for name, took in seconds.items() if name[:7] == "matmul-"
    }
    return sizes.read_bytes / seconds["read"], flops, seconds["launch"]


def _compute(work: Workload) -> ComputeConfig:
    """How a workload over whole sequences is run: as `prepare` and the trainer would."""
    from jaxgpt.cpu import sequences

    return ComputeConfig(dtype=work.dtype, native_sequences=work.platform == "cpu" and sequences.preferred(work.dtype))


def attention(work: Workload) -> str | None:
    """The backend of attention that a workload over whole sequences uses; None for other workloads."""
    from jaxgpt.model import backend_of

    if work.kind not in ("forward", "train"):
        return None
    config = work.config()
    dropout = work.kind == "train" and config.drop_rate_attn > 0
    return backend_of(config, _compute(work), work.batch, work.length, dropout)


def _start_up() -> float:
    """Seconds that a whole `jaxgpt generate` process takes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "jaxgpt", *START_UP]
    subprocess.run(command, env=startup.child_environment(), check=True, capture_output=True)
    return time.perf_counter() - started


def cold_and_warm_start() -> tuple[float, float]:
    """Seconds that the bundled model's first process takes, with an empty compile cache, and then the second."""
    with tempfile.TemporaryDirectory() as cache:
        others = ("JAX_COMPILATION_CACHE_DIR", startup.CACHE_VARIABLE)
        before = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", *others)}
        os.environ["XDG_CACHE_HOME"] = cache
        for name in others:
            os.environ.pop(name, None)
        try:
            return _start_up(), _start_up()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def main(arguments: list[str]) -> None:
    """`python -m jaxgpt.measuring.benchmark WORKLOAD PRESET [PROFILE_DIR]`: runs it and prints the measurement. The
    workload "device" prints only on what device the others run."""
    startup.configure()
    from jaxgpt.measuring import limits

    name, preset, *profile = arguments
    device = limits.device()
    if name == "device":
        print(json.dumps(device))
        return
    work = next(work for work in workloads(preset, device["platform"]) if work.name == name)
    measurement, costliest = measure(work, Path(profile[0]) if profile else None)
    print(json.dumps({**dataclasses.asdict(measurement), "costliest": costliest, "attention": attention(work)}))


if __name__ == "__main__":
    main(sys.argv[1:])

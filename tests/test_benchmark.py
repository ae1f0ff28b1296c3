"""`jaxgpt benchmark`: its formulas, what it reads from a trace, and its report. No test asserts a time."""

from __future__ import annotations

import json
import os
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs_compiler

from jaxgpt import planning
from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.cpu import kernel
from jaxgpt.measuring import benchmark, limits, workloads
from jaxgpt.measuring import peers as benchmark_peers
from jaxgpt.measuring.workloads import Workload
from jaxgpt.training import batches


def test_the_limit_of_decoding_is_reading_the_weights_and_the_cache_once():
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        rate, _ = workloads.limit(Workload("decode", "gpt2", dtype, 8), 1e10, {})
        weights = (124_439_808 - 1024 * 768) * size
        assert rate == pytest.approx(8 * 1e10 / (weights + 2 * 12 * 8 * 96 * 768 * 4))
    # int8: one byte per weight; the rest, scales and biases, is much smaller than the cache.
    rate, _ = workloads.limit(Workload("decode", "gpt2", "int8", 1), 1e10, {})
    assert 1e10 / rate == pytest.approx(124e6 + 2 * 12 * 96 * 768 * 4, rel=0.01)


def test_the_limit_of_the_rest_is_the_matrix_products():
    flops = {"float32": 1e11, "bfloat16": 1e12}
    linear, attention = 2 * 4096 * (12 * 12 * 768**2 + 50257 * 768), 4 * 4 * 1024 * 1025 / 2 * 768 * 12
    rate, _ = workloads.limit(Workload("forward", "gpt2", "float32", 4, 1024), 1.0, flops)
    assert rate == pytest.approx(4096 * 1e11 / (linear + attention))
    rate, _ = workloads.limit(Workload("train", "gpt2", "bfloat16", 4, 1024), 1.0, flops)
    assert rate == pytest.approx(4096 * 1e12 / (3 * (linear + attention)))


def test_the_limit_of_scoring_reads_a_prompt_once():
    work = Workload("score", "gpt2", "float32", 5)
    prompts, continuations = workloads.questions(work)
    assert work.tokens == sum(
        4 * len(p) + sum(map(len, group)) for p, group in zip(prompts, continuations, strict=True)
    )
    scored = sum(len(ids) for group in continuations for ids in group)
    needed = 2 * (sum(map(len, prompts)) + scored) * 12 * 12 * 768**2 + 2 * scored * 50257 * 768
    assert workloads.limit(work, 1.0, {"float32": 1e11})[0] == pytest.approx(work.tokens * 1e11 / needed)


def test_the_limit_of_a_first_token_computes_one_positions_logits():
    work = Workload("prompt", "gpt2", "float32", 1, 512)
    needed = 2 * (512 * 12 * 12 * 768**2 + 50257 * 768) + 4 * 512 * 513 / 2 * 768 * 12
    assert work.tokens == 512
    assert workloads.limit(work, 1.0, {"float32": 1e11})[0] == pytest.approx(512 * 1e11 / needed)


def test_banded_attention_has_no_peers_and_needs_less():
    assert benchmark_peers.available(Workload("forward", "gpt3-125m")) == []
    rates = [
        workloads.limit(Workload("forward", preset), 1.0, {"float32": 1e11})[0] for preset in ("gpt2", "gpt3-125m")
    ]
    assert rates[0] < rates[1]


def test_the_costliest_operations_do_not_count_what_they_call(tmp_path):
    threads = [
        [("while.1", 0, 10_000, True), ("dot.1", 1_000, 3_000, True), ("dot.2", 5_000, 4_000, True)],
        [("add.7", 0, 500, True), ("a thread's own business", 0, 90_000, False)],
    ]
    names = [name for thread in threads for name, *_ in thread]

    def event(name, start_us, duration_us, compiled):
        stats = f'stats {{ metadata_id: 1 str_value: "{name}" }}' if compiled else ""
        times = f"offset_ps: {10**6 * start_us} duration_ps: {10**6 * duration_us}"
        return f"events {{ metadata_id: {names.index(name)} {times} {stats} }}"

    lines = [f"lines {{ id: {i} {' '.join(event(*e) for e in thread)} }}" for i, thread in enumerate(threads)]
    known = [f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names)]
    known.append('stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }')
    space = f'planes {{ name: "/host:CPU" {" ".join(lines + known)} }}'
    (tmp_path / "run").mkdir()
    trace = jax.profiler.ProfileData.text_proto_to_serialized_xspace(space)
    (tmp_path / "run" / "host.xplane.pb").write_bytes(trace)
    assert benchmark.costliest_operations(tmp_path) == [("dot x 2", 7.0), ("while x 1", 3.0), ("add x 1", 0.5)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model name\t: EPYC\nflags\t: avx avx2 avx512f\n\nmodel name\t: EPYC\n", "EPYC, 3 cores, AVX-512"),
        ("model name : Xeon\nflags : avx2 amx_bf16 avx512f\n", "Xeon, 3 cores, AMX"),
        ("Features : fp asimd\n", "chip, 3 cores, NEON"),
        ("", "chip, 3 cores"),
    ],
)
def test_the_processor_is_named(monkeypatch, text, told):
    monkeypatch.setattr(benchmark.Path, "read_text", lambda *_, **__: text)
    monkeypatch.setattr(benchmark.platform, "processor", lambda: "chip")
    monkeypatch.setattr(benchmark, "cores", lambda: 3)
    assert benchmark.processor() == told


@pytest.mark.parametrize("kind", ["read", "matmul-float32", "matmul-tf32", "matmul-bfloat16", "launch"])
def test_a_limit_of_any_device_is_measured_by_the_same_program(kind, monkeypatch):
    monkeypatch.setattr(limits, "ACCELERATOR", limits.Sizes(2**12, 16))
    (work,) = [work for work in workloads.workloads("gpt2", "gpu") if work.name == kind]
    measured, _ = benchmark.measure(work)
    assert measured.seconds > 0


def test_what_the_limits_are_follows_from_what_they_took():
    took = {"read": 0.5, "matmul-float32": 2.0, "matmul-bfloat16": 0.25, "launch": 1e-5}
    assert benchmark.limit_rates(took, "cpu") == (2**30, {"float32": 2048**3, "bfloat16": 8 * 2048**3}, 1e-5)
    read, flops, _ = benchmark.limit_rates(took, "gpu")
    assert (read, flops["bfloat16"]) == (2**33, 8 * 8192**3)


def test_products_of_limits_are_what_they_are_called():
    def product(name):
        x = jnp.full((4, 4), 1 + 2**-12, jnp.float32).astype(limits.PRODUCTS[name][0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda *_: x)
            return limits.matmul(4, name)()

    assert product("float32").dtype == product("bfloat16").dtype == jnp.float32
    assert float(product("float32")[0, 0]) == pytest.approx(4 * (1 + 2**-12) ** 2, rel=1e-7)
    assert float(product("bfloat16")[0, 0]) == 4  # which does not hold 1 + 2**-12
    assert [limits.PRODUCTS[name][1].name for name in ("float32", "tf32")] == ["HIGHEST", "DEFAULT"]


def test_the_cache_of_a_gpu_is_of_the_compute_type():
    work = Workload("decode", "gpt2", "bfloat16", 64, platform="gpu")
    rate, _ = workloads.limit(work, 3e12, {})
    assert rate == pytest.approx(64 * 3e12 / ((124_439_808 - 1024 * 768) * 2 + 2 * 12 * 64 * 96 * 768 * 2))


def test_on_a_gpu_the_rows_and_the_peers_are_others(canned, where, capsys, monkeypatch):
    where |= {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"}
    assert main(["benchmark", "--json", "--peers", "--only", "train-32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], [row["work"] for row in report["rows"]]) == (
        "NVIDIA H100 80GB HBM3",
        ["train-32x1024-bfloat16"],
    )
    assert list(report["matmul_flops_per_s"]) == ["float32", "tf32", "bfloat16"]
    assert report["launch_seconds"] == 2.0
    # A peer is told where; the package asks JAX.
    assert ("peers", "train-32x1024-bfloat16", "torch", "gpu") in canned
    assert ("benchmark", "train-32x1024-bfloat16") in canned
    assert main(["benchmark", "--only", "decode-64", "--only", "forward"]) == 0
    table = capsys.readouterr().out
    assert "gpt2 on NVIDIA H100 80GB HBM3. Limits: reading" in table
    assert "starting a program and waiting for it 3,000,000 µs.\n" in table
    assert "Native kernel" not in table
    rows = [work.name for work in workloads.workloads("gpt2", "gpu") if work.kind not in workloads.LIMITS]
    assert {"decode-1-bfloat16", "decode-64-bfloat16", "forward-32x1024-bfloat16", "train-32x1024-bfloat16"} <= set(
        rows
    )
    monkeypatch.undo()
    monkeypatch.setattr(benchmark_peers, "find_spec", lambda name: True)
    monkeypatch.setattr(benchmark_peers.shutil, "which", lambda name: name)
    for platform, peers in (("gpu", ["torch", "torch.compile"]), ("tpu", [])):
        (work,) = [work for work in workloads.workloads("gpt2", platform) if work.name == "decode-64-bfloat16"]
        assert benchmark_peers.available(work) == peers


def test_a_torch_without_a_gpu_says_so(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, __version__="2.13+cpu"))
    with pytest.raises(RuntimeError, match=r"torch 2\.13\+cpu sees no GPU: install a build for CUDA"):
        benchmark_peers._torch_device(Workload("forward", platform="gpu"))
    assert benchmark_peers._torch_device(Workload("forward")) == "cpu"


@pytest.fixture
def installed(monkeypatch):
    """The modules and programs that are there, to be filled."""
    there = set()
    monkeypatch.setattr(benchmark_peers, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(benchmark_peers.shutil, "which", lambda name: name in there or None)
    return there


def test_peers_need_their_packages_and_a_compiler(installed):
    work = Workload("forward")
    assert benchmark_peers.available(work) == []
    lacking = "torch, transformers not installed"
    assert benchmark_peers.missing(work) == {"torch": lacking, "torch.compile": lacking}
    installed |= {"torch", "transformers"}
    assert benchmark_peers.available(work) == ["torch"]
    assert benchmark_peers.missing(work) == {"torch.compile": "no C++ compiler"}
    installed.add("clang++")
    assert benchmark_peers.available(work) == ["torch", "torch.compile"]
    assert benchmark_peers.missing(work) == {}


def test_the_table_of_peers_is_what_they_run():
    header, _, *rows = re.findall(r"^\|.*\|$", benchmark_peers.__doc__, re.MULTILINE)
    kinds = [cell.strip() for cell in header.strip("|").split("|")][1:]
    told = [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in rows]
    run = [
        ["all" if peer.rows.get(kind) == benchmark_peers.ALL else ", ".join(peer.rows.get(kind, ())) for kind in kinds]
        for peer in benchmark_peers.PEERS.values()
    ]
    assert told == run


@pytest.mark.exhaustive
def test_a_peers_files_are_written_in_another_process(monkeypatch):
    peer = benchmark_peers.Peer((), {}, lambda work, path: (path / "pid").read_text, _write_pid)
    monkeypatch.setitem(benchmark_peers.PEERS, "peer", peer)
    pids = []
    monkeypatch.setattr(benchmark_peers, "timed", lambda run, repeats, warm_up: pids.append(int(run())) or 1.5)
    assert benchmark_peers.measure(Workload("decode"), "peer").seconds == 1.5
    assert pids != [os.getpid()]


def _write_pid(work, path):
    (path / "pid").write_text(str(os.getpid()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_random_parameters_are_the_models(dtype):
    config, compute = GPTConfig(**workloads.CHARACTER_MODEL), ComputeConfig(param_dtype=dtype)
    model, params = benchmark.model_and_params(config, compute, dtype)
    want = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), want
    )
    assert np.std(np.asarray(params["tok_emb"]["weight"], np.float32)) > 0


@pytest.mark.exhaustive
def test_a_work_is_measured_and_profiled(tmp_path):
    measured, costliest = benchmark.measure(Workload("decode", "character", "int8"), tmp_path)
    assert 0 < measured.seconds < 100
    assert measured.peak_bytes > 1e7
    assert 0 < len(costliest) <= 10
    assert all(ms > 0 for _, ms in costliest[:3])
    assert list(tmp_path.rglob("*.xplane.pb"))  # for XProf and TensorBoard
    assert list(tmp_path.rglob("*.trace.json.gz"))  # for Perfetto


@pytest.mark.exhaustive
def test_a_limit_is_measured_in_its_own_process():
    result = benchmark.run_in_process("jaxgpt.measuring.benchmark", "matmul-float32", "gpt2")
    assert result["seconds"] > 0
    with pytest.raises(RuntimeError, match="no-such-work"):
        benchmark.run_in_process("jaxgpt.measuring.benchmark", "no-such-work", "gpt2")


@pytest.fixture
def where():
    """The device that the processes tell, to be changed."""
    return {"platform": "cpu", "device": "cpu"}


@pytest.fixture
def canned(monkeypatch, where):
    """Every process takes 2 s; torch takes 1 s, llama.cpp 4 s; a second round takes longer."""
    calls = []

    def run(module, name, preset, *arguments, **_):
        if name == "device":
            return where
        calls.append((module.rpartition(".")[2], name, *arguments))
        seconds = {"torch": 1.0, "llama.cpp": 4.0}.get(arguments[0] if arguments else "", 2.0)
        seconds += calls.count(calls[-1]) - 1
        return {"seconds": seconds, "peak_bytes": 3 * 10**9, "costliest": [["dot x 2", 1.5]] if arguments else []}

    monkeypatch.setattr(benchmark, "run_in_process", run)
    monkeypatch.setattr(benchmark, "cold_and_warm_start", lambda: (3.0, 2.0))
    monkeypatch.setattr(benchmark_peers, "available", lambda work: ["torch", "llama.cpp"])
    monkeypatch.setattr(benchmark_peers, "missing", lambda work: {"OpenVINO": "not here"})
    return calls


def test_the_report_takes_the_best_round_and_gives_ratios(canned, capsys):
    assert main(["benchmark", "--json", "--peers", "--rounds", "2", "--only", "decode-8-bfloat16"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["tokens_per_s"] == {"jaxgpt": 8 * 128 / 2, "torch": 8 * 128 / 1, "llama.cpp": 8 * 128 / 4}
    assert row["ms"] == 2000
    assert row["limit_tokens_per_s"] > 0
    turns = [call[0] for call in canned if call[1] == "decode-8-bfloat16"]
    assert turns == ["benchmark", "peers", "peers"] * 2
    canned.clear()
    assert main(["benchmark", "--peers", "--only", "decode-8-bfloat16"]) == 0
    table = capsys.readouterr().out
    assert "0.50 (torch)" in table
    assert "peers in decode-8-bfloat16, tokens/s (peak): torch 1,024.0 (3.0 GB), llama.cpp 256.0 (3.0 GB)" in table
    assert "not compared with OpenVINO: not here" in table
    assert f"gpt2 on {benchmark.processor()}. Limits" in table
    assert "peak GB" in table
    assert " 3.0 " in table  # of 3 * 10**9 bytes
    assert "rows x read bandwidth" in table


def test_the_whole_benchmark_covers_every_row(canned, capsys, tmp_path):
    assert main(["benchmark", "--json", "--profile", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = [row["work"] for row in report["rows"]]
    decode = [f"decode-{batch}-{dtype}" for batch in (1, 8, 32) for dtype in ("float32", "bfloat16", "int8")]
    rest = [
        f"{work}-{dtype}"
        for work in ("prompt-512", "prompt-1024", "forward-4x1024", "score-100", "train-2x512")
        for dtype in ("float32", "bfloat16")
    ]
    train = ["character-train-32x256-float32", "character-train-32x256-bfloat16"]
    assert rows == [*decode, *rest, *train, "feed-64x1024"]
    assert report["start_seconds"] == {"cold": 3.0, "compiled": 2.0}
    assert report["rows"][0]["costliest"] == [["dot x 2", 1.5]]
    assert ("benchmark", rows[0], str(tmp_path / rows[0])) in canned


def test_lookup_is_measured_where_the_kernel_is(canned, capsys, monkeypatch):
    names = [f"{kind}-1-{dtype}" for kind in ("copy", "mislead") for dtype in ("float32", "bfloat16", "int8")]
    monkeypatch.setattr(kernel, "available", lambda: True)
    assert main(["benchmark", "--json", "--only", "copy", "--only", "mislead"]) == 0
    rows = {row["work"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == names
    assert rows["copy-1-int8"]["tokens_per_s"]["jaxgpt"] == 128 / 2
    # One reading gives at most 8 ids, or one where every guess is wrong.
    assert rows["copy-1-int8"]["limit_tokens_per_s"] == 8 * rows["mislead-1-int8"]["limit_tokens_per_s"]


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "looked_up"), [("copy", range(30, 48)), ("mislead", [0])])
def test_lookup_guesses_a_copy_and_not_what_misleads(built, monkeypatch, kind, looked_up):
    monkeypatch.setattr(workloads, "LOOKUP_PROMPT", 60)
    monkeypatch.setattr(workloads, "NEW", 60)
    result = benchmark._look_up(Workload(kind, "character"))()
    assert len(result.new_tokens[0]) == 60
    assert result.looked_up in looked_up


def test_what_one_host_feeds_stands_beside_what_a_pods_host_takes(canned, capsys):
    assert main(["benchmark", "--only", "feed"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"feed-64x1024 +{50 * 64 * 1024 / 2:,.1f} ", out)
    taken = planning.host_takes("gpt2")
    assert f"A host of a pod takes at most {taken:,.0f} tokens/s of them (training on v5p:2x2x1)" in out
    peak = 4 * 459e12 / (6 * 124_439_808)  # of the four chips
    assert peak / 4 < taken < peak


def test_batches_are_fed_from_a_file(monkeypatch):
    for module in (benchmark, workloads):
        monkeypatch.setattr(module, "FED", 3)
    monkeypatch.setattr(benchmark, "FEED_IDS", 100)
    work, steps = Workload("feed", "gpt2", batch=4, length=8), []
    monkeypatch.setattr(batches, "out_of_range", lambda ids, *_: steps.append(len(ids)))
    benchmark._feed(work)()
    assert (steps, work.tokens) == ([9] * 12, 3 * 4 * 8)


def test_a_program_that_fails_costs_its_own_figure_only(canned, capsys, monkeypatch):
    run = benchmark.run_in_process

    def fail(module, name, preset, *arguments, **_):
        if (module, name) in (
            ("jaxgpt.measuring.benchmark", "decode-1-int8"),
            ("jaxgpt.measuring.peers", "decode-8-int8"),
        ) and "llama.cpp" not in arguments:
            raise RuntimeError(f"{name}: no memory [left]")
        return run(module, name, preset, *arguments)

    monkeypatch.setattr(benchmark, "run_in_process", fail)
    assert main(["benchmark", "--json", "--peers", "--only", "int8"]) == 0
    first, second, _ = json.loads(capsys.readouterr().out)["rows"]
    assert first["tokens_per_s"] == {"torch": 128.0, "llama.cpp": 32.0}
    assert first["failures"] == {"jaxgpt": "decode-1-int8: no memory [left]"}
    assert second["tokens_per_s"] == {"jaxgpt": 512.0, "llama.cpp": 256.0}
    assert second["failures"] == {"torch": "decode-8-int8: no memory [left]"}
    assert main(["benchmark", "--peers", "--only", "int8"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"decode-1-int8 +failed", table)
    assert "decode-1-int8, jaxgpt failed: decode-1-int8: no memory [left]" in table


def test_results_are_told_as_they_come_and_a_slow_peer_is_given_up(canned, capsys, monkeypatch):
    run, waits = benchmark.run_in_process, []

    def wait(module, name, preset, *arguments, timeout=0):
        waits.append(timeout)
        if "llama.cpp" in arguments:
            raise RuntimeError(f"{name}: no result within {timeout:.0f} s")
        return run(module, name, preset, *arguments)

    monkeypatch.setattr(benchmark, "run_in_process", wait)
    assert main(["benchmark", "--peers", "--only", "decode-8-bfloat16"]) == 0
    assert waits[-3:] == [1800, 300, 300]
    out, err = capsys.readouterr()
    assert "decode-8-bfloat16: 2,000.0 ms\ndecode-8-bfloat16 torch: " in err
    assert err.endswith("decode-8-bfloat16 llama.cpp: failed\n")
    assert "decode-8-bfloat16, llama.cpp failed: decode-8-bfloat16: no result within 300 s" in out


def test_a_process_that_hangs_is_a_failure(monkeypatch):
    with pytest.raises(RuntimeError, match=r"read: no result within 0 s"):
        benchmark.run_in_process("jaxgpt.measuring.benchmark", "read", "gpt2", timeout=0.01)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
        (["--only", "dance"], "--only dance matches none of decode-1-float32, .*start"),
    ],
)
def test_bad_arguments_are_told(canned, capsys, arguments, told):
    assert main(["benchmark", *arguments]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_peers_that_are_not_installed_name_the_extra(canned, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_peers, "available", lambda work: [])
    assert main(["benchmark", "--peers"]) == 2
    assert "jaxgpt[bench]" in capsys.readouterr().err

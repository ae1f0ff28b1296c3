"""The planner: its formulae, its parser of XLA's text, the command, and real compilations if the compiler is there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import TINY
from jax.sharding import PartitionSpec

from jaxgpt import accounting
from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.generation import session
from jaxgpt.model.gpt import GPT
from jaxgpt.parallel import MeshConfig, make_mesh
from jaxgpt.planning import chips, compile
from jaxgpt.planning import plan as planner
from jaxgpt.planning.hlo import Program, _group
from jaxgpt.planning.plan import Cost, Topology

ROOT = Path(__file__).parent.parent

# Three iterations of a loop, each with an all-reduce over a ring of four that two fusions share, and a slice of stacked
# weights. Arrays in S(1) are no HBM traffic. At the end is an all-reduce of which each chip keeps a part.
PROGRAM = """HloModule jit_step, is_scheduled=true

%body_fusion (param_0: f32[3,256], param_1: f32[256]) -> f32[256] {
  %param_0 = f32[3,256]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[256]{0:T(256)S(1)} parameter(1)
  %dynamic-slice.1 = f32[1,256]{1,0:T(8,128)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,256}
  %bitcast.1 = f32[256]{0:T(256)} bitcast(%dynamic-slice.1)
  %all-reduce.1 = f32[256]{0:T(256)} all-reduce(%param_1), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %add.1 = f32[256]{0:T(256)} add(%bitcast.1, %all-reduce.1)
}

%again (param_0.1: f32[256]) -> f32[256] {
  %param_0.1 = f32[256]{0:T(256)S(1)} parameter(0)
  ROOT %all-reduce.2 = f32[256]{0:T(256)S(1)} all-reduce(%param_0.1), channel_id=1, replica_groups=[2,4]<=[8]
}

%all-reduce-scatter.3 (input: f32[256]) -> f32[64] {
  %input = f32[256]{0:T(256)} parameter(0)
  %all-reduce.3 = f32[256]{0:T(256)} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}
  %constant.9 = u32[] constant(0)
  ROOT %dynamic-slice.2 = f32[64]{0:T(256)} dynamic-slice(%all-reduce.3, %constant.9), dynamic_slice_sizes={64}
}

%body (state: (s32[], f32[3,256], f32[256])) -> (s32[], f32[3,256], f32[256]) {
  %state = (s32[]{:T(128)}, f32[3,256]{1,0:T(8,128)}, /*index=2*/f32[256]{0:T(256)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack = f32[3,256]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %x = f32[256]{0:T(256)S(1)} get-tuple-element(%state), index=2
  %fusion.1 = f32[256]{0:T(256)} fusion(%stack, %x), kind=kLoop, calls=%body_fusion
  %fusion.2 = f32[256]{0:T(256)S(1)} fusion(%x), kind=kLoop, calls=%again
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[3,256]{1,0:T(8,128)}, f32[256]{0:T(256)S(1)}) tuple(%i, %stack, %fusion.2)
}

%condition (state.1: (s32[], f32[3,256], f32[256])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[3,256]{1,0:T(8,128)}, f32[256]{0:T(256)S(1)}) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(3)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}

ENTRY %main (p: s32[], p.1: f32[3,256], p.2: f32[256]) -> f32[64] {
  %p = s32[]{:T(128)} parameter(0)
  %p.1 = f32[3,256]{1,0:T(8,128)} parameter(1)
  %p.2 = f32[256]{0:T(256)} parameter(2)
  %copy-start.1 = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%p.2)
  %copy-done.1 = f32[256]{0:T(256)S(1)} copy-done(%copy-start.1)
  %tuple.2 = (s32[]{:T(128)}, f32[3,256]{1,0:T(8,128)}, f32[256]{0:T(256)S(1)}) tuple(%p, %p.1, %copy-done.1)
  %while.1 = (s32[], f32[3,256], f32[256]{0:T(256)S(1)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %fusion.3 = f32[64]{0:T(256)} fusion(%p.2), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def plan_of(name: str, topology: str, mesh: str | None = None, *overrides: str, batch: int | None = None):
    slice_ = Topology.parse(topology)
    return planner.resolve(name, slice_, mesh, overrides, batch)[0], slice_


def test_traffic_of_a_program():
    traffic = Program(PROGRAM).traffic()
    # The copy at the start; then three times a slice of the stack and the result.
    assert traffic.hbm_bytes == 1024 + 3 * (1024 + 1024)
    assert {c.kind: c.wire_bytes for c in traffic.collectives.values()} == {
        "all-reduce": 3 * 2 * 3 / 4 * 1024,
        "reduce-scatter": 3 / 4 * 1024,
    }
    assert {c.group for c in traffic.collectives.values()} == {(0, 1, 2, 3)}


CHOICE = """HloModule jit_choice, is_scheduled=true

%band (a: f32[256]) -> f32[256] {
  %a = f32[256]{0:T(256)} parameter(0)
  ROOT %negate.1 = f32[256]{0:T(256)} negate(%a)
}

%dense (b: f32[256]) -> f32[256] {
  %b = f32[256]{0:T(256)} parameter(0)
  %negate.2 = f32[256]{0:T(256)} negate(%b)
  %all-reduce.1 = f32[256]{0:T(256)} all-reduce(%negate.2), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  ROOT %negate.3 = f32[256]{0:T(256)} negate(%all-reduce.1)
}

%nothing (c: f32[256]) -> f32[256] {
  ROOT %c = f32[256]{0:T(256)} parameter(0)
}

ENTRY %main (p: s32[], x: f32[256]) -> f32[256] {
  %p = s32[]{:T(128)} parameter(0)
  %x = f32[256]{0:T(256)} parameter(1)
  ROOT %conditional.1 = f32[256]{0:T(256)} conditional(%p, %x, %x), branch_computations={BRANCHES}
}
"""


@pytest.mark.parametrize(
    ("branches", "read_and_written", "sent"),
    [("%band, %dense", 3 * 1024, 512), ("%nothing, %dense", 4 * 1024, 1024), ("%nothing, %nothing", 0, 0)],
)
def test_traffic_of_a_choice_is_the_mean_of_what_does_something(branches, read_and_written, sent):
    traffic = Program(CHOICE.replace("BRANCHES", branches)).traffic()
    assert traffic.hbm_bytes == read_and_written
    assert sum(c.wire_bytes for c in traffic.collectives.values()) == sent


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5}}, dimensions={0}", (0, 4)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x", (0, 2, 4, 6)),
        ("source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,5},{5,1}}", (0, 2, 4)),
        ("source_target_pairs={{0,0},{1,4},{4,1}}", (1, 4)),
    ],
)
def test_groups_of_chips_as_xla_writes_them(text, group):
    assert _group(text) == group


def test_products_are_counted_as_often_as_they_run():
    from jaxgpt.planning.compile import product_flops

    config = TINY.replace(n_layers=5)
    model, ids = GPT(config, ComputeConfig(scan_layers=True)), jnp.zeros((3, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    traced = jax.make_jaxpr(lambda params: model.apply({"params": params}, ids))(params)
    assert product_flops(traced.jaxpr) == accounting.forward_flops(config, 3, 7).total


@pytest.mark.exhaustive
def test_products_of_layers_that_take_turns_are_counted_in_turn():
    from jaxgpt.planning.compile import product_flops

    def count(scan_layers, pattern):
        config = TINY.replace(context_length=1024, n_layers=4, attention_pattern=pattern, attention_window=64)
        model, ids = GPT(config, ComputeConfig(scan_layers=scan_layers)), jnp.zeros((1, 1024), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]

        def loss(params):
            return model.apply({"params": params}, ids).sum()

        return product_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    assert count(True, "alternating") == count(False, "alternating") < 0.9 * count(True, "dense")


@pytest.mark.parametrize(
    ("name", "size"), [("v5e:4x8", 32), ("v5p:8x8x16", 1024), ("v4:2x2x1", 4), ("h100:8", 8), ("h200:4x8", 32)]
)
def test_slices(name, size):
    assert Topology.parse(name).size == size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", r"no chip 'v9' \(known: v4, v5e, .*, b200, as in v5e:4x8 or h100:8\)"),
        ("v5:4x4", "no chip 'v5'; did you mean 'v5[ep]'"),
        ("v5e", r"v5e has no slice '' \(known: 1x1, 2x2, .*16x16\)$"),
        ("v5e:5x5", r"v5e has no slice '5x5' \(known: 1x1"),
        ("v5p:16x16", r"v5p has no slice '16x16' \(known: 2x2x1, .*multiples of 4, up to 6,144 chips\)"),
        ("v5p:16x16x28", "v5p has no slice '16x16x28'"),
        ("v4:0x4x4", "v4 has no slice '0x4x4'"),
        ("v4:4x4x4x", "v4 has no slice '4x4x4x'"),
        ("h300:8", "no chip 'h300'; did you mean 'h[12]00'"),
        ("h100", r"h100 has no shape '': expected the GPUs of one node \(1, 2, 4, 8\), as in h100:8, or the number of"),
        ("h100:16", "h100 has no shape '16': .* as in h100:4x8"),
        ("b200:0x8", "b200 has no shape '0x8'"),
        ("a100:2x2x8", "a100 has no shape '2x2x8'"),
    ],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(ConfigError, match=message):
        Topology.parse(name)


@pytest.mark.parametrize(
    ("group", "axes"),
    [((0, 1), ["tensor"]), ((1, 3), ["fsdp"]), ((0, 4), ["data"]), ((0, 2, 4, 6), ["data", "fsdp"]), ((0,), [])],
)
def test_axes_of_a_mesh_that_a_group_of_devices_spans(group, axes):
    assert compile.axes_of(group, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))) == axes


def test_bandwidth_counts_the_links_that_close_to_rings():
    v5e, v5p = Topology.parse("v5e:8x16"), Topology.parse("v5p:4x8x8")
    assert v5e.bandwidth((1, 16)) == 2 * 5e10
    assert v5e.bandwidth((8, 1)) == 5e10  # not a ring
    assert v5e.bandwidth((8, 16)) == 3 * 5e10
    assert v5p.bandwidth((4, 8, 4)) == 5 * 1e11
    assert v5p.bandwidth((1, 1, 1)) == 1e11


def test_bandwidth_between_gpus():
    node, nodes = Topology.parse("h100:8"), Topology.parse("h100:4x8")
    assert node.bandwidth((1, 8)) == 4.5e11  # NVLink
    assert nodes.bandwidth((4, 1)) == 5e10  # one network card each
    assert nodes.bandwidth((4, 8)) == 8 * 5e10  # eight of them, less than NVLink
    assert Topology.parse("a100:2x8").bandwidth((2, 8)) == 8 * 2.5e10
    assert node.mesh_bandwidth((1, 4, 2)) == {"tensor": 4.5e11, "fsdp": 4.5e11, "data": 4.5e11}
    # Neighbours along tensor share a node: of 8 parts along fsdp, 4 do, and 2 nodes; data is between nodes.
    assert nodes.mesh_bandwidth((2, 8, 2)) == {"tensor": 4.5e11, "fsdp": 4 * 5e10, "data": 5e10}


def test_a_gpu_is_what_its_data_sheet_says():
    # H100 SXM: 1,979 TFLOPS with sparsity; 80 GB; 3.35 TB/s; NVLink 900 GB/s in both directions; a card of 400 Gb/s.
    h100 = chips.GPUS["h100"]
    assert h100 == chips.GPU(pytest.approx(1979e12 / 2, rel=1e-3), 80e9, 3.35e12, 900e9 / 2, 400e9 / 8)
    # DGX B200, of eight: 36 PFLOPS with sparsity, 1,440 GB, 64 TB/s, NVLink 14.4 TB/s in both directions.
    assert chips.GPUS["b200"] == chips.GPU(36e15 / 2 / 8, 1440e9 / 8, 64e12 / 8, 14.4e12 / 2 / 8, 400e9 / 8)


def test_formulae_of_a_training_step_on_a_gpu():
    overrides = ("model.drop_rate=0", "compute.remat=none", "loss_chunk=0")
    config, topology = plan_of("gpt2", "h100:1", None, *overrides, batch=32)
    assert planner.attention(config, "gpu") == "cudnn"
    assert planner.attention(dataclasses.replace(config, separate_documents=True), "gpu") == "blocked"
    cost = planner.analytic_training(config, topology)
    P, tokens, T = 124_439_808, 32 * 1024, 1024
    assert cost.memory["parameters"] == 4 * P
    # Attention in blocks of 128 queries and keys: two products forward, and five backward.
    scored = 12 * 32 * T * (T + 128) / 2 * 2 * 768 * (2 + 5)
    assert cost.flops == pytest.approx(3 * 2 * tokens * (12 * 12 * 768**2 + 50257 * 768) + scored)
    # Per head and query, of 64 bfloat16 numbers: 4 forward, q, k, v and the result; 11 backward, as in Splash; and one
    # float32 forward, two backward.
    once = 12 * 32 * 12 * T
    attention = once * ((4 + 11) * 64 * 2 + 3 * 4)
    assert planner._attention_bytes(config, "gpu") == attention
    bounds = planner.roofline(cost, topology, tokens, planner.model_flops(config))
    assert bounds["seconds"]["compute"] == pytest.approx(cost.flops / 989e12)
    assert bounds["seconds"]["memory"] == pytest.approx(cost.hbm_bytes / 3.35e12)


def test_the_command_plans_gpus_by_formula(monkeypatch, capsys):
    monkeypatch.setattr(planner, "compiler_available", lambda: True)  # which would compile for TPUs
    arguments = ["plan", "gpt3-6.7b", "--topology", "h100:4x8", "--batch", "1024"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("by formula: nothing is compiled for GPUs. The formulas were fitted to programs for TPUs")
    for text in ("on h100:4x8, 32 chips", "attention in training: cudnn", "analytic", "fits 74.51 GiB"):
        assert text in out
    assert "compiled\n" not in out
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["compiled"]
    assert report["attention"] == "cudnn"
    assert report["training"]["analytic"]["memory_bytes"]["parameters"] == pytest.approx(4 * 6.66e9 / 32, rel=0.01)


def test_what_the_config_does_not_say_is_chosen_and_told(tmp_path):
    topology = Topology.parse("v5e:2x2")
    config, chosen = planner.resolve("gpt2", topology)
    compute = {"compute.scan_layers": True, "compute.remat": "block", "compute.dtype": "bfloat16"}
    assert chosen == compute | {"batch_size": 4}
    assert (config.mesh.fsdp, config.batch_size, config.compute.remat) == (4, 4, "block")
    (tmp_path / "run.toml").write_text(
        '[model]\npreset = "gpt2"\n[compute]\nremat = "dots"\nscan_layers = false\n'
        "[train]\nbatch_size = 6\ngrad_accumulation = 3\n[mesh]\ndata = 2\ntensor = 2\n"
    )
    config, chosen = planner.resolve(str(tmp_path / "run.toml"), topology, overrides=["compute.dtype=float32"])
    assert chosen == {}
    assert (config.compute.remat, config.compute.scan_layers, config.compute.dtype) == ("dots", False, "float32")
    config, chosen = planner.resolve("gpt2", topology, batch=64)
    assert chosen["loss_chunk"] == config.loss_chunk < 64 * 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt2", "v5e:2x2", "fsdp=2"), "has 2 chips, and v5e:2x2 4: they must be equal"),
        (("gpt2", "v5e:2x2", "fsdp=8"), "has 8 chips, and v5e:2x2 4"),
        (("gpt2", "v5e:2x2", "fsdp=3,tensor=-1"), "3 does not divide the 4 devices"),
        (("gpt2", "v5e:4x4", "tensor=8,fsdp=2"), "tensor=8 does not divide n_heads=12"),
        (("gpt2-xl", "v5p:4x4x4", "fsdp=-1"), None),
        (("gpt3-13b", "v5p:4x4x8", "tensor=16,fsdp=8"), "tensor=16 does not divide n_heads=40"),
        (("nothing.toml", "v5e:2x2", None), "cannot be read as TOML"),
        (("gpt3-125", "v5e:2x2", None), "gpt3-125: no such file or preset; did you mean 'gpt3-125m'"),
        (
            ("gpt2", "v5e:2x2", None, "lr=1e-4"),
            r"^--set lr=1e-4 \[train\]: unknown key 'lr'; did you mean 'learning_rate'",
        ),
    ],
)
def test_meshes_that_do_not_fit(arguments, message):
    if message is None:
        plan_of(*arguments)
        return
    with pytest.raises(ConfigError, match=message):
        plan_of(*arguments)


def test_batches_that_the_mesh_does_not_divide():
    with pytest.raises(ConfigError, match="data x fsdp=4 does not divide the batch of a step or micro-batch=6"):
        plan_of("gpt2", "v5e:2x2", batch=6)
    with pytest.raises(ConfigError, match="data x fsdp=4 does not divide"):
        planner.make_plan(*plan_of("gpt2", "v5e:2x2"), decode_batch=3)


def test_formulae_of_a_training_step():
    blocked = "compute.attention=blocked"
    config, topology = plan_of("gpt3-13b", "v5p:4x8x8", "data=2,fsdp=32,tensor=4", blocked, batch=128)
    P = accounting.count_parameters(config.model).total
    cost = planner.analytic_training(config, topology)
    assert cost.memory["parameters"] == cost.memory["gradients"] == cost.memory["optimizer"] / 2 == 4 * P / 128
    kept = 40 * 2 * 2048 * 5120 / 4 * 4  # each layer's input, a quarter of it per chip
    assert kept < cost.memory["activations"] < 4 * kept
    linear = accounting.training_flops(config.model, 128, 2048, config.compute.remat).linear
    # Of 40 layers every other one is banded. A block of 128 queries meets half of the keys, or those of its band. There
    # are two products forward, done twice, and five backward.
    pairs = 20 * 2048 * (2048 + 128) / 2 + 20 * 2048 * (256 + 128)
    assert cost.flops == pytest.approx((linear + 9 * 128 * pairs * 2 * 5120) / 256)
    positions = 40 * 3 / 4 * (2 * 2048 * 5120 * 4)
    tensor = {
        "all-gather (tensor)": pytest.approx(6 * positions),
        "reduce-scatter (tensor)": pytest.approx(5 * positions),
    }
    assert cost.wire_bytes == tensor | {
        "all-gather (fsdp)": pytest.approx(2 * 31 / 32 * P / 4 * 2),
        "reduce-scatter (fsdp)": pytest.approx(31 / 32 * P / 4 * 4),
        "all-reduce (data)": pytest.approx(2 * 1 / 2 * 4 * P / 128),
    }
    halved = planner.analytic_training(
        dataclasses.replace(config, compute=config.compute.replace(activation_dtype="bfloat16")), topology
    )
    assert halved.wire_bytes == cost.wire_bytes | {sent: cost.wire_bytes[sent] / 2 for sent in tensor}


def compiled_rows():
    """Of each row of the table in docs/scaling.md: the plan's arguments, GiB, and tokens/s in turn and overlapped."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    size, gib, number = r"\| ([\d.]+[MB]) ", r"\| ([\d.]+) of \d+ ", r"([\d,]+)"
    table = re.findall(rf"^{size}\|[^|]*{gib}\|[^|]*\| {number} to {number} \|", page, re.MULTILINE)
    plans = re.search(r"^Each row is `jaxgpt plan` of\n\n((?:    .+\n)+)", page, re.MULTILINE)
    for (name, *values), words in zip(table, map(str.split, plans[1].splitlines()), strict=True):
        assert words[0] == f"configs/gpt3-{name.lower()}.toml"
        yield words, [float(value.replace(",", "")) for value in values]


def test_the_formulae_are_as_close_to_the_compiled_programs_as_the_command_says():
    errors = {"memory": [], "tokens_per_s": []}
    for words, (gib, in_turn, overlapped) in compiled_rows():
        options = list(zip(words[1::2], words[2::2], strict=True))
        given, sets = dict(options), [value for option, value in options if option == "--set"]
        config, topology = plan_of(str(ROOT / words[0]), given["--topology"], given.get("--mesh"), *sets)
        report = planner.roofline(
            planner.analytic_training(config, topology),
            topology,
            config.batch_size * config.T,
            planner.model_flops(config),
        )
        errors["memory"].append(report["memory_bytes"]["total"] / 2**30 / gib - 1)
        bound = 0.5 if words[0].endswith(("6.7b.toml", "13b.toml", "175b.toml")) else 0.4
        assert report["mfu"]["in_turn"] > bound
        assert report["mfu"]["overlapped"] > 0.7
        speed = report["tokens_per_s"]
        errors["tokens_per_s"] += [speed["in_turn"] / in_turn - 1, speed["overlapped"] / overlapped - 1]
    assert len(errors["memory"]) == 8
    for what, found in errors.items():
        stated = planner.ANALYTIC_ERROR[what]
        assert stated - 0.02 < max(map(abs, found)) < stated < 0.4


DENSE = ("model.attention_pattern=dense", "compute.attention=blocked")


def test_formulae_of_the_memory_traffic():
    def traffic(*overrides):
        config, _ = plan_of("gpt3-1.3b", "v5e:8x8", None, *DENSE, *overrides, batch=512)
        return planner._hbm_bytes(config)

    tokens, D, L = 8 * 2048, 2048, 24
    # Twice as many micro-batches of half the rows: only weights, the head's gradient and the optimizer do not halve.
    micro = traffic("grad_accumulation=2", "loss_chunk=0") - traffic("loss_chunk=0")
    P = accounting.count_parameters(GPTConfig.preset("gpt3-1.3b")).total
    assert micro == pytest.approx(2 * 4 * P * 2 + 2 * 50257 * D * 4)
    # Logits in two chunks add twice to the head's gradient.
    chunk = 512 * 2048 // 2
    assert traffic(f"loss_chunk={chunk}") - traffic("loss_chunk=0") == pytest.approx(2 * 50257 * D * 4)
    # Without recomputation a pass of weights and activations goes, and one of attention's two forward passes.
    scores = 8 * 16 * L * (2048 * (2048 + 128) / 2) * 4
    recomputed = 2 * P * 2 + 2 * L * tokens * (2 * D + 5 * D + 4 * D) * 4 + 3 * scores
    assert traffic() - traffic("compute.remat=none") == pytest.approx(recomputed)
    # Half as wide, activations cost half as much.
    halved = 8 * L * tokens * (2 * D + 5 * D + 4 * D) * 2
    assert traffic() - traffic("compute.activation_dtype=bfloat16") == pytest.approx(halved)


def test_formulae_of_attention_in_a_kernel():
    def cost(backend):
        config, topology = plan_of("gpt3-1.3b", "v5e:8x8", None, DENSE[0], f"compute.attention={backend}", batch=512)
        return planner.analytic_training(config, topology), planner._attention_bytes(config)

    (kernel, in_kernels), (blocks, in_blocks) = cost("auto"), cost("blocked")
    rows, heads, layers, T, K = 8, 16, 24, 2048, 128
    # No block of scores is in memory or passes through HBM.
    spared = blocks.memory["activations"] - kernel.memory["activations"]
    assert spared == pytest.approx(4 * rows * heads * 128 * T * 4)
    assert blocks.hbm_bytes - kernel.hbm_bytes == pytest.approx(in_blocks - in_kernels)
    # 10 of the 4 x 4 blocks of 512 are not wholly masked. Two products forward, twice, and seven backward.
    scored = 2 * rows * heads * layers * K * 512**2 * 10 * (2 * 2 + 7)
    in_blocks_of_128 = 2 * rows * heads * layers * K * T * (T + 128) / 2 * (2 * 2 + 5)
    assert kernel.flops - blocks.flops == pytest.approx(scored - in_blocks_of_128)


@pytest.mark.parametrize(("window", "steps"), [(None, 1 + 2 + 3), (100, 1 + 2 + 2)])
def test_a_kernels_cost_is_that_of_the_blocks_that_it_computes(window, steps):
    from jaxgpt.model.attention import splash
    from jaxgpt.model.cache import Seen
    from jaxgpt.planning.traced import kernel_bytes, product_flops

    B, H, T, K = 2, 3, 384, 64  # three blocks of 128

    def total(q, k, v):
        return splash(q, Seen(k, v, 0, None, "bfloat16"), window=window).sum()

    x = jax.ShapeDtypeStruct((B, H, T, K), jnp.float32)
    forward, both = (jax.make_jaxpr(f)(x, x, x).jaxpr for f in (total, jax.grad(total, (0, 1, 2))))
    product = 2 * B * H * steps * K * 128**2
    assert product_flops(forward) == 2 * product
    inner = 2 * B * H * T * K  # sum_K of the result times its gradient
    assert product_flops(both) == (2 + 7) * product + inner
    # Queries, the result, their positions in 128 lanes of int32; keys and values per block; before JAX 0.12, one
    # block of three sums.
    once, lanes, block = 2 * B * H * T * K, 4 * B * H * T * 128, 2 * B * H * 128 * K
    sums = B * 128 * 4 * (128 + 128 + K) if jax.__version_info__ < (0, 12) else 0
    assert kernel_bytes(forward) == 2 * once + lanes + 2 * steps * block + sums


def test_operations_within_shard_map_count_once_per_device():
    from jaxgpt.planning.traced import product_flops

    mesh = make_mesh(MeshConfig(data=2))
    whole, rows = PartitionSpec(), PartitionSpec("data")
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert product_flops(jax.make_jaxpr(product)(jnp.ones((4, 8)), jnp.ones((8, 16))).jaxpr) == 2 * 4 * 8 * 16


def test_formulae_of_the_activations():
    def activations(*overrides, topology="v5e:8x8", batch=512):
        config, chips = plan_of("gpt3-1.3b", topology, None, "loss_chunk=0", *overrides, batch=batch)
        return planner.analytic_training(config, chips).memory["activations"]

    tokens, D, L = 8 * 2048, 2048, 24
    products = L * tokens * (5 + 4) * D * 4  # the results of the layers
    least = activations("compute.remat=block")
    assert activations("compute.remat=dots") - least == pytest.approx(products)
    assert activations("compute.remat=none") - least == pytest.approx(2 * products)
    # In bfloat16 each layer's input is half as large, and so is the widest layer, except for its products' operands.
    halved = least - activations("compute.activation_dtype=bfloat16")
    assert halved == pytest.approx((L * D + 3 * D + 9 * D) * tokens * 2)


def test_formulae_of_the_embedding_and_the_logits():
    def memory(mesh, loss_chunk):
        overrides = ("compute.attention=blocked", f"loss_chunk={loss_chunk}")
        config, chips = plan_of("gpt3-1.3b", "v5e:8x8", mesh, *overrides, batch=512)
        return planner.analytic_training(config, chips).memory["embedding and logits"]

    rows, V, D = 8, 50257, 2048
    # 700 positions at a time are three chunks of 683.
    assert memory("data=64", 512 * 700) == pytest.approx(rows * 683 * V * 4)
    assert memory("fsdp=64", 512 * 700) == pytest.approx(rows * 683 * V * 4 + 2 * V * D * 4)
    assert memory("fsdp=64", 0) == pytest.approx(rows * 2048 * V * 4 + 2 * V * D * 4)


def test_formulae_of_decoding():
    config, topology = plan_of("gpt2", "v5e:2x2", "tensor=2,fsdp=2")
    cost = planner.analytic_decoding(config, topology, 8)
    weights, cache = 2 * accounting.count_parameters(config.model).total, 2 * 12 * 8 * 1024 * 768 * 2
    assert cost.memory == {"parameters": weights / 4, "cache": cache / 4}
    assert cost.hbm_bytes == weights / 2 + cache / 4


def test_a_roofline():
    topology = Topology.parse("v5e:2x2")
    cost = Cost({"a": 2**33, "b": 2**33}, 197e12, 819e9 / 2, {"all-gather": 1.0}, 0.25)
    bounds = planner.roofline(cost, topology, 700, 4 * 98.5e12)
    assert bounds["fits"]
    assert bounds["memory_bytes"]["total"] == 2**34
    assert bounds["seconds"] == {"compute": 1, "memory": 0.5, "interconnect": 0.25, "overlapped": 1, "in_turn": 1.75}
    assert bounds["bound_by"] == "compute"
    assert bounds["tokens_per_s"] == {"overlapped": 700, "in_turn": 400}
    assert bounds["mfu"]["overlapped"] == 0.5
    cost.memory["b"] += 1
    assert not planner.roofline(cost, topology, 700, 1)["fits"]


def test_a_program_that_the_compiler_cannot_place_is_a_result():
    from jaxgpt.planning.compile import _cost

    def failing(reason):
        def compile(**_):
            raise jax.errors.JaxRuntimeError(reason)

        lowered = SimpleNamespace(compile=compile)
        traced = SimpleNamespace(jaxpr=jax.make_jaxpr(lambda x: x)(1.0), lower=lambda: lowered)
        return SimpleNamespace(trace=lambda: traced)

    topology, mesh = Topology.parse("v5e:2x2"), SimpleNamespace(size=4)
    cost = _cost(topology, mesh, {}, failing("RESOURCE_EXHAUSTED: Ran out of memory\n on HBM"), (), {})
    assert cost.does_not_fit == "RESOURCE_EXHAUSTED: Ran out of memory on HBM"
    bounds = planner.roofline(cost, topology, 1, 1)
    assert not bounds["fits"]
    assert "seconds" not in bounds
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        _cost(topology, mesh, {}, failing("INTERNAL: a fault"), (), {})


def test_a_compiler_that_fails_says_how(monkeypatch):
    monkeypatch.setattr(planner, "compiler_available", lambda: True)
    monkeypatch.setattr(planner.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="x\nbad flag"))
    with pytest.raises(RuntimeError, match="the TPU compiler failed: x\nbad flag"):
        planner.make_plan(*plan_of("gpt2", "v5e:2x2"))


def test_the_command_without_the_compiler_says_so_first(monkeypatch, capsys):
    monkeypatch.setattr(planner, "compiler_available", lambda: False)
    assert main(["plan", "gpt3-175b", "--topology", "v5p:8x8x16", "--mesh", "fsdp=128,tensor=8", "--batch", "256"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "analytic estimate: the TPU compiler isn't installed, pip install 'jaxgpt[tpu]'. For the sizes of"
    )
    error = planner.ANALYTIC_ERROR
    assert f"within {error['memory']:.0%} of the compiler's and tokens/s within {error['tokens_per_s']:.0%};" in out
    for text in (
        "1,024 chips",
        "compute.remat = block",
        "fits 95.00 GiB",
        "sent: reduce-scatter (tensor)",
        "decoding, 128 ",
    ):
        assert text in out
    assert main(["plan", "gpt3-175b", "--topology", "v5p:8x8x16", "--mesh", "fsdp=128,tensor=8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["training"]["analytic"]["memory_bytes"]["parameters"] == 4 * 174_604_259_328 / 1024
    assert report["training"]["analytic"]["fits"]
    assert not report["compiled"]
    assert report["analytic_error"] == error
    assert main(["plan", "gpt2", "--topology", "v5e:1x1"]) == 0
    assert "gpt2 on v5e:1x1, 1 chip: mesh" in capsys.readouterr().out


def test_the_command_tells_what_does_not_fit(monkeypatch, capsys):
    reason = "RESOURCE_EXHAUSTED: Ran out of memory [on HBM]"
    monkeypatch.setattr(planner, "compiler_available", lambda: True)
    cost = Cost({"parameters": 1e9}, 1, 0, {}, 0, does_not_fit=reason)
    monkeypatch.setattr(planner, "_compiled", lambda *_: {"training": cost})
    assert main(["plan", "gpt2", "--topology", "v5e:2x2"]) == 0
    out = capsys.readouterr().out
    assert f"training: the compiler: {reason}" in out
    assert "NO" in out


def test_the_commands_errors_are_one_line(capsys):
    assert main(["plan", "gpt2", "--topology", "v7:1x1"]) == 2
    assert capsys.readouterr().err.startswith("jaxgpt: error: no chip 'v7'")


SPLASH = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxgpt.model.attention import splash
from jaxgpt.model.cache import Seen

slice_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
place = SingleDeviceSharding(slice_.devices[0])
for T, K, window, starts in json.loads(sys.argv[1]):
    x = jax.ShapeDtypeStruct((2, 3, T, K), jnp.float32, sharding=place)
    start = {"rows": (2,), "documents": (2, T)}.get(starts)
    start = start and jax.ShapeDtypeStruct(start, jnp.int32, sharding=place)

    def total(q, k, v, start):
        start_B, start_BxT = (start if starts == which else None for which in ("rows", "documents"))
        return splash(q, Seen(k, v, 0, start_B, "bfloat16", start_BxT), window=window).sum()

    program = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(x, x, x, start).compile()
    print(program.as_text().count("tpu_custom_call"))
"""


@pytest.mark.exhaustive
def test_splash_is_compiled_for_whatever_it_takes():
    pytest.importorskip("libtpu")
    # T, head_dim, band, and what starts where: the cases of test_attention_backends.py, and GPT-3's widths.
    cases = [(384, 64, None, "rows"), (384, 64, 100, None), (100, 64, None, "rows"), (200, 64, 40, "documents")]
    cases += [(512, 96, None, None), (1024, 128, 256, "documents")]
    done = subprocess.run(
        [sys.executable, "-c", SPLASH, json.dumps(cases)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Forward, and backward one for the queries and one for the keys and values.
    assert [int(line) for line in done.stdout.splitlines()] == [3] * len(cases)


@pytest.mark.exhaustive
def test_gpt2_compiled_for_four_chips():
    pytest.importorskip("libtpu")
    report = planner.make_plan(*plan_of("gpt2", "v5e:2x2", batch=32), quick=True)
    training, analytic = report["training"]["compiled"], report["training"]["analytic"]
    assert training["fits"]
    for part in ("parameters", "optimizer"):  # all are sharded, except LayerNorms and biases
        assert training["memory_bytes"][part] == pytest.approx(analytic["memory_bytes"][part], rel=0.01)
    assert analytic["memory_bytes"]["total"] == pytest.approx(training["memory_bytes"]["total"], rel=0.1)
    # Attention skips masked blocks; the loss's last chunk is padded, from 357 positions to 667.
    assert 0.9 * analytic["flops"] < training["flops"] < 1.05 * analytic["flops"]
    assert analytic["hbm_bytes"] < training["hbm_bytes"]
    sent, expected = (sum(way["wire_bytes"].values()) for way in (training, analytic))
    assert expected < sent < 3 * expected
    decoding = report["decoding"]["compiled"]
    assert decoding["fits"]
    assert decoding["memory_bytes"]["cache"] == pytest.approx(2 * 12 * 1024 * 768 * 2, rel=0.01)
    # Each chip gathers the weights.
    weights = accounting.parameter_bytes(GPTConfig.preset("gpt2"), "bfloat16")
    assert decoding["wire_bytes"]["all-gather (fsdp)"] == pytest.approx(3 / 4 * weights, rel=0.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rows", [1, 64])
def test_decoding_reads_little_more_than_the_weights_and_the_cache(rows):
    pytest.importorskip("libtpu")
    config, topology = plan_of("gpt2", "v5e:1x1")
    cost = planner._compiled(config, topology, rows, quick=False, train=False)["decoding"]
    # A scan over the layers, which the training step has and decoding must not, reads up to ten times as much.
    assert 0.7 < cost.hbm_bytes / planner.analytic_decoding(config, topology, rows).hbm_bytes < 1.15


def test_a_plan_says_how_much_decoding_reads(monkeypatch, capsys):
    config, topology = plan_of("gpt2", "v5e:2x2")
    least = planner.analytic_decoding(config, topology, 4).hbm_bytes
    costs = {name: Cost({"parameters": 1e9}, 1, 1.5 * least, {}, 0) for name in ("training", "decoding")}
    monkeypatch.setattr(planner, "compiler_available", lambda: True)
    monkeypatch.setattr(planner, "_compiled", lambda *_: costs)
    assert main(["plan", "gpt2", "--topology", "v5e:2x2"]) == 0
    (line,) = re.findall(r"^ times the weights and the cache .*$", capsys.readouterr().out, re.MULTILINE)
    assert line.split()[-1] == "1.50"


def test_decoding_is_planned_in_the_form_that_generate_runs():
    config, _ = plan_of("gpt2", "v5e:1x1", None, "model.n_layers=2")
    assert config.compute.scan_layers
    assert compile.CHUNK == session.CHUNK
    _, (params, state, _), _ = compile.decoding(config, make_mesh(MeshConfig()), 3)
    assert {"trf_blocks_0", "trf_blocks_1"} <= set(params)
    assert [kept.shape for kept in jax.tree.leaves(state.memory.layers)] == 4 * [(3, 12, 1024, 64)]


POD = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 256)
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.parallel import MeshConfig, make_mesh
from jaxgpt.planning import compile, plan
from jaxgpt.planning.hlo import Program
from jaxgpt.training import TrainConfig

mesh = MeshConfig.parse(sys.argv[1])
model = GPTConfig(
    vocab_size=1000, context_length=512, emb_dim=1024, n_heads=16, n_layers=24, drop_rate=0.0, tokenizer="none"
)
# A CPU's collectives are float32 whatever the program's are.
compute = ComputeConfig(scan_layers=True, remat="block")
config = TrainConfig(model=model, compute=compute, mesh=mesh, batch_size=mesh.data * mesh.fsdp)
devices = make_mesh(mesh)
step, arguments, _ = compile.training(config, devices)
sent = {}
for kind, size, group in Program(step.lower(*arguments).compile().as_text()).traffic().collectives.values():
    name = f"{kind} ({', '.join(compile.axes_of(group, devices))})"
    sent[name] = sent.get(name, 0) + size
formulae = plan.analytic_training(config, plan.Topology.parse("v5e:16x16")).wire_bytes
print(json.dumps([sent, formulae]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["fsdp=256", "data=4,fsdp=8,tensor=8"])
def test_what_256_simulated_devices_exchange(mesh):
    """The trainer's step, partitioned and compiled without a TPU's compiler, and not run."""
    done = subprocess.run(
        [sys.executable, "-c", POD, mesh],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sent, formulae = json.loads(done.stdout.splitlines()[-1])
    # On a CPU, XLA scatters a sum by making all of it everywhere, which sends twice as much; and it sums gradients over
    # both axes of the batch at once.
    expected = {"all-gather (fsdp)": formulae["all-gather (fsdp)"]}
    if mesh == "fsdp=256":
        expected["all-reduce (fsdp)"] = 2 * formulae["reduce-scatter (fsdp)"]
    else:
        expected["all-gather (tensor)"] = formulae["all-gather (tensor)"]
        expected["all-reduce (tensor)"] = 2 * formulae["reduce-scatter (tensor)"]
        gradients = formulae["reduce-scatter (fsdp)"] / (7 / 8)
        assert formulae["all-reduce (data)"] == pytest.approx(2 * (3 / 4) * gradients / 8)
        expected["all-reduce (data, fsdp)"] = 2 * (31 / 32) * gradients
    for name, size in expected.items():
        assert sent.pop(name) == pytest.approx(size, rel=0.04), name
    # The rest is the ids, the loss, and the embedding's table as its layout changes.
    assert sum(sent.values()) < 0.002 * sum(expected.values()), sent


@pytest.mark.exhaustive
def test_gpt3_compiled_for_a_pod_it_fits():
    pytest.importorskip("libtpu")
    config, topology = plan_of("gpt3-175b", "v5p:8x8x16", "fsdp=128,tensor=8", batch=256)
    assert planner.attention(config) == "splash"
    report = planner.make_plan(config, topology, decode_batch=0, quick=True)
    training, analytic = report["training"]["compiled"], report["training"]["analytic"]
    assert training["fits"]
    # Biases and LayerNorms are replicated on every chip.
    assert training["memory_bytes"]["parameters"] == pytest.approx(4 * 174_604_259_328 / 1024, rel=0.06)
    # With positions spread over eight chips, the formula counts too little: docs/scaling.md says so.
    assert analytic["memory_bytes"]["total"] < training["memory_bytes"]["total"] < 12e9
    # The program counts banded layers as dense ones, the formulae count only their bands.
    assert 0.9 * analytic["flops"] < training["flops"] < 1.05 * analytic["flops"]
    # Nothing is exchanged beyond what the formulae expect: XLA once gathered all of the qkv weights on every chip. What
    # the mesh's two axes gather and scatter are of the same kinds, so only the sum tells.
    sent, expected = (sum(way["wire_bytes"].values()) for way in (training, analytic))
    assert 0.8 * expected < sent < 1.5 * expected


@pytest.mark.exhaustive
def test_gpt3_on_four_chips_does_not_fit():
    pytest.importorskip("libtpu")
    report = planner.make_plan(*plan_of("gpt3-13b", "v5e:2x2"), decode_batch=0, quick=True)
    assert not report["training"]["compiled"]["fits"]
    assert "RESOURCE_EXHAUSTED" in report["training"]["compiled"]["does_not_fit"]


@pytest.mark.parametrize("table", ["model", "compute", "mesh", "lora", "train"])
def test_a_table_that_is_none_is_refused_by_name(table, tmp_path):
    (tmp_path / "run.toml").write_text(f"{table} = 3\n")
    with pytest.raises(ConfigError, match=f"'{table}' must be a table, not 3"):
        planner.resolve(str(tmp_path / "run.toml"), planner.Topology.parse("v5e:2x2"))


@pytest.mark.parametrize("override", ["lora.rank=16", "freeze=tok_emb"])
def test_a_plan_of_a_part_of_a_model_is_refused(override):
    with pytest.raises(ConfigError, match="a plan is for the training of whole models, without lora and freeze"):
        planner.resolve("gpt2", planner.Topology.parse("v5e:2x2"), overrides=[override])

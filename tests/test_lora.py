"""LoRA adapters, and parts of a model that stay frozen: as functions, and through the trainer."""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, make_model, random_ids, stack_blocks

import jaxgpt
from jaxgpt import lora
from jaxgpt.accounting import count_adapters
from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.data import Tokens
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.model import cast_params, leaves
from jaxgpt.parallel import MeshConfig, sharding
from jaxgpt.training import step as train_step
from jaxgpt.training import trainable
from jaxgpt.training.config import LoraConfig, TrainConfig
from jaxgpt.training.loss import model_loss
from jaxgpt.training.models import load_run
from jaxgpt.training.optimizer import is_matrix
from jaxgpt.training.run_directory import Run
from jaxgpt.training.trainer import train

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TEXT = "The cat sat on the mat. The dog sat on the log. The cat saw the dog. " * 12
MODEL = GPTConfig(
    vocab_size=257, context_length=16, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, tokenizer="bytes"
)
EVERYTHING = "att, ff, tok_emb, pos_emb, out_head"


def trained(adapters, seed=0):
    """Adapters in which every element matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, x.dtype), adapters)


def equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_the_books_appendix_e_trains_as_many_parameters_as_it_says():
    # GPT-2 small with Q/K/V biases and an output head of two classes, rank 16, in all linear layers.
    config = GPTConfig.preset("gpt2")
    model = jaxgpt.GPT(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params["out_head"] = {"weight": jax.ShapeDtypeStruct((2, 768), jnp.float32)}
    adapters = jax.eval_shape(lambda params: lora.init(jax.random.key(0), params, 16, "att, ff, out_head"), params)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 2_666_528
    assert count_adapters(config, 16) == 2_666_528 - 16 * (2 + 768)
    for scan_layers in (False, True):
        run = TrainConfig.from_dict({"compute": {"scan_layers": scan_layers}, "lora": {"rank": 16}})
        assert trainable.count(run) == 2_666_528 - 16 * (2 + 768)


@pytest.mark.parametrize("stacked", [False, True])
def test_new_adapters_change_nothing_and_merged_ones_are_the_papers_formula(stacked):
    _, params = make_model(TINY.replace(tie_embeddings=False))
    if stacked:
        params = stack_blocks(params, TINY.n_layers)
    adapters = lora.init(jax.random.key(0), params, 4, EVERYTHING)
    merge = jax.jit(lora.merge, static_argnums=2)
    equal(merge(params, adapters), params)
    assert {path.rpartition("/")[0] for path in leaves(adapters)} == {
        path.removesuffix("/weight") for path in leaves(params) if path.endswith("/weight")
    }
    first = adapters["trf_blocks" if stacked else "trf_blocks_0"]["att"]["qkv"]["lora_a"]
    bound = TINY.emb_dim**-0.5
    assert 0.9 * bound < float(jnp.max(jnp.abs(first))) <= bound
    assert abs(float(jnp.mean(first))) < 0.1 * bound
    rows = [row.tobytes() for path, leaf in leaves(adapters).items() if path.endswith("lora_a")
            for row in np.asarray(leaf).reshape(-1, leaf.shape[-1])]  # fmt: skip
    assert len(set(rows)) == len(rows)  # no matrix shares its draw with another
    adapters = trained(adapters)
    merged, own, before = leaves(merge(params, adapters, 6)), leaves(adapters), leaves(params)
    for path, leaf in merged.items():
        want = np.asarray(before[path], np.float64)
        if path.endswith("/weight"):
            a, b = (np.asarray(own[path.removesuffix("weight") + name], np.float64) for name in ("lora_a", "lora_b"))
            want = want + 6 / 4 * np.einsum("...or,...ri->...oi", b, a)
        np.testing.assert_allclose(leaf, want, atol=2e-6, err_msg=path)
    equal(merge(params, adapters), merge(params, adapters, 4))  # alpha / r is 1 by default


@pytest.mark.parametrize(
    "compute",
    [
        {},
        exhaustive({"scan_layers": True, "remat": "block"}),
        exhaustive({"remat": "dots"}),
        exhaustive({"scan_layers": True}),
        exhaustive({"custom_derivatives": False}),
        exhaustive({"dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_attached_adapters_compute_what_merged_ones_do(compute):
    model, params = make_model(TINY.replace(tie_embeddings=False, n_layers=1), **compute)
    adapters = trained(lora.init(jax.random.key(0), params, 4, EVERYTHING))
    ids = random_ids(TINY, 2, 12)

    def loss(adapters, merged):
        if merged:
            total, count = model_loss(model, lora.merge(params, adapters, 6), ids[:, :-1], ids[:, 1:])
        else:
            with lora.attached(params, adapters, 6) as attached:
                total, count = model_loss(model, attached, ids[:, :-1], ids[:, 1:])
        return total / count

    (one, its), (other, theirs) = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(adapters, m) for m in (0, 1))
    tolerance = 0.03 if compute.get("dtype") == "bfloat16" else 1e-5
    assert float(one) == pytest.approx(float(other), rel=tolerance)
    for path, leaf in leaves(its).items():
        np.testing.assert_allclose(leaf, leaves(theirs)[path], atol=tolerance, err_msg=path)
        assert float(jnp.max(jnp.abs(leaf))) > 10 * tolerance or "bfloat16" in compute.values(), path
    # Outside of the context nothing is left of them.
    plain = jax.jit(lambda params: model_loss(model, params, ids[:, :-1], ids[:, 1:])[0])(params)
    assert abs(float(plain) / ids[:, 1:].size - float(one)) > 0.01


def test_a_step_trains_adapters_without_gradients_of_whole_matrices():
    def products(config, shape):
        """How many products of the step have a matrix of this shape as their result."""
        state = train_step.abstract_state(config)
        ids = jax.ShapeDtypeStruct((2, TINY.context_length + 1), jnp.int32)
        program = jax.jit(train_step.make_step(config)).lower(state, ids).as_text()
        return len(re.findall(rf"dot_general.*-> tensor<{shape}xf32>", program))

    config = TrainConfig(model=TINY, batch_size=2, lora=LoraConfig(rank=5))
    whole = dataclasses.replace(config, lora=LoraConfig())
    F, D = TINY.ffn_dim, TINY.emb_dim
    assert products(whole, f"{F}x{D}") == TINY.n_layers  # the gradient of each fc_in
    assert products(config, f"{F}x{D}") == 0
    assert products(config, f"5x{D}") > 0
    state = train_step.abstract_state(config)
    assert all(jax.tree.leaves(is_matrix(state["params"])))  # weight decay acts on them
    held = {name: sum(leaf.size for leaf in jax.tree.leaves(state[name])) for name in ("params", "opt_state")}
    assert held["params"] == trainable.count(config)
    assert held["opt_state"] < 2 * held["params"] + 10


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match="rank of adapters must be an integer of 1 or more, not"):
        lora.init(jax.random.key(0), make_model()[1], rank)


def test_patterns_that_match_nothing_are_told_the_nearest():
    params = make_model()[1]
    for patterns, message in {
        "att, ff_in": "'ff_in' matches no matrix; did you mean 'fc_in'",
        "attn/qkv": r"'attn/qkv' matches no matrix; did you mean 'att/qkv'",
        "out_head": "'out_head' matches no matrix",  # tied
        "norm1": "'norm1' matches no matrix",
        "xyzzy": r"'xyzzy' matches no matrix \(such as tok_emb, trf_blocks_0, att/qkv\)",
        " , ": "expected patterns of paths such as 'att, ff', not ' , '",
    }.items():
        with pytest.raises(ConfigError, match=message):
            lora.init(jax.random.key(0), params, 4, patterns)


def test_adapters_of_another_model_and_int8_matrices_are_refused():
    model, params = make_model()
    adapters = lora.init(jax.random.key(0), params, 4)
    with pytest.raises(ValueError, match="there is an adapter for trf_blocks_0, which the parameters do not have"):
        lora.merge(stack_blocks(params, 2), adapters)
    other = make_model(TINY.replace(ffn_dim=99))[1]
    with pytest.raises(ValueError, match=r"ff/fc_in/lora_b is \[96, 4\] and should be \[99, 4\]"):
        lora.merge(other, adapters)
    with pytest.raises(ValueError, match="weight is int8, which cannot be adapted"):
        lora.merge(jaxgpt.prepare(model, params, "int8")[1], adapters)


# Through the trainer.


@pytest.fixture(scope="module")
def tokens():
    return Tokens.from_text(TEXT, "bytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "model"
    jaxgpt.save(directory, *make_model(MODEL))
    return str(directory)


def config_of(tables=None, **train):
    """A run of a checkpoint's model."""
    settings = {"steps": 4, "batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2, "eval_interval": 2, **train}
    return TrainConfig.from_dict({"lora": {"rank": 4, "alpha": 8}, "train": settings, **(tables or {})})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokens, base):
    directory = tmp_path_factory.mktemp("undisturbed")
    config = config_of({"model": {"drop_rate": 0.1}}, ema_decay=0.5, checkpoint_interval=2)
    return directory, train(config, tokens, directory, init_from=base)


def final_state(directory):
    config = Run(directory).config()
    expected = train_step.saved_state(config, train_step.abstract_state(config))
    with Run(directory).reading() as checkpoints:
        return checkpoints.restore(checkpoints.steps()[-1], expected)


def test_a_run_trains_adapters_alone_and_loads_as_a_merged_model(undisturbed, base, tokens, tmp_path, capsys):
    directory, result = undisturbed
    state, params = final_state(directory), jaxgpt.load(base)[1]
    assert "frozen" not in state
    assert {path.rpartition("/")[2] for path in leaves(state["params"])} == {"lora_a", "lora_b"}
    merged = lora.merge(params, state["ema_params"], alpha=8)
    for path, leaf in leaves(result.params).items():
        np.testing.assert_allclose(leaf, leaves(merged)[path], atol=1e-6)
        moved = float(jnp.max(jnp.abs(leaf - leaves(params)[path])))
        assert (moved > 1e-4) == (path.endswith("weight") and path.startswith("trf_blocks")), path
    equal(load_run(directory, "latest")[2], result.params)
    losses = [line["loss"] for line in Run(directory).read_metrics() if "loss" in line]
    assert main(["export", str(directory), str(tmp_path / "out"), "--step", "latest"]) == 0
    equal(jaxgpt.load(tmp_path / "out")[1], result.params)
    assert losses
    val_losses = list(Run(directory).val_losses().values())
    assert val_losses[-1] < val_losses[0]
    assert val_losses[-1] == pytest.approx(
        jaxgpt.evaluate(jaxgpt.GPT(result.config), result.params, tokens.split(0.1)[1]).loss, rel=1e-5
    )


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(undisturbed, tmp_path, tokens, base):
    directory, result = undisturbed
    shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    moved = shutil.copytree(base, tmp_path / "moved")
    again = train(None, tokens, tmp_path / "run", resume=True, init_from=str(moved))  # known by its content
    equal(again.params, result.params)
    equal(final_state(tmp_path / "run"), final_state(directory))
    assert Run(tmp_path / "run").val_losses() == Run(directory).val_losses()
    assert Run(tmp_path / "run").init_from() == str(moved)


def test_adapters_whose_model_is_gone_or_another_are_refused(undisturbed, tmp_path, tokens):
    directory = shutil.copytree(undisturbed[0], tmp_path / "run")
    model, params = make_model(MODEL)
    other = {**params, "pos_emb": {"weight": params["pos_emb"]["weight"].at[3, 3].add(1e-6)}}
    jaxgpt.save(tmp_path / "other", model, other)
    with pytest.raises(
        CheckpointError, match=r"adapters belong to other parameters than those of \S*other: has it chan"
    ):
        train(None, tokens, directory, resume=True, init_from=str(tmp_path / "other"))
    text = (directory / "run.json").read_text(encoding="utf-8")
    gone = text.replace(Run(directory).init_from(), str(tmp_path / "gone"))
    (directory / "run.json").write_text(gone, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*gone: no such file .*--init-from MODEL says where"):
        jaxgpt.load(directory)
    assert jaxgpt.training.load_config(directory) == MODEL.replace(drop_rate=0.1)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"lora": {"rank": 4, "matrices": "atn"}}, "lora.matrices: 'atn' matches no matrix; did you mean 'att'"),
        ({"lora": {"rank": -1}}, r"lora.rank must be from 0 to 65536, not -1"),
        ({"lora": {"alpha": 8}}, "the other fields of lora need a lora.rank, such as 8 or 16"),
        ({"lora": {"ranks": 8}}, r"\[lora\]: unknown key 'ranks'; did you mean 'rank'"),
        ({"lora": {"rank": 4}, "train": {"freeze": "att"}}, "freeze is not for lora"),
        ({"lora": {"rank": 4}, "train": {"optimizer": "muon"}}, "optimizer must be adamw for lora, not muon"),
        ({"compute": {"param_dtype": "bfloat16"}}, r"param_dtype must be float32 to train.*of lora.*may be bfloat16"),
        ({"lora": {"rank": 4}, "compute": {"param_dtype": "int8"}}, "param_dtype must be float32 to train"),
        ({"train": {"freeze": "tok_em"}}, "freeze: 'tok_em' matches no parameter; did you mean 'tok_emb'"),
        ({"train": {"freeze": "*"}}, "freeze: .* matches every parameter, so there is nothing left to train"),
        (
            {"train": {"freeze": "trf_blocks_0"}, "compute": {"scan_layers": True}},
            "did you mean 'trf_blocks'.; compute.scan_layers makes all blocks one, trf_blocks",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tables, message, tmp_path, tokens, base):
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig.from_dict(tables), tokens, tmp_path / "run", init_from=base)
    assert not (tmp_path / "run").exists()


def test_lora_needs_a_model_to_start_from(tmp_path, tokens):
    config = dataclasses.replace(config_of(), model=MODEL)
    with pytest.raises(ConfigError, match="lora needs a model whose matrices it adapts"):
        train(config, tokens, tmp_path / "run")


@pytest.mark.parametrize(
    "tables",
    [
        {"compute": {"scan_layers": True, "remat": "block", "dtype": "bfloat16"}},
        exhaustive({"compute": {"scan_layers": True}, "lora": {"rank": 2, "matrices": "out_proj, tok_emb"}}),
    ],
    ids=str,
)
def test_runs_with_the_models_options(tables, tmp_path, tokens, base):
    result = train(config_of(tables, grad_accumulation=2), tokens, tmp_path / "run", init_from=base)
    assert np.diff(list(Run(tmp_path / "run").val_losses().values())) < 0
    model, params = jaxgpt.load(tmp_path / "run")
    assert model.compute == result.compute
    equal(params, result.params)


def test_a_step_beside_a_bfloat16_model_is_that_beside_its_rounded_weights():
    """Its products are in float32, so that the weights' own rounding is all that differs."""
    short = config_of({"model": MODEL.to_dict(), "compute": {"param_dtype": "bfloat16"}})
    full = dataclasses.replace(short, compute=short.compute.replace(param_dtype="float32"))
    params, ids = make_model(MODEL)[1], random_ids(MODEL, 4, MODEL.context_length + 1)
    rounded = cast_params(params, "bfloat16")
    results = {}
    for name, config, base in (
        ("bfloat16", short, rounded),
        ("rounded", full, cast_params(rounded, "float32")),
        ("float32", full, params),
    ):
        state, step = train_step.init_state(config, base), train_step.jit_step(config)
        for _ in range(2):
            state, metrics = step(state, ids)
        results[name] = state, float(metrics["loss"])
    assert {leaf.dtype.name for leaf in leaves(results["bfloat16"][0]["frozen"]).values()} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in leaves(results["bfloat16"][0]["params"]).values()} == {"float32"}
    assert results["bfloat16"][1] == pytest.approx(results["rounded"][1], rel=1e-6)
    for path, leaf in leaves(results["bfloat16"][0]["params"]).items():
        np.testing.assert_allclose(leaf, leaves(results["rounded"][0]["params"])[path], atol=2e-5, err_msg=path)
    assert 1e-6 < abs(results["bfloat16"][1] / results["float32"][1] - 1) < 2e-2


@pytest.mark.exhaustive
def test_a_run_beside_a_bfloat16_model_loads_and_resumes_with_what_it_trained_unrounded(tmp_path, tokens, base):
    config, directory = config_of({"compute": {"param_dtype": "bfloat16"}}, checkpoint_interval=2), tmp_path / "run"
    train(dataclasses.replace(config, steps=2), tokens, directory, init_from=base)
    train(config, tokens, directory, resume=True, force=True)
    model, params = jaxgpt.load(directory)
    rounded = cast_params(cast_params(jaxgpt.load(base)[1], "bfloat16"), "float32")
    adapters = final_state(directory)["params"]
    equal(params, lora.merge(rounded, adapters, alpha=8))
    assert model.compute.param_dtype == "float32"
    val_N = tokens.split(0.1)[1]
    merged = jaxgpt.evaluate(model, params, val_N).loss
    assert list(Run(directory).val_losses().values())[-1] == pytest.approx(merged, rel=2e-2)


@pytest.mark.exhaustive
def test_accumulated_gradients_of_adapters_are_those_of_the_whole_batch():
    config = TrainConfig(model=TINY, batch_size=4, warmup_steps=0, clip_norm=0.0, lora=LoraConfig(rank=3))
    ids = random_ids(TINY, 4, TINY.context_length + 1)
    states = []
    for micro in (1, 2):
        c = dataclasses.replace(config, grad_accumulation=micro)
        states.append(jax.jit(train_step.make_step(c))(train_step.init_state(c), ids)[1])
    assert float(states[0]["grad_norm"]) == pytest.approx(float(states[1]["grad_norm"]), rel=1e-5)
    assert float(states[0]["grad_norm"]) > 0


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", exhaustive("fsdp=4"), exhaustive("tensor=2")])
def test_a_step_on_a_mesh_equals_that_of_one_device(mesh):
    model = TINY.replace(emb_dim=32, n_heads=8, n_layers=1)
    config = TrainConfig(
        model=model, batch_size=8, warmup_steps=0, mesh=MeshConfig.parse(mesh), lora=LoraConfig(rank=4, alpha=8)
    )
    params = make_model(model)[1]
    ids = random_ids(model, 8, model.context_length + 1)
    devices = sharding.make_mesh(config.mesh)
    states = [train_step.init_state(config, params, where) for where in (None, devices)]
    for state in states:  # B is zero in a new state, and then A has no gradient
        state["params"] = jax.tree.map(lambda x: jax.device_put(0.1 + x, x.sharding), state["params"])
    (one, its), (other, theirs) = (
        train_step.jit_step(config, where)(state, ids) for state, where in zip(states, (None, devices), strict=True)
    )
    assert float(its["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)
    assert float(its["grad_norm"]) == pytest.approx(float(theirs["grad_norm"]), rel=1e-4)
    merged = [train_step.eval_params(config, state) for state in (one, other)]
    for mine, other_one in zip(*map(jax.tree.leaves, merged), strict=True):
        np.testing.assert_allclose(mine, other_one, atol=2e-3)  # Adam's first step has the size of the rate
    layouts = sharding.shardings(devices, merged[1])
    for leaf, layout in zip(jax.tree.leaves(merged[1]), jax.tree.leaves(layouts), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)


@pytest.mark.exhaustive
def test_a_run_on_a_mesh_resumes_on_one_device(tmp_path, tokens, base, undisturbed):
    config = Run(undisturbed[0]).config()
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
    train(dataclasses.replace(config, steps=4), tokens, tmp_path / "run", init_from=base)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    for run, mesh in (("run", config.mesh), ("alone", MeshConfig())):
        result = train(dataclasses.replace(config, mesh=mesh), tokens, tmp_path / run, resume=True)
        for mine, its in zip(jax.tree.leaves(result.params), jax.tree.leaves(undisturbed[1].params), strict=True):
            np.testing.assert_allclose(mine, its, atol=2e-3)
    assert jaxgpt.load(tmp_path / "run")[0].config == MODEL.replace(drop_rate=0.1)


@pytest.mark.parametrize(
    ("scan_layers", "freeze"),
    [(False, "tok_emb, att, trf_blocks_0/*/bias"), exhaustive(True, "tok_emb, att, *norm*")],
)
def test_frozen_parameters_keep_every_bit_and_have_no_optimizer_state(scan_layers, freeze, tmp_path, tokens, base):
    tables = {"lora": {}, "compute": {"scan_layers": scan_layers}}
    config = config_of(tables, freeze=freeze, checkpoint_interval=2)
    result = train(config, tokens, tmp_path / "run", init_from=base)
    before = leaves(jaxgpt.load(base, scan_layers=scan_layers)[1])
    also = "norm" if scan_layers else "bias"
    frozen = {
        path for path in before if path.startswith("tok_emb") or "/att/" in path or (also in path and "/" in path)
    }
    assert 0 < len(frozen) < len(before)
    for path, leaf in leaves(result.params).items():
        assert (np.asarray(leaf).tobytes() == np.asarray(before[path]).tobytes()) == (path in frozen), path
    state = final_state(tmp_path / "run")
    assert set(leaves(state["frozen"])) == frozen
    held = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
    assert held == 2 * sum(leaf.size for path, leaf in before.items() if path not in frozen)
    config = Run(tmp_path / "run").config()
    assert trainable.count(config) == held // 2
    # What starts from frozen parts resumes like any run, and needs no other model.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    equal(train(None, tokens, tmp_path / "run", resume=True).params, result.params)
    equal(jaxgpt.load(tmp_path / "run")[1], result.params)


@pytest.mark.exhaustive
def test_muon_trains_what_is_not_frozen(tmp_path, tokens, base):
    config = config_of({"lora": {}}, freeze="att, tok_emb", optimizer="muon", weight_decay=0.5)
    result = train(config, tokens, tmp_path / "run", init_from=base)
    before = leaves(jaxgpt.load(base)[1])
    same = {path for path, leaf in leaves(result.params).items() if np.array_equal(leaf, before[path])}
    assert same == {path for path in before if "/att/" in path or path.startswith("tok_emb")}


def test_frozen_weights_are_not_kept_in_two_types_while_several_steps_run(compiled_fully):
    model = TINY.replace(vocab_size=1000, emb_dim=128, n_heads=2)
    config = TrainConfig(model=model, compute=ComputeConfig(dtype="bfloat16"), seq_len=16, lora=LoraConfig(rank=2))
    state, ids = train_step.abstract_state(config), jax.ShapeDtypeStruct((config.batch_size, 17), jnp.int32)
    one = train_step.jit_step(config).lower(state, ids)
    several = train_step.jit_steps(config).lower(state, jax.ShapeDtypeStruct((8, *ids.shape), jnp.int32), 1)
    one, several = (lowered.compile().memory_analysis().temp_size_in_bytes for lowered in (one, several))
    assert several < 1.1 * one

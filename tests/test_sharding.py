"""One program on many devices: results equal those of one device on every mesh; what does not fit is refused.

Devices are simulated, eight per test process (see conftest.py).
"""

from __future__ import annotations

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, exhaustive, make_model, random_ids
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt import beam_search, generate, prepare
from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig
from jaxgpt.data import Tokens
from jaxgpt.errors import ConfigError
from jaxgpt.generation.sampling import Temperature
from jaxgpt.model import dot
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import BATCH, MeshConfig
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.evaluation import evaluate
from jaxgpt.training.step import abstract_state, init_state, jit_step, make_step
from jaxgpt.training.trainer import train

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MODEL = TINY.replace(emb_dim=32, n_heads=8, vocab_size=97)
ALTERNATING_MODEL = MODEL.replace(attention_pattern="alternating", attention_window=5)
CONFIG = TrainConfig(model=MODEL, batch_size=16, grad_accumulation=2, steps=100, warmup_steps=0, ema_decay=0.9)
MESHES = ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=-1"]


def mesh_of(text):
    return sharding.make_mesh(MeshConfig.parse(text))


def assert_close(got, want, atol=1e-5):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), np.asarray(theirs, np.float64), atol=atol)


@pytest.fixture(scope="module")
def single():
    """A step on one device: (ids, the state before it, the state after it, metrics)."""
    ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, CONFIG.T + 1)).astype(np.int32)
    state = init_state(CONFIG)
    return ids, state, *jax.jit(make_step(CONFIG))(state, ids)


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        *(exhaustive(text, {}) for text in MESHES),
        ("data=2,fsdp=2,tensor=2", {"loss_chunk": 32}),
        exhaustive("data=2,fsdp=2,tensor=2", {"compute": ComputeConfig(scan_layers=True, remat="block")}),
        exhaustive("data=2,fsdp=2,tensor=2", {"model": ALTERNATING_MODEL, "compute": ComputeConfig(scan_layers=True)}),
    ],
)
def test_a_step_on_a_mesh_equals_that_of_one_device(single, text, variant):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig.parse(text), **variant)
    ids, _, want, figures = single
    if "compute" in variant:
        want, figures = jax.jit(make_step(config))(init_state(config), ids)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check(mesh, config.model, config.batch_size // config.grad_accumulation)
    state = init_state(config, mesh=mesh)
    after, got = jit_step(config, mesh)(state, ids)
    assert_close(got, figures)
    assert_close(after["opt_state"], want["opt_state"])
    # Adam's first moment is (1 - beta1) times the gradient.
    gradients, its = (optax.tree.get(state["opt_state"], "mu") for state in (after, want))
    assert_close(gradients, its, atol=1e-5 * (1 - config.beta1))
    # Its first step is learning_rate * g / (|g| + 1e-8), which exposes every rounding of a gradient near 0.
    moments = jax.tree.leaves(optax.tree.get(want["opt_state"], "mu"))
    steady = [np.abs(moment) > (1 - config.beta1) * 1e-6 for moment in moments]
    assert np.mean([*map(np.mean, steady)]) > 0.9
    for name in ("params", "ema_params"):
        mine, theirs = (
            [np.asarray(leaf)[where] for leaf, where in zip(jax.tree.leaves(state[name]), steady, strict=True)]
            for state in (after, want)
        )
        assert_close(mine, theirs)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    for leaf, layout in zip(jax.tree.leaves(after), jax.tree.leaves(layouts), strict=True):
        assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)


@pytest.mark.parametrize(
    ("text", "gathered"),
    [
        exhaustive("data=8", 0),  # gradients are only added up
        ("fsdp=8", 2 + 4 * MODEL.n_layers),  # every matrix once
        # Positions, on each side of a layer's two halves, forward and backward; the logits stay spread.
        exhaustive("tensor=8", 8 * MODEL.n_layers),
    ],
)
def test_a_step_gathers_no_more_than_it_must(text, gathered):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig.parse(text))
    mesh = sharding.make_mesh(config.mesh)
    layout = NamedSharding(mesh, P(BATCH))
    ids = jax.ShapeDtypeStruct((config.batch_size, config.T + 1), jnp.int32, sharding=layout)
    program = jit_step(config, mesh).lower(abstract_state(config, mesh), ids).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) > 0
    assert len(re.findall(r" all-gather(?:-start)?\(", program)) <= gathered


@pytest.mark.parametrize("optimizer", ["adamw", exhaustive("muon")])
def test_the_state_is_made_in_parts(optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    mesh = mesh_of("fsdp=4,tensor=2")
    state = init_state(config, mesh=mesh)
    assert_close(state, init_state(config), atol=1e-8)  # some versions of XLA differ in the last bit
    sizes = [(leaf.size, max(shard.data.size for shard in leaf.addressable_shards)) for leaf in jax.tree.leaves(state)]
    assert sum(part for _, part in sizes) < sum(size for size, _ in sizes) / 6
    matrices = [(size, part) for size, part in sizes if size >= 32 * 32]
    assert len(matrices) > 20
    assert all(part == size // 8 for size, part in matrices)


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    model = MODEL.replace(tie_embeddings=False)
    params = make_model(model)[1]
    mesh = mesh_of("fsdp=2,tensor=2")
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): layout.spec
        for path, layout in jax.tree_util.tree_leaves_with_path(sharding.shardings(mesh, params))
    }
    assert found["trf_blocks_0/att/qkv/weight"] == P(None, "tensor", "fsdp")
    assert found["trf_blocks_1/ff/fc_out/weight"] == P("fsdp", "tensor")
    assert found["trf_blocks_1/ff/fc_in/bias"] == P("tensor")
    assert found["out_head/weight"] == P(None, ("tensor", "fsdp"))
    stacked = sharding.shardings(mesh, make_model(model, scan_layers=True)[1])["trf_blocks"]
    assert stacked["att"]["out_proj"]["weight"].spec == P(None, "fsdp", "tensor")
    assert stacked["ff"]["fc_in"]["bias"].spec == P(None, "tensor")
    for pattern, _ in sharding.RULES:
        assert any(sharding.fits(pattern, name) for name in found), pattern
    for name in found:
        assert any(sharding.fits(pattern, name) for pattern, _ in sharding.RULES), name


@pytest.mark.parametrize(
    ("text", "rows", "scan_layers"),
    [
        exhaustive("data=4", 3, False),
        exhaustive("tensor=8", 1, False),
        ("data=2,fsdp=2,tensor=2", 4, False),
        exhaustive("fsdp=2,tensor=2", 3, True),
    ],
)
def test_generation_on_a_mesh_draws_the_same_ids(text, rows, scan_layers):
    model, params = make_model(MODEL, scan_layers=scan_layers)
    prompts = [row[: 3 + 2 * i].tolist() for i, row in enumerate(random_ids(MODEL, rows, 12))]
    options = {"temperature": 0.7, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "seed": 1, "logprobs": 3}
    want = generate(model, params, prompts, 20, **options)
    got = generate(model, sharding.shard(params, mesh_of(text)), prompts, 20, **options)
    for mine, theirs in zip(got.tokens, want.tokens, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert_close(got.sampler_logprobs, want.sampler_logprobs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("text", ["data=4", "data=2,fsdp=2,tensor=2"])
def test_beams_and_several_rows_per_prompt_on_a_mesh_are_those_of_one_device(text):
    model, params = make_model(MODEL)
    spread = sharding.shard(params, mesh_of(text))
    prompts = [row[: 3 + 2 * i].tolist() for i, row in enumerate(random_ids(MODEL, 2, 12))]
    draws = {"sampler": Temperature(0.7), "key": jax.random.key(1), "num_return_sequences": 3}
    for run in (
        lambda params: generate(model, params, prompts, 12, **draws),
        lambda params: beam_search(model, params, prompts, 9, num_beams=4, num_return_sequences=4, stop_ids=range(60)),
    ):
        for mine, theirs in zip(run(spread).tokens, run(params).tokens, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.exhaustive
def test_int8_generation_and_evaluation_on_a_mesh_equal_one_devices():
    model, params = prepare(*make_model(MODEL), "int8")
    spread = sharding.shard(params, mesh_of("fsdp=2,tensor=4"))
    prompts = random_ids(MODEL, 2, 9).tolist()
    for mine, theirs in zip(
        generate(model, spread, prompts, 10).tokens, generate(model, params, prompts, 10).tokens, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    ids = random_ids(MODEL, 1, 200)[0]
    # Token ids of this vocabulary are bytes to the tokenizer.
    bytes_model = dataclasses.replace(model, config=model.config.replace(tokenizer="bytes"))
    assert evaluate(bytes_model, spread, ids).loss == pytest.approx(evaluate(bytes_model, params, ids).loss, abs=1e-5)


def test_the_forward_pass_of_spread_parameters_needs_no_mesh():
    model, params = make_model(MODEL)
    ids = random_ids(MODEL, 2, 9)
    spread = sharding.shard(params, mesh_of("fsdp=2,tensor=2"))
    assert_close(jax.jit(lambda p: model.apply({"params": p}, ids))(spread), model.apply({"params": params}, ids))


def tokens():
    return Tokens.from_text("".join(map(chr, np.random.default_rng(0).integers(32, 90, 3000))), "bytes")


RUN = dataclasses.replace(
    CONFIG,
    model=MODEL.replace(vocab_size=257, tokenizer="bytes"),
    steps=4,
    checkpoint_interval=2,
    val_fraction=0.0,
)


@pytest.mark.exhaustive
def test_a_checkpoint_resumes_on_other_devices(tmp_path):
    meshes = {"1": "", "4": "tensor=4", "8": "data=2,fsdp=2,tensor=2"}
    configs = {name: dataclasses.replace(RUN, mesh=MeshConfig.parse(text)) for name, text in meshes.items()}
    written = {name: train(config, tokens(), tmp_path / name).params for name, config in configs.items()}
    for first, then in (("8", "1"), ("8", "4"), ("1", "8"), ("4", "8")):
        copy = tmp_path / f"{first} to {then}"
        # As if the run had been stopped after the checkpoint of step 2.
        shutil.copytree(tmp_path / first, copy, ignore=lambda _, names: {"4"} & set(names))
        result = train(configs[then], tokens(), copy, resume=True)
        assert result.step == 4
        # Adam divides by the size of a gradient, so where that is almost 0, other rounding changes a step.
        assert_close(result.params, written["1"], atol=5e-5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data=3,tensor=4", "needs 12 devices, and there are 8"),
        ("data=-1,tensor=3", "3 does not divide the 8 devices"),
        ("data=-1,fsdp=-1", "only one axis of a mesh can be -1"),
        ("tensors=2", "unknown axis 'tensors'; did you mean 'tensor'"),
        ("tensor=two", "mesh.tensor must be an int, not 'two'"),
        ("tensor=0", "mesh.tensor must be 1 or more, or -1"),
        ("tensor", "a mesh is written like data=2,fsdp=4,tensor=2, not 'tensor'"),
        ("tensor=2,tensor=4", "a mesh is written like"),
    ],
)
def test_a_mesh_that_cannot_be_is_told(text, told):
    with pytest.raises(ConfigError, match=told):
        mesh_of(text)


@pytest.mark.parametrize(
    ("mesh", "changes", "batch", "told"),
    [
        ("tensor=8", {"n_heads": 4}, None, "tensor=8 does not divide n_heads=4"),
        ("tensor=8", {"ffn_dim": 100}, None, "tensor=8 does not divide ffn_dim=100"),
        ("fsdp=8", {"emb_dim": 12, "n_heads": 4}, None, "fsdp=8 does not divide emb_dim=12"),
        ("data=2,fsdp=4", {}, 12, "data x fsdp=8 does not divide the batch of a step or micro-batch=12"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_or_the_batch_is_told(mesh, changes, batch, told):
    with pytest.raises(ConfigError, match=told):
        sharding.check(mesh_of(mesh), MODEL.replace(**changes), batch)


def test_parameters_that_a_mesh_does_not_divide_are_told():
    with pytest.raises(
        ConfigError, match=r"the mesh's \('tensor', 'fsdp'\), 3 parts, do not divide pos_emb/weight \(16,"
    ):
        sharding.shard(make_model(MODEL)[1], mesh_of("tensor=3"))


@pytest.mark.exhaustive
def test_the_commands_take_a_mesh(capsys):
    assert main(["generate", "--prompt", "ROMEO:", "--max-new-tokens", "8"]) == 0
    want = capsys.readouterr().out
    assert main(["generate", "--prompt", "ROMEO:", "--max-new-tokens", "8", "--mesh", "data=2,tensor=2"]) == 0
    assert capsys.readouterr().out == want
    assert main(["generate", "--prompt", "A", "--mesh", "tensor=5"]) == 2
    assert "tensor=5 does not divide n_heads=6" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", ["cpu", 3, None])
def test_the_default_device_is_the_users(chosen):
    device = chosen if chosen in ("cpu", None) else jax.devices()[chosen]
    with jax.default_device(device):
        assert sharding.default_device() == jax.devices()[chosen if chosen == 3 else 0]
    with jax.default_device(jax.devices()[3]), sharding.on_host():
        assert jnp.ones(1).device == jax.devices("cpu")[0]


def laid(letters, shape, mesh):
    """The result of `lay` for an array that was replicated on every device of a mesh."""
    x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, P()))
    return jax.jit(lambda x: sharding.lay(x, letters))(x)


@pytest.mark.parametrize(
    ("letters", "shape", "spec"),
    [
        ("BTD", (8, 3, 5), (BATCH,)),
        ("BHTK", (4, 2, 3, 5), (BATCH, "tensor")),
        ("BTF", (4, 3, 6), (BATCH, None, "tensor")),
        ("RW", (7, 6), (None, "tensor")),
        ("BTV", (2, 3, 8), (None, None, "tensor")),  # two rows are too few for four shards: they stay replicated
        ("BHTK", (4, 1, 3, 5), (BATCH,)),
        ("BPD", (4, 6, 3), (BATCH, "tensor")),
        ("BPD", (4, 7, 3), (BATCH,)),
    ],
)
def test_axes_lie_where_their_letters_say_but_one_too_short_for_its_parts_stays_whole(letters, shape, spec):
    mesh = mesh_of("data=2,fsdp=2,tensor=2")
    got = laid(letters, shape, mesh).sharding
    assert got.is_equivalent_to(NamedSharding(mesh, P(*spec)), len(shape)), got
    assert tuple(sharding.layout(shape, letters, mesh)) == (*spec, *(None,) * (len(shape) - len(spec)))


def test_positions_between_the_blocks_are_spread_over_tensor():
    model, params = make_model(MODEL)
    params = sharding.shard(params, mesh_of("data=2,tensor=4"))
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids, mutable=["intermediates"]))
    seen = run(params, random_ids(MODEL, 2, 12))[1]["intermediates"]
    for x_BxTxD in (*seen["embedded"], *(seen[f"trf_blocks_{i}"]["output"][0] for i in range(MODEL.n_layers))):
        assert {shard.data.shape for shard in x_BxTxD.addressable_shards} == {(1, 3, 32)}
    (x_BxTxD,) = seen["normed"]
    assert {shard.data.shape for shard in x_BxTxD.addressable_shards} == {(1, 12, 32)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("text", ["tensor=8", "data=2,fsdp=2,tensor=2"])
def test_activations_in_bfloat16_on_a_mesh_equal_one_devices_but_for_rounding(text):
    narrow = ComputeConfig(dtype="bfloat16", activation_dtype="bfloat16")

    def gradients(compute, text):
        config = dataclasses.replace(CONFIG, compute=compute, mesh=MeshConfig.parse(text))
        mesh = sharding.make_mesh(config.mesh)
        ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (16, CONFIG.T + 1)).astype(np.int32)
        after, metrics = jit_step(config, mesh)(init_state(config, mesh=mesh), ids)
        moments = jax.tree.leaves(optax.tree.get(after["opt_state"], "mu"))
        return np.concatenate([np.asarray(moment).ravel() for moment in moments]), float(metrics["loss"])

    (exact, loss), (single, _), (mesh, its) = (
        gradients(*which) for which in ((ComputeConfig(), "data=1"), (narrow, "data=1"), (narrow, text))
    )
    assert its == pytest.approx(loss, rel=2e-3)
    rounding, difference = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (single, mesh))
    assert 1e-3 < difference < 1.5 * rounding < 0.05


def test_a_product_gathers_its_weight_in_the_compute_type_and_scatters_its_gradient_in_float32():
    mesh = mesh_of("fsdp=4,tensor=2")
    stored = P("tensor", "fsdp")
    weight, x = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((16, 24), stored), ((4, 8, 24), P(BATCH)))
    )

    def total(weight, x):
        return dot("BTD,OD->BTO", x, weight, "bfloat16", stored=stored).sum()

    lowered = jax.jit(jax.grad(total, (0, 1))).lower(weight, x)
    constrained = re.findall(r"sharding_constraint %\w+ <@mesh, (\[.*?\])> : tensor<16x24x(\w+)>", lowered.as_text())
    whole, parts = '[{"tensor"}, {}]', '[{"tensor"}, {"fsdp"}]'
    assert sorted(constrained) == sorted([(whole, "bf16"), (whole, "f32"), (parts, "f32")])
    assert lowered.compile().output_shardings[0].is_equivalent_to(NamedSharding(mesh, stored), 2)


def test_a_letter_that_has_no_place_is_an_error_on_a_mesh():
    with pytest.raises(KeyError, match="X"):
        laid("BX", (8, 3), mesh_of("data=8"))


@pytest.mark.parametrize("place", [lambda x: sharding.lay(x, "B"), sharding.replicate], ids=["lay", "replicate"])
def test_without_a_mesh_nothing_is_constrained(place):
    text = jax.jit(place).lower(jnp.ones(8)).as_text()
    assert "sharding" not in text


def test_what_is_replicated_lies_whole_on_every_device():
    mesh = mesh_of("data=4,tensor=2")
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    got = jax.jit(sharding.replicate)(x)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P()), 1)
    assert {shard.data.shape for shard in got.addressable_shards} == {(8,)}


def test_a_mesh_of_the_callers_own_is_left_alone():
    """Data parallelism over an axis of another name, with the ids spread and the parameters whole."""
    model, params = make_model(MODEL)
    ids = random_ids(MODEL, 8, 9)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    whole, spread = (NamedSharding(mesh, spec) for spec in (P(), P("batch")))
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    got = run(jax.device_put(params, whole), jax.device_put(ids, spread))
    assert_close(got, run(params, ids))

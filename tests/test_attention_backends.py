"""Every backend of attention against float64, what each refuses, and how one is chosen.

cuDNN's kernel needs an NVIDIA GPU. Elsewhere the reference stands in for it, which tests everything around the kernel.
Splash is interpreted; test_planner.py compiles it for TPUs. The native one is skipped without AVX2, or without MKL
where that multiplies.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, make_model, random_ids

from jaxgpt.config import ATTENTION, ComputeConfig
from jaxgpt.errors import ConfigError
from jaxgpt.generation import generate
from jaxgpt.model import backend_of, reference
from jaxgpt.model.attention import attend, blocked, choice, choose, cudnn, fused, native_attention, splash
from jaxgpt.model.attention import reference as reference_attention
from jaxgpt.model.cache import Cache, Seen
from jaxgpt.parallel import MeshConfig, make_mesh, shard

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")
ON_GPU = jax.default_backend() == "gpu"
# The compute type and the largest error, with that of rounding the operands and the result.
BACKENDS = {
    "reference": (reference_attention, "float32", 5e-6),
    "blocked": (blocked, "float32", 5e-6),
    "cudnn": (cudnn, "bfloat16", 0.06),
    "splash": (functools.partial(splash, interpret=True), "bfloat16", 0.06),
    "native": (native_attention, "float32", 5e-6),
    "native, MKL": (native_attention, "float32", 5e-6),
    "native, bfloat16": (native_attention, "bfloat16", 0.06),
}


@pytest.fixture
def context(backend, request):
    """What computes attention by the backend of a test."""
    calls = request.getfixturevalue("calls") if backend == "cudnn" else None
    if backend.startswith("native"):
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no C++ compiler")
        request.getfixturevalue("natively")
    yield BACKENDS[backend][0]
    assert calls is None or calls


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the calls of cuDNN, which the reference computes instead unless there is a GPU."""
    seen, function = [], jax.nn.dot_product_attention

    def call(q, k, v, **options):
        seen.append({"shape": q.shape, "dtype": q.dtype.name, **options})
        if ON_GPU:
            return function(q, k, v, **options)
        if q.shape[1] == 1 < k.shape[1]:
            return decode(q, k, v, **options)
        assert options["is_causal"]
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        before, after = options["local_window_size"] or (q.shape[2], 0)
        assert after == 0
        y = reference_attention(q, Seen(k, v, 0, None, "bfloat16"), window=before + 1, scale=options["scale"])
        return y.astype("bfloat16").swapaxes(1, 2)

    def decode(q, k, v, *, mask, key_value_seq_lengths, scale, implementation):
        assert (q.dtype, k.dtype, v.dtype, implementation) == (*["bfloat16"] * 3, "cudnn")
        within = jnp.arange(k.shape[1])[None, None, None] < key_value_seq_lengths[:, None, None, None]
        scores = jnp.einsum("BTNK,BSNK->BNTS", q, k, preferred_element_type="float32") * scale
        weights = jax.nn.softmax(jnp.where(mask & within, scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNK->BTNK", weights, v.astype("float32")).astype(q.dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return seen


def inputs(T, seed=0, B=2, H=1, K=8):
    """q, k, v and the gradient of the result, of numbers that bfloat16 holds."""
    x = np.random.default_rng(seed).normal(size=(4, B, H, T, K))
    return [jnp.asarray(part, jnp.bfloat16).astype(jnp.float32) for part in x]


def exact(q, k, v, g, window, start_B):
    """The result and the gradients of q, k and v, in float64; 0 where a row has not started."""
    out = np.zeros((4, *q.shape))
    scale = q.shape[-1] ** -0.5
    for b, h in np.ndindex(q.shape[:2]):
        place = b, h, slice(start_B[b], None)
        q64, k64, v64, g64 = (np.asarray(x[place], np.float64) for x in (q, k, v, g))
        weights = reference.attention_weights(q64, k64, window)
        d_weights = g64 @ v64.T
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        found = weights @ v64, d_scores @ k64 * scale, d_scores.T @ q64 * scale, weights.T @ g64
        for i, part in enumerate(found):
            out[(i, *place)] = part
    return out


@pytest.mark.parametrize(
    ("backend", "T", "window", "starts"),
    [
        ("reference", 37, None, None),
        ("reference", 37, 5, [0, 9]),
        ("blocked", 37, None, [0, 9]),
        ("blocked", 150, 5, None),
        ("cudnn", 37, None, None),
        ("cudnn", 40, 5, [0, 9]),
        # Three blocks of 128; the band leaves out one of six, and ends within another.
        exhaustive("splash", 384, None, [0, 150]),
        exhaustive("splash", 384, 100, None),
        ("splash", 128, 40, [0, 9]),
        # Padded to 128, and to 256.
        ("splash", 100, None, [0, 9]),
        exhaustive("splash", 200, 40, None),
        ("native", 37, None, [0, 9]),
        ("native", 150, 5, None),
        ("native", 300, 100, [70, 0]),
        exhaustive("native", 1, None, None),
        ("native, MKL", 150, 5, [0, 9]),
        ("native, bfloat16", 300, None, [0, 150]),
        exhaustive("native, bfloat16", 150, 5, None),
    ],
)
def test_values_and_gradients_equal_those_of_float64(backend, T, window, starts, context):
    _, dtype, atol = BACKENDS[backend]
    q, k, v, g = inputs(T)
    start_B = None if starts is None else jnp.asarray(starts, jnp.int32)
    used = jnp.arange(T)[None] >= jnp.asarray(starts or [0, 0])[:, None]

    def run(q, k, v):
        y = context(q, Seen(k, v, 0, start_B, dtype), window=window)
        return jnp.where(used[:, None, :, None], y, 0.0)  # before a row's start, the result is unspecified

    y, pull_back = jax.vjp(jax.jit(run), q, k, v)
    assert y.dtype == jnp.float32
    want = exact(q, k, v, g, window, starts or [0, 0])
    for mine, theirs in zip((y, *pull_back(g)), want, strict=True):
        assert T == 1 or np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(mine, theirs, atol=atol * np.abs(theirs).max())


@pytest.mark.parametrize("backend", ["reference", "blocked", "cudnn", exhaustive("splash"), "native"])
def test_no_gradient_reaches_a_later_position_or_one_before_the_band(backend, context):
    dtype = BACKENDS[backend][1]
    T, at, window = 256, 177, 50
    q, k, v, g = inputs(T)

    def run(q, k, v):
        return jnp.sum((context(q, Seen(k, v, 0, None, dtype), window=window) * g)[:, :, at])

    gradients = jax.grad(run, (0, 1, 2))(q, k, v)
    for gradient, first in zip(gradients, (at, at + 1 - window, at + 1 - window), strict=True):
        moved = np.flatnonzero(np.abs(gradient).max((0, 1, 3)))
        assert (moved[0], moved[-1]) == (first, at)


@pytest.mark.parametrize(
    ("backend", "T"),
    [exhaustive("splash", 128), exhaustive("splash", 120), ("native", 140), ("reference", 140), ("blocked", 140)],
)
def test_documents_are_kept_apart(backend, T, context):
    q, k, v, g = inputs(T)
    _, dtype, atol = BACKENDS[backend]
    start_BxT, want = np.zeros((2, T), np.int32), np.zeros((4, *q.shape))
    for b, starts in enumerate(([0, 70, T], [0, 50, 100, T])):
        for first, end in itertools.pairwise(starts):
            start_BxT[b, first:end] = first
            document = slice(b, b + 1), slice(None), slice(first, end)
            want[(slice(None), *document)] = exact(*(x[document] for x in (q, k, v, g)), 40, [0])
    seen = functools.partial(Seen, query_slot=0, start_B=None, dtype=dtype, start_BxT=jnp.asarray(start_BxT))
    y, pull_back = jax.vjp(lambda q, k, v: context(q, seen(k, v), window=40), q, k, v)
    for mine, theirs in zip((y, *pull_back(g)), want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=atol * np.abs(theirs).max())


def test_what_cudnn_is_asked_for(calls):
    q, k, v, _ = inputs(24, H=3)
    cudnn(q, Seen(k, v, 0, None, "bfloat16"), window=5, scale=0.3)
    expected = {"shape": (2, 24, 3, 8), "dtype": "bfloat16", "scale": 1.0, "is_causal": True}
    assert calls == [expected | {"local_window_size": (4, 0), "implementation": "cudnn"}]


@pytest.mark.parametrize("slot", [17, jnp.int32(17)], ids=["known", "traced"])
@pytest.mark.parametrize(("window", "starts"), [(None, [0, 9]), (5, [0, 15]), (None, None)])
def test_cudnn_decodes_one_query_per_row(slot, window, starts, calls):
    q, k, v, _ = inputs(24, H=3)
    start_B = None if starts is None else jnp.asarray(starts, jnp.int32)
    # What a cache holds beyond its length must not count, whatever it is.
    k, v = (x.at[:, :, 18:].set(1e4) for x in (k, v))

    def run(slot):
        return cudnn(q[:, :, 17:18], Seen(k, v, slot, start_B, "bfloat16"), window=window, scale=0.3)

    y = run(slot) if isinstance(slot, int) else jax.jit(run)(slot)
    assert y.dtype == jnp.float32
    for b, h in np.ndindex(2, 3):
        first = max((starts or [0, 0])[b], 0 if window is None else 18 - window)
        seen = slice(first, 18)
        scores = np.asarray(k[b, h, seen], np.float64) @ np.asarray(q[b, h, 17], np.float64) * 0.3
        weights = np.exp(scores - scores.max())
        want = weights @ np.asarray(v[b, h, seen], np.float64) / weights.sum()
        np.testing.assert_allclose(y[b, h, 0], want, atol=0.03)
    # The cache as it lies in memory: heads count as rows.
    (call,) = calls
    assert (call["shape"], call["mask"].shape) == ((6, 1, 1, 8), (6, 1, 1, 24))
    # Only by name: nobody has measured whether it pays.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "platform", lambda _: "gpu")
        seen = Seen(k, v, slot, start_B, "bfloat16")
        assert choose("auto", q[:, :, :1], seen) == "blocked"
        assert choose("cudnn", q[:, :, :1], seen) == "cudnn"


@pytest.mark.exhaustive
@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_cudnns_calls_forward_and_backward_are_lowered_for_cuda_without_a_gpu(monkeypatch):
    # All that JAX misses here is the library's version.
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused, "platform", lambda _: "gpu")
    monkeypatch.setattr(fused, "_gpu_is_here", lambda: True)
    x = jax.ShapeDtypeStruct((2, 3, 64, 8), jnp.float32)
    start_B = jax.ShapeDtypeStruct((2,), jnp.int32)

    def total(q, k, v, start_B):
        seen = Seen(k, v, 0, start_B, "bfloat16")
        assert choose("cudnn", q, seen) == "cudnn"
        return jnp.sum(cudnn(q, seen, window=20))

    calls = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    text = jax.export.export(gradient, platforms=["cuda"], disabled_checks=unchecked)(x, x, x, start_B).mlir_module()
    for call in calls:
        assert f"@{call}(" in text
    assert text.count("CAUSAL") == text.count(r"sliding_window_length\22: 20") == 2

    def decode(q, k, v, start_B, slot):
        seen = Seen(k, v, slot, start_B, "bfloat16")
        assert choose("cudnn", q, seen) == "cudnn"
        return cudnn(q, seen, window=20)

    query, cache = (jax.ShapeDtypeStruct((2, 3, T, 8), "bfloat16") for T in (1, 64))
    (call,) = calls = ["__cudnn$fmhaScaleBiasSoftmax"]
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    slot = jax.ShapeDtypeStruct((), jnp.int32)
    step = jax.export.export(jax.jit(decode), platforms=["cuda"], disabled_checks=unchecked)
    text = step(query, cache, cache, start_B, slot).mlir_module()
    assert f"@{call}(" in text
    assert "PADDING" in text
    # The kernel reads the cache where it lies: nothing transposes or copies it.
    assert not re.search(r"transpose.*64x8x|transpose.*64x3x", text)
    # JAX knows what its kernel can do.
    q = jnp.zeros((2, 3, 64, 20))
    assert "head dim must be <= 128 and a multiple of 8, but got 20" in fused.cudnn_refusal(
        q, Seen(q, q, 0, None, "bfloat16")
    )


@pytest.mark.parametrize("backend", ["reference", "cudnn"])
def test_scores_are_multiplied_by_the_scale(backend, calls):
    context, dtype, atol = BACKENDS[backend]
    q, k, v, _ = inputs(16)
    got = jax.jit(lambda scale: context(q, Seen(k, v, 0, None, dtype), scale=scale))(jnp.float32(0.5))
    want = context(q * jnp.float32(0.5 * 8**0.5), Seen(k, v, 0, None, dtype))
    np.testing.assert_allclose(got, want, atol=atol)


def test_the_reference_drops_weights():
    zeros, values = jnp.zeros((1, 1, 64, 64)), jnp.eye(64)[None, None]
    options = {"backend": "reference", "drop_rate": 0.25, "dropout_key": jax.random.key(0)}
    weights, _ = attend(zeros, Seen(zeros, values, 0, None, "float32"), **options)
    kept = np.asarray(weights)[0, 0][np.tril_indices(64)] != 0
    assert 0.7 < kept.mean() < 0.8


def refused(backend, dtype="bfloat16", T=128, S=None, slot=0, **options):
    q, k, v, _ = inputs(T)
    if S is not None:
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, S - T), (0, 0))) for x in (k, v))
    seen = Seen(k, v, slot, None, dtype)
    with pytest.raises(ConfigError) as error:
        choose(backend, q, seen, **options)
    assert choose("auto", q, seen, **options) == "blocked"
    return str(error.value)


CONTINUED = {
    "cudnn": "continues a sequence in a cache by one query per row, and these are 128",
    "splash": "these queries continue one in a cache",
}


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float32"}, "multiplies in bfloat16, and dtype is float32"),
        ({"return_weights": True}, "does not return the attention weights"),
        ({"dropout_key": 0}, "no dropout of the attention weights"),
        ({"custom_derivatives": False}, "no forward-mode derivatives, which custom_derivatives=False asks for"),
        ({"slot": 5, "S": 140}, CONTINUED),
        ({"S": 140}, CONTINUED),
        ({"slot": jnp.int32(0)}, CONTINUED),
    ],
    ids=["float32", "weights", "dropout", "forward-mode", "cached", "longer", "traced"],
)
def test_what_a_kernel_cannot_compute_is_refused_by_name_and_left_by_auto(backend, options, reason, monkeypatch, calls):
    platform = {"cudnn": "gpu", "splash": "tpu"}[backend]
    monkeypatch.setattr(fused, "platform", lambda _: platform)
    message = refused(backend, **options)
    assert message.startswith(f"attention='{backend}' cannot compute this: it ")
    assert (reason if isinstance(reason, str) else reason[backend]) in message
    assert message.endswith("; attention='auto' takes what can")


@pytest.mark.parametrize(
    ("backend", "reason"), [("cudnn", "it needs an NVIDIA GPU, and the"), ("splash", "it needs a TPU, and the")]
)
@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_a_kernel_of_another_platform_is_refused(backend, reason):
    assert f"{reason} program is for a cpu" in refused(backend)


def test_a_plan_for_gpus_knows_which_heads_cudnn_takes(monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda _: "gpu")
    monkeypatch.setattr(fused, "_gpu_is_here", lambda: False)
    for K, reason in ((20, "its head_dim is a multiple of 8 up to 128, and this is 20"), (136, "this is 136")):
        q = jnp.zeros((1, 1, 4, K))
        assert reason in fused.cudnn_refusal(q, Seen(q, q, 0, None, "bfloat16"))
    q = jnp.zeros((1, 1, 4, 128))
    assert fused.cudnn_refusal(q, Seen(q, q, 0, None, "bfloat16")) is None


def test_what_jax_says_of_cudnn_is_the_reason(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused, "platform", lambda _: "gpu")
    monkeypatch.setattr(fused, "_gpu_is_here", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    assert "JAX says: cuDNN is not detected." in refused("cudnn")


@pytest.mark.parametrize(("platform", "backend"), [("gpu", "cudnn"), ("tpu", "splash"), ("cpu", "blocked")])
def test_auto_takes_the_kernel_of_the_platform(platform, backend, monkeypatch, calls):
    monkeypatch.setattr(fused, "platform", lambda _: platform)
    compute = ComputeConfig(dtype="bfloat16")
    assert backend_of(TINY, compute, 2, 128) == backend
    assert backend_of(TINY, compute, 2, 128, dropout=True) == "blocked"
    # Splash has segments; cuDNN's form here has nothing like them.
    assert backend_of(TINY, compute, 2, 128, documents=True) == ("splash" if backend == "splash" else "blocked")


def test_every_backend_has_a_name_in_the_config():
    assert {"auto", *choice.BACKENDS} == set(ATTENTION)
    assert next(reversed(choice.BACKENDS)) == "reference"


def test_a_model_can_ask_for_a_backend_by_name():
    ids = random_ids(TINY, 2, 16)
    model, params = make_model(TINY, attention="reference")
    auto, _ = make_model(TINY)
    got, want = (jax.jit(lambda p, m=m: m.apply({"params": p}, ids))(params) for m in (model, auto))
    np.testing.assert_allclose(got, want, atol=1e-5)
    model, _ = make_model(TINY, attention="splash")  # initialises: only its shapes count
    with pytest.raises(ConfigError, match="attention='splash' cannot compute this: it needs a TPU"):
        model.apply({"params": params}, ids)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_decodes_by_cudnn_if_asked_by_name(rows, monkeypatch, calls):
    monkeypatch.setattr(fused, "platform", lambda _: "gpu")
    prompts, ids = [[1, 2, 3], [4]][:rows], {}
    for attention in ("cudnn", "blocked"):
        model, params = make_model(TINY, attention=attention, dtype="bfloat16")
        ids[attention] = generate(model, params, prompts, 4, cache_dtype="bfloat16").tokens
    assert [list(row) for row in ids["cudnn"]] == [list(row) for row in ids["blocked"]]
    shapes = {call["shape"] for call in calls}
    assert (rows * TINY.n_heads, 1, 1, TINY.head_dim) in shapes


def test_decoding_by_splash_by_name_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda _: "tpu")
    model, params = make_model(TINY, attention="splash", dtype="bfloat16")
    cache = Cache.empty(model.config, model.compute, start_B=jnp.zeros(1, jnp.int32), slots=8, dtype="bfloat16")
    cache = dataclasses.replace(cache, length=jnp.int32(3))
    with pytest.raises(ConfigError, match="these queries continue one in a cache"):
        model.apply({"params": params}, jnp.ones((1, 1), jnp.int32), cache=cache, method="features")


def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads(monkeypatch, calls):
    monkeypatch.setattr(fused, "platform", lambda _: "gpu")
    config = TINY.replace(n_heads=4, emb_dim=32)
    model, params = make_model(config, dtype="bfloat16")
    ids = random_ids(config, 4, 16)
    run = jax.jit(lambda p, ids: model.apply({"params": p}, ids))
    alone, spread = run(params, ids), run(shard(params, make_mesh(MeshConfig(fsdp=2, tensor=2))), ids)
    np.testing.assert_allclose(alone, spread, atol=0.05)
    shapes = [call["shape"] for call in calls]
    assert shapes.count((4, 16, 4, 8)) == shapes.count((2, 16, 2, 8)) == config.n_layers
    # Three rows on two devices: refused, and so computed in blocks.
    mesh = make_mesh(MeshConfig(fsdp=2))
    compute = ComputeConfig(dtype="bfloat16")
    assert backend_of(config, compute, 4, 16, mesh=mesh) == "cudnn"
    assert backend_of(config, compute, 3, 16, mesh=mesh) == "blocked"
    with pytest.raises(ConfigError, match="the mesh divides no batch of 3 rows and 4 heads"):
        backend_of(config, compute.replace(attention="cudnn"), 3, 16, mesh=mesh)


@pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU: the reference has stood in for cuDNN's kernel")
def test_cudnns_kernel_is_what_runs():
    q = k = v = jnp.ones((2, 4, 64, 64))
    program = jax.jit(lambda q: cudnn(q, Seen(k, v, 0, None, "bfloat16"))).lower(q).compile().as_text()
    assert "cudnn" in program

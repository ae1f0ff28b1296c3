"""Checkpoints and logits that other code wrote and computed: see goldens/make_goldens.py and make_openai.py."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import to_numpy
from safetensors.numpy import load_file

import jaxgpt
from jaxgpt.model import reference

GOLDENS = Path(__file__).parent / "goldens"
FILES = {"huggingface": "huggingface", "book": "book.safetensors", "nanogpt": "nanogpt.pt", "openai": "openai"}


@pytest.fixture(params=FILES)
def golden(request):
    """(model, params, ids, exact logits) of one layout."""
    if request.param == "nanogpt":
        pytest.importorskip("torch")  # the only reader of .pt files
    overrides = {"n_heads": 2} if request.param == "book" else {}  # the book's files do not hold it
    model, params = jaxgpt.load(GOLDENS / FILES[request.param], **overrides)
    with np.load(GOLDENS / ("openai.npz" if request.param == "openai" else "expected.npz")) as expected:
        return model, params, expected["ids"], expected[request.param]


def test_logits_equal_what_the_original_code_computed(golden):
    model, params, ids, logits = golden
    got = jax.jit(model.apply)({"params": params}, ids)
    assert np.abs(got - logits).max() < 2e-5
    assert np.abs(logits).max() > 1


def test_the_reference_equals_what_the_original_code_computed(golden):
    model, params, ids, logits = golden
    np.testing.assert_allclose(reference.gpt(to_numpy(params), model.config, ids), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "overrides"), [("huggingface", {}), ("book", {"n_heads": 2})])
def test_scanned_layers_load_from_the_same_file(name, overrides):
    model, params = jaxgpt.load(GOLDENS / FILES[name], scan_layers=True, **overrides)
    with np.load(GOLDENS / "expected.npz") as expected:
        got = jax.jit(model.apply)({"params": params}, expected["ids"])
        assert np.abs(got - expected[name]).max() < 2e-5


def test_saving_the_hugging_face_golden_gives_its_tensors_back(tmp_path):
    model, params = jaxgpt.load(GOLDENS / "huggingface")
    jaxgpt.save(tmp_path / "out", model, params, format="huggingface")
    want, got = (load_file(path / "model.safetensors") for path in (GOLDENS / "huggingface", tmp_path / "out"))
    short = {name.removeprefix("transformer."): tensor for name, tensor in got.items()}
    assert short.keys() == {name.removeprefix("transformer.") for name in want}
    for name, tensor in want.items():
        np.testing.assert_array_equal(short[name.removeprefix("transformer.")], tensor)

"""Parity with transformers' Flax GPT-2, which version 5 no longer has, on the files that it wrote. It needs an
environment of its own, whose Python the variable JAXGPT_FLAX_PYTHON names:

    python -m venv flax-world && flax-world/bin/pip install transformers==4.57.1 flax==0.12.8 jax==0.10.2
    JAXGPT_FLAX_PYTHON=flax-world/bin/python pytest -m parity tests/test_parity_flax.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization
from test_flax_page import GENERATE, WITHOUT_EFFECT, code, rows

import jaxgpt

pytestmark = [pytest.mark.parity, pytest.mark.exhaustive]

FILES = {
    "tied": "flax_model.msgpack",
    "untied": "flax_model.msgpack",
    "sharded": "flax_model.msgpack.index.json",
    "safetensors": "model.safetensors",
    "bfloat16": "flax_model.msgpack",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The directory that tests/flax_world.py writes."""
    python = os.environ.get("JAXGPT_FLAX_PYTHON")
    if not python:
        pytest.skip("JAXGPT_FLAX_PYTHON does not name the Python of an environment with transformers 4.57.1 and Flax")
    directory = tmp_path_factory.mktemp("flax")
    script = Path(__file__).with_name("flax_world.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, str(script), str(directory)], check=True, env=environment | {"JAX_PLATFORMS": "cpu"})
    return directory


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_the_flax_model(name, world):
    assert (world / name / FILES[name]).is_file()
    assert not list((world / name).glob("*.bin"))
    model, params = jaxgpt.load(world / name, check_finite=True)
    expected = np.load(world / f"{name}.npz")
    logits = np.asarray(jax.jit(model.apply)({"params": params}, expected["ids"].astype(np.int32)))
    assert np.abs(expected["logits"]).max() > 1
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)


def test_greedy_ids_are_those_of_the_flax_model(world):
    model, params = jaxgpt.load(world / "tied")
    result = jaxgpt.generate(model, params, np.load(world / "tied.npz")["ids"].tolist(), max_new_tokens=6)
    greedy = np.load(world / "greedy.npy")
    assert len(np.unique(greedy[:, 10:])) > 3
    np.testing.assert_array_equal(result.tokens, greedy)


def test_training_code_may_save_under_params_or_without_the_head(world, tmp_path):
    """What `serialization.to_bytes` makes of a model's variables, or of `FlaxGPT2Model`, which has no prefix."""
    tree = serialization.msgpack_restore((world / "tied" / "flax_model.msgpack").read_bytes())
    want = jaxgpt.load(world / "tied")[1]
    (tmp_path / "config.json").write_bytes((world / "tied" / "config.json").read_bytes())
    for variant in ({"params": tree}, tree["transformer"]):
        (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(variant))
        got = jaxgpt.load(tmp_path)[1]
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, want))


def test_the_page_has_every_option_that_generate_used(world):
    facts = json.loads((world / "facts.json").read_text())
    assert sorted(option for option, _ in GENERATE) == sorted(facts["arguments"] + facts["fields"])
    assert set(WITHOUT_EFFECT) <= set(facts["all_fields"]) - set(facts["fields"])


def test_the_page_has_the_names_and_shapes_of_the_flax_model(world):
    shapes = json.loads((world / "facts.json").read_text())["shapes"]
    sizes = {"V": 97, "C": 16, "D": 24, "F": 37, "3D": 72}
    table = {
        code(name)[0].replace("../", "") if "lm_head" in name else f"transformer/{code(name)[0]}": [
            sizes[size] for size in shape.split(", ")
        ]
        for name, shape, *_ in rows("Parameters")
    }
    first = {
        name: shape for name, shape in shapes.items() if not name.startswith(("transformer/h/1", "transformer/h/2"))
    }
    assert table == first

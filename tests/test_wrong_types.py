"""Arguments of the wrong type, as people really mistake them; and public objects as pickles, copies and text."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import inspect
import pickle
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_model

import jaxgpt
from jaxgpt import (
    GPT,
    ComputeConfig,
    FeedForward,
    Greedy,
    MeshConfig,
    Temperature,
    TopK,
    TopP,
    TrainConfig,
    evaluate,
    generate,
    generate_text,
    get_tokenizer,
    load,
    look_inside,
    make_mesh,
    prepare,
    save,
    scan_generate,
    shard,
    stream,
    train,
)
from jaxgpt.data import Tokens
from jaxgpt.errors import CheckpointError, MissingExtraError

BYTES = TINY.replace(vocab_size=257, tokenizer="bytes")
MODEL, PARAMS = make_model(BYTES)
IDS, DRAW = [[1, 2, 3]], Temperature(1.0)
BATCH = np.array(IDS)
CONFIG = TrainConfig(model=BYTES)

# Per call: what the message must say, in this order: what was expected, what came, what to do.
CALLS = {
    "a sampler's name": (lambda: generate(MODEL, PARAMS, IDS, 4, sampler="greedy"), "Greedy().*not 'greedy'"),
    "a sampler's class": (
        lambda: generate(MODEL, PARAMS, IDS, 4, sampler=Temperature),
        "Temperature.0.8.*not the class Temperature",
    ),
    "a sampler's name, scan": (
        lambda: scan_generate(MODEL, PARAMS, BATCH, 4, sampler="greedy"),
        "Greedy().*not 'greedy'",
    ),
    "a float as key": (lambda: generate(MODEL, PARAMS, IDS, 4, sampler=DRAW, key=0.5), "an int or a key.*not 0.5"),
    "a text as key": (lambda: generate(MODEL, PARAMS, IDS, 4, sampler=DRAW, key="0"), "an int or a key.*not '0'"),
    "another library's option": (
        lambda: generate(MODEL, PARAMS, IDS, 4, do_sample=True),
        "'do_sample': use temperature=1.0",
    ),
    "another library's option for text": (
        lambda: generate_text(MODEL, PARAMS, "To", 4, max_length=5),
        "'max_length': use max_new_tokens",
    ),
    "another library's option, streamed": (
        lambda: stream(MODEL, PARAMS, "To", 4, eos_token_id=5),
        "'eos_token_id': use stop_ids",
    ),
    "a misspelt option": (lambda: generate(MODEL, PARAMS, IDS, 4, samplr=Greedy()), "'samplr'; did you mean 'sampler'"),
    "a preset's name as config": (lambda: GPT("gpt2"), "GPTConfig, not 'gpt2': GPT.GPTConfig.preset"),
    "a dict as config": (lambda: GPT({"n_layers": 2}), "GPTConfig, not {'n_layers': 2}"),
    "a block of a name": (lambda: FeedForward("gpt2"), "GPTConfig, not 'gpt2'"),
    "a type as compute": (lambda: GPT(BYTES, "bfloat16"), "ComputeConfig, not 'bfloat16'"),
    "a type that is no name": (
        lambda: ComputeConfig(dtype=jnp.bfloat16),
        "dtype must be one of float32, bfloat16, not",
    ),
    "a preset's name to train": (lambda: TrainConfig(model="gpt2"), "model must be a GPTConfig.*not 'gpt2'"),
    "a text as compute to train": (
        lambda: TrainConfig(model=BYTES, compute="bfloat16"),
        "compute must be a ComputeConfig",
    ),
    "a text as mesh to train": (lambda: TrainConfig(model=BYTES, mesh="fsdp=2"), "mesh must be a MeshConfig"),
    "parameters before the model": (
        lambda: generate(PARAMS, MODEL, IDS, 4),
        r"the model comes first.*generate\(model, params",
    ),
    "parameters before the model, text": (lambda: generate_text(PARAMS, MODEL, "To", 4), "the model comes first"),
    "parameters before the model, scan": (lambda: scan_generate(PARAMS, MODEL, BATCH, 4), "the model comes first"),
    "parameters before the model, evaluate": (lambda: evaluate(PARAMS, MODEL, [1, 2]), "the model comes first"),
    "parameters before the model, inside": (lambda: look_inside(PARAMS, MODEL, [1, 2]), "the model comes first"),
    "parameters before the model, prepare": (lambda: prepare(PARAMS, MODEL), "the model comes first"),
    "parameters before the model, save": (
        lambda: save("x", PARAMS, MODEL),
        r"the model comes first.*save\(path, model",
    ),
    "the path last": (lambda: save(MODEL, PARAMS, "x"), r"save\(path, model, params\)"),
    "model and parameters as one": (lambda: generate((MODEL, PARAMS), PARAMS, IDS, 4), "unpack them"),
    "a name as model": (lambda: generate("gpt2", PARAMS, IDS, 4), "a jaxgpt.GPT, not 'gpt2'.*load"),
    "no parameters": (lambda: generate(MODEL, None, IDS, 4), "params must be.*not None"),
    "what init returns": (lambda: generate(MODEL, {"params": PARAMS}, IDS, 4), r"pass params\['params'\]"),
    "another tree": (lambda: evaluate(MODEL, {"lm_head": 1}, [1, 2]), "'tok_emb' and so on, but it holds 'lm_head'"),
    "a list to apply": (
        lambda: MODEL.apply({"params": PARAMS}, IDS),
        r"array of integers \[B, T\].*jnp.array.*not \[\[1, 2, 3\]\]",
    ),
    "a list to init": (lambda: MODEL.init(jax.random.key(0), IDS), r"array of integers \[B, T\]"),
    "one row to apply": (
        lambda: MODEL.apply({"params": PARAMS}, BATCH[0]),
        r"\[B, T\], not the shape \[3\]: ids\[None\]",
    ),
    "floats to apply": (lambda: MODEL.apply({"params": PARAMS}, np.float32(BATCH)), r"integers.*not float32\[1, 3\]"),
    "text to generate": (lambda: generate(MODEL, PARAMS, "To be", 4), "ids, not text: jaxgpt.generate_text"),
    "ids to generate_text": (lambda: generate_text(MODEL, PARAMS, IDS, 4), "texts, not .1, 2, 3.*jaxgpt.generate"),
    "nothing to generate_text": (lambda: generate_text(MODEL, PARAMS, None, 4), "texts, not None"),
    "texts to stream": (lambda: stream(MODEL, PARAMS, ["a", "b"], 4), "one prompt.*once per text"),
    "text to evaluate": (lambda: evaluate(MODEL, PARAMS, "To be"), "token ids, not text.*encode"),
    "rows to evaluate": (lambda: evaluate(MODEL, PARAMS, BATCH), r"one row of integers \[N\], not int64\[1, 3\]"),
    "floats to evaluate": (lambda: evaluate(MODEL, PARAMS, [1.0, 2.0]), r"one row of integers.*not \[1.0, 2.0\]"),
    "a ragged list to evaluate": (lambda: evaluate(MODEL, PARAMS, [[1], [1, 2]]), "one row of integers"),
    "an id outside to evaluate": (
        lambda: evaluate(MODEL, PARAMS, [1, 300, 2]),
        r"ids_N\[1\] is 300, outside the vocabulary: 0 to 256",
    ),
    "text to look_inside": (lambda: look_inside(MODEL, PARAMS, "To be"), "token ids, not text"),
    "a batch to look_inside": (lambda: look_inside(MODEL, PARAMS, IDS), "one row of integers"),
    "a text as top": (lambda: look_inside(MODEL, PARAMS, [1, 2], top="5"), "top must be an integer.*not '5'"),
    "a mesh's text to shard": (lambda: shard(PARAMS, "fsdp=2"), r"shard\(params, make_mesh.*not 'fsdp=2'"),
    "a mesh's config to shard": (lambda: shard(PARAMS, MeshConfig(fsdp=2)), "make_mesh.*not <MeshConfig>"),
    "a text to make_mesh": (lambda: make_mesh("fsdp=2"), "MeshConfig, such as.*not 'fsdp=2'"),
    "a path as config": (lambda: train("config.toml", "a.txt", "run"), r"TrainConfig.from_file.*not 'config.toml'"),
    "a list of arrays": (lambda: train(CONFIG, [np.arange(99)], "run"), "a path, Tokens, or a list of these, not"),
    "an array of ids": (lambda: train(CONFIG, np.arange(99), "run"), "a path or tokens.*Tokens.from_ids"),
    "no path": (lambda: load(None), "a path or a name, not None"),
    "a model to load": (lambda: load((MODEL, PARAMS)), "a path or a name, not"),
    "a text as compute to load": (
        lambda: load("shakespeare", compute="bfloat16"),
        "compute must be a ComputeConfig, not 'bfloat16'",
    ),
    "bytes to encode": (lambda: get_tokenizer("gpt2").encode(b"a"), "one text, not"),
    "a list to encode": (lambda: get_tokenizer("gpt2").encode(["a"]), r"one text, not \['a'\]"),
    "text to decode": (lambda: get_tokenizer("gpt2").decode("abc"), "row of token ids, not 'abc'"),
    "one id to decode": (lambda: get_tokenizer("gpt2").decode(5), "row of token ids, not 5"),
    "a number as tokenizer": (lambda: get_tokenizer(5), "no tokenizer 5.*gpt2"),
    "a list as tokenizer": (lambda: get_tokenizer(["gpt2"]), "no tokenizer .*gpt2"),
    "a text as temperature": (lambda: Temperature("0.8"), "temperature must be 0 or more, not '0.8'"),
    "a number to describe": (lambda: jaxgpt.describe(5), "a model or its parameters, not 5"),
    "numbers to describe": (lambda: jaxgpt.describe({"a": 5}), "a model or its parameters"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_the_wrong_type_is_told_the_right_call(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, message = CALLS[call]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        function()
    assert "jaxgpt" in str(caught.traceback[-1].path), "raised by another library"
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_a_key_of_another_shape_is_refused():
    with pytest.raises(TypeError, match="an int or a key"):
        generate(MODEL, PARAMS, IDS, 4, sampler=DRAW, key=jnp.zeros(3, jnp.uint32))


DATA = {
    "a tokenizer": get_tokenizer("gpt2"),
    "a tokenizer of bytes": get_tokenizer("bytes"),
    "a config": BYTES,
    "a compute config": ComputeConfig(dtype="bfloat16"),
    "a mesh config": MeshConfig(fsdp=2),
    "a training config": CONFIG,
    "a model": MODEL,
    "a chain": DRAW | TopK(20) | TopP(0.9),
    "an error": CheckpointError("x", "is damaged"),
    "an error of a missing package": MissingExtraError("torch", "torch", "reading it"),
}


@pytest.mark.parametrize("name", DATA)
def test_public_data_survives_pickling_and_copying(name):
    value = DATA[name]
    for other in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert repr(other) == repr(value)
        assert type(other) is type(value)
        if not isinstance(value, Exception):
            assert other == value


@pytest.fixture(scope="module")
def results():
    """One of each public result that holds arrays."""
    return {
        "generate": generate(MODEL, PARAMS, [[1], [2, 3]], 4, logprobs=2),
        "look_inside": look_inside(MODEL, PARAMS, [1, 2, 3]),
        "evaluate": evaluate(MODEL, PARAMS, [1, 2, 3]),
        "score": jaxgpt.score(MODEL, PARAMS, [[1]], [[[2, 3]]])[0][0],
        "tokens": Tokens.from_text("To be", "bytes"),
        "cache": jaxgpt.Cache.empty(BYTES, ComputeConfig(), jnp.zeros(2, jnp.int32), 8),
        "train": jaxgpt.TrainResult(3, PARAMS, BYTES, ComputeConfig(), 1.5, None),
    }


def test_results_survive_pickling_and_copying(results):
    for value in results.values():
        for other in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
            assert repr(other) == repr(value)
            if isinstance(value, Tokens):
                assert (other.identity, list(other.ids_N)) == (value.identity, list(value.ids_N))
            else:
                assert jax.tree.all(jax.tree.map(np.array_equal, vars(other), vars(value)))


def encoded(text):
    return get_tokenizer("gpt2").encode(text)


def test_a_tokenizer_crosses_into_other_processes():
    texts = ["Hello, I am", "Every effort moves you"]
    with get_context("spawn").Pool(1) as pool:
        assert pool.map(get_tokenizer("gpt2").encode, texts) == [encoded(text) for text in texts]


def test_results_print_shapes_and_not_numbers(results):
    for value in results.values():
        assert len(repr(value)) < 900, repr(value)
    assert "attention_LxHxTxT=float32[2, 3, 3, 3]" in repr(results["look_inside"])
    assert "tokens=[int32[5], int32[6]]" in repr(results["generate"])
    assert f"params=<{len(jax.tree.leaves(PARAMS))} arrays, " in repr(results["train"])
    assert "token_logprobs=float32[2]" in repr(results["score"])
    assert repr(results["tokens"]) == "Tokens(5 tokens, tokenizer='bytes', vocab_size=257)"


def test_samplers_print_as_they_are_written():
    chain = Temperature(0.8) | TopK(20) | TopP(0.95)
    assert repr(chain) == "Temperature(0.8) | TopK(20) | TopP(0.95)"
    assert chain == Temperature(0.8) | (TopK(20) | TopP(0.95))
    assert hash(chain) == hash(eval(repr(chain)))
    assert repr(Greedy()) == "Greedy()"


def test_the_package_lists_its_own_names_and_no_others():
    names: dict = {}
    exec("from jaxgpt import *", names)
    assert set(names) - {"__builtins__"} == set(jaxgpt.__all__) == set(dir(jaxgpt))
    for name in jaxgpt.__all__:
        module = inspect.getmodule(getattr(jaxgpt, name))
        assert name == "__version__" or module.__name__.startswith("jaxgpt."), name


@pytest.mark.parametrize("compute", [{}, {"scan_layers": True}, {"param_dtype": "int8"}], ids=str)
def test_a_description_has_every_parameter_with_its_shape_and_type(compute):
    model, params = prepare(*make_model(BYTES), "int8") if "param_dtype" in compute else make_model(BYTES, **compute)
    described = jaxgpt.describe(params)
    leaves = jax.tree.leaves(params)
    assert described.parameters == sum(leaf.size for leaf in leaves)
    assert described.nbytes == sum(leaf.nbytes for leaf in leaves)
    text = repr(described)
    assert len(text) < 4000
    assert "tok_emb/weight" in text
    assert f"{described.parameters:,}" in text
    assert jaxgpt.describe(model).parameters == described.parameters
    assert jaxgpt.describe(model).nbytes == described.nbytes


def test_blocks_that_differ_are_described_apart():
    params = {**PARAMS, "trf_blocks_1": {"extra": jnp.zeros(3)}}
    paths = [row.path for row in jaxgpt.describe(params).rows]
    assert "trf_blocks_1/extra" in paths
    assert "trf_blocks_0/norm1/scale" in paths


def test_a_notebook_shows_a_description_as_a_table():
    cells: list = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in ("td", "th"):
                cells.append("")

        def handle_data(self, data):
            if cells:
                cells[-1] += data

    description = dataclasses.replace(jaxgpt.describe(MODEL), title="<b>&")
    Reader().feed(description._repr_html_())
    assert len(cells) == 5 * (len(description.rows) + 2)
    assert description.rows[0].path in cells
    assert "<b>" not in description._repr_html_()

"""GGUF files: what is refused, in the default tier; what is in them, and what llama.cpp makes of them, with the marker
gguf, which needs the extra [gguf] and xllamacpp: pip install -e '.[test,gguf]' xllamacpp && pytest -n0 -m gguf."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALTERNATING, TINY, make_model, make_model_that_draws, random_ids, stack_blocks
from test_tokenizer_files import described, small, spelling, tokenizer_of

import jaxgpt
from jaxgpt.cli import convert, main
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError, MissingExtraError
from jaxgpt.model import cast_params
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.weights.gguf import OUTTYPES, write_gguf

BYTES = GPTConfig(
    vocab_size=257, context_length=32, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, tokenizer="bytes"
)
# Neither biases nor a tied head, and more ids than tokens.
BARE = BYTES.replace(qkv_bias=False, bias=False, tie_embeddings=False, vocab_size=259)
WIDE = BYTES.replace(emb_dim=64, n_heads=2)
MERGES = spelling("hello", " hello", " world", "über")
ENDED = ("<|endoftext|>", {"special": True})

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def bpe(*added, **changes):
    return tokenizer_of(described(MERGES, added=[ENDED, *added], seed=1, **changes))


def test_a_file_needs_the_extra_and_the_command_asks_for_it_before_it_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"jaxgpt\[gguf\]"):
        write_gguf(tmp_path / "x.gguf", *make_model(BYTES))
    assert main(["convert", str(tmp_path / "no-such-model"), str(tmp_path / "x.gguf")]) == 2
    assert "jaxgpt[gguf]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


NOT_IN_LLAMA_CPP = {
    "bands": (lambda: ALTERNATING.replace(tokenizer="bytes", vocab_size=257), "banded attention"),
    "another activation": (lambda: BYTES.replace(activation="silu"), "gelu_tanh, not silu"),
    "an activation": (lambda: BYTES.replace(activation="gelu"), "gelu_tanh, not gelu"),
    "fewer ids than tokens": (lambda: TINY, "97 ids, fewer than its tokenizer gpt2, 50,257"),
    "no tokenizer": (lambda: TINY.replace(tokenizer="none"), "none came with this model"),
    "characters": (lambda: small(tokenizer_of(CHARACTERS)), "chars-.* is not of the one kind"),
    "word pieces": (lambda: small(tokenizer_of(WORD_PIECES)), "hf-.* is not of the one kind"),
    "a space before each text": (lambda: small(bpe(prefix=True)), "add_prefix_space"),
    "a token that strips": (lambda: small(bpe(("<mask>", {"lstrip": True}))), "'<mask>' is single_word, lstrip"),
    "no end of a text": (lambda: small(tokenizer_of(described(MERGES))), "0 ids that end a text"),
}
CHARACTERS = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "decoder": {"type": "Fuse"}}
WORD_PIECES = {
    "model": {
        "type": "WordPiece",
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
}


@pytest.mark.parametrize("case", NOT_IN_LLAMA_CPP)
def test_what_llama_cpp_does_not_have_is_refused_by_name(case, tmp_path):
    config, message = NOT_IN_LLAMA_CPP[case]
    model = jaxgpt.GPT(config())
    with pytest.raises(CheckpointError, match=message):
        write_gguf(tmp_path / "x.gguf", model, {"tok_emb": {}})
    assert not list(tmp_path.iterdir())


def test_int8_parameters_and_other_types_are_refused(tmp_path):
    model, params = make_model(BYTES)
    int8 = jaxgpt.GPT(BYTES, model.compute.replace(param_dtype="int8"))
    with pytest.raises(CheckpointError, match="int8 would be rounded once more"):
        write_gguf(tmp_path / "x.gguf", int8, cast_params(params, "int8"))
    with pytest.raises(ValueError, match="outtype must be one of f32, f16, bf16, q8_0, not 'q4_k'"):
        write_gguf(tmp_path / "x.gguf", model, params, outtype="q4_k")
    with pytest.raises(TypeError, match=r"write_gguf\(path, model, params\)"):
        write_gguf(tmp_path / "x.gguf", params, model)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_replaced_unless_it_is_a_gguf_file_and_forced(tmp_path, capsys):
    file = tmp_path / "x.gguf"
    for content in (b"years of work", b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="exists and is not a GGUF file"):
            write_gguf(file, *make_model(BYTES))
        assert main(["convert", "shakespeare", str(file)]) == 2
        assert "exists: choose another name, or pass --force" in capsys.readouterr().err
        assert file.read_bytes() == content
    with pytest.raises(ConfigError, match="is a directory"):
        write_gguf(tmp_path, *make_model(BYTES))


def test_the_command_offers_every_type_and_takes_it_for_a_file_only(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    (option,) = [action for action in parser._actions if action.dest == "outtype"]
    assert tuple(option.choices) == OUTTYPES
    assert main(["convert", "shakespeare", str(tmp_path / "x"), "--outtype", "f16"]) == 2
    assert "--outtype is for FILE.gguf" in capsys.readouterr().err
    assert main(["convert", "shakespeare", str(tmp_path / "x.gguf"), "--format", "huggingface"]) == 2
    assert "a directory is written" in capsys.readouterr().err


def test_a_gguf_file_is_not_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    with pytest.raises(CheckpointError, match="a GGUF file, which is written and not read"):
        jaxgpt.load(tmp_path / "x.gguf")


# From here on, with the packages.


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


@contextlib.contextmanager
def llama_cpp(path, n_ctx):
    """Runs a file in llama.cpp; yields a function that posts to its server, which is the only way to its logits."""
    xllamacpp = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = n_ctx, 1, False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # several wait for each other busily
    # By default, keys and values are rounded to float16.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(task, **fields):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{task}", json.dumps(fields).encode(), headers)
        with opener.open(request) as reply:
            return json.load(reply)

    yield post


def assert_same_model(model, params, path, prompt, new, tolerance, same_ids=True):
    """Compares the greedy ids and, after several parts of these, the log-probabilities of the 1,000 likeliest ids."""
    config = model.config
    likeliest = min(1000, config.vocab_size)
    # Probabilities come with a whole character only, so one is drawn: they are those from before the bias.
    (letter,) = get_tokenizer(config.tokenizer).encode("a")
    options = {"n_predict": 1, "n_probs": likeliest, "logit_bias": [[letter, 1000]], "cache_prompt": False}
    with llama_cpp(path, config.context_length) as post:
        ids = [*prompt, *post("completion", prompt=prompt, n_predict=new, temperature=0, return_tokens=True)["tokens"]]
        assert len(ids) == len(prompt) + new
        lengths = [1, len(prompt), len(prompt) + 1, len(ids)]
        steps = [post("completion", prompt=ids[:T], **options)["completion_probabilities"] for T in lengths]
    if same_ids:
        assert ids == list(jaxgpt.generate(model, params, [prompt], new).tokens[0])
    log_probs_TxV = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, jnp.array([ids]))[0]))
    for T, (step,) in zip(lengths, steps, strict=True):
        got = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        assert len(got) == likeliest
        np.testing.assert_allclose(log_probs_TxV[T - 1, list(got)], list(got.values()), rtol=0, atol=tolerance)


# At least twice what was measured, with the bundled model and with random ones. llama.cpp's GELU is a table in float16.
TOLERANCES = {"f32": 0.005, "f16": 0.02, "bf16": 0.08, "q8_0": 0.15}


@pytest.mark.gguf
@pytest.mark.parametrize("outtype", OUTTYPES)
def test_llama_cpp_gives_the_bundled_model_s_probabilities(outtype, gguf, tmp_path, capsys):
    path = tmp_path / "shakespeare.gguf"
    assert main(["convert", "shakespeare", str(path), "--outtype", outtype]) == 0
    assert f"gguf ({outtype}), 10,844,544 parameters" in capsys.readouterr().err
    model, params = jaxgpt.load("shakespeare")
    prompt = get_tokenizer("bytes").encode("JULIET:\nO Romeo, Romeo! ")
    assert_same_model(model, params, path, prompt, 40, TOLERANCES[outtype], same_ids=outtype == "f32")


MODELS = {
    "OpenAI's vocabulary": lambda: small(get_tokenizer("gpt2"), context_length=32, emb_dim=32, n_layers=2),
    "no biases, untied, more ids than tokens": lambda: BARE,
    "feed-forward layer of another width": lambda: WIDE.replace(ffn_dim=96, layer_norm_eps=0.1),
    "scores scaled by layer": lambda: BYTES.replace(scale_attn_by_inverse_layer_idx=True),
    "scores not scaled": lambda: WIDE.replace(scale_attn_weights=False, qkv_bias=False),
    "added tokens": lambda: small(bpe(("<|pad|>", {"special": True}), ("Juliet", {})), emb_dim=32),
}


@pytest.mark.gguf
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_a_random_model_s_probabilities_and_greedy_ids(name, gguf, tmp_path):
    config = MODELS[name]()
    model, params = make_model(config)
    write_gguf(tmp_path / "x.gguf", model, params)
    prompt = random_ids(config, 1, 5, seed=1)[0].tolist()  # its continuations do not end
    assert_same_model(model, params, tmp_path / "x.gguf", prompt, 8, TOLERANCES["f32"])


@pytest.mark.gguf
@pytest.mark.parametrize("outtype", OUTTYPES)
def test_llama_cpp_reads_every_type_of_a_model_whose_rows_have_no_whole_blocks(outtype, gguf, tmp_path):
    model, params = make_model(BARE)  # rows of 24, and of 96
    write_gguf(tmp_path / "x.gguf", model, params, outtype=outtype)
    prompt = random_ids(BARE, 1, 5)[0].tolist()
    assert_same_model(model, params, tmp_path / "x.gguf", prompt, 8, TOLERANCES[outtype], same_ids=outtype == "f32")


TEXTS = [
    "Hello, hello world; it's 2 o'clock, I've said. We'LL see  --   \n\n\tthen:\r\n 3½ ²x ₂ Ⅻ ٣",
    "über Füße, naïve café, 中文字 中文, 🙂🙂 👩\u200d👩\u200d👧, e\u0301, \u00a0\u2003x\u3000 \u200b\ufeff",
    "<|endoftext|> Juliet <|pad|>Juliet<|endof <|pad|> [PAD300] \u0000\u0007 \u00ff\u0100\u0122 ÿÿ",
    "   ",
    "a" * 500 + " " * 500 + "b",
]
TOKENIZERS = {
    "gpt2": lambda: get_tokenizer("gpt2"),
    "bytes": lambda: get_tokenizer("bytes"),
    "of a file, with added tokens": lambda: bpe(("<|pad|>", {"special": True}), ("Juliet", {})),
}


@pytest.mark.gguf
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_every_text_the_same_tokens_and_these_the_same_text(name, gguf, tmp_path):
    tokenizer = TOKENIZERS[name]()
    write_gguf(tmp_path / "x.gguf", *make_model(small(tokenizer)))
    with llama_cpp(tmp_path / "x.gguf", 16) as post:
        for text in TEXTS:
            for special in (False, True):
                ids = tokenizer.encode(text, allow_special=special)
                reply = post("tokenize", content=text, add_special=True, parse_special=special)
                assert reply["tokens"] == ids, text
            assert post("detokenize", tokens=ids)["content"] == text


@pytest.mark.gguf
def test_llama_cpp_stops_where_generate_does(gguf, tmp_path):
    tokenizer = bpe()
    stops = (tokenizer.end_of_text, 3, 200)
    ended = jaxgpt.tokenizer.restored(dataclasses.replace(tokenizer.content, start=7, stop_ids=stops))
    for stop in (*stops, 9):
        model, params = make_model_that_draws(stop, small(ended))
        write_gguf(tmp_path / f"{stop}.gguf", model, params)
        with llama_cpp(tmp_path / f"{stop}.gguf", 16) as post:
            reply = post("completion", prompt=[5, 6], n_predict=3, temperature=0)
            assert reply["stop_type"] == ("eos" if stop in stops else "limit")
            assert reply["tokens_evaluated"] == 2  # nothing is put before a prompt
        assert value(gguf, tmp_path / f"{stop}.gguf", "tokenizer.ggml.bos_token_id") == 7
    too_many = jaxgpt.tokenizer.restored(dataclasses.replace(tokenizer.content, stop_ids=(*stops, 9)))
    with pytest.raises(CheckpointError, match="4 ids that end a text"):
        write_gguf(tmp_path / "x.gguf", jaxgpt.GPT(small(too_many)), {"tok_emb": {}})


def value(gguf, path, key):
    return gguf.GGUFReader(path).fields[key].contents()


@pytest.mark.gguf
def test_a_file_says_what_the_model_and_its_ids_are(gguf, tmp_path):
    tokenizer = bpe(("<|pad|>", {"special": True}), ("Juliet", {}))
    config = small(tokenizer, emb_dim=32, ffn_dim=96, n_layers=3, layer_norm_eps=1e-3)
    config = config.replace(vocab_size=tokenizer.vocab_size + 2)
    for outtype, number in zip(OUTTYPES, (0, 1, 32, 7), strict=True):
        write_gguf(tmp_path / "x.gguf", *make_model(config), outtype=outtype)
        assert value(gguf, tmp_path / "x.gguf", "general.file_type") == number
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    got = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    tokens, types, merges = (got.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    end = tokenizer.end_of_text
    assert got == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gpt2.context_length": 16,
        "gpt2.embedding_length": 32,
        "gpt2.block_count": 3,
        "gpt2.feed_forward_length": 96,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-3),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert merges == [" ".join(pair) for pair in MERGES]
    assert len(tokens) == len(types) == config.vocab_size
    assert dict(zip(tokens[-5:], types[-5:], strict=True)) == {
        "<|endoftext|>": gguf.TokenType.CONTROL,
        "<|pad|>": gguf.TokenType.CONTROL,
        "Juliet": gguf.TokenType.USER_DEFINED,
        f"[PAD{config.vocab_size - 2}]": gguf.TokenType.UNUSED,
        f"[PAD{config.vocab_size - 1}]": gguf.TokenType.UNUSED,
    }
    assert set(types[:-5]) == {gguf.TokenType.NORMAL}


def their_tensors(params):
    """The tensors of BARE, written out by hand."""
    named = {"token_embd.weight": params["tok_emb"]["weight"], "position_embd.weight": params["pos_emb"]["weight"]}
    zeros = np.zeros
    for i in range(2):
        block = params[f"trf_blocks_{i}"]
        named |= {
            f"blk.{i}.attn_norm.weight": block["norm1"]["scale"],
            f"blk.{i}.attn_norm.bias": zeros(24),
            f"blk.{i}.attn_qkv.weight": np.concatenate(list(block["att"]["qkv"]["weight"])),
            f"blk.{i}.attn_qkv.bias": zeros(72),
            f"blk.{i}.attn_output.weight": block["att"]["out_proj"]["weight"],
            f"blk.{i}.attn_output.bias": zeros(24),
            f"blk.{i}.ffn_norm.weight": block["norm2"]["scale"],
            f"blk.{i}.ffn_norm.bias": zeros(24),
            f"blk.{i}.ffn_up.weight": block["ff"]["fc_in"]["weight"],
            f"blk.{i}.ffn_up.bias": zeros(96),
            f"blk.{i}.ffn_down.weight": block["ff"]["fc_out"]["weight"],
            f"blk.{i}.ffn_down.bias": zeros(24),
        }
    named |= {"output_norm.weight": params["final_norm"]["scale"], "output_norm.bias": zeros(24)}
    return named | {"output.weight": params["out_head"]["weight"]}


@pytest.mark.gguf
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outtype", OUTTYPES)
def test_a_file_holds_the_tensors_under_llama_cpp_s_names(outtype, param_dtype, gguf, tmp_path):
    model, params = make_model(BARE, param_dtype=param_dtype)
    write_gguf(tmp_path / "x.gguf", model, params, outtype=outtype)
    types = gguf.GGMLQuantizationType
    want = {name: np.asarray(array, np.float32) for name, array in their_tensors(params).items()}
    tensors = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert sorted(tensor.name for tensor in tensors) == sorted(want)
    for tensor in tensors:
        array = want[tensor.name]
        kept = array.ndim == 1 or tensor.name == "position_embd.weight"
        chosen = types.F16 if outtype == "q8_0" and array.shape[-1] == 24 else types[outtype.upper()]
        assert tensor.tensor_type == (types.F32 if kept else chosen), tensor.name
        assert tuple(tensor.shape[::-1]) == array.shape
        got = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
        if tensor.tensor_type == types.Q8_0:
            # Half a step of 1/127 of a block's largest value, and the rounding of the step to float16.
            largest = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True)
            assert np.all(np.abs(got - array).reshape(-1, 32) <= largest * (0.5 / 127 + 2**-11))
        else:
            dtype = {types.F32: np.float32, types.F16: np.float16, types.BF16: jnp.bfloat16}[tensor.tensor_type]
            np.testing.assert_array_equal(got, array.astype(dtype).astype(np.float32))


@pytest.mark.gguf
def test_stacked_blocks_give_the_same_file_and_one_of_a_tied_model_has_no_head(gguf, tmp_path):
    model, params = make_model(BYTES)
    write_gguf(tmp_path / "a.gguf", model, params, outtype="q8_0")
    scanned = jaxgpt.GPT(BYTES, model.compute.replace(scan_layers=True))
    write_gguf(tmp_path / "b.gguf", scanned, stack_blocks(params, BYTES.n_layers), outtype="q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


@pytest.mark.gguf
@pytest.mark.parametrize(
    ("outtype", "bad"), [("f16", 1e6), ("q8_0", 1e8), ("q8_0", np.nan), ("q8_0", np.inf), ("q8_0", "disk")]
)
def test_a_file_is_written_whole_or_not_at_all(outtype, bad, gguf, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    model, params = make_model(WIDE)
    write_gguf(path, model, params)
    before = path.read_bytes()
    if bad == "disk":
        write, error, message = gguf.GGUFWriter.write_tensor_data, OSError, "No space left"

        def fail(writer, tensor):
            if len(writer.tensors[0]) == 3:
                raise OSError(28, "No space left on device")
            write(writer, tensor)

        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    else:
        error, message = CheckpointError, "blk.1.ffn_down.weight has values that are NaN, infinite or too large"
        layer = params["trf_blocks_1"]["ff"]["fc_out"]
        layer["weight"] = layer["weight"].at[1, 2].set(bad)
    with pytest.raises(error, match=message):
        write_gguf(path, model, params, outtype=outtype)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]
    monkeypatch.undo()
    assert main(["convert", "shakespeare", str(path), "--outtype", "f16", "--force"]) == 0
    assert 2e7 < path.stat().st_size < 3e7

"""`jaxgpt generate`: what goes to stdout and stderr, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import pytest
from helpers import TINY, exhaustive, make_model, make_model_that_draws

from jaxgpt import beam_search, generation, prepare, weights
from jaxgpt.cli import main
from jaxgpt.generation.options import SAMPLING, from_options
from jaxgpt.generation.sampling import Greedy
from jaxgpt.generation.text import generate_text
from jaxgpt.model.cache import Cache

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = TINY.replace(vocab_size=257, tokenizer="bytes", context_length=32)
N = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG, seed=3)


@pytest.fixture(autouse=True)
def loaded(model, monkeypatch):
    """Replaces `load`, and collects the calls."""
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return model

    monkeypatch.setattr(weights, "load", load)
    return asked


def sampled(model, prompts, n=8, seed=0, cache_dtype=None, **options):
    sampler = from_options(**{"temperature": 0.8, "top_k": 200, **options})
    return generate_text(*model, prompts, n, sampler=sampler, key=jax.random.key(seed), cache_dtype=cache_dtype)


def set_stdin(monkeypatch, data, terminal=False):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: terminal))


def test_prints_text_on_stdout_and_speed_on_stderr(model, capsys, loaded):
    assert main(["generate", "--prompt", "Ab", *N]) == 0
    out, err = capsys.readouterr()
    assert out == sampled(model, "Ab")[0] + "\n"
    assert "8 tokens in" in err
    assert loaded == [("shakespeare", {})]


def test_sampling_options_reach_the_sampler(model, capsys, loaded):
    options = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "5"]
    assert main(["generate", "--model", "m", "--prompt", "Ab", *N, *options]) == 0
    want = sampled(model, "Ab", 8, 5, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01)
    assert capsys.readouterr().out == want[0] + "\n"


@pytest.mark.parametrize("dtype", [exhaustive("bfloat16"), "int8"])
def test_types_reach_the_model_and_its_cache(model, capsys, loaded, dtype, monkeypatch):
    caches = []
    empty = Cache.empty
    monkeypatch.setattr(
        Cache, "empty", lambda *args, **options: caches.append(options["dtype"]) or empty(*args, **options)
    )
    assert main(["generate", "--model", "m", "--prompt", "Ab", *N, "--dtype", dtype, "--cache-dtype", "bfloat16"]) == 0
    want = sampled(prepare(*model, dtype), "Ab", cache_dtype="bfloat16")
    assert capsys.readouterr().out == want[0] + "\n"
    assert loaded == [("m", {"param_dtype": dtype})]
    assert set(caches) == {"bfloat16"}


def test_greedy_is_temperature_0(model, capsys):
    main(["generate", "--prompt", "Ab", *N, "--greedy"])
    greedy = capsys.readouterr().out
    assert greedy == generate_text(*model, "Ab", 8)[0] + "\n"
    main(["generate", "--prompt", "Ab", *N, "--temperature", "0", "--seed", "9"])
    assert capsys.readouterr().out == greedy


def test_several_prompts_and_sequences_are_one_batch(model, capsys):
    assert main(["generate", "--prompt", "Ab", "--prompt", "xyz", "--num-return-sequences", "2", *N]) == 0
    texts = sampled(model, ["Ab", "Ab", "xyz", "xyz"])
    assert capsys.readouterr().out == "\n---\n".join(texts) + "\n"
    assert len(set(texts)) == 4
    assert main(["generate", "--prompt", "Ab", "--prompt", "xyz", "--num-return-sequences", "2", *N, "--stream"]) == 0
    assert capsys.readouterr().out == "\n---\n".join(texts) + "\n"


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_a_seed_means_the_same_text_whatever_the_default_implementation_of_keys(model, capsys, implementation):
    prompts = ["--prompt", "Ab", "--prompt", "xyz", *N]
    texts = []
    for options in ([], ["--stream"]):
        with jax.default_prng_impl(implementation):
            main(["generate", *prompts, *options])
        texts.append(capsys.readouterr().out)
    main(["generate", *prompts])
    assert texts == [capsys.readouterr().out] * 2


def test_any_integer_is_a_seed(model, capsys):
    texts = []
    for seed in (2**64 - 1, -1, 2**32, 0):
        assert main(["generate", "--prompt", "Ab", "--seed", str(seed), *N]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_stream_prints_the_same_text(model, capsys):
    main(["generate", "--prompt", "Ab", "--prompt", "xyz", *N])
    whole = capsys.readouterr().out
    main(["generate", "--prompt", "Ab", "--prompt", "xyz", *N, "--stream"])
    assert capsys.readouterr().out == whole


def test_beams_are_a_search(model, capsys):
    options = ["--num-beams", "3", "--num-return-sequences", "2", "--length-penalty", "0.5"]
    command = ["generate", "--prompt", "Ab", "--prompt", "xyz", *N, *options]
    assert main(command) == 0
    found = beam_search(
        *model,
        [list(b"Ab"), list(b"xyz")],
        8,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.5,
        stop_ids=[256],
    )
    texts = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    assert texts == generate_text(*model, ["Ab", "xyz"], 8, num_beams=3, num_return_sequences=2, length_penalty=0.5)
    assert main([*command, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["new_tokens"] for line in lines] == [new.tolist() for new in found.new_tokens]
    assert [line["score"] for line in lines] == pytest.approx(found.scores)


def test_json_is_one_object_a_line(model, capsys):
    main(["generate", "--prompt", "Ab", "--prompt", "é", *N, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == sampled(model, ["Ab", "é"])
    assert [line["prompt"] for line in lines] == ["Ab", "é"]
    assert [line["prompt_tokens"] for line in lines] == [2, 2]
    assert [line["prompt"] + line["completion"] for line in lines] == [line["text"] for line in lines]
    assert [line["finish_reason"] for line in lines] == ["length", "length"]
    assert [len(line["new_tokens"]) for line in lines] == [8, 8]


def test_stop_strings_end_a_text_however_it_is_printed(model, capsys):
    whole = sampled(model, ["Ab", "xyz"], 24)
    stop = [whole[0][9:12], "never"]
    ended = whole[0][2:].partition(stop[0])[0]
    command = ["generate", "--prompt", "Ab", "--prompt", "xyz", "--max-new-tokens", "24"]
    command += [word for text in stop for word in ("--stop", text)]
    for how in ([], ["--stream"]):
        assert main([*command, *how]) == 0
        assert capsys.readouterr().out == f"Ab{ended}\n---\n{whole[1]}\n"
    assert main([*command, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["completion"] for line in lines] == [ended, whole[1][3:]]
    assert [line["finish_reason"] for line in lines] == ["stop", "length"]


def test_json_shows_logprobs_without_infinities(model, capsys):
    command = ["generate", "--prompt", "Ab", *N, "--top-k", "2", "--logprobs", "3"]
    assert main([*command, "--json"]) == 0
    line = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    for drawn, top, token in zip(line["logprobs"]["drawn"], line["logprobs"]["top"], line["new_tokens"], strict=True):
        assert len(top) == 3
        assert drawn in [entry["logprob"] for entry in top if entry["id"] == token]
    assert [len(top) for top in line["sampler_logprobs"]["top"]] == [2] * 8
    assert main(command) == 2
    assert "--logprobs needs --json" in capsys.readouterr().err


def test_every_option_of_samplers_reaches_them(model, capsys):
    options = {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.1,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "temperature": 1.5,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.01,
        "logit_bias": {97: 2.0, 98: -1.5},
        "bad_words_ids": [[99], [100, 101]],
    }
    assert set(options) == set(SAMPLING)
    command = ["--logit-bias", "97=2", "--logit-bias", "98=-1.5", "--bad-words-ids", "99", "--bad-words-ids", "100,101"]
    for name, value in options.items():
        if not isinstance(value, (dict, list)):
            command += [f"--{name.replace('_', '-')}", str(value)]
    samplers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "jaxgpt.generation.session.check_sampler", lambda sampler, V: samplers.append(sampler) or Greedy()
        )
        assert main(["generate", "--prompt", "Ab", *N, *command]) == 0
    assert samplers == [from_options(**options)]


def test_an_id_without_text_is_printed_as_a_placeholder(monkeypatch, capsys):
    larger = make_model_that_draws(258, CONFIG.replace(vocab_size=259))
    monkeypatch.setattr(weights, "load", lambda name: larger)
    command = ["generate", "--prompt", "Ab", "--max-new-tokens", "2"]
    for how in ([], ["--stream"]):
        assert main([*command, *how]) == 0
        assert capsys.readouterr().out == "Ab<|258|><|258|>\n"
    assert main([*command, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["text"], line["new_tokens"]) == ("Ab<|258|><|258|>", [258, 258])


def test_a_model_without_an_id_for_end_of_text_generates_until_the_limit(monkeypatch, capsys):
    smaller = make_model_that_draws(33, CONFIG.replace(vocab_size=256))
    monkeypatch.setattr(weights, "load", lambda name: smaller)
    assert main(["generate", "--prompt", "Ab", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == "Ab!!\n"
    assert main(["generate", "--prompt", "", "--max-new-tokens", "2"]) == 2
    assert "id 256 of tokenizer 'bytes', but the model's ids end at 255" in capsys.readouterr().err


def test_prompts_from_files_and_stdin(model, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"one\ntwo\n")
    set_stdin(monkeypatch, b"three")
    options = ["--prompt-file", str(tmp_path / "prompt.txt"), "--prompt-file", "-", "--prompt", "zero", *N]
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out == "\n---\n".join(sampled(model, ["zero", "one\ntwo\n", "three"])) + "\n"


def test_stdin_is_the_prompt_where_none_is_given(model, capsys, monkeypatch):
    set_stdin(monkeypatch, b"A\xff\xfe")
    assert main(["generate", *N]) == 0
    assert capsys.readouterr().out == sampled(model, "A\ufffd\ufffd")[0] + "\n"


def test_says_when_the_text_outgrows_the_context(capsys):
    main(["generate", "--prompt", "Ab", "--max-new-tokens", "31"])
    assert "beyond 32 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", "-1"], "top_k"),
        (["--top-p", "1.5"], "top_p"),
        (["--min-p", "-0.1"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["--no-repeat-ngram-size", "0"], "no_repeat_ngram_size must be an integer of 1 or more"),
        (["--logit-bias", "5"], "--logit-bias is written like 50256=-1.5, not '5'"),
        (["--logit-bias", "257=1"], "logit_bias has the id 257"),
        (["--bad-words-ids", "a"], "--bad-words-ids is written like 464,3797, not 'a'"),
        (["--stop", ""], "stop[0] is empty"),
        (["--max-new-tokens", "-1"], "max_new_tokens"),
        (["--num-return-sequences", "0"], "num_return_sequences"),
        (["--num-return-sequences", "2", "--greedy", "--stream"], "num_return_sequences=2 needs a random sampler"),
        (["--num-beams", "0"], "--num-beams must be an integer of 1 or more, not 0"),
        (["--num-beams", "2", "--num-return-sequences", "3", *N], "num_return_sequences=3 must be at most num_beams=2"),
        (["--num-beams", "2", "--max-new-tokens", "31"], "exceed context_length=32"),
        (["--num-beams", "2", "--top-k", "200"], "--top-k and --num-beams exclude each other"),
        (["--greedy", "--top-p", "0.9"], "--top-p and --greedy exclude each other"),
        (["--greedy", "--seed", "0"], "--seed and --greedy exclude each other"),
        (["--num-beams", "2", "--greedy"], "--greedy and --num-beams exclude each other"),
        (["--num-beams", "2", "--lookup"], "--lookup and --num-beams exclude each other"),
        (["--lookup", "33"], "lookup must be from 2 to 32"),
        (["--lookup"], "lookup needs the C++ kernel"),
        (["--num-beams", "2", "--stream"], "--stream and --num-beams exclude each other"),
        (["--length-penalty", "2"], "--length-penalty needs --num-beams"),
        (["--stream", "--json"], "exclude"),
        (["--prompt-file", "/nonexistent/file"], "/nonexistent/file"),
    ],
)
def test_bad_options_are_one_line_and_code_2(options, message, capsys):
    assert main(["generate", "--prompt", "Ab", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]


def test_a_terminal_without_a_prompt_is_told_what_to_give(capsys, monkeypatch):
    set_stdin(monkeypatch, b"", terminal=True)
    assert main(["generate"]) == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.fixture
def types(monkeypatch):
    """Sets what is typed on a terminal: lines, and exceptions for Ctrl-C; after these Ctrl-D."""

    def types(*lines):
        script = iter([*lines, EOFError()])

        def read(prompt):
            line = next(script)
            if isinstance(line, BaseException):
                raise line
            return line

        set_stdin(monkeypatch, b"", terminal=True)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr("builtins.input", read)

    return types


def test_a_terminal_without_a_prompt_is_asked_for_prompts(model, capsys, types, loaded):
    types("Ab", KeyboardInterrupt(), "xyz")
    assert main(["generate", *N]) == 0
    out, err = capsys.readouterr()
    want = sampled(model, ["Ab", "xyz"])  # the n-th answer is the n-th row of a batch
    assert out == f"{want[0][2:]}\n\n{want[1][3:]}\n\n"
    assert "Ctrl-D or an empty line ends" in err
    assert len(loaded) == 1
    types("Ab", "", "xyz")
    assert main(["generate", *N]) == 0
    assert capsys.readouterr().out == f"{want[0][2:]}\n"


def test_ctrl_c_stops_an_answer_and_asks_on(model, capsys, types, monkeypatch):
    pieces = generation.text_pieces

    def interrupted(session, stop):
        yield next(pieces(session, stop))
        monkeypatch.setattr(generation, "text_pieces", pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "text_pieces", interrupted)
    types("Ab", "xyz")
    assert main(["generate", *N]) == 0
    first, second = sampled(model, ["Ab", "xyz"])
    stopped, answered = capsys.readouterr().out.removesuffix("\n\n").split("\n")
    assert stopped
    assert stopped != first[2:]
    assert first[2:].startswith(stopped)
    assert answered == second[3:]


def test_a_typed_text_that_the_model_cannot_read_is_told_so_and_asked_again(monkeypatch, capsys, types):
    smaller = make_model_that_draws(33, CONFIG.replace(vocab_size=100))
    monkeypatch.setattr(weights, "load", lambda name: smaller)
    types("xyz", "Ab")
    assert main(["generate", "--max-new-tokens", "2", "--num-return-sequences", "2"]) == 0
    out, err = capsys.readouterr()
    assert "but the model's ids end at 99" in err
    assert out == "!!\n---\n!!\n\n"


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_prompts_and_ctrl_c_on_a_real_terminal():
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "jaxgpt", "generate", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "TERM": "dumb"}
    )
    watchdog = threading.Timer(300, process.kill)  # then the terminal ends, and so do the reads
    watchdog.start()
    os.close(theirs)

    def read_until(ending):
        seen = b""
        while not seen.endswith(ending):
            seen += os.read(ours, 1)
        return seen

    read_until(b"> ")
    for _ in range(2):
        os.write(ours, b"ROMEO:\n")
        read_until(b"ROMEO:\r\n")  # the terminal's echo
        for _ in range(40):
            assert os.read(ours, 1)
        process.send_signal(signal.SIGINT)
        read_until(b"\r\n> ")
    os.write(ours, b"\x04")
    assert process.wait() == 0
    watchdog.cancel()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    os.close(ours)


@pytest.mark.parametrize("option", [["--json"], ["--num-beams", "2"]])
def test_what_cannot_be_streamed_needs_a_prompt(option, capsys, types):
    types("Ab")
    assert main(["generate", *option]) == 2
    assert "no prompt: give --prompt" in capsys.readouterr().err


def test_a_missing_model_is_one_line(capsys, monkeypatch):
    monkeypatch.undo()
    assert main(["generate", "--model", "no/such/model", "--prompt", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


_ISOLATED = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from jaxgpt.cli import main
sys.exit(main(["generate", "--prompt", "To be", "--max-new-tokens", "2"]))
"""


@pytest.mark.exhaustive
def test_the_bundled_model_needs_no_network_no_home_and_no_cache(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV")}
    for settings in ({}, {"HOME": str(tmp_path / "none"), "XDG_CACHE_HOME": "/proc/none"}):
        done = subprocess.run(
            [sys.executable, "-c", _ISOLATED], capture_output=True, text=True, env=kept | settings, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("To be")
    assert list(tmp_path.iterdir()) == []

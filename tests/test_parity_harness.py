"""`LMEvalModel` and the built-in benchmarks against lm-evaluation-harness: its `hf` model on the same directory, and
its preparation of the data. Needs the extras [parity] and [eval]."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY, make_model

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.config import GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.scoring import check_tasks, datasets, harness, run_harness
from jaxgpt.scoring.pairs import rolling_windows

pytestmark = [
    pytest.mark.parity,
    pytest.mark.exhaustive,
    # The libraries' own.
    pytest.mark.filterwarnings("default"),
]
torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

CONTEXT = 48
WORDS = "the cat sat on a mat and the dog, who had not seen it before, barked at the old man"
LONG = " ".join([WORDS] * 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = TINY.replace(
        vocab_size=50257, tokenizer="gpt2", context_length=CONTEXT, qkv_bias=True, tie_embeddings=True
    )
    path = tmp_path_factory.mktemp("exported") / "gpt2"
    jaxgpt.save(path, *make_model(config), format="huggingface")
    return path


@pytest.fixture(scope="module")
def ours(directory):
    return jaxgpt.LMEvalModel(*jaxgpt.load(directory), batch_tokens=512)


@pytest.fixture(scope="module")
def theirs(directory):
    return huggingface.HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=3)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_log_likelihoods_are_those_of_the_harness(ours, theirs):
    asked = requests(
        ("The cat", " sat on the mat"),
        ("The cat", " slept"),
        ("The cat ", "sat"),  # the space is the continuation's
        ("The cat  \n", "sat\n\nand"),
        ("The ca", "t sat"),  # a token that begins in the context
        ("", "The cat sat"),
        ("", "<|endoftext|>The cat"),  # starts from its own first token
        ("<|endoftext|>A dog", " sat"),
        (LONG, " barked at the cat"),  # the context is cropped on the left
        (LONG, " " + WORDS),
        ("It", " " + " ".join(LONG.split()[:40])),  # a continuation of nearly the context
        *((WORDS, f" {choice}") for choice in ("again", "and again and again", "because it was late", "no")),
    )
    mine, wanted = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    np.testing.assert_allclose([value for value, _ in mine], [value for value, _ in wanted], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in wanted]


def test_greedy_continuations_are_greedy_to_both(ours, theirs):
    (written,) = theirs.generate_until(requests(("The cat", {"until": [], "max_gen_toks": 6})))
    asked = requests(("The cat", written), ("The cat", written + " mat"))
    assert [greedy for _, greedy in ours.loglikelihood(asked)] == [greedy for _, greedy in theirs.loglikelihood(asked)]
    assert ours.loglikelihood(asked)[0][1]


def test_a_continuation_longer_than_the_window_is_refused_by_both(ours, theirs):
    asked = requests(("It", " " + LONG))
    with pytest.raises(AssertionError):
        theirs.loglikelihood(asked)
    with pytest.raises(ValueError, match=r"continuations\[0\]\[0\] has .* ids, more than context_length=48"):
        ours.loglikelihood(asked)


def test_rolling_log_likelihoods_are_those_of_the_harness(ours, theirs):
    asked = requests((WORDS,), (LONG,), (LONG + "\n" + LONG,), ("a",))
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), atol=1e-4, rtol=1e-6
    )


def test_generated_texts_are_those_of_the_harness(ours, theirs):
    (free,) = theirs.generate_until(requests(("The cat", {"until": [], "max_gen_toks": 20})))
    stop = free[len(free) // 2 :][:3]
    asked = requests(
        ("The cat", {"until": [], "max_gen_toks": 20}),
        ("The cat", {"until": [stop], "max_gen_toks": 20}),
        ("The cat", {"until": stop, "max_gen_toks": 20, "do_sample": False}),
        (WORDS, {"until": ["\n", "."], "max_gen_toks": 20}),
        (LONG, {"until": ["zzz"], "max_gen_toks": 20}),  # the context is cropped
        ("a dog", {"until": ["zzz"], "max_gen_toks": 20}),
    )
    texts = ours.generate_until(asked)
    assert texts == theirs.generate_until(asked)
    assert texts[0] == free
    assert texts[1] == free[: free.index(stop)]
    with pytest.raises(ValueError, match="48 new tokens leave no room for a prompt in context_length=48"):
        ours.generate_until(requests(("a", {"max_gen_toks": CONTEXT})))


@functools.cache
def their_module(name):
    """A file beside the harness's tasks, which are not in packages."""
    path = Path(lm_eval.__file__).parent / "tasks" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_are_prepared_as_by_the_harness():
    preprocess = their_module("hellaswag/utils.py").preprocess
    detokenize = their_module("wikitext/preprocess_wikitext.py").wikitext_detokenizer
    rng = np.random.default_rng(0)
    pieces = [
        "[header] ",
        " [title]",
        "  ",
        "[x]",
        "a",
        " @-@ ",
        " @,@ ",
        " @.@ ",
        " ; ",
        " . ",
        "( b )",
        "[ c ]",
        "{ d }",
    ]
    pieces += [
        '" e "',
        "' f '",
        "= = = =",
        "= = =",
        "= =",
        " \u00b0 ",
        " \n",
        "\n ",
        " N ",
        " 's",
        "s '",
        " : ",
        " ! ",
        " ? ",
    ]
    pieces += ["/' 1/", "/' [0-9]/", " , ", "Word", " "]
    for _ in range(500):
        text = "".join(rng.choice(pieces, rng.integers(1, 30)))
        assert datasets._without_brackets(text) == preprocess(text)
        assert datasets.detokenized(text) == detokenize({"page": text})


def test_windows_are_those_of_the_harness():
    for n in range(30):
        for context in (1, 2, 7, 10):
            ids = list(range(1, n + 1))
            theirs = lm_eval.utils.get_rolling_token_windows(ids, 0, context, 1)
            assert list(rolling_windows(ids, 0, context)) == [
                lm_eval.utils.make_disjoint_window(pair) for pair in theirs
            ]


def test_a_task_that_the_harness_does_not_have_is_told_the_nearest():
    check_tasks(["hellaswag", "lambada_openai", "wikitext"])
    with pytest.raises(ConfigError, match=r"no task 'helaswag'; did you mean 'hellaswag'\?"):
        check_tasks(["helaswag"])
    with pytest.raises(ConfigError, match=r"no task 'wikitext_guid'; did you mean 'wikitext_guide'\?"):
        check_tasks(["wikitext_guid"])
    with pytest.raises(
        ConfigError, match=r"the task .wikitext_guide. reads wiki\.test\.raw: give its place, wikitext_guide="
    ):
        check_tasks(["wikitext_guide"])


def test_a_model_without_an_end_of_text_is_refused(tmp_path):
    (tmp_path / "characters.json").write_text(json.dumps(list("abc")))
    tokenizer = jaxgpt.get_tokenizer(tmp_path)
    model, params = make_model(GPTConfig(**{**TINY.to_dict(), "vocab_size": 3, "tokenizer": tokenizer.name}))
    with pytest.raises(ConfigError, match="no end-of-text, from which lm-evaluation-harness starts"):
        jaxgpt.LMEvalModel(model, params)


def test_the_harness_runs_its_tasks_on_ours(ours, directory, tmp_path, capsys, monkeypatch):
    """A task of the harness on a file here, since its own are on the hub."""
    items = [{"text": f"{' '.join(WORDS.split()[i : i + 6])}"} for i in range(8)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "last_word.yaml").write_text(
        f"""task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}, cache_dir: {tmp_path}/cache}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness, "_task_manager", lambda: manager)
    results = run_harness(ours.model, ours.params, ["last_word"])["last_word"]
    built_in = jaxgpt.scoring.run_task(ours.model, ours.params, "lambada_openai", tmp_path / "items.jsonl").metrics
    assert results["perplexity"] == pytest.approx(built_in["perplexity"], rel=1e-6)
    assert results["acc"] == built_in["acc"]
    assert main(["evaluate", "--model", str(directory), "--tasks", "last_word", "--json", "--limit", "4"]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["last_word"]["metrics"]) == {"acc", "perplexity"}

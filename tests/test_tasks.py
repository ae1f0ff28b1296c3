"""The built-in benchmarks: twenty items written for these tests, measured by hand in float64."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, make_model, to_numpy

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.errors import ConfigError, DataError, MissingExtraError
from jaxgpt.model import reference
from jaxgpt.scoring import TASKS, datasets, run_task
from jaxgpt.scoring.pairs import encode_pair, rolling_windows, sliding_windows
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training import evaluate
from jaxgpt.weights import save

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

BYTES = TINY.replace(vocab_size=257, tokenizer="bytes", context_length=128)
C, START = BYTES.context_length, 256

HELLASWAG = [
    ("Baking", "A woman stands in a kitchen.", "she", ["cracks an egg.", "flies.", "is a lamp [x] shade.", "sings"], 3),
    ("Rowing", "Two men sit in a boat.", "they", ["pull the oars.", "eat it.", "melt.", "are one man."], 0),
    ("Chess", "A boy moves a pawn.", "the other", ["burns it.", "moves a knight.", "is chess.", "was."], 1),
    ("Home and Garden", "[header] How to sweep [title] Take a broom.", "", ["Hold it.", "Eat.", "No.", "Why?"], 0),
    ("Skiing", "Snow falls on a hill.", "a skier", ["digs.", "drives a car home.", "skis down.", "reads"], 2),
    ("Sewing", "A needle lies there.", "someone", ["threads  it.", "is it.", "bends  the hill.", "so"], 0),
    ("Fishing", "A line is cast.", "the fish", ["bites.", "casts a line back.", "is a line.", "votes."], 0),
    ("Painting", "A wall is white.", "a painter", ["dances.", "paints it blue.", "is white too.", "a"], 1),
]
LAMBADA = [
    "The dog that barked all night was tired, so by noon nobody heard the dog",
    "She put the letter on the table, and later he read the letter",
    "Take the key. Without it you will not open the door with the key",
    "It was a long road home, and we walked the whole long road",
    "I said yes, and you said  yes",
    "Rain fell on the roof. We listened to the rain",
    "He sold the boat to a man who needed a boat",
]
ARTICLES = [
    " = Egg = \n \n An egg is laid by a hen ; it is ( mostly ) round . \n"
    " \n = = Use = = \n \n It weighs 1 @,@ 000 mg . \n",
    ' = Boat = \n \n " A boat floats , " said the sailor \'s son : it did . It is 2 @.@ 5 m long , well @-@ built . \n'
    " \n = = Sailors = = \n \n The sailors sang all night long , and nobody slept . Where were they ? At sea ! \n",
    " = Hen = \n \n A hen [ a bird ] lays eggs , and what she lays she sits on , day and night , for three weeks . \n",
    " = Rain = \n \n Rain is wet ! Is it ? At 20 \u00b0 C it is . \n",
    " = Road = \n",
]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    hellaswag = [
        dict(zip(("activity_label", "ctx_a", "ctx_b", "endings", "label"), item, strict=True))
        | {"ctx": f"{item[1]} {item[2]}".strip()}
        for item in HELLASWAG
    ]
    (directory / "wiki.test.raw").write_text(" \n" + " \n".join(ARTICLES), encoding="utf-8")
    return {
        "hellaswag": jsonl(directory / "hellaswag_val.jsonl", hellaswag),
        "hellaswag_llmc": directory / "hellaswag_val.jsonl",
        "lambada_openai": jsonl(directory / "lambada_test.jsonl", [{"text": text} for text in LAMBADA]),
        **dict.fromkeys(("wikitext", "wikitext_verbatim", "wikitext_guide"), directory / "wiki.test.raw"),
    }


@pytest.fixture(scope="module")
def model_and_params():
    return make_model(BYTES)


@pytest.fixture(scope="module")
def log_probs(model_and_params):
    """Of the ids after a context, in float64: (log p of each id, whether all are the likeliest)."""
    params = to_numpy(model_and_params[1])

    def log_probs(context, ids):
        ids = list(ids)
        logits = reference.gpt(params, BYTES, [[*context, *ids][:-1][-C:]])[0][-len(ids) :]
        values = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return values[np.arange(len(ids)), ids], logits.argmax(-1).tolist() == ids

    return log_probs


def test_hellaswag_is_as_in_the_harness(files, model_and_params, log_probs):
    result = run_task(*model_and_params, "hellaswag", files["hellaswag"])
    right = right_per_character = 0
    for activity, a, b, endings, label in HELLASWAG:
        query = f"{activity}: {a} {b.capitalize()}"
        if activity == "Home and Garden":
            query = "Home and Garden: How to sweep. Take a broom."
        choices = [ending.replace("[x] ", " ").replace("  ", " ") for ending in endings]
        totals = [log_probs(query.encode(), f" {choice}".encode())[0].sum() for choice in choices]
        right += int(np.argmax(totals)) == label
        right_per_character += int(np.argmax([t / len(c) for t, c in zip(totals, choices, strict=True)])) == label
    assert result.metrics == {"acc": right / 8, "acc_norm": right_per_character / 8}
    assert 0 < right < 8
    assert (result.examples, result.task) == (8, "hellaswag")


def test_hellaswag_is_as_in_llmc(files, model_and_params, log_probs):
    result = run_task(*model_and_params, "hellaswag_llmc", files["hellaswag_llmc"])
    right = right_per_token = 0
    for _, a, b, endings, label in HELLASWAG:
        scores = [log_probs(f"{a} {b}".strip().encode(), f" {ending}".encode())[0] for ending in endings]
        right += int(np.argmax([s.sum() for s in scores])) == label
        right_per_token += int(np.argmax([s.mean() for s in scores])) == label
    assert result.metrics == {"acc": right / 8, "acc_norm": right_per_token / 8}
    assert 0 < right_per_token < 8


def test_lambada_is_as_in_the_harness(files, model_and_params, log_probs):
    result = run_task(*model_and_params, "lambada_openai", files["lambada_openai"])
    words = []
    for text in LAMBADA:
        context, word = text.rsplit(" ", 1)
        spaces = len(context) - len(context.rstrip())
        words.append(log_probs(context.rstrip().encode(), (" " * (spaces + 1) + word).encode()))
    assert result.metrics["acc"] == sum(greedy for _, greedy in words) / len(LAMBADA)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-np.mean([v.sum() for v, _ in words])), rel=1e-5)


@pytest.mark.parametrize("name", ["wikitext", "wikitext_verbatim"])
def test_wikitext_is_as_in_the_harness(name, files, model_and_params, log_probs):
    result = run_task(*model_and_params, name, files[name])
    nats = words = size = tokens = 0
    for text in [*(f"{article} " for article in ARTICLES[:-1]), ARTICLES[-1]]:
        ids = list((datasets.detokenized(text) if name == "wikitext" else text).encode())
        nats -= log_probs([START], ids[:C])[0].sum()
        for first in range(C, len(ids), C):
            end = min(first + C, len(ids))
            nats -= log_probs(ids[:first], ids[first:end])[0].sum()
        words, size, tokens = words + len(re.split(r"\s+", text)), size + len(text.encode()), tokens + len(ids)
    assert result.examples == 5
    assert result.metrics == {
        "word_perplexity": pytest.approx(math.exp(nats / words), rel=1e-4),
        "byte_perplexity": pytest.approx(math.exp(nats / size), rel=1e-5),
        "bits_per_byte": pytest.approx(nats / size / math.log(2), rel=1e-5),
        "token_perplexity": pytest.approx(math.exp(nats / tokens), rel=1e-5),
    }
    assert (tokens < size) == (name == "wikitext")


def test_the_stride_is_that_of_hugging_faces_guide(files, model_and_params, log_probs):
    text = files["wikitext_guide"].read_text(encoding="utf-8")
    rows = [line if line.strip() else "" for line in re.findall(r".*\n|.+$", text)]
    ids = list("\n\n".join(rows).encode())
    for stride in (C, 50):
        nats, count, held = 0.0, 0, 0
        for begin in range(0, len(ids), stride):  # the guide's loop
            end = min(begin + C, len(ids))
            targets = end - held
            window = ids[begin:end]
            predicted = min(targets, len(window) - 1)
            nats -= log_probs(window[:-predicted], window[-predicted:])[0].sum()
            count, held = count + predicted, end
            if end == len(ids):
                break
        result = run_task(*model_and_params, "wikitext_guide", files["wikitext_guide"], stride=stride)
        assert result.metrics == {"perplexity": pytest.approx(math.exp(nats / count), rel=1e-5)}
        if stride < C:  # sequences of C - 1 predictions are the same windows
            whole = evaluate(*model_and_params, np.array(ids), seq_len=C - 1, stride=stride)
            assert (whole.loss, whole.tokens) == (pytest.approx(nats / count, rel=1e-5), count)
            assert count == len(ids) - 1


def test_windows_predict_every_id_once_with_all_the_context_there_is():
    ids = list(range(1, 24))
    for n in (0, 1, 9, 10, 11, 23):
        windows = list(rolling_windows(ids[:n], 0, 10))
        assert [i for _, predicted in windows for i in predicted] == ids[:n]
        for i, (context, predicted) in enumerate(windows):
            read = [*context, *predicted][:-1]
            assert len(read) == (10 if n >= 10 else n)
            assert (context == [0]) == (i == 0)
            assert read == [0, *ids][predicted[0] - len(context) : predicted[-1]]
    assert list(sliding_windows(ids[:5], 2, 4)) == [([1], [2, 3, 4]), ([3, 4], [5])]
    assert list(sliding_windows(ids[:5], 4, 4)) == [([1], [2, 3, 4])]
    assert list(sliding_windows([], 4, 4)) == []


def test_spaces_before_a_continuation_are_its_own():
    encode = get_tokenizer("gpt2").encode
    assert encode_pair(encode, "The cat", " sat") == (encode("The cat"), encode(" sat"))
    assert encode_pair(encode, "The cat  ", "sat") == (encode("The cat"), encode("  sat"))
    assert encode_pair(encode, "The ca", "t sat") == (encode("The ca"), encode("The cat sat")[2:])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 @,@ 000 @.@ 5 well @-@ built", "1,000.5 well-built"),
        ("so : it ; is . yes ! no ? a , b", "so: it; is. yes! no? a, b"),
        ("( a ) [ b ] { c } \" d \" ' e '", "(a) [b] {c} \"d\" 'e'"),
        ("= = = = A = = = =\n = = = B = = = \n = = C = =", "==== A ====\n=== B ===\n== C =="),
        ("20 \u00b0 C ; the dogs ' end ; N times", "20\u00b0C; the dogs' end; 1 times"),
        ("Ann 's", "Ann's"),
    ],
)
def test_detokenizing_removes_what_tokenizing_added(text, expected):
    # One text at a time, as the rules for quotes span everything between two of them.
    assert datasets.detokenized(text) == expected


def llmc_file(path, examples):
    body = []
    for i, (context, endings, label) in enumerate(examples):
        values = [label, 4, len(context), *context]
        for ending in endings:
            values += [len(ending), *ending]
        body += [65535, 2 * (len(values) + 3), i, *values]
    header = struct.pack("<256i", 20240522, 1, len(examples), 500, *[0] * 252)
    path.write_bytes(header + struct.pack(f"<{len(body)}H", *body))
    return path


def test_llmcs_own_file_gives_what_the_texts_give(files, tmp_path):
    encode = get_tokenizer("gpt2").encode
    examples = [
        (encode(f"{a} {b}".strip()), [encode(f" {ending}") for ending in endings], label)
        for _, a, b, endings, label in HELLASWAG
    ]
    path = llmc_file(tmp_path / "hellaswag_val.bin", examples)

    def read(path, tokenizer="gpt2"):
        return list(datasets.hellaswag_llmc(datasets.Reading(path, tokenizer, 1024, 1024)))

    assert read(path) == read(files["hellaswag_llmc"])
    with pytest.raises(DataError, match="ids of the tokenizer 'gpt2', but the model has 'bytes'"):
        read(path, "bytes")
    data = path.read_bytes()
    for damaged, message in (
        (data[:-2], "ends within example 7 of 8"),
        (data + b"\0\0", "2 bytes after its 8 examples"),
        (data[:1024] + b"\0\0" + data[1026:], "no example 0 where it should begin"),
        (data[:1000], "not llm.c's file of version 1"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read(path)


def test_the_command_measures_tasks_and_compares_them(files, model_and_params, tmp_path, capsys):
    save(tmp_path / "model", *model_and_params)
    tasks = f"hellaswag={files['hellaswag']},lambada_openai={files['lambada_openai']}"
    command = ["evaluate", "--model", str(tmp_path / "model"), "--limit", "3", "--tasks", tasks]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^hellaswag: .* \(3 examples of .*jsonl\)\n    acc +[\d.]+\n        GPT-2: 124M 0.2892, 1558M", printed
    )
    assert re.search(r"\n    perplexity +[\d.]+\n        GPT-2: 124M 40.06 \(lm-evaluation-harness\)\n", printed)
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    limited = run_task(*model_and_params, "lambada_openai", files["lambada_openai"], limit=3)
    assert results["lambada_openai"]["metrics"] == limited.metrics
    assert results["hellaswag"]["published"][0]["values"]["124M"] == 0.2892
    text = ["--data", str(files["wikitext"]), "--seq-len", "127", "--stride", "50", "--json"]
    assert main(["evaluate", "--model", str(tmp_path / "model"), *text]) == 0
    ids = np.frombuffer(files["wikitext"].read_bytes(), np.uint8)
    whole = evaluate(*model_and_params, ids, seq_len=127, stride=50)
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(whole)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", r"line 2: expected a JSON object, not \[1\]"),
        ('{"ctx_a": "a", "ctx_b": "b"}', "line 2: 'activity_label' must be a text, not None"),
        ('{"activity_label": "a", "ctx_a": "a", "ctx_b": "b", "endings": []}', "'endings' must be a list of texts"),
        (
            '{"activity_label": "a", "ctx_a": "a", "ctx_b": "b", "endings": ["a", "b"], "label": ""}',
            "'label' must be from 0 to 1, not '': the test set has no labels",
        ),
    ],
)
def test_a_benchmarks_damaged_line_is_named(line, message, files, model_and_params, tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(files["hellaswag"].read_text().partition("\n")[0] + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        run_task(*model_and_params, "hellaswag", path)


def test_what_is_no_benchmarks_file_is_refused(files, model_and_params, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "word").write_text('{"text": "word"}\n')
    for name, file, message in (
        ("lambada_openai", "empty", "holds no examples of lambada_openai, which reads lambada_test.jsonl, from http"),
        ("wikitext", "zip", "not text: it looks like a zip archive"),
        ("lambada_openai", "word", "line 1: the text has no last word: 'word'"),
        ("lambada_openai", "nowhere", "nowhere: does not exist: lambada_openai reads lambada_test.jsonl, from https"),
        ("hellaswag", "", "is not a file: hellaswag reads hellaswag_val.jsonl, from https://github.com/rowanz"),
    ):
        with pytest.raises(DataError, match=message):
            run_task(*model_and_params, name, tmp_path / file)
    with pytest.raises(ConfigError, match=r"no task 'helaswag' is built in; did you mean 'hellaswag'\?"):
        run_task(*model_and_params, "helaswag", tmp_path)
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        run_task(*model_and_params, "wikitext", files["wikitext"], limit=0)
    with pytest.raises(ValueError, match="stride must be from 1 to context_length=128, not 129"):
        run_task(*model_and_params, "wikitext_guide", files["wikitext"], stride=129)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "hellaswag="], "--tasks takes NAME=FILE or NAME, not 'hellaswag='"),
        (["--tasks", "wikitext=a,", "wikitext=b"], "--tasks takes NAME=FILE or NAME, not ''"),
        (["--tasks", "wikitext=a", "wikitext=b"], "--tasks names wikitext twice"),
        (["--tasks", "wikitex=a"], "no task 'wikitex' is built in; did you mean 'wikitext'"),
        (["--tasks", "wikitext=nowhere"], "nowhere: does not exist: wikitext reads wiki.test.raw, from"),
        (["--tasks", "wikitext=a", "--limit", "0"], "--limit must be 1 or more, not 0"),
        (["--tasks", "wikitext=a", "--stride", "5"], "--stride belongs to --data and to the task wikitext_guide"),
        (["--tasks", "wikitext=a", "--last-fraction", "0.1"], "--last-fraction belongs to --data"),
        (["--tasks", "wikitext=a", "--batch-size", "8"], "--batch-size belongs to --data: --tasks have --batch-tokens"),
        (["--tasks", "wikitext=a", "--text-key", "body"], "--text-key belongs to --data"),
        (["--tasks", "wikitext=a", "--allow-special"], "--allow-special belongs to --data"),
        (["--tasks", "wikitext=a", "--skip-bad"], "--skip-bad belongs to --data"),
        (["--tasks", "wikitext=a", "--separate-documents"], "--separate-documents belongs to --data"),
        (["--data", "a.txt", "--limit", "3"], "--limit belongs to --tasks"),
        (["--data", "a.txt", "--batch-tokens", "9"], "--batch-tokens belongs to --tasks: --data has --batch-size"),
    ],
)
def test_bad_tasks_are_refused_before_any_work(options, message, capsys, monkeypatch):
    monkeypatch.setattr("jaxgpt.cli.evaluate.load_model", lambda _: pytest.fail("loaded a model"))
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_harness_is_an_extra(model_and_params, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    importlib.import_module("jaxgpt.scoring.harness")._adapter.cache_clear()
    with pytest.raises(MissingExtraError, match=r"jaxgpt.LMEvalModel needs 'lm_eval.*': pip install 'jaxgpt\[eval\]'"):
        jaxgpt.LMEvalModel(*model_and_params)
    # What is built in is named also where the harness is not installed.
    for name, hint in (
        ("helaswag", "the task helaswag (did you mean 'hellaswag'?) without a file needs"),
        ("wikitext", "the task wikitext, which reads wiki.test.raw as wikitext=PATH, without a file needs"),
        ("arc_easy", "the task arc_easy without a file needs"),
    ):
        assert main(["evaluate", "--tasks", name]) == 2
        assert hint in capsys.readouterr().err


def test_help_and_page_name_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    page = (Path(__file__).parent.parent / "docs" / "scoring.md").read_text(encoding="utf-8")
    for name in TASKS:
        assert f"{name}=" in shown
        assert f"| `{name}` |" in page

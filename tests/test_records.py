"""Fine-tuning on prompts and responses: what is read, what is learned, and how exactly."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
from helpers import exhaustive, make_model, to_numpy

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.config import GPTConfig
from jaxgpt.data import Records, Template, Tokens, documents, open_corpus, open_tokens
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.model import reference
from jaxgpt.parallel import MeshConfig, sharding
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training import batches, evaluate, loop
from jaxgpt.training.batches import batch
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.loss import IGNORE, inputs_and_labels
from jaxgpt.training.preparation import prepare
from jaxgpt.training.rehearsal import dry_run
from jaxgpt.training.run_directory import Run
from jaxgpt.training.step import init_state, jit_step
from jaxgpt.training.trainer import train

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MODEL = GPTConfig(
    vocab_size=257, context_length=24, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, tokenizer="bytes"
)
CONFIG = TrainConfig(
    model=MODEL, steps=6, batch_size=4, warmup_steps=2, learning_rate=1e-2, log_interval=1, eval_interval=3, seed=5
)
END = 256
# Responses of unequal lengths: 1 to 9 bytes.
RECORDS = [{"prompt": f"{i}? ", "response": "!" * (1 + i * 5 % 9)} for i in range(20)]
ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{response}"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
    {"role": "user", "content": "(gone)"},
]


def write(path, records):
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "records.jsonl", RECORDS)


def shown(row):
    """A record as text, with what is learned in brackets and end-of-text as |."""
    text, learned = "", False
    for i in row[: 1 + np.flatnonzero(row >= 0)[-1]].tolist():
        text += "" if (i >= 0) == learned else "]" if learned else "["
        learned = i >= 0
        text += "|" if i == END else chr(max(i, ~i))
    return text + "]"


def texts(source, length=400):
    records = source.tokens.ids_N
    return [shown(records.row(number, length)) for number in range(records.count)]


# --- what is read, and what is learned


@pytest.mark.parametrize(
    ("template", "record", "want"),
    [
        ("", {"prompt": "To be", "response": " or not"}, "To be[ or not|]"),
        ("", {"prompt": "To be", "completion": " or not"}, "To be[ or not|]"),
        ("Q: {q}\nA: {response}", {"q": "2+2", "response": "4", "text": "no"}, "Q: 2+2\nA: [4|]"),
        ("{{{q}}} {q}: {response}", {"q": "{2}", "response": "{4}"}, "{{2}} {2}: [{4}|]"),
        (
            ALPACA,
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n[3|]",
        ),
        (
            ALPACA,
            {"instruction": "Add.", "input": "", "output": "3"},
            "### Instruction:\nAdd.\n\n### Response:\n[3|]",
        ),
        (
            "",
            {"messages": CHAT},
            "### system:\nBe kind.\n\n### user:\nHi\n\n### assistant:\n[Hello|]\n\n### user:\nBye\n\n"
            "### assistant:\n[Ciao|]",
        ),
        ("<{role}>{content}", {"messages": CHAT[1:3]}, "<user>Hi\n\n<assistant>[Hello|]"),
        (
            "<{role}>{content}",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
                ]
            },
            "<user>Hi\n\n<assistant>[Hello|]",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_template_says_what_is_read_and_what_is_learned(template, record, want, ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        write(path, [record])
    elif ending == "json":
        path.write_text(json.dumps([record], indent=4), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([record]), path)
    source = open_corpus(path, MODEL, template=template, longest=400).sources[0]
    assert texts(source) == [want]
    assert source.text_key is None


def test_prompt_and_response_are_encoded_apart_as_at_generation(tmp_path):
    gpt2 = GPTConfig.preset("gpt2")
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode("Hello") != tokenizer.encode("Hel") + tokenizer.encode("lo")
    records = [{"prompt": "Hel", "response": "lo"}, {"prompt": "", "response": "Hi"}]
    records = open_corpus(write(tmp_path / "a.jsonl", records), gpt2).sources[0].tokens.ids_N
    prompt, response, end = tokenizer.encode("Hel"), tokenizer.encode("lo"), tokenizer.end_of_text
    assert records.ids_N.dtype == np.uint16
    row = records.row(0, len(prompt) + len(response) + 3)
    assert row.tolist() == [*(~i for i in prompt), *response, end, ~0, ~0]
    inputs, labels = inputs_and_labels(row[None], records=True)
    assert inputs[0].tolist() == [*prompt, *response, end, 0]
    assert labels[0].tolist() == [IGNORE] * (len(prompt) - 1) + [*response, end] + [IGNORE] * 2
    assert records.row(1, 3).tolist() == [~end, *tokenizer.encode("Hi"), end]  # an empty prompt is end-of-text


def test_what_is_no_record_stays_a_text(tmp_path):
    both = write(tmp_path / "both.jsonl", [{"prompt": "a", "response": "b", "text": "c"}])
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "a", "response": "b"}])
    for path, key, want in ((both, None, "c"), (asked, "prompt", "a")):
        source = open_corpus(path, MODEL, text_key=key).sources[0]
        assert np.asarray(source.tokens.ids_N).tolist() == [ord(want), END]
        assert source.text_key == (key or "text")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt}", r"template '\{prompt\}' must end in \{response\}, which is learned"),
        ("no fields", "must end in {response}"),
        ("{response}{prompt}", "must end in {response}"),
        ("{response} {response}", "and have it once"),
        ("{content}", "must name {role} and {content} alone"),
        ("{name} {role} {content}", "must name {role} and {content} alone"),
        ("{prompt{response}", "is not a format string: "),
        ("{}{response}", "must name keys in braces"),
        ("{0}{response}", "must name keys in braces"),
        ("{a.b}{response}", "must name keys in braces"),
        ("{a!r}{response}", "must name keys in braces"),
        ("{a:>9}{response}", "must name keys in braces"),
    ],
)
def test_a_template_without_a_response_is_refused_before_anything_is_read(template, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(template=template)
    assert message.replace("\\", "") in str(error.value)


@pytest.mark.parametrize(
    ("template", "bad", "message"),
    [
        ("", {"prompt": "a"}, r"no key 'response' \(the template names it; there are 'prompt'\)"),
        ("", {"response": "a"}, r"no key 'prompt' \(the template names it; there are 'response'\)"),
        (ALPACA, {"instruction": "a", "output": "b"}, r"no key 'input' \(the template names it; "),
        ("", {"prompt": "a", "response": ""}, "the response, under 'response', is empty"),
        ("", {"prompt": "a", "response": 3}, "expected a text under 'response', not 3"),
        ("", {"prompt": ["a"], "response": "b"}, r"expected a text under 'prompt', not \['a'\]"),
        ("", '{"prompt": "a"', "not JSON: "),
        ("", "[1]", r"expected a JSON object, not \[1\]"),
        ("<{role}>{content}", {"prompt": "a", "response": "b"}, "no key 'messages'"),
        ("<{role}>{content}", {"messages": "a"}, "expected a list of turns under 'messages', not 'a'"),
        ("<{role}>{content}", {"messages": ["a"]}, "expected a list of turns"),
        ("<{role}>{content}", {"messages": [{"role": "user"}]}, "turn 1 has no key 'content'"),
        (
            "<{role}>{content}",
            {"messages": [{"role": "user", "content": None}]},
            "expected a text under 'content', not None",
        ),
        (
            "<{role}>{content}",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"expected parts of the type 'text' under 'content', not \{'image_url'",
        ),
        ("<{role}>{content}", {"messages": [{"role": "user", "content": ["Hi"]}]}, "expected parts of the type 'text'"),
        ("<{role}>{content}", {"messages": [{"role": "assistant", "content": []}]}, "the response, under 'content'"),
        ("<{role}>{content}", {"messages": CHAT[:2]}, "no turn of the role 'assistant', so nothing to learn"),
        ("<{role}>{content}", {"messages": [{"role": "assistant", "content": ""}]}, "the response, under 'content'"),
    ],
)
def test_a_bad_record_is_named_with_its_line_or_left_out_and_counted(template, bad, message, tmp_path):
    kind = {"": RECORDS[0], ALPACA: {"instruction": "a", "input": "", "output": "b"}}
    good = kind.get(template, {"messages": CHAT[1:3]})
    path = write(tmp_path / "a.jsonl", [good, "", bad, bad, good])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: {message}.*--skip-bad leaves such records out"):
        open_corpus(path, MODEL, template=template, longest=99)
    source = open_corpus(path, MODEL, template=template, longest=99, skip_bad=True).sources[0]
    assert source.tokens.ids_N.count == 2
    (note,) = source.left_out
    assert note.startswith("2 records without what the template needs (the first: ")
    assert "a.jsonl, line 3: " in note


def test_a_first_record_without_a_response_does_not_make_the_others_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, *RECORDS])
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no key 'response' .*--skip-bad leaves such records out"):
        open_corpus(path, MODEL, longest=99)
    assert open_corpus(path, MODEL, longest=99, skip_bad=True).sources[0].tokens.ids_N.count == len(RECORDS)


def test_the_line_of_invalid_json_is_named_however_far_down_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n" * (10**6 - 1) + b"{bad\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1000000: not JSON"):
        open_corpus(path, MODEL)


def test_a_json_array_holds_records_or_texts(tmp_path):
    path, bad = tmp_path / "a.json", {"prompt": "a"}
    path.write_bytes(codecs.BOM_UTF8 + json.dumps([*RECORDS, bad, 3], indent=2).encode())
    with pytest.raises(DataError, match=r"a\.json, record 21: no key 'response'"):
        open_corpus(path, MODEL)
    source = open_corpus(path, MODEL, skip_bad=True).sources[0]
    assert texts(source) == texts(open_corpus(write(tmp_path / "a.jsonl", RECORDS), MODEL).sources[0])
    assert source.left_out[0].startswith("2 records without what the template needs (the first: ")
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}]), encoding="utf-8")
    assert np.asarray(open_tokens(path, MODEL).ids_N).tolist() == [ord("a"), END, ord("b"), END]


def test_json_that_is_neither_lines_nor_an_array_is_not_read_as_a_text(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": RECORDS}, indent=2), encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: one JSON object over several lines: expected an array of records"):
        open_corpus(path, MODEL)
    path.write_text(json.dumps(RECORDS)[:-1], encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: not a JSON array: Expecting"):
        open_corpus(path, MODEL)
    monkeypatch.setattr(documents, "_ARRAY_LIMIT", 99)
    with pytest.raises(DataError, match=r"a\.json: a JSON array of more than 99 bytes"):
        open_corpus(path, MODEL)


def test_skip_bad_leaves_out_texts_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}, {"text": ""}, {"text": "c"}])
    with pytest.raises(DataError, match="line 2: no key 'text'"):
        open_corpus(path, MODEL)
    source = open_corpus(path, MODEL, skip_bad=True).sources[0]
    assert np.asarray(source.tokens.ids_N).tolist() == [ord("a"), END, ord("c"), END]
    assert source.left_out[0].startswith("1 record without a text (the first: ")


def test_records_longer_than_the_context_are_left_out_and_counted(tmp_path):
    fits = {"prompt": "a" * 20, "response": "b" * 4}  # with end-of-text, one id more than the context: the last label
    longer = {"prompt": "a" * 20, "response": "b" * 5}
    path = write(tmp_path / "a.jsonl", [longer, fits, longer])
    source = open_corpus(path, MODEL).sources[0]
    assert texts(source, MODEL.context_length + 1) == ["a" * 20 + "[bbbb|]"]
    assert source.left_out == (f"2 records of more than 25 tokens (the first: {path}, line 1)",)
    config = dataclasses.replace(CONFIG, batch_size=1, val_fraction=0.0)
    assert any("left out: 2 records of more than 25 tokens" in line for line in dry_run_lines(config, path))
    with pytest.raises(DataError, match="the training split has no records"):
        list(dry_run(dataclasses.replace(config, seq_len=23), path))
    with pytest.raises(DataError, match=r"the training split has a record of 25 tokens, above 23 \+ 1"):
        list(dry_run(dataclasses.replace(config, seq_len=23), source))


def dry_run_lines(config, path):
    """What a dry run says before it compiles."""
    lines = []
    for paragraph in dry_run(config, path):
        lines += paragraph.splitlines()
        if paragraph.startswith("the first batch"):
            return lines
    raise AssertionError("no first batch")


def test_a_dry_run_shows_what_is_learned(file):
    lines = dry_run_lines(CONFIG, file)
    learned = sum(len(record["response"]) + 1 for record in RECORDS)
    total = learned + sum(len(record["prompt"]) for record in RECORDS)
    assert 'template = "{prompt}{response}"' in lines
    assert any(f"the loss counts on {learned} of {total} tokens" in line for line in lines)
    assert "records: 4 per step, 24 in 6 steps, which is 1.33 times the training data" in lines
    assert lines[-3] == "the first batch begins (2 of 4 rows, ⟦what is learned⟧):"
    number = int(lines[-1].strip(" '").split("?")[0])
    assert lines[-1] == f"  '{number}? ⟦{RECORDS[number]['response']}<|endoftext|>⟧'"


def test_kinds_of_data_are_not_mixed(file, tmp_path):
    text, chat = write(tmp_path / "a.txt", ["To be"]), write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    for data, validation in (([file, text], None), (file, text), ([file, chat], None)):
        with pytest.raises(
            DataError, match=r"records\.jsonl and .* cannot be mixed: records for the template '\{prompt"
        ):
            open_corpus(data, MODEL, validation=validation, longest=99)
    with pytest.raises(DataError, match=r"text and .*chat\.jsonl cannot be mixed: text or tokens and records"):
        open_corpus(tmp_path, MODEL, longest=99)
    (tmp_path / "split").mkdir()
    write(tmp_path / "split" / "train.jsonl", RECORDS)
    write(tmp_path / "split" / "val.txt", ["To be"])
    with pytest.raises(DataError, match=r"split and the validation of split cannot be mixed: .* and text or tokens"):
        open_corpus(tmp_path / "split", MODEL)
    for data in (text, Tokens.from_text("To be", "bytes")):
        with pytest.raises(DataError, match=r"expected records for the template 'x\{response\}', not text or tokens"):
            open_corpus(data, MODEL, template="x{response}")
    with pytest.raises(DataError, match="a text key, 'prompt', is for texts, and a template for records"):
        open_corpus(file, MODEL, template="x{response}", text_key="prompt")


def test_what_the_model_cannot_read_is_refused(file):
    with pytest.raises(DataError, match="outside the vocabulary: 0 to 99"):
        open_corpus(file, MODEL.replace(vocab_size=100))
    tokenizer = get_tokenizer("bytes")
    characters = dataclasses.replace(tokenizer.content, end_of_text=None)
    assert characters.end_of_text is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgpt.data.records.get_tokenizer", lambda _: type(tokenizer)(characters, (), lambda _: []))
        with pytest.raises(DataError, match="a response ends in end-of-text, which tokenizer 'bytes' does not have"):
            open_corpus(file, MODEL)


def test_what_is_learned_is_part_of_what_tells_data_apart(tmp_path):
    records = [[{"prompt": "ab", "response": "c"}], [{"prompt": "a", "response": "bc"}]]
    one, other = (open_corpus(write(tmp_path / f"{i}.jsonl", each), MODEL) for i, each in enumerate(records))
    np.testing.assert_array_equal(one.sources[0].tokens.records.ids_N, other.sources[0].tokens.records.ids_N)
    assert one.identity != other.identity
    assert one.identity == open_corpus(tmp_path / "0.jsonl", MODEL).identity


# --- batches


def test_an_epoch_has_every_record_once_and_batches_are_a_pure_function(file, tmp_path):
    more = write(tmp_path / "more.jsonl", [{"prompt": "m", "response": str(i)} for i in range(10)])
    alone = open_corpus(file, MODEL).split(0.0)[0]
    config = dataclasses.replace(CONFIG, batch_size=5, template="{prompt}{response}")
    epochs = [[shown(row) for i in range(4) for row in batch(alone, config, 4 * epoch + i)] for epoch in range(2)]
    want = sorted(f"{record['prompt']}[{record['response']}|]" for record in RECORDS)
    assert [sorted(epoch) for epoch in epochs] == [want, want]
    assert epochs[0] != epochs[1]
    mixture = open_corpus([f"a={file}:3", f"b={more}:1"], MODEL).split(0.1)[0]
    for data in (alone, mixture):
        parts = [batch(data, config, 7, slice(i, i + 1)) for i in range(5)]
        np.testing.assert_array_equal(np.concatenate(parts), batch(data, config, 7))
    whole = batch(mixture, dataclasses.replace(config, batch_size=batches.BLOCK), 0)
    assert np.mean(whole[:, 0] == ~ord("m")) == 0.25
    with pytest.raises(DataError, match="has 20 records, too few for batch_size=21: give it more, or a smaller batch"):
        list(dry_run(dataclasses.replace(CONFIG, batch_size=21, val_fraction=0.0), file))


def test_without_weights_every_record_of_a_mixture_is_drawn_equally_often(tmp_path):
    short = write(tmp_path / "short.jsonl", [{"prompt": "s", "response": "."}] * 30)
    long = write(tmp_path / "long.jsonl", [{"prompt": "l", "response": "." * 20}] * 10)
    mixture = open_corpus([short, long], MODEL).split(0.0)[0]
    rows = batch(mixture, dataclasses.replace(CONFIG, batch_size=batches.BLOCK, template="{prompt}{response}"), 0)
    assert np.mean(rows[:, 0] == ~ord("s")) == 0.75


def test_validation_is_the_end_of_each_source_or_what_is_given(file, tmp_path):
    more = write(tmp_path / "more.jsonl", RECORDS[:5])
    train_data, val = open_corpus([file, more], MODEL).split(0.2)
    assert [records.count for records in train_data.ids] == [16, 4]
    rows = [shown(val.row(i, 25)) for i in range(val.count)]
    assert rows == [f"{record['prompt']}[{record['response']}|]" for record in [*RECORDS[16:], RECORDS[4]]]
    given = open_corpus(file, MODEL, validation=more).split(0.2)[1]
    assert isinstance(given, Records)
    assert given.count == 5
    (tmp_path / "split").mkdir()
    write(tmp_path / "split" / "train.jsonl", RECORDS[:7])
    write(tmp_path / "split" / "val.jsonl", RECORDS[7:10])
    assert open_corpus(tmp_path / "split", MODEL).split(0.2)[1].count == 3
    joined = open_tokens(tmp_path / "split", MODEL)
    assert joined.ids_N.count == 10
    assert shown(joined.ids_N.row(8, 25)) == f"8? [{RECORDS[8]['response']}|]"


# --- exact numbers


def reference_loss(params, rows):
    """Mean over all learned ids of some rows, in float64."""
    inputs, labels = inputs_and_labels(rows, records=True)
    probabilities = reference.softmax(reference.gpt(params, MODEL, inputs))
    at = np.nonzero(labels != IGNORE)
    return -np.log(probabilities[(*at, labels[at])]).mean()


@pytest.mark.parametrize(("accumulation", "mesh"), [(2, ""), exhaustive(1, ""), exhaustive(2, "data=2")])
def test_the_gradient_is_that_of_the_mean_over_all_response_tokens(accumulation, mesh, file, monkeypatch):
    config = dataclasses.replace(CONFIG, batch_size=4, template="{prompt}{response}")
    rows = batch(open_corpus(file, MODEL).split(0.0)[0], config, 1)
    learned = (rows >= 0).sum(axis=1)
    assert learned[::2].sum() != learned[1::2].sum()  # of the micro-batches: a mean of means would be another number
    _, params = make_model(MODEL)
    exact, direction = to_numpy(params), to_numpy(make_model(MODEL, seed=1)[1])
    around = [jax.tree.map(lambda p, d, t=t: p + t * d, exact, direction) for t in (1e-6, -1e-6)]
    losses = [reference_loss(near, rows) for near in around]
    mesh_config = MeshConfig.parse(mesh or "data=1")
    config = dataclasses.replace(config, grad_accumulation=accumulation, clip_norm=0.0, mesh=mesh_config)
    devices = sharding.make_mesh(config.mesh) if mesh else None
    # An optimizer that keeps the gradient in its state, and compiles quickly.
    monkeypatch.setattr("jaxgpt.training.step.make_optimizer", lambda _: optax.trace(decay=0.0))
    after, metrics = jit_step(config, devices)(init_state(config, params, devices), rows)
    assert float(metrics["loss"]) == pytest.approx(reference_loss(exact, rows), rel=1e-6)
    gradient = to_numpy(after["opt_state"].trace)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4)


def test_evaluation_is_the_mean_over_all_response_tokens(file):
    model, params = make_model(MODEL)
    records = open_tokens(file, MODEL).ids_N
    rows = np.stack([records.row(i, MODEL.context_length + 1) for i in range(records.count)])
    result = evaluate(model, params, records, batch_size=3)
    assert result.loss == pytest.approx(reference_loss(to_numpy(params), rows), rel=1e-6)
    assert result.tokens == (rows >= 0).sum()
    assert result.bits_per_byte is None
    with pytest.raises(ValueError, match="stride is for a text"):
        evaluate(model, params, records, stride=4)
    with pytest.raises(ValueError, match="separate_documents is for a text"):
        evaluate(model, params, records, separate_documents=True)
    with pytest.raises(DataError, match="special tokens in the texts of prompts and responses are never tokens"):
        open_tokens(file, MODEL, allow_special=True)
    with pytest.raises(DataError, match="a record has 14 tokens, which do not fit into sequences of 8"):
        evaluate(model, params, records, seq_len=8)


# --- runs


@pytest.fixture
def bad(tmp_path):
    """A file whose last record lacks a response."""
    return write(tmp_path / "bad.jsonl", [*RECORDS, {"prompt": "no response"}])


def test_a_run_knows_its_template_and_what_it_skips(bad, tmp_path):
    config, _, corpus, *_ = prepare(CONFIG, bad, None, skip_bad=True)
    run = Run(tmp_path / "run")
    run.make()
    run.describe(config, corpus, None)
    assert run.config().template == "{prompt}{response}"
    run.check_config(CONFIG, "config.toml")  # a config that leaves the template to the data

    def resume(*overrides):
        data, validation = run.data()
        again, _, corpus, *_ = prepare(run.config(overrides), data, None, resume=True, validation=validation)
        run.check_resume(again, corpus, None)
        return corpus.identity

    assert resume() == corpus.identity
    with pytest.raises(
        ConfigError, match=r"train\.template: '\{prompt\}\{response\}' before, '\{prompt\} \{response\}'"
    ):
        resume("template={prompt} {response}")
    write(bad, RECORDS[1:])
    with pytest.raises(ConfigError, match=r"data bad\.jsonl: identity"):
        resume()


@pytest.mark.exhaustive
def test_a_run_on_records_resumes_bit_for_bit(bad, tmp_path, monkeypatch):
    whole = train(CONFIG, bad, tmp_path / "whole", skip_bad=True)
    make_batch = loop.Loop.global_batch

    def stop(loop, at):
        if at == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_batch(loop, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "global_batch", stop)
        assert train(CONFIG, bad, tmp_path / "cut", skip_bad=True).step == 2
    resumed = train(None, None, tmp_path / "cut", resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert resumed.val_loss == whole.val_loss
    lines = [line for line in Run(tmp_path / "cut").read_metrics() if "val_loss" in line]
    assert [line["val_tokens"] for line in lines] == [sum(len(record["response"]) + 1 for record in RECORDS[18:])] * 2


def test_the_command_evaluates_responses(file, tmp_path, capsys):
    jaxgpt.save(tmp_path / "model", *make_model(MODEL))
    write(tmp_path / "qa.jsonl", [{"q": "1", "response": "2"}, {"q": "1" * 30, "response": "2"}])
    evaluating = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "qa.jsonl")]
    assert main([*evaluating, "--template", "{q} {response}"]) == 0
    shown = capsys.readouterr()
    assert "over 2 tokens" in shown.out
    assert "left out: 1 record of more than 25 tokens" in shown.err
    write(tmp_path / "bad.jsonl", [{"q": "1", "response": "2"}, {"q": "1"}])
    evaluating[-1] = str(tmp_path / "bad.jsonl")
    assert main([*evaluating, "--template", "{q} {response}"]) != 0
    assert "--skip-bad leaves such records out" in capsys.readouterr().err
    assert main([*evaluating, "--template", "{q} {response}", "--skip-bad"]) == 0
    assert "left out: 1 record without what the template needs" in capsys.readouterr().err
    assert main([*evaluating, "--template", "{q}"]) != 0
    assert "must end in {response}" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("template", ["", exhaustive("Q: {prompt}\nA: {response}")])
def test_a_model_fine_tuned_on_records_answers_and_stops(template, tmp_path, capsys):
    records = [{"prompt": f"{i} + {i} = ", "response": f"{2 * i}, I think"} for i in range(8)]
    path = write(tmp_path / "sums.jsonl", records)
    model = MODEL.replace(context_length=40, emb_dim=32, n_layers=2)
    config = TrainConfig(
        model=model, steps=300, batch_size=8, learning_rate=3e-3, warmup_steps=10, val_fraction=0.0, eval_interval=1000
    )
    config = dataclasses.replace(config, template=template)
    train(config, path, tmp_path / "run")
    shape = Template(template or "{prompt}{response}")
    for record in records[:3]:
        prompt, response = shape.parts(record)
        capsys.readouterr()
        arguments = ["generate", "--model", str(tmp_path / "run"), "--prompt", prompt, "--max-new-tokens", "24"]
        assert main([*arguments, "--temperature", "0", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["completion"] == response
        assert printed["finish_reason"] == "stop"

"""Documents in files of every format, and `jaxgpt tokenize`: the same ids however work is divided or interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.console import Console
from test_tokenizer_files import described, saved

from jaxgpt.cli import main
from jaxgpt.cli.progress import BytesProgress
from jaxgpt.config import GPTConfig
from jaxgpt.data import Report, open_corpus, open_tokens, read_index, tokenize
from jaxgpt.data.documents import open_documents
from jaxgpt.data.encoding import Encoder, encode
from jaxgpt.data.tokenization import PROGRESS
from jaxgpt.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training import Run, TrainConfig
from jaxgpt.training.batches import check_enough
from jaxgpt.training.preparation import notes

BYTES = GPTConfig(vocab_size=257, context_length=8, emb_dim=8, n_heads=2, n_layers=1, tokenizer="bytes")
TEXTS = ["To be, or not to be", "that is\n\nthe question:  é北\U0001f600", "", "Whether 'tis nobler"]
END = 256


def ids_of(texts, end=END):
    """What "bytes" makes of documents."""
    return [i for text in texts if text for i in (*text.encode(), end)]


def ids_in(directory):
    index = read_index(directory)
    return np.concatenate([np.asarray(open_tokens(directory / shard.file, BYTES).ids_N) for shard in index.shards])


def content(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_parquet(path, column):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": column, "n": list(range(len(column)))}), path, row_group_size=3)


def write_zstd(path, data):
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2
    path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))  # two frames


@pytest.fixture
def small(monkeypatch):
    """Pieces of a few characters, so that short texts are cut too."""
    monkeypatch.setattr("jaxgpt.data.documents.PIECE", 20)


# --- cutting a text


def texts(count):
    parts = [" ", " ", "  ", "\n", "\n", "\r\n", "\t", "\u3000", "\x1c", "'", "'l", "l", "'ve", "re", "s", "The", "a"]
    parts += ["12", "é", "北京", "!", "?!", "\U0001f600", "<|endoftext|>", "<x>", "\0", "\ud800", "A" * 9]
    rng = random.Random(5)
    return ["".join(rng.choices(parts, k=rng.randint(1, 30))) for _ in range(count)]


ADDED = [("<x>", {}), ("<y", {"single_word": True, "lstrip": True, "normalized": True})]
TOKENIZERS = {
    "gpt2": lambda path: "gpt2",
    "bytes": lambda path: "bytes",
    "byte pairs with added tokens": lambda path: saved(path, described([("a", "b"), ("Ġ", "T")], added=ADDED)),
}


@pytest.mark.parametrize("allow_special", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_parts_of_a_text_have_the_ids_of_the_whole(name, allow_special, tmp_path):
    tokenizer = get_tokenizer(TOKENIZERS[name](tmp_path))
    cuts = 0
    for text in texts(700):
        whole = tokenizer.encode(text, allow_special=allow_special)
        place = -1
        while (place := tokenizer.find_cut(text, place + 1)) is not None:
            parts = (tokenizer.encode(part, allow_special=allow_special) for part in (text[:place], text[place:]))
            assert list(itertools.chain(*parts)) == whole, (text, place)
            cuts += 1
    assert cuts > 1000


@pytest.mark.parametrize(
    "changes",
    [{"prefix": True}, {"added": [("<x>", {"rstrip": True})]}, {"added": [("a b", {})]}, {"added": [("\n", {})]}],
)
def test_a_text_is_not_cut_where_that_would_change_the_ids(changes, tmp_path):
    tokenizer = get_tokenizer(saved(tmp_path, described([("a", "b")], **changes)))
    assert tokenizer.find_cut("To be, or not to be", 0) is None


def test_the_pieces_of_a_document_are_short_and_join_to_it(small, tmp_path):
    find_cut = get_tokenizer("bytes").find_cut
    for text in texts(100):
        text = "Whether 'tis nobler " + text.translate({0xD800: "", 0: "", 0x1C: ""})
        (tmp_path / "a.txt").write_bytes(text.encode())
        (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": text}]))
        for name in ("a.txt", "a.jsonl"):
            with open_documents(tmp_path / name) as opened:
                pieces = list(opened.pieces(find_cut))
            assert "".join(piece.text for piece in pieces) == text
            assert [piece.part for piece in pieces] == list(range(len(pieces)))
            assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            for piece in pieces[:-1]:
                assert find_cut(piece.text, 20) is None


def test_a_long_document_is_read_in_little_memory(tmp_path):
    line = "To be, or not to be, that is the question\n"
    (tmp_path / "a.txt").write_text(line * 10**6)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        for _ in range(20):
            file.write(lines_of([{"text": line * 50_000}]))
    for name in ("a.txt", "a.jsonl.gz"):
        tracemalloc.start()
        with open_documents(tmp_path / name) as opened:
            assert sum(len(piece.text) for piece in opened.pieces(get_tokenizer("gpt2").find_cut)) == len(line) * 10**6
        assert tracemalloc.get_traced_memory()[1] < 16e6
        tracemalloc.stop()


def test_what_cannot_be_cut_has_a_limit(small, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.data.documents.LIMIT", 2000)
    (tmp_path / "a.txt").write_text("a" * 2001)
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": "a b " * 10}, {"text": "a b " * 600}, {"text": "a" * 99}]))
    with pytest.raises(DataError, match=r"a\.txt: a text of more than 2,000 characters, without a place where"):
        tokenize([tmp_path / "a.txt"], tmp_path / "out", "bytes")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than 2,000 bytes"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out2", "bytes")
    result = tokenize([tmp_path / "a.jsonl"], tmp_path / "out3", "bytes", skip_bad=True)
    assert (result.index.tokens, result.index.documents, result.counts.bad) == (40 + 1 + 99 + 1, 2, 1)


# --- formats


FORMATS = {
    "a.jsonl": lambda path: path.write_bytes(lines_of({"text": text} for text in TEXTS)),
    "a.jsonl with a mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines_of({"text": text} for text in TEXTS)),
    "a.ndjson": lambda path: path.write_bytes(lines_of({"text": text} for text in TEXTS).replace(b"\n", b"\r\n\n")),
    "no-ending": lambda path: path.write_bytes(lines_of({"n": 1, "text": text} for text in TEXTS).rstrip()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines_of({"text": text} for text in TEXTS))),
    "a.jsonl.zst": lambda path: write_zstd(path, lines_of({"text": text} for text in TEXTS)),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "a.parquet": lambda path: write_parquet(path, TEXTS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_records_of_every_format_are_documents(name, tmp_path):
    path = tmp_path / name
    FORMATS[name](path)
    result = tokenize([path], tmp_path / "out", "bytes")
    assert ids_in(tmp_path / "out").tolist() == ids_of(TEXTS)
    assert (result.index.documents, result.counts.empty, result.index.end_of_text) == (3, 1, END)
    tokens = open_tokens(path, BYTES)
    np.testing.assert_array_equal(tokens.ids_N, ids_of(TEXTS))
    with open_documents(path) as opened:
        assert [piece.text for piece in opened.pieces(get_tokenizer("bytes").find_cut)] == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_each_record_is_in_one_block_and_knows_its_place(name, tmp_path, monkeypatch):
    path, find_cut, counts = tmp_path / name, get_tokenizer("bytes").find_cut, set()
    FORMATS[name](path)
    unit = {"a.parquet": "row", "a.json": "record"}.get(name, "line")
    want = [(f"{path}, {unit} {(2 if 'ndjson' in name else 1) * i + 1}", text) for i, text in enumerate(TEXTS)]
    for size in range(1, 200):
        monkeypatch.setattr("jaxgpt.data.documents.PIECE", size)
        with open_documents(path) as opened:
            blocks = list(opened.blocks(lambda text, start: None))
            pieces = [piece for block in pickle.loads(pickle.dumps(blocks)) for piece in block.pieces(find_cut)]
        assert [block.end.blocks for block in blocks] == list(range(1, len(blocks) + 1))
        counts.add(len(blocks))
        places = dict.fromkeys(piece.where for piece in pieces)
        assert [(where, "".join(p.text for p in pieces if p.where == where)) for where in places] == want
    assert len(counts) > 2


def test_a_line_that_is_too_long_is_left_out_wherever_blocks_end(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.data.documents.LIMIT", 50)
    long = b'{"text": "' + b"a" * 200 + b'"}'
    for lines in ([b'{"text": "b"}', long, b'{"text": "c"}', b"", long], [long, b'{"text": "d"}', b'{"text": "e"}']):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        for size in (*range(1, 100), 2**19):
            monkeypatch.setattr("jaxgpt.data.documents.PIECE", size)
            with open_documents(tmp_path / "a.jsonl") as opened:
                pieces = list(opened.pieces(get_tokenizer("bytes").find_cut, skip_bad=True))
            kept = [line for line in lines if line]
            assert [bool(piece.error) for piece in pieces] == [line == long for line in kept]
            assert [piece.where for piece in pieces] == [
                f"{tmp_path / 'a.jsonl'}, line {i}" for i, line in enumerate(lines, 1) if line
            ]


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_text_is_one_document(packed, tmp_path):
    text = "{not: JSON}\r\n" + "\n".join(TEXTS)
    (tmp_path / "a").write_bytes(packed(b"\xef\xbb\xbf" + text.encode()))
    tokenize([tmp_path / "a"], tmp_path / "out", "bytes")
    assert ids_in(tmp_path / "out").tolist() == ids_of([text])
    assert np.asarray(open_tokens(tmp_path / "a", BYTES).ids_N).tolist() == list(text.encode())


def test_directories_and_patterns_are_read_by_name(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("c.txt", "b.jsonl", "a.jsonl.gz", "d.md")):
        data = lines_of([{"text": f"{i}"}]) if "json" in name else f"{i}".encode()
        (tmp_path / "data" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    sources = [tmp_path / "data", str(tmp_path / "data" / "*.md")]
    tokenize(sources, tmp_path / "out", "bytes")
    assert ids_in(tmp_path / "out").tolist() == ids_of(["2", "1", "0", "3"])
    # In a source of several files, documents are separated in training too.
    assert np.asarray(open_tokens(tmp_path / "data", BYTES).ids_N).tolist() == ids_of(["2", "1", "0"])
    with pytest.raises(ConfigError, match=r"c\.txt is given twice"):
        tokenize([tmp_path / "data", tmp_path / "data" / "c.txt"], tmp_path / "again", "bytes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        writing = pool.submit((tmp_path / "pipe").write_bytes, lines_of({"text": text} for text in TEXTS))
        tokenize([tmp_path / "pipe"], tmp_path / "out", "bytes")
        writing.result()
    assert ids_in(tmp_path / "out").tolist() == ids_of(TEXTS)


BAD_LINES = [
    (b'{"text": "b"', "not JSON"),
    (b'{"text": "b\xff"}', "not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "not JSON"),
    (b'["b"]', r"expected a JSON object, not \['b'\]"),
    (b'{"body": "b"}', r"no key 'text' \(--text-key .*; there are 'body'\)"),
    (b'{"text": 7}', "expected a text under 'text', not 7"),
    (b'{"text": null}', "expected a text under 'text', not None"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_record_without_a_text_is_named_or_left_out(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of([{"text": "a"}] * 998) + line + b"\n" + lines_of([{"text": "c"}]))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 999: {message}.*\(--skip-bad leaves such records out\)"):
        tokenize([path], tmp_path / "out", "bytes")
    with pytest.raises(DataError, match="line 999"):
        open_tokens(path, BYTES)
    result = tokenize([path], tmp_path / "out", "bytes", skip_bad=True)
    assert ids_in(tmp_path / "out").tolist() == ids_of("a" * 998 + "c")
    assert (result.counts.bad, result.index.documents) == (1, 999)
    assert "line 999" in result.counts.first_bad


def test_a_row_without_a_text_is_named_or_left_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", "b", None, "c", None])
    with pytest.raises(DataError, match=r"a\.parquet, row 3: expected a text under 'text', not None"):
        tokenize([tmp_path / "a.parquet"], tmp_path / "out", "bytes")
    assert tokenize([tmp_path / "a.parquet"], tmp_path / "out", "bytes", skip_bad=True).counts.bad == 2
    with pytest.raises(DataError, match=r"a\.parquet, row 1: expected a text under 'n', not 0"):
        tokenize([tmp_path / "a.parquet"], tmp_path / "numbers", "bytes", text_key="n")
    with pytest.raises(DataError, match=r"no column 'body' \(--text-key .* there are 'text', 'n'\)"):
        open_corpus(tmp_path / "a.parquet", BYTES, text_key="body")


def test_files_that_are_damaged_or_hold_no_documents_are_refused_by_name(tmp_path):
    packed = gzip.compress(lines_of({"text": text} for text in TEXTS * 99))
    noise = np.random.default_rng(0).bytes(10**5).replace(b"\n", b"")
    for name, data, message in (
        ("a.jsonl.gz", packed[:-9], "damaged: gzip cannot unpack it"),
        ("b.gz", packed[:50] + bytes(40) + packed[90:], "damaged: gzip cannot unpack it"),
        ("c.gz", gzip.compress(bytes(99)), "many control characters"),
        ("d.txt", b"a b c \xff", r"not UTF-8 text .byte 6."),
        ("e.txt", b"\xe5\x8c\x97" * 10**6 + b"\xe5\x8c", r"not UTF-8 text .byte 3000000."),
        ("f.jsonl", noise, "many control characters"),
        ("g.jsonl", b"To be", "line 1: not JSON"),
        ("h.tokens", b"\x18\0\0\0\0\0\0\0{", "looks like a safetensors file"),
        ("i.txt", b"", "holds no text"),
        ("j.jsonl", lines_of([{"text": ""}] * 3), "holds no text"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}[:,].*{message}"):
            tokenize([tmp_path / name], tmp_path / "out", "bytes")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(DataError, match="absent: cannot be read: No such file"):
        tokenize([tmp_path / "absent"], tmp_path / "out", "bytes")
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_the_extra_are_refused(tmp_path):
    write_zstd(tmp_path / "a.zst", lines_of([{"text": "b"}] * 999))
    (tmp_path / "a.zst").write_bytes((tmp_path / "a.zst").read_bytes()[:20] + bytes(30))
    with pytest.raises(DataError, match=r"a\.zst: damaged: zstd cannot unpack it"):
        open_tokens(tmp_path / "a.zst", BYTES)
    write_parquet(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: damaged"):
        open_tokens(tmp_path / "a.parquet", BYTES)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python has zstd itself")
def test_formats_whose_package_is_missing_name_the_extra(tmp_path, monkeypatch):
    for name, data, module in (
        ("a.parquet", b"PAR1\x15\x04\x15", "pyarrow"),
        ("a.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "zstandard"),
    ):
        for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / name).write_bytes(data)
        with pytest.raises((MissingExtraError, ModuleNotFoundError), match=module):
            open_tokens(tmp_path / name, BYTES)


# --- end-of-text


def test_end_of_text_in_a_text_is_the_token_only_when_asked(tmp_path):
    mark = "<|endoftext|>"
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": f"a{mark}b"}, {"text": f"c{mark}"}, {"text": "d"}]))
    plain = tokenize([tmp_path / "a.jsonl"], tmp_path / "plain", "bytes")
    assert ids_in(tmp_path / "plain").tolist() == ids_of([f"a{mark}b", f"c{mark}", "d"])
    assert plain.counts.marked == 2
    special = tokenize([tmp_path / "a.jsonl"], tmp_path / "special", "bytes", allow_special=True)
    assert ids_in(tmp_path / "special").tolist() == [97, END, 98, END, 99, END, 100, END]
    assert special.counts.marked == 0


def test_a_tokenizer_without_end_of_text_has_nothing_between_documents(tmp_path, capsys):
    directory = saved(tmp_path, described([("a", "b")]))
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": "ab"}, {"text": "b"}]))
    out = str(tmp_path / "out")
    assert main(["tokenize", str(tmp_path / "a.jsonl"), "--out", out, "--tokenizer", str(directory)]) == 0
    assert "nothing between them: it has no end-of-text" in capsys.readouterr().out
    index = read_index(tmp_path / "out")
    assert (index.end_of_text, index.tokens, index.documents) == (None, 2, 2)


# --- the work as a whole


@pytest.fixture
def sources(tmp_path):
    """Several sources, with everything that can be left out."""
    (tmp_path / "a.txt").write_text(" ".join(f"{i}" for i in range(150)))
    lines = lines_of({"text": " ".join(["x"] * (i % 12))} for i in range(90))
    bad = b'{"body": 1}\n'
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines + bad + lines + bad * 2))
    (tmp_path / "c.txt").write_text("<|endoftext|> " * 9)
    return [tmp_path / name for name in ("a.txt", "b.jsonl.gz", "c.txt")]


OPTIONS = {"tokenizer": "bytes", "shard_tokens": 100, "skip_bad": True}


def test_a_directory_of_shards_holds_the_documents_and_its_index_says_what(small, sources, tmp_path):
    result = tokenize(sources, tmp_path / "out", **OPTIONS)
    texts = [sources[0].read_text(), *(" ".join(["x"] * (i % 12)) for i in [*range(90)] * 2), sources[2].read_text()]
    ids = ids_of(texts)
    assert ids_in(tmp_path / "out").tolist() == ids
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["tokenizer"], index["vocab_size"]) == ("bytes", 257)
    assert index["end_of_text"] == {"id": 256, "place": "after"}
    assert len(index["shards"]) > 12
    assert all(100 <= shard["tokens"] < 140 for shard in index["shards"][:-1])
    done = 0
    for shard in index["shards"]:
        row = ids[done : done + shard["tokens"]]
        assert shard["documents"] == row.count(END)
        done += shard["tokens"]
    assert sorted(content(tmp_path / "out")) == ["index.json", *(shard["file"] for shard in index["shards"])]
    assert (result.counts.empty, result.counts.bad, result.counts.marked, result.kept) == (16, 3, 5, 0)
    corpus = open_corpus(tmp_path / "out", BYTES)
    np.testing.assert_array_equal(corpus.sources[0].tokens.ids_N, ids)


class Stop(Exception):
    pass


def stopping(after):
    """A report that stops the work at the n-th block."""
    calls = itertools.count(1)

    def report(_):
        if next(calls) == after:
            raise Stop

    return report


def test_interrupted_work_goes_on_to_the_same_result(small, sources, tmp_path):
    want = tokenize(sources, tmp_path / "want", **OPTIONS)
    for after in (1, 9, 31):
        out, kept = tmp_path / f"out{after}", [-1]
        while kept[-1:] != kept[-2:-1]:  # until it does not come as far as the next shard
            with contextlib.suppress(Stop):
                result = tokenize(sources, out, **OPTIONS, report=stopping(after))
                break
            kept.append(len([*out.glob("shard-*")]))
            assert len(kept) < 50
            (out / ".shard-000000.tokens.1234.partial").write_text("from a killed process")
        else:
            result = tokenize(sources, out, **OPTIONS)
        assert len(kept) > 2
        assert (result.kept, result.counts) == (kept[-1], want.counts)
        assert content(out) == content(tmp_path / "want")


def test_reports_tell_how_far_the_work_is(small, sources, tmp_path):
    reports = []
    result = tokenize(sources, tmp_path / "out", **OPTIONS, report=reports.append)
    sizes = sum(source.stat().st_size for source in sources)
    assert {report.total for report in reports} == {sizes}
    assert [report.read for report in reports] == sorted(report.read for report in reports)
    assert reports[-1].read == sizes
    assert (reports[-1].tokens, reports[-1].size) == (result.index.tokens, result.index.tokens - result.index.documents)


def test_work_goes_on_only_with_the_same_sources_and_settings(small, sources, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        tokenize(sources, out, **OPTIONS, report=stopping(20))
    before = content(out)
    for changes, message in (
        ({"tokenizer": "gpt2"}, "tokenizer: 'bytes' before, 'gpt2' now"),
        ({"shard_tokens": 99}, "shard_tokens: 100 before, 99 now"),
        ({"text_key": "body"}, "text_key: 'text' before, 'body' now"),
        ({"allow_special": True}, "allow_special: False before, True now"),
    ):
        with pytest.raises(ConfigError, match=f"{message}.*--force starts again"):
            tokenize(sources, out, **(OPTIONS | changes))
    with pytest.raises(ConfigError, match="other sources, or in another order"):
        tokenize(sources[::-1], out, **OPTIONS)
    os.utime(sources[1], ns=(0, 0))
    with pytest.raises(ConfigError, match=r"b\.jsonl\.gz has changed"):
        tokenize(sources, out, **OPTIONS)
    assert content(out) == before
    tokenize(sources, out, **OPTIONS, force=True)
    tokenize(sources, tmp_path / "want", **OPTIONS)
    assert content(out) == content(tmp_path / "want")
    with pytest.raises(CheckpointError, match="exists: choose another name, or pass --force"):
        tokenize(sources, out, **OPTIONS)


def test_a_damaged_finished_shard_is_noticed_before_the_work_goes_on(small, sources, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stop):
        tokenize(sources, out, **OPTIONS, report=stopping(20))
    (out / "shard-000001.tokens").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tokens: missing: progress\.json lists it"):
        tokenize(sources, out, **OPTIONS)
    (out / PROGRESS).write_text("{}")
    with pytest.raises(DataError, match="damaged: --force starts again"):
        tokenize(sources, out, **OPTIONS)


def test_only_its_own_files_are_replaced_and_by_one_process_at_a_time(sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-mine.tokens").write_text("precious")
    with pytest.raises(CheckpointError, match="exists"):
        tokenize(sources, out, **OPTIONS)
    tokenize(sources, out, **OPTIONS, force=True)
    assert (out / "shard-mine.tokens").read_text() == "precious"
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = content(out)
    with pytest.raises(CheckpointError, match="another process writes into this directory"):
        tokenize(sources, out, **OPTIONS, force=True)
    os.close(descriptor)
    assert content(out) == before
    with pytest.raises(CheckpointError, match="cannot be written"):
        tokenize(sources, sources[0] / "out", **OPTIONS)
    for name in ("workers", "shard_tokens"):
        with pytest.raises(ConfigError, match=f"{name} must be a number from 1 on, not 0"):
            tokenize(sources, tmp_path / "new", **(OPTIONS | {name: 0}))


def test_a_full_disk_is_told_and_the_work_goes_on_later(small, sources, tmp_path, monkeypatch):
    out, count = tmp_path / "out", itertools.count()
    from jaxgpt.data import tokens

    write = tokens.TokenWriter.write

    def full(self, ids_N):
        if next(count) == 12:
            raise OSError(28, "No space left on device")
        write(self, ids_N)

    monkeypatch.setattr(tokens.TokenWriter, "write", full)
    with pytest.raises(DataError, match=r"shard-\d+\.tokens: cannot be written: .*No space left on device"):
        tokenize(sources, out, **OPTIONS)
    assert not [*out.glob(".*")]
    monkeypatch.setattr(tokens.TokenWriter, "write", write)
    assert tokenize(sources, out, **OPTIONS).kept
    tokenize(sources, tmp_path / "want", **OPTIONS)
    assert content(out) == content(tmp_path / "want")


def test_a_text_that_the_tokenizer_cannot_encode_is_named(tmp_path):
    characters = tmp_path / "characters.json"
    characters.write_text(json.dumps(["a", "b"]))
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": "ab"}, {"text": "abc"}]))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the tokenizer has no character 'c'"):
        tokenize([tmp_path / "a.jsonl"], tmp_path / "out", characters)


def made_by_another_tokenizer(path):
    dataclasses.replace(open_tokens(path, BYTES), tokenizer="gpt2").save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "shard-000002.tokens").unlink(), r"shard-000002\.tokens: missing: index.json lists it"),
        (lambda out: os.truncate(out / "shard-000002.tokens", 700), r"shard-000002\.tokens: damaged"),
        (lambda out: shutil.copy(out / "shard-000001.tokens", out / "shard-000002.tokens"), "not the shard that index"),
        (
            lambda out: made_by_another_tokenizer(out / "shard-000002.tokens"),
            "tokens of 'gpt2' with .*, not .* of 'bytes'",
        ),
        (lambda out: (out / "index.json").write_text("{"), r"index\.json: cannot be read as JSON"),
        (lambda out: (out / "index.json").unlink() or (out / PROGRESS).touch(), "not complete: the same"),
    ],
)
def test_shards_that_are_not_those_of_the_index_are_refused_at_open(damage, message, small, sources, tmp_path):
    tokenize(sources, tmp_path / "out", **OPTIONS)
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        open_corpus(tmp_path / "out", BYTES)


def test_a_run_reads_records_and_knows_under_which_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"body": "To be", "text": "no"}, {"body": "or not"}]))
    corpus = open_corpus(tmp_path / "a.jsonl", BYTES, text_key="body")
    want = ids_of(["To be", "or not"])
    assert np.asarray(corpus.sources[0].tokens.ids_N).tolist() == want
    run = Run(tmp_path / "run")
    run.directory.mkdir()
    run.describe(TrainConfig(model=BYTES), corpus, None)
    again = open_corpus(run.data()[0], BYTES)
    assert np.asarray(again.sources[0].tokens.ids_N).tolist() == want
    with pytest.raises(DataError, match="line 2: no key 'text'"):
        open_corpus(run.data()[0], BYTES, text_key="text")


def test_an_empty_document_leaves_nothing_behind_in_a_runs_own_reading(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": text} for text in ("", "ab", "", "")]))
    tokens = open_corpus(tmp_path / "a.jsonl", BYTES).sources[0].tokens
    assert np.asarray(tokens.ids_N).tolist() == [97, 98, END]
    (tmp_path / "empty.jsonl").write_bytes(lines_of([{"text": ""}]))
    (tmp_path / "empty.txt").touch()
    for name in ("empty.jsonl", "empty.txt"):
        mixture, _ = open_corpus(tmp_path / name, BYTES).split(0.0)
        with pytest.raises(DataError, match="the training split has 0 tokens; sequences of 8 need one more than that"):
            check_enough(mixture, TrainConfig(model=BYTES), "training")


def test_a_run_knows_whether_end_of_text_in_texts_is_the_token(tmp_path):
    mark = "<|endoftext|>"
    (tmp_path / "a.txt").write_text(f"ab{mark}c")
    (tmp_path / "val.jsonl").write_bytes(lines_of([{"text": f"d{mark}"}]))
    files = {"data": tmp_path / "a.txt", "config": BYTES, "validation": tmp_path / "val.jsonl"}
    plain, special = open_corpus(**files), open_corpus(**files, allow_special=True)
    assert np.asarray(plain.sources[0].tokens.ids_N).tolist() == list(f"ab{mark}c".encode())
    assert np.asarray(special.sources[0].tokens.ids_N).tolist() == [97, 98, END, 99]
    assert np.asarray(special.validation[0].tokens.ids_N).tolist() == [100, END]
    told = list(notes(TrainConfig(model=BYTES), None, plain))
    assert told == [
        f"{name}: holds end-of-text as ordinary text: --allow-special makes it the token"
        for name in ("a.txt", "val.jsonl")
    ]
    assert not list(notes(TrainConfig(model=BYTES), None, special))
    run = Run(tmp_path / "run")
    run.directory.mkdir()
    run.describe(TrainConfig(model=BYTES), special, None)
    data, validation = run.data()
    assert open_corpus(data, BYTES, validation=validation).identity == special.identity
    run.check_resume(TrainConfig(model=BYTES), open_corpus(data, BYTES, validation=validation), None)
    with pytest.raises(ConfigError, match=r"data a\.txt: identity .* before"):
        run.check_resume(TrainConfig(model=BYTES), plain, None)
    run.description.write_text(run.description.read_text().replace('"allow_special": true', '"allow_special": 1'))
    with pytest.raises(CheckpointError, match=r"damaged: allow_special of .*a\.txt is 1"):
        run.data()


# --- the command


def test_the_command_tells_what_it_wrote_and_what_it_left_out(sources, tmp_path, capsys):
    words = ["tokenize", *map(str, sources), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(words) == 2
    assert "b.jsonl.gz, line 91: no key 'text'" in capsys.readouterr().err
    assert main([*words, "--skip-bad"]) == 0
    out, err = capsys.readouterr()
    assert "2,525 tokens of 166 documents in 1 file (tokenizer bytes, vocabulary 257; end-of-text after each)" in out
    assert "16 empty documents were left out" in err
    assert "3 records without a text were left out, the first: " in err
    assert "--allow-special makes it the token" in err


def test_ctrl_c_tells_how_to_go_on(sources, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxgpt.data.tokenization.encode", interrupt)
    assert main(["tokenize", str(sources[0]), "--out", str(tmp_path / "out")]) == 130
    assert "interrupted: run the same command again to continue" in capsys.readouterr().err


def test_progress_is_a_line_now_and_then_or_a_bar(monkeypatch):
    for terminal in (False, True):
        output, seconds = io.StringIO(), itertools.count(0, 8)
        monkeypatch.setattr("time.monotonic", lambda seconds=seconds: next(seconds))
        with BytesProgress(Console(file=output, force_terminal=terminal, width=100)) as progress:
            for read in range(100, 1100, 100):
                progress.update(Report(read * 10**6, 2000 * 10**6, read * 2 * 10**6, read * 400_000))
        shown = output.getvalue()
        if terminal:
            assert "1,000 of 2,000 MB" in shown
        else:
            assert shown.splitlines()[-1] == "1,000 of 2,000 MB  400,000,000 tokens  25.0 MB/s  89 s left"
            assert len(shown.splitlines()) == 5


@pytest.mark.exhaustive
def test_several_processes_write_what_one_writes(small, sources, tmp_path):
    tokenize(sources, tmp_path / "one", **OPTIONS)
    tokenize(sources, tmp_path / "three", **OPTIONS, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    drawn = []
    with open_documents(sources[0]) as opened:
        blocks = (drawn.append(block) or block for block in opened.blocks(get_tokenizer("bytes").find_cut))
        encoded = encode(blocks, Encoder(get_tokenizer("bytes")), 2)
        next(encoded)
        encoded.close()  # ends the processes
    assert not multiprocessing.active_children()
    assert len(drawn) <= 8  # of more than 20: no more are read than are needed next
    characters = tmp_path / "characters.json"
    characters.write_text(json.dumps(list("0123456789 ")))
    with pytest.raises(DataError, match=r"line 2: the tokenizer has no character 'x'"):
        tokenize(sources, tmp_path / "out", **(OPTIONS | {"tokenizer": characters}), workers=2)


@pytest.mark.exhaustive
def test_processes_read_every_format_and_name_what_is_wrong_in_it(tmp_path):
    long = [f"{i} " + "to be, or not to be, " * (i % 5000) for i in range(300)]
    for name in FORMATS:
        path = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "TEXTS", long)
            FORMATS[name](path)
        tokenize([path], tmp_path / "one", "bytes", force=True)
        tokenize([path], tmp_path / "two", "bytes", force=True, workers=2)
        assert content(tmp_path / "one") == content(tmp_path / "two")
        assert ids_in(tmp_path / "two").tolist() == ids_of(long)
    path = tmp_path / "million.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * (10**6 - 1) + b'{"text": "b\n' + b'{"text": "c"}\n')
    with pytest.raises(DataError, match=r"million\.jsonl, line 1000000: not JSON: .* \(--skip-bad leaves such"):
        tokenize([path], tmp_path / "out", "bytes", workers=2)
    result = tokenize([path], tmp_path / "out", "bytes", workers=2, skip_bad=True)
    assert (result.counts.bad, result.index.documents) == (1, 10**6)
    assert "million.jsonl, line 1000000: not JSON" in result.counts.first_bad


@pytest.mark.exhaustive
def test_large_blocks_and_large_results_pass_each_other(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
        for i in range(12):
            file.write(lines_of([{"text": f"{i} to be, or not to be " * 2**17}]))
    tokenize([tmp_path / "a.jsonl.gz"], tmp_path / "one", "bytes")
    tokenize([tmp_path / "a.jsonl.gz"], tmp_path / "two", "bytes", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.exhaustive
def test_a_killed_process_is_told(small, sources, tmp_path):
    def kill(_):
        for process in multiprocessing.active_children():
            process.kill()
            process.join()

    with pytest.raises(DataError, match="a process that encodes was killed, perhaps for lack of memory"):
        tokenize(sources, tmp_path / "out", **OPTIONS, workers=2, report=kill)
    assert not multiprocessing.active_children()


@pytest.mark.exhaustive
def test_killed_work_leaves_no_process_behind_and_goes_on_to_the_same_result(tmp_path):
    with (tmp_path / "a.jsonl").open("wb") as file:
        for i in range(30_000):
            file.write(lines_of([{"text": f"{i} to be, or not to be, that is the question " * 9}]))
    words = ["tokenize", str(tmp_path / "a.jsonl"), "--workers", "2", "--shard-tokens", "300000", "--out"]
    command = [sys.executable, "-m", "jaxgpt", *words, str(tmp_path / "out")]
    kept = -1
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        shards = len([*(tmp_path / "out").glob("shard-*")])
        while process.poll() is None and len([*(tmp_path / "out").glob("shard-*")]) < shards + 2:
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # its end of the pipe closes when the processes that hold it have ended
        assert len([*(tmp_path / "out").glob("shard-*")]) > kept
        kept = len([*(tmp_path / "out").glob("shard-*")])
    assert not (tmp_path / "out" / "index.json").exists()
    assert main([*words, str(tmp_path / "out")]) == 0
    assert main([*words, str(tmp_path / "want")]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "want")

"""The ids and texts of tokenizers from files against transformers' own. Needs the extra [parity]; half a minute."""

from __future__ import annotations

import functools
import json
import random
import unicodedata

import pytest
from helpers import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer_files import ADDED, NAMED, described, gpt2_files, saved, small, spelling, token

from jaxgpt import weights
from jaxgpt.generation import default_stop_ids, generate, generate_text
from jaxgpt.tokenizer import StreamDecoder, get_tokenizer, write_tokenizer

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

TEXT = (
    "Guten Tag! The quick brown fox doesn't jump over 13 lazy dogs; über 42 Füße, naïve café, 中文字 中文, 🙂🙂. "
    "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak.\n\n  def f(x):\n    return x\n"
) * 20
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SENTENCE_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(tokenizer, trainer):
    tokenizer.train_from_iterator([TEXT], trainer)
    return json.loads(tokenizer.to_str())


@functools.cache
def byte_level(prefix=False, digits=False):
    """Byte pairs trained on a small text, with special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]) if digits else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return json.dumps(trained(tokenizer, trainer))


def fast(tmp_path, description, **options):
    return saved(tmp_path, description, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **options})


def with_added_tokens(tmp_path, prefix=False):
    description = json.loads(byte_level(prefix))
    tokens = sorted(description["model"]["vocab"], key=description["model"]["vocab"].__getitem__)
    more = [
        *ADDED,
        ("中", {"single_word": True}),
        ("  ", {"normalized": True}),
        ("u", {"rstrip": True, "special": True}),
    ]
    description["added_tokens"] += [token(content, i, tokens, **flags) for i, (content, flags) in enumerate(more)]
    return fast(tmp_path, description, add_prefix_space=prefix, **NAMED)


def with_shuffled_ids(tmp_path):
    description = json.loads(byte_level())
    vocab = description["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    vocab |= dict(zip(vocab, ids, strict=True))
    description["added_tokens"] = [{**fields, "id": vocab[fields["content"]]} for fields in description["added_tokens"]]
    return fast(tmp_path, description)


def of_pairs_that_cannot_occur(tmp_path):
    rng, tokens, merges = random.Random(1), [*"abcdeu"], {}
    while len(merges) < 60:
        pair = rng.choice(tokens), rng.choice(tokens)
        merges[pair] = None
        tokens.append("".join(pair))
    return fast(tmp_path, described(list(merges), seed=2))


def as_older_files(tmp_path):
    """vocab.json and merges.txt, as GPT2Tokenizer reads them, with tokens added later."""
    description = json.loads(byte_level())
    directory = tmp_path / "older"
    directory.mkdir()
    vocab = description["model"]["vocab"]
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in description["model"]["merges"]), ""])
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    for name, content in {
        "vocab": vocab | {"<|endoftext|>": len(vocab)},
        "added_tokens": {"<new>": len(vocab) + 1, "[PAD]": len(vocab) + 2},
        "special_tokens_map": {"pad_token": "[PAD]", "eos_token": {"content": "</s>", "lstrip": True}},
        "config": {"model_type": "gpt2"},
    }.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def gpt2(tmp_path):
    directory = gpt2_files(tmp_path / "gpt2", ("vocab.json", "merges.txt"))
    (directory / "config.json").write_text('{"model_type": "gpt2"}')
    return directory


def word_piece(tmp_path, **options):
    """BERT's vocab.txt, as Chinese GPT-2s have it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = trained(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))[
        "model"
    ]["vocab"]
    directory = tmp_path / "word pieces"
    directory.mkdir()
    text = "".join(f"{piece}\n" for piece in sorted(vocab, key=vocab.__getitem__))
    (directory / "vocab.txt").write_text(text, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    return directory


def unigram(tmp_path):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return fast(tmp_path, trained(tokenizer, trainer), **NAMED)


def with_byte_fallback(tmp_path):
    """Byte pairs of characters, as converted from SentencePiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *SENTENCE_BYTES]
    description = trained(tokenizer, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False))
    description["added_tokens"] = description["added_tokens"][: len(SPECIAL)]
    return fast(tmp_path, description, **NAMED)


CASES = {
    "gpt2": (gpt2, "gpt2"),
    "trained": (lambda path: fast(path, json.loads(byte_level())), "bpe"),
    "prefix space": (lambda path: fast(path, json.loads(byte_level(True)), add_prefix_space=True), "bpe"),
    "added tokens": (with_added_tokens, "bpe"),
    "added tokens and prefix space": (functools.partial(with_added_tokens, prefix=True), "bpe"),
    "shuffled ids": (with_shuffled_ids, "bpe"),
    "pairs that cannot occur": (of_pairs_that_cannot_occur, "bpe"),
    "older files": (as_older_files, "bpe"),
    "digits apart": (lambda path: fast(path, json.loads(byte_level(digits=True))), "hf"),
    "word pieces": (word_piece, "hf"),
    "cased word pieces": (functools.partial(word_piece, do_lower_case=False, strip_accents=True), "hf"),
    "unigram": (unigram, "hf"),
    "byte fallback": (with_byte_fallback, "hf"),
}

PARTS = [
    *(" ", "  ", "\n\n", "\t", "'ll", "don't", "\u3000", "12", "é", "e\u0301", "🙂", "中文", "ⓐ", "_", "abcdu"),
    *(content for content, _ in ADDED),
    *SPECIAL,
    *("[SEP]", "[PAD]", "<new>", "<|endoftext|>", " <both> ", "word word"),
]
# Characters that every Unicode version in use knows, so that the libraries' tables agree.
known = st.characters(codec="utf-8").filter(lambda character: unicodedata.category(character) != "Cn")
texts = st.lists(
    st.one_of(
        st.sampled_from(PARTS),
        st.integers(0, 400).map(lambda i: TEXT[i : i + 9]),
        st.text(known, max_size=5),
    ),
    max_size=10,
).map("".join)


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_transformers(case, tmp_path):
    make, kind = CASES[case]
    directory = make(tmp_path)
    ours, theirs = get_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert ours.name.partition("-")[0] == kind
    written = tmp_path / "written"
    written.mkdir()
    write_tokenizer(written, ours, context_length=99, vocab_size=ours.vocab_size + 2)
    exported = transformers.AutoTokenizer.from_pretrained(written)
    # Ids that the model has more have a token, unless the tokenizer would find it in a text.
    more = range(ours.vocab_size, ours.vocab_size + (0 if "pieces" in case or case == "unigram" else 2))
    placeholders = [f"<|{i}|>" for i in more]
    assert [len(exported), *exported.convert_tokens_to_ids(placeholders)] == [ours.vocab_size + len(more), *more]
    assert exported.decode(list(more), clean_up_tokenization_spaces=False) == ours.decode(more, placeholders=True)

    @settings(max_examples=60)
    @given(texts.map(lambda text: text.join(["<|", *placeholders, "|>"])))
    def check(text):
        for allow_special in (False, True):
            ids = ours.encode(text, allow_special=allow_special)
            for other in (theirs, exported):
                expected = other.encode(text, add_special_tokens=False, split_special_tokens=not allow_special)
                assert ids == expected, other
        decoded = ours.decode(ids)
        if kind == "hf":
            assert decoded == theirs.decode(ids, clean_up_tokenization_spaces=False)
        elif not any(content in text for content in ("中", "u")):  # transformers spells added tokens as byte characters
            assert decoded.encode() == theirs.decode(ids, clean_up_tokenization_spaces=False).encode()

    check()
    if kind == "hf":

        @settings(max_examples=60)
        @given(st.lists(st.lists(st.integers(0, ours.vocab_size + 1), max_size=4), max_size=8))
        def check_pieces(chunks):
            decoder = StreamDecoder(ours)
            pieces = [decoder.feed(chunk) for chunk in chunks]
            whole = ours.decode([i for chunk in chunks for i in chunk], placeholders=True)
            assert "".join(pieces) + decoder.finish() == whole

        check_pieces()


@pytest.mark.parametrize("case", ["added tokens", "unigram", "older files"])
def test_transformers_pipeline_draws_our_ids_with_any_tokenizer(case, tmp_path):
    pytest.importorskip("torch")
    tokenizer = get_tokenizer(CASES[case][0](tmp_path))
    model, params = make_model(small(tokenizer, context_length=32, emb_dim=16), seed=4)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    loaded = weights.load(tmp_path / "hf")
    assert loaded[0].config == model.config
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    (answer,) = pipeline("The lazy", add_special_tokens=False, return_tensors=True)
    ids, stops = tokenizer.encode("The lazy"), default_stop_ids(model.config)
    result = generate(*loaded, [ids], 32 - len(ids), stop_ids=stops)
    assert answer["generated_token_ids"] == result.tokens[0].tolist()
    text = generate_text(*loaded, "The lazy", 32 - len(ids))[0]
    new = [i for i in result.new_tokens[0] if i not in stops]
    assert text == "The lazy" + tokenizer.decode(new)


def test_a_character_model_s_export_is_a_tokenizer_for_transformers(tmp_path):
    (tmp_path / "characters.json").write_text(json.dumps(sorted(set(TEXT))))
    ours = get_tokenizer(tmp_path / "characters.json")
    (tmp_path / "written").mkdir()
    write_tokenizer(tmp_path / "written", ours, context_length=99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    ids = theirs.encode(TEXT[:400])
    assert ids == ours.encode(TEXT[:400])
    assert theirs.decode(ids) == TEXT[:400]
    assert get_tokenizer(tmp_path / "written") is ours


def test_special_tokens_and_spelling_of_the_export(tmp_path):
    description = described(spelling("Guten", " Tag"), first=["<s>", "</s>"])
    tokenizer = get_tokenizer(saved(tmp_path, description, tokenizer_config=NAMED | {"pad_token": "<s>"}))
    (tmp_path / "written").mkdir()
    write_tokenizer(tmp_path / "written", tokenizer, context_length=99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    roles = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id]
    assert (roles, len(theirs)) == ([0, 1, 0], tokenizer.vocab_size)
    assert theirs.model_max_length == 99

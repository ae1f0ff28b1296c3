"""Paths that users give, files that are not text, and writing that leaves the old content or the new."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import os
import pickle
import stat
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import TINY, make_model

from jaxgpt import files, load, save
from jaxgpt.cli import main
from jaxgpt.data import Tokens, open_tokens
from jaxgpt.errors import CheckpointError, ConfigError, DataError
from jaxgpt.files import decode_text, local, not_text
from jaxgpt.textfile import read_json, read_toml
from jaxgpt.training import TrainConfig, load_run
from jaxgpt.training.run_directory import Run
from jaxgpt.training.storage import bucket_url, storage

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BYTES = TINY.replace(vocab_size=257, tokenizer="bytes")
TEXT = "To be, or not to be: that is the question.\n" * 20


@pytest.fixture(scope="module")
def tiny():
    return make_model(TINY)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "run.toml").write_text("[model]\n")
    return tmp_path


TRAIN = ("train", "run.toml", "--data", "a.txt")
COMMANDS = {
    "convert to": ("convert", "shakespeare", "URL"),
    "convert from": ("convert", "URL", "x"),
    "train into": (*TRAIN, "--out", "URL"),
    "train on": ("train", "run.toml", "--out", "x", "--data", "URL"),
    "train with": ("train", "URL", "--data", "a.txt", "--out", "x"),
    "train from": (*TRAIN, "--out", "x", "--init-from", "URL"),
    "train into, in several processes": (*TRAIN, "--out", "URL", "--distributed"),
    "train on, in several processes": ("train", "run.toml", "--out", "x", "--data", "URL", "--distributed"),
    "export from": ("export", "URL", "x"),
    "export to": ("export", "x", "URL"),
    "tokenize from": ("tokenize", "URL", "--out", "x"),
    "tokenize to": ("tokenize", "a.txt", "--out", "URL"),
    "evaluate": ("evaluate", "--model", "URL", "--data", "a.txt"),
    "evaluate on": ("evaluate", "--data", "URL"),
    "evaluate a task on": ("evaluate", "--tasks", "wikitext=URL"),
    "generate": ("generate", "--model", "URL", "--prompt", "a"),
    "generate from": ("generate", "--prompt-file", "URL"),
    "inspect": ("inspect", "URL"),
    "inspect into": ("inspect", "gpt2", "--plot", "URL"),
    "plot": ("plot", "URL"),
    "plot to": ("plot", "x", "--out", "URL.png"),
    "profile into": ("benchmark", "--profile", "URL"),
    "plan": ("plan", "URL", "--topology", "v5e:2x2"),
}


# What takes a run, whose directory may be in a bucket.
OF_RUNS = {
    *("convert from", "train into", "train from", "train into, in several processes", "export from", "evaluate"),
    *("generate", "inspect", "plot"),
}


@pytest.mark.parametrize("url", ["gs://bucket/model", "s3://bucket/model", "file:///model"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_is_refused_by_name_before_any_work(command, url, here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for work in ("weights.formats.read_params", "parallel.distributed.initialize"):
        monkeypatch.setattr(f"jaxgpt.{work}", lambda *_, work=work: pytest.fail(f"went as far as {work}"))
    before = sorted(here.iterdir())
    try:
        code = main([word.replace("URL", url) for word in COMMANDS[command]])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    err = capsys.readouterr().err.strip()
    assert f"error: {url}" in err
    if url.startswith("gs:") and command in OF_RUNS:
        assert f"{url}: a run in a bucket needs 'gcsfs': pip install 'jaxgpt[gs]'" in err
    else:
        assert f"{url.partition(':')[0]}:// is not a local path" in err
    assert "Traceback" not in err
    assert sorted(here.iterdir()) == before


def test_functions_refuse_urls_too(tiny, here):
    before = sorted(here.iterdir())
    for call in (
        lambda: save("gs://b/m", *tiny),
        lambda: save(Path("gs://b/m"), *tiny),
        lambda: load("hdfs://b/m"),
        lambda: open_tokens("hdfs://a/b.txt", BYTES),
        lambda: Tokens.from_text("a", "bytes").save("gs://b/tokens"),
    ):
        with pytest.raises(ConfigError, match="is not a local path: copy it"):
            call()
    with pytest.raises(ConfigError, match=r"is not a local path: download it, or give .* by its name"):
        load("https://huggingface.co/openai-community/gpt2")
    assert sorted(here.iterdir()) == before


def test_runs_are_not_written_to_s3_and_that_is_told_with_the_reason(here):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for call in (lambda: load_run("s3://b/run"), lambda: load("S3://b/run"), lambda: Run(Path("s3://b/run"))):
        with pytest.raises(ConfigError, match=r"orbax, which writes the checkpoints, cannot write to S3: use .*sync"):
            call()
    with pytest.raises(ValueError, match="should be absolute"):  # once orbax can, we can
        tensorstore_utils.build_kvstore_tspec("s3://b/run", use_ocdbt=True)


@pytest.mark.parametrize("name", ["", "b", "b/", "b/a//c", "b/../c", "b/./c", "b/a c", "b/a#1", "b/a*", "b/a?x=1"])
def test_a_name_that_means_different_things_to_different_clients_is_refused(name):
    with pytest.raises(ConfigError, match=r"expected gs://BUCKET/NAME"):
        bucket_url(f"gs://{name}")


def test_a_run_in_a_bucket_is_known_by_its_url():
    for given in ("gs://b/runs/a", "gs://b/runs/a/", "GS://b/runs/a", Path("gs://b/runs/a")):
        assert bucket_url(given) == "gs://b/runs/a"
    for given in ("b/runs/a", "./gs:/b", "/gs/b", "https://b/a", "hdfs://b/a", ""):
        assert bucket_url(given) is None


def test_a_directory_on_the_disk_knows_its_name_and_whether_it_holds_a_run(here):
    place = storage("runs/one")
    assert (place.holds_run(), place.absolute(), place.name) == (False, None, "one")
    place.make(place.path)
    (place.path / "run.json").touch()
    assert (place.holds_run(), place.absolute()) == (True, str(here / "runs" / "one"))
    (place.path / "config.json").touch()  # an exported model, into the run's own directory
    assert not place.holds_run()
    assert storage(".").name == here.name


def test_a_file_url_is_told_the_path():
    for url in ("file:///models/gpt2", "FILE:///models/gpt2", Path("file:///models/gpt2")):
        with pytest.raises(ConfigError, match=r"file:// is not a local path: give the path itself, /models/gpt2$"):
            local(url)


def test_an_empty_path_is_not_the_current_directory(tiny, here):
    for call in (lambda: load(""), lambda: save("", *tiny), lambda: open_tokens("", BYTES), lambda: load_run("")):
        with pytest.raises(ConfigError, match="a path is empty"):
            call()
    assert main(["tokenize", "a.txt", "--out", ""]) == 2


def test_names_with_colons_are_paths():
    for name in ("a:b", "C:/models/gpt2", "runs/2026-11-25T10:30/x", "./gs:/x"):
        assert local(name) == Path(name)
    assert local("~/x") == Path.home() / "x"


WRITING = {
    "tokenize": (("tokenize", "a.txt", "--out", "OUT", "--tokenizer", "bytes"), "shards"),
    "convert": (("convert", "shakespeare", "OUT"), "model"),
    "plot": (("plot", "no-run", "--out", "OUT"), "curves.png"),
    "inspect": (("inspect", "gpt2", "--plot", "OUT"), "pictures"),
    "export": (("export", "no-run", "OUT"), "exported"),
}


@pytest.mark.parametrize("command", WRITING)
def test_a_command_does_not_replace_what_exists_unless_forced(command, here, capsys):
    words, name = WRITING[command]
    file = here / name if "." in name else here / name / "file"
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    words = [word.replace("OUT", name) for word in words]
    assert main(words) == 2
    assert f"{name}: exists: choose another name, or pass --force to replace it" in capsys.readouterr().err
    assert file.read_text() == "precious"
    main([*words, "--force"])
    assert "pass --force" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "shakespeare", "a.txt"), "a.txt: exists and is not a directory"),
        ((*TRAIN, "--out", "a.txt"), "a.txt: exists and is not a directory"),
        (("benchmark", "--profile", "a.txt"), "a.txt: exists and is not a directory"),
        (("tokenize", "a.txt", "--out", "a.txt", "--force"), "a.txt: exists and is not a directory"),
        (("tokenize", "a.txt", "--out", "/dev/null", "--force"), "/dev/null: exists and is not a directory"),
        (("tokenize", "a.txt", "--out", "b.tokens"), "a directory is written, and this is a file's name: b"),
        (("inspect", "gpt2", "--plot", "a.txt"), "a.txt: exists and is not a directory"),
        (("plot", "no-run", "--out", "."), "is a directory: give the name of a file"),
        (("plot", "no-run", "--out", "/dev/null", "--force"), "/dev/null: is not a file"),
        (("plot", "no-run", "--out", "lost/curves.png"), "lost is not a directory: make it first"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(words, message, here, capsys):
    assert main(list(words)) == 2
    assert message in capsys.readouterr().err
    assert (here / "a.txt").read_text() == TEXT
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "words",
    [
        (*TRAIN, "--out", "x", "--out", "y"),
        ("generate", "--model", "a", "--model", "b"),
        ("evaluate", "--data", "a.txt", "--stride", "3", "--stride=4"),
    ],
)
def test_an_option_given_twice_is_an_error(words, here, capsys):
    with pytest.raises(SystemExit):
        main(list(words))
    assert "was given twice" in capsys.readouterr().err


def test_a_key_given_twice_is_an_error(here):
    for keys in (("steps=1", "steps=2"), ("steps=1", "train.steps=2"), ("model.n_layers=1", "model.n_layers=1")):
        with pytest.raises(ConfigError, match=f"--set {keys[1].partition('=')[0]} was given twice"):
            TrainConfig.from_file("run.toml", keys)
    (here / "a.json").write_text('{"n_layers": 2, "n_layers": 4}')
    with pytest.raises(ConfigError, match=r"a\.json: cannot be read as JSON: key 'n_layers' appears twice"):
        read_json("a.json")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "model.onnx", "run.json", "x.png"])
def test_a_directory_is_not_written_under_the_name_of_a_file(name, tiny, here, capsys):
    for words in (
        ("convert", "shakespeare", name),
        ("export", "no-run", name),
        (*TRAIN, "--out", name),
        ("inspect", "gpt2", "--plot", name),
    ):
        assert main(list(words)) == 2
        assert f"{name}: a directory is written, and this is a file's name" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="a file's name"):
        save(name, *tiny)
    assert not (here / name).exists()


def npy():
    file = io.BytesIO()
    np.save(file, np.arange(50))
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 40 * len(TEXT)
        archive.addfile(entry, io.BytesIO(40 * TEXT.encode()))
    return file.getvalue()


IDS = np.random.default_rng(0).integers(0, 65, 3000)
OTHERS = {
    "nanoGPT's characters": (IDS.astype(np.uint16).tobytes(), "token ids"),
    "ids of one byte": (IDS.astype(np.uint8).tobytes(), "token ids"),
    "ids of four bytes": (IDS.astype(np.uint32).tobytes(), "token ids"),
    "llm.c": (np.array([20240520, 2, 3] + [0] * 253, "<i4").tobytes() + b"abcdef", "llm.c or modded-nanogpt"),
    "NumPy": (npy(), "NumPy array"),
    "UTF-16, little-endian": (TEXT.encode("utf-16-le"), "UTF-16 without a mark.*UTF-16LE"),
    "UTF-16, big-endian": (TEXT.encode("utf-16-be"), "UTF-16 without a mark.*UTF-16BE"),
    "UTF-16 with a mark": (TEXT.encode("utf-16"), "UTF-16: convert"),
    "UTF-32, little-endian": (TEXT.encode("utf-32-le"), "UTF-32 without a mark.*UTF-32LE"),
    "UTF-32, big-endian": (TEXT.encode("utf-32-be"), "UTF-32 without a mark.*UTF-32BE"),
    "UTF-32 with a mark": (TEXT.encode("utf-32"), "UTF-32: convert"),
    "tar": (tar(), "tar archive: unpack"),
    "Arrow": (b"ARROW1\0\0" + TEXT.encode(), "an Arrow file"),
    "gzip": (gzip.compress(IDS.astype(np.uint16).tobytes()), "token ids"),
    "a pickle": (pickle.dumps([1, 2]), "a pickle, which is never loaded"),
    "GGUF": (b"GGUF" + np.array([3, 0, 0], "<u4").tobytes() + b"llama", "a GGUF model"),
    "SQLite": (b"SQLite format 3\0" + bytes(20), "SQLite"),
    "Latin-1": ("caf\xe9 au lait".encode("latin-1"), "not UTF-8 text .byte 3.; expected UTF-8 text, or a token file"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_data_that_is_not_text_is_told_what_it_looks_like(kind, here, capsys):
    data, message = OTHERS[kind]
    (here / "data").write_bytes(data)
    with pytest.raises(DataError, match=f"data: .*{message}"):
        open_tokens("data", BYTES)
    assert main([*TRAIN[:2], "--data", "data", "--out", "x"]) == 2
    assert not (here / "x").exists()
    if kind != "Latin-1":  # a prompt's other bytes become U+FFFD
        assert main(["generate", "--prompt-file", "data"]) == 2
        assert "data: not text" in capsys.readouterr().err


def test_a_token_file_is_not_tokenized_again(here, capsys):
    Tokens.from_text(TEXT, "bytes").save("tokens")
    assert main(["tokenize", "tokens", "--out", "again"]) == 2
    assert "tokens: not text: it looks like a safetensors file" in capsys.readouterr().err
    assert not (here / "again").exists()


def test_text_of_another_encoding_is_told_on_stdin_and_in_configs_too(here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode("utf-16")), isatty=lambda: False))
    assert main(["generate", "--prompt-file", "-"]) == 2
    assert "stdin: not text: it looks like UTF-16: convert it first" in capsys.readouterr().err
    (here / "a.toml").write_bytes("[model]\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"a\.toml: cannot be read as TOML: not text: it looks like UTF-16"):
        read_toml("a.toml")


@pytest.mark.parametrize(
    "text",
    ["", "a", "1\t2\r\n\f", "北京\n", "\x1b[1mbold\x1b[0m", "a" * 99 + "\0", "\ud7ff\U0001f600", "GGUF is", "PAR1 is"],
)
def test_text_of_every_kind_is_text(text):
    assert not_text(text.encode()) == ""
    assert decode_text(text.encode()) == text


def test_a_byte_order_mark_is_not_text(here, monkeypatch):
    mark = b"\xef\xbb\xbf"
    (here / "marked.txt").write_bytes(mark + TEXT.encode())
    (here / "a.toml").write_bytes(mark + b"[model]\nn_layers = 2\n")
    (here / "a.json").write_bytes(mark + b'{"n_layers": 2}')
    assert open_tokens("marked.txt", BYTES).identity == open_tokens("a.txt", BYTES).identity
    assert read_toml("a.toml") == {"model": {"n_layers": 2}}
    assert read_json("a.json") == {"n_layers": 2}
    from jaxgpt.cli.generate import read_prompts

    assert read_prompts(SimpleNamespace(prompt=[], prompt_file=["marked.txt"])) == [TEXT]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(mark + b"Ab")))
    assert read_prompts(SimpleNamespace(prompt=[], prompt_file=["-"])) == ["Ab"]


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.usefixtures("umask")
def test_files_have_the_permissions_of_any_file_that_the_user_makes(tiny, tmp_path):
    save(tmp_path / "model", *tiny)
    Tokens.from_text(TEXT, "bytes").save(tmp_path / "tokens")
    assert [mode(tmp_path / name) for name in ("model", "tokens")] == [0o755, 0o644]
    assert {mode(file) for file in (tmp_path / "model").iterdir()} == {0o644}
    (tmp_path / "tokens").chmod(0o640)
    (tmp_path / "link").symlink_to("tokens")
    if os.getuid() == 0:
        os.chown(tmp_path / "tokens", -1, 12345)
    group = os.stat(tmp_path / "tokens").st_gid
    Tokens.from_text(TEXT, "bytes").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    with files.replacing_file(tmp_path / "link") as partial:
        assert mode(partial) == 0o600
        partial.write_bytes((tmp_path / "tokens").read_bytes())
    assert (mode(tmp_path / "tokens"), os.stat(tmp_path / "tokens").st_gid) == (0o640, group)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("permissions", [0o2775, 0o700])
def test_a_directory_keeps_its_permissions_and_its_group(permissions, tiny, tmp_path):
    (tmp_path / "model").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / "model", -1, 12345)
    (tmp_path / "model").chmod(permissions)
    group = os.stat(tmp_path / "model").st_gid
    for _ in range(2):
        save(tmp_path / "model", *tiny)
        assert mode(tmp_path / "model") == permissions
        assert os.stat(tmp_path / "model").st_gid == group
    (tmp_path / "model" / "model.safetensors").chmod(0o600)
    save(tmp_path / "model", *tiny)
    assert mode(tmp_path / "model" / "model.safetensors") == 0o600
    load(tmp_path / "model")


@pytest.mark.usefixtures("umask")
def test_a_file_system_without_permissions_is_written_too(tmp_path, monkeypatch):
    def chmod(path, *_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    os.umask(0o077)  # as there, all files have the same permissions, and others cannot be set
    monkeypatch.setattr(os, "chmod", chmod)
    for text in ("old", "new"):
        files.write_text(tmp_path / "a", text)
        assert (tmp_path / "a").read_text() == text


def refuse(monkeypatch, name, error, of):
    """Makes a method of `Path` fail with a system's error for some paths."""
    usual = getattr(Path, name)

    def method(self, *args, **kwargs):
        if of(self, *args):
            raise OSError(error, os.strerror(error), str(self))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(Path, name, method)


IMMOVABLE = {
    "a mount point": ("rename", errno.EBUSY, lambda model: lambda path, *_: path == model),
    "a file system that renames no directories": ("rename", errno.ENOSYS, lambda model: lambda path, *_: path == model),
    "a directory of a container's image": ("rename", errno.EXDEV, lambda model: lambda path, *_: path == model),
    "a read-only parent": ("mkdir", errno.EACCES, lambda model: lambda path, *_: path.parent == model.parent),
}


@pytest.mark.parametrize("kind", IMMOVABLE)
def test_a_directory_that_cannot_be_renamed_gets_its_files_replaced(kind, tiny, tmp_path, monkeypatch):
    model = tmp_path / "model"
    save(model, *tiny)
    other = make_model(TINY, seed=5)
    name, error, of = IMMOVABLE[kind]
    refuse(monkeypatch, name, error, of(model))
    save(model, *other)
    assert sorted(entry.name for entry in model.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]
    np.testing.assert_array_equal(load(model)[1]["tok_emb"]["weight"], other[1]["tok_emb"]["weight"])


@pytest.mark.parametrize("moves", range(1, 4))
def test_a_crash_while_files_are_replaced_never_leaves_a_mixture(moves, tiny, tmp_path, monkeypatch):
    model = tmp_path / "model"
    save(model, *tiny)
    refuse(monkeypatch, "rename", errno.EBUSY, lambda path, *_: path == model)
    usual, count = Path.rename, iter(range(99))

    class Killed(BaseException):
        pass

    def rename(self, target):
        if self.parent.is_relative_to(model) and next(count) >= moves:
            raise Killed
        return usual(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(Killed):
        save(model, *make_model(TINY, seed=5))
    with pytest.raises(CheckpointError, match=r"no config\.json: a process was killed.*former ones are in .*\.old$"):
        load(model)
    (old,) = model.glob(".*.old")
    (new,) = model.glob(".*.new")
    kept = {"old": sorted(entry.name for entry in old.iterdir()), "new": sorted(entry.name for entry in new.iterdir())}
    assert ["config.json", "model.safetensors"] in kept.values()


def test_an_error_while_files_are_replaced_leaves_the_old_ones(tiny, tmp_path, monkeypatch):
    model = tmp_path / "model"
    save(model, *tiny)
    refuse(monkeypatch, "rename", errno.EBUSY, lambda path, *_: path == model)
    refuse(
        monkeypatch,
        "rename",
        errno.EIO,
        lambda path, *_: path.parent.name.endswith(".new") and path.name == "config.json",
    )
    with pytest.raises(CheckpointError, match="could not be written"):
        save(model, *make_model(TINY, seed=5))
    assert sorted(entry.name for entry in model.iterdir()) == ["config.json", "model.safetensors"]
    np.testing.assert_array_equal(load(model)[1]["tok_emb"]["weight"], tiny[1]["tok_emb"]["weight"])


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(error, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match=f"{tmp_path}: this file system cannot lock files"), Run(tmp_path).locked():
        pass


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_a_warning(error, tiny, tmp_path, monkeypatch):
    usual = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        usual(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(UserWarning, match="this file system cannot confirm that new names are on disk"):
        save(tmp_path / "model", *tiny)
    load(tmp_path / "model")


def test_a_directory_that_cannot_be_listed_is_not_synced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "open", None)
    files.sync(tmp_path)


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path):
    from matplotlib.figure import Figure

    from jaxgpt.pictures import style

    class Full(Figure):
        def savefig(self, file, **options):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    style.save(Figure(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError, match="No space"):
        style.save(Full(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]

"""Runs in a bucket of Google Cloud Storage: against an emulator on loopback, with the real clients.

Run with `pip install -e '.[test,gs]' gcp-storage-emulator && pytest -n0 -m "" tests/test_buckets.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from http.server import ThreadingHTTPServer

import jax
import numpy as np
import pytest
from test_trainer import CONFIG, TEXT, TOML, assert_same_run, metrics, stopping_after

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.data import Tokens
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.training import lease, storage, trainer
from jaxgpt.training.checkpoints import Checkpoints
from jaxgpt.training.models import load_run
from jaxgpt.training.run_directory import Run
from jaxgpt.training.trainer import train

REASON = "needs pip install 'jaxgpt[gs]' gcp-storage-emulator"
server = pytest.importorskip("gcp_storage_emulator.server", reason=REASON)
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects", reason=REASON)
pytest.importorskip("gcsfs", reason=REASON)

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.usefixtures("compiled_quickly"),
    # Google's and fsspec's clients leave sockets and event loops to the end of the process.
    pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"),
]

BUCKET = "a-bucket"
# What makes another process compute as this one does.
LIKE_HERE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}


ONE_AT_A_TIME = threading.Lock()


def with_generations(handler):
    """A handler of the emulator that also keeps the conditions on an object's generation, which the emulator ignores,
    and tells the generation of what it sends."""

    def checked(request, response, files, *args, **kwargs):
        # The body is read before the lock is taken: a client that stops in the middle of it must not stop all others.
        data = request.data
        with ONE_AT_A_TIME:
            return on_condition(data if isinstance(data, dict) else {}, request, response, files, *args, **kwargs)

    def on_condition(data, request, response, files, *args, **kwargs):
        name = (
            request.params.get("object_id")
            or request.query.get("name", [None])[0]
            or (data.get("meta") or data).get("name")
        )
        found = files.objects.get(request.params["bucket_name"], {}).get(name, {"generation": "0"})["generation"]
        if request.query.get("ifGenerationMatch", [found])[0] != found:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        if request.query.get("ifGenerationNotMatch", [None])[0] == found:
            response.status = HTTPStatus.NOT_MODIFIED
            return None
        response["x-goog-generation"] = found
        return handler(request, response, files, *args, **kwargs)

    return checked


@pytest.fixture(scope="module", autouse=True)
def emulator():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for _, methods in server.HANDLERS:
            for method, handler in list(methods.items()):
                if handler in (objects.insert, objects.delete, objects.get, objects.download):
                    patch.setitem(methods, method, with_generations(handler))
        # Clients keep connections, and the emulator otherwise serves one after the other.
        patch.setattr("http.server.HTTPServer", ThreadingHTTPServer)
        patch.setattr("socketserver.BaseServer.handle_error", lambda *_: None)  # clients close connections early
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://127.0.0.1:{port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")  # for TensorStore
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # another client, without an emulator
        running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
        running.start()
        yield running
        running.stop()


@pytest.fixture
def files(emulator):
    """The emulator's objects of the bucket, by name."""
    emulator.wipe(keep_buckets=True)
    return emulator._storage.objects.setdefault(BUCKET, {})


@pytest.fixture
def quick(monkeypatch):
    """A lock is renewed, and taken over, soon."""
    monkeypatch.setattr(lease, "RENEWAL", 0.1)
    monkeypatch.setattr(lease, "STALE", 1.0)


@pytest.fixture(scope="module")
def tokens():
    return Tokens.from_text(TEXT, "bytes")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokens):
    """The directory of the run that never stopped, on a disk."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(CONFIG, tokens, directory)
    return directory


OUT = f"gs://{BUCKET}/runs/one"


def test_a_run_in_a_bucket_equals_the_one_on_a_disk(files, tokens, undisturbed, tmp_path, capsys):
    result = train(CONFIG, tokens, OUT)
    assert_same_run(OUT, undisturbed)
    assert f"in {OUT}. To try it: jaxgpt generate --model {OUT} --prompt The" in capsys.readouterr().err
    names = {name.removeprefix("runs/one/") for name in files}
    assert {"run.json", "metrics.jsonl", "loss.png", "checkpoints/8/commit_success.txt"} <= names
    assert ".lock" not in names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"6", "8"}
    step, model, params = load_run(OUT)
    assert step == result.step
    assert jaxgpt.load(OUT)[0] == model
    jax.tree.map(np.testing.assert_array_equal, params, result.params)
    assert main(["export", OUT, str(tmp_path / "model")]) == 0
    jax.tree.map(np.testing.assert_array_equal, jaxgpt.load(tmp_path / "model")[1], params)
    assert main(["generate", "--model", OUT, "--prompt", "The", "--max-new-tokens", "4", "--greedy"]) == 0


def test_a_stopped_run_resumes_bit_for_bit(files, tokens, undisturbed, monkeypatch):
    with stopping_after(monkeypatch, 5):
        assert train(CONFIG, tokens, OUT).stopped_by == signal.SIGTERM
    assert [line["step"] for line in metrics(OUT)][-1] == 5
    train(None, tokens, OUT, resume=True)
    assert_same_run(OUT, undisturbed)


def test_a_killed_trainers_lock_is_taken_over_and_its_run_resumes_bit_for_bit(files, quick, tmp_path, capsys):
    """SIGKILL while a checkpoint is being written: what stays is a lock, a part of a checkpoint, and metrics."""
    (tmp_path / "config.toml").write_text(TOML)
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["train", str(tmp_path / "config.toml"), "--data", str(tmp_path / "text.txt"), "--set", "steps=12"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxgpt", *command, "--out", OUT], env={**os.environ, **LIKE_HERE}
    )
    while not any("/checkpoints/6/" in name for name in list(files)):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert "runs/one/.lock" in files
    steps = [int(found[1]) for name in files if (found := re.search(r"checkpoints/(\d+)/commit_success", name))]
    assert steps, "no checkpoint was complete"
    assert max(line["step"] for line in Run(OUT).read_metrics()) >= max(steps)
    assert main(["train", "--resume", OUT]) == 0
    assert "waiting 1 seconds to see whether its trainer lives" in capsys.readouterr().err
    assert_same_run(OUT, tmp_path / "whole", dataclasses.replace(CONFIG, steps=12, sample_tokens=0))


def test_a_checkpoint_that_is_not_complete_does_not_count(files, tokens, undisturbed):
    train(dataclasses.replace(CONFIG, keep=3), tokens, OUT)
    with contextlib.closing(Checkpoints(Run(OUT).checkpoints, read_only=True)) as checkpoints:
        assert checkpoints.steps() == [4, 6, 8]
    del files["runs/one/checkpoints/8/commit_success.txt"]
    with contextlib.closing(Checkpoints(Run(OUT).checkpoints, read_only=True)) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    train(None, tokens, OUT, resume=True)
    assert_same_run(OUT, undisturbed)


def test_a_damaged_checkpoint_is_stepped_over(files, emulator, tokens, undisturbed, capsys):
    train(dataclasses.replace(CONFIG, keep=3), tokens, OUT)
    for name in [name for name in files if "/checkpoints/8/state/" in name and "/d/" in name]:
        content = emulator._storage.get_file(BUCKET, name)
        emulator._storage.create_file(BUCKET, name, content[: len(content) // 2], files[name])
    train(None, tokens, OUT, resume=True)
    assert "falling back to the checkpoint before it" in capsys.readouterr().err
    assert_same_run(OUT, undisturbed)


def test_one_trainer_at_a_time(files, quick):
    with Run(OUT).locked():
        with pytest.raises(CheckpointError, match="another trainer is running in this directory"), Run(OUT).locked():
            pass
        assert "runs/one/.lock" in files
    assert "runs/one/.lock" not in files


def test_a_trainer_whose_lock_was_taken_ends_and_leaves_it(files, quick):
    run = Run(OUT)

    def lose_it():
        with run.locked():
            files["runs/one/.lock"]["generation"] = "7"  # another's, with another text
            run.storage._lease._text = "this one's"
            run.storage._lease._renewer.join(60)  # it ends once the lock is lost
            run.append({"step": 1, "loss": 1.0})
            run.flush()

    with pytest.raises(CheckpointError, match="it took over"):
        lose_it()
    assert files["runs/one/.lock"]["generation"] == "7"
    assert "runs/one/metrics.jsonl" not in files


def test_metrics_reach_the_bucket_before_their_checkpoint(files, tokens, monkeypatch):
    seen = {}
    save = Checkpoints.save

    def watched(checkpoints, step, state, loss=None):
        seen[step] = [line["step"] for line in Run(OUT).read_metrics()]
        save(checkpoints, step, state, loss)

    monkeypatch.setattr(Checkpoints, "save", watched)
    train(CONFIG, tokens, OUT)
    assert {step: max(steps) for step, steps in seen.items()} == {2: 2, 4: 4, 6: 6, 8: 8}


def test_without_a_checkpoint_metrics_reach_the_bucket_now_and_then(files, monkeypatch):
    run = Run(OUT)
    run.append({"step": 1, "loss": 1.0})
    assert not run.read_metrics()
    monkeypatch.setattr(storage, "FLUSH", 0)
    run.append({"step": 2, "loss": 1.0})
    assert [line["step"] for line in Run(OUT).read_metrics()] == [1, 2]


def test_the_tokenizers_files_are_read_back(files, tmp_path):
    run = Run(OUT)
    with run.storage.replacing(run.tokenizer, last="b") as directory:
        for name in "abc":
            (directory / name).write_text(name)
    with run.storage.replacing(run.tokenizer, last="b") as directory:
        for name in "bc":
            (directory / name).write_text(name.upper())
    with run.storage.reading(run.tokenizer) as copy:
        assert {path.name: path.read_text() for path in copy.iterdir()} == {"b": "B", "c": "C"}


def test_a_bucket_that_does_not_exist_is_told_before_the_first_step(files, tokens, monkeypatch):
    monkeypatch.setattr(trainer, "prepare", lambda *_, **__: pytest.fail("went as far as the data"))
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"there is no bucket another: make it first \(gcloud storage"):
            train(None if resume else CONFIG, tokens, "gs://another/run", resume=resume)


def test_credentials_that_are_missing_or_do_not_suffice_are_told_before_the_first_step(files, tokens, monkeypatch):
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud.storage import Client

    monkeypatch.setattr(trainer, "prepare", lambda *_, **__: pytest.fail("went as far as the data"))
    for error, told in (
        (DefaultCredentialsError("none"), "no credentials: log in with gcloud auth application-default login"),
        (exceptions.Forbidden("no storage.buckets.get"), r"storage\.legacyBucketReader.*no storage\.buckets\.get"),
        (ConnectionError("refused"), r"the bucket cannot be reached \(refused\)"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(Client, "get_bucket", fail)
        with pytest.raises(CheckpointError, match=told):
            train(CONFIG, tokens, OUT)


def test_a_directory_in_a_bucket_is_named_by_its_url(files):
    for place in (storage.storage("GS://b/runs/one/"), Run("gs://b/runs/one", writes=False).storage):
        assert (place.holds_run(), place.absolute(), place.name) == (True, "gs://b/runs/one", "one")


def test_a_run_that_is_not_there_is_told(files, capsys):
    assert main(["generate", "--model", OUT, "--prompt", "a"]) == 2
    assert f"{OUT}: holds no run (no run.json)" in capsys.readouterr().err


def test_a_bucket_that_fails_while_it_is_written_is_one_line(files, tokens, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the network is down")

    with contextlib.closing(Checkpoints(Run(OUT).checkpoints)) as checkpoints:
        checkpoints.save(1, {"a": jax.numpy.ones(3)})
        checkpoints.finish()
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(
            CheckpointError, match="step 2 could not be written, earlier checkpoints are untouched: the"
        ):
            checkpoints.save(2, {"a": jax.numpy.ones(3)})
    run = Run(OUT)
    run.append({"step": 1, "loss": 1.0})
    monkeypatch.setattr(type(run.metrics), "write_text", fail)
    with pytest.raises(CheckpointError, match="could not be written: the network is down"):
        run.flush()


def test_tensorboard_cannot_log_a_run_in_a_bucket(files, tokens):
    with pytest.raises(ConfigError, match="tensorboard adds to files, which gs://"):
        train(CONFIG, tokens, OUT, log_to=["tensorboard"])
    assert not files

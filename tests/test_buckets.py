"""Runs in a bucket of Google Cloud Storage: against an emulator on loopback, with the real clients.

Run with `pip install -e '.[test,gs]' gcp-storage-emulator && pytest -n0 -m "" tests/test_buckets.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path

import jax
import numpy as np
import pytest
from test_trainer import CONFIG, TEXT, TOML, assert_same_run, metrics, stopping_after

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.data import Tokens
from jaxgpt.errors import CheckpointError, ConfigError
from jaxgpt.training import loop as trainer
from jaxgpt.training import storage
from jaxgpt.training.checkpoints import Checkpoints
from jaxgpt.training.loop import train
from jaxgpt.training.models import load_run
from jaxgpt.training.run_directory import Run

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




def on_condition(handler):
    """A handler of the emulator that also keeps `ifGenerationMatch`, which the emulator ignores."""

    def checked(request, response, files, *args, **kwargs):
        if wanted := request.query.get("ifGenerationMatch"):
            name = request.params.get("object_id") or request.query.get("name", [None])[0] or request.data["meta"]["name"]
            found = files.objects.get(request.params["bucket_name"], {}).get(name, {"generation": "0"})
            if found["generation"] != wanted[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
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
                if handler in (objects.insert, objects.delete):
                    patch.setitem(methods, method, on_condition(handler))
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
    monkeypatch.setattr(storage, "RENEWAL", 0.1)
    monkeypatch.setattr(storage, "STALE", 1.0)


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

"""Training runs: what they write, exact resume, and what happens to a bad run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import exhaustive, make_model, random_ids, to_numpy, to_toml

import jaxgpt
from jaxgpt import accounting
from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.data import Corpus, Mixture, Shard, Tokens
from jaxgpt.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError, TrainingError
from jaxgpt.model import reference
from jaxgpt.parallel import memory
from jaxgpt.training import evaluation, loop, preparation, progress, signals, speed
from jaxgpt.training import step as train_step
from jaxgpt.training.checkpoints import Checkpoints, _checksum, import_orbax
from jaxgpt.training.config import LoraConfig, TrainConfig
from jaxgpt.training.evaluation import evaluate
from jaxgpt.training.models import load_run
from jaxgpt.training.run_directory import Run
from jaxgpt.training.trainer import train

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TEXT = "The cat sat on the mat. The dog sat on the log. The cat saw the dog. " * 12
MODEL = GPTConfig(
    vocab_size=257, context_length=16, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.1, tokenizer="bytes"
)
CONFIG = TrainConfig(
    model=MODEL,
    steps=8,
    batch_size=4,
    warmup_steps=2,
    learning_rate=1e-2,
    ema_decay=0.9,
    log_interval=1,
    eval_interval=4,
    checkpoint_interval=2,
    sample_tokens=4,
    sample_prompt="The",
    seed=5,
)
TOML = """
[model]
vocab_size = 257
context_length = 16
emb_dim = 16
n_heads = 2
n_layers = 1
drop_rate = 0.1
tokenizer = "bytes"

[train]
steps = 8
batch_size = 4
warmup_steps = 2
learning_rate = 1e-2
ema_decay = 0.9
log_interval = 1
eval_interval = 4
checkpoint_interval = 2
seed = 5
"""


@pytest.fixture(scope="module")
def tokens():
    return Tokens.from_text(TEXT, "bytes")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokens):
    """(directory, result) of the run that never stopped."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return directory, train(CONFIG, tokens, directory)


def final_state(directory, config=CONFIG):
    with contextlib.closing(Checkpoints(Run(directory).checkpoints, read_only=True)) as checkpoints:
        return checkpoints.restore(checkpoints.steps()[-1], train_step.abstract_state(config))


def metrics(directory):
    """The run's metrics without those that depend on the clock."""
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in Run(directory).read_metrics()]


def assert_same_run(directory, other, config=CONFIG):
    mine, theirs = final_state(directory, config), final_state(other, config)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert metrics(directory) == metrics(other)


@contextlib.contextmanager
def stopping_after(monkeypatch, step, number=signal.SIGTERM):
    """Sends the process a signal once `step` steps have been requested."""
    make_batch = loop.Loop.global_batch

    def stop(loop, at):
        if at == step - 1:
            os.kill(os.getpid(), number)
        return make_batch(loop, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "global_batch", stop)
        yield


def test_a_run_learns_and_writes_what_it_should(undisturbed, tokens):
    directory, result = undisturbed
    lines = metrics(directory)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert losses[-1] < losses[0] - 0.5
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8]
    assert result.step == 8
    assert result.stopped_by is None
    assert (directory / "loss.png").read_bytes()[:4] == b"\x89PNG"
    described = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    assert TrainConfig.from_dict(described["config"]) == CONFIG
    assert described["data"]["sources"][0]["identity"] == tokens.identity
    assert described["versions"]["jax"] == jax.__version__


def test_validation_loss_is_the_references_on_the_averaged_parameters(undisturbed, tokens):
    directory, result = undisturbed
    val_N = np.asarray(tokens.split(0.1)[1], np.int64)
    state = final_state(directory)
    total = 0.0
    for start in range(0, len(val_N) - 1, 16):
        window = val_N[None, start : start + 17]
        total += reference.loss(to_numpy(state["ema_params"]), MODEL, window) * (window.shape[1] - 1)
    assert result.val_loss == pytest.approx(total / (len(val_N) - 1), rel=1e-5)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(state["ema_params"]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, exhaustive(signal.SIGINT)])
def test_a_run_that_is_stopped_and_resumed_equals_the_undisturbed_one(
    tmp_path, tokens, undisturbed, monkeypatch, number
):
    with stopping_after(monkeypatch, 3, number):
        stopped = train(CONFIG, tokens, tmp_path)
    assert stopped.stopped_by == number
    assert stopped.step == 3  # between two checkpoint intervals: the signal saved it
    assert train(CONFIG, tokens, tmp_path, resume=True).stopped_by is None
    assert_same_run(tmp_path, undisturbed[0])


@pytest.mark.parametrize("grad_accumulation", [1, 2])
def test_steps_of_one_program_are_those_of_several_to_the_last_bit(grad_accumulation):
    config = dataclasses.replace(CONFIG, grad_accumulation=grad_accumulation)
    ids = np.random.default_rng(0).integers(0, 257, (train_step.MOST_AT_ONCE, 4, 17)).astype(np.int32)
    steps = train_step.jit_steps(config)
    state, losses = train_step.init_state(config), []
    for i in range(5):
        state, metrics = steps(state, np.roll(ids, -i, axis=0), 1)
        losses.append(metrics["loss"][0])
    at_once, metrics = steps(train_step.init_state(config), ids, 5)
    assert at_once["step"] == 5
    jax.tree.map(np.testing.assert_array_equal, at_once, state)
    np.testing.assert_array_equal(metrics["loss"], [*losses, 0, 0, 0])
    one = train_step.jit_step(config)(train_step.init_state(config), ids[0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one[1]["loss"], losses[0])


def test_a_run_that_does_several_steps_at_once_is_the_same(tmp_path, tokens, monkeypatch):
    config = dataclasses.replace(CONFIG, steps=24, log_interval=4, eval_interval=10, checkpoint_interval=24)
    monkeypatch.setattr(loop, "steps_at_once", lambda seconds: 8)
    at_once, done = [], loop.Loop.batches
    monkeypatch.setattr(loop.Loop, "batches", lambda loop, steps: at_once.append(len(steps)) or done(loop, steps))
    train(config, tokens, tmp_path / "several")
    # One by one until it is known how long the first took that are logged; then up to whatever is due.
    assert at_once == [1, 1, 1, 1, 1, 3, 2, 2, 4, 4, 4]
    monkeypatch.setattr(loop, "steps_at_once", lambda seconds: 1)
    train(config, tokens, tmp_path / "single")
    assert at_once[11:] == [1] * 24
    assert_same_run(tmp_path / "several", tmp_path / "single", config)
    monkeypatch.setattr(loop, "steps_at_once", lambda seconds: 8)
    with stopping_after(monkeypatch, 6):
        stopped = train(config, tokens, tmp_path / "stopped")
    assert (stopped.step, stopped.stopped_by) == (8, signal.SIGTERM)  # at the end of the program that did step 6
    train(config, tokens, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "several", config)


def test_slow_steps_are_done_one_by_one():
    assert [train_step.steps_at_once(seconds) for seconds in (0.01, 1.5, 2.5, 3.5, 60.0)] == [8, 4, 2, 1, 1]


def test_resume_steps_over_a_damaged_checkpoint_and_says_so(tmp_path, tokens, undisturbed, monkeypatch, capsys):
    with stopping_after(monkeypatch, 5):
        train(CONFIG, tokens, tmp_path)
    files = [path for path in (tmp_path / "checkpoints" / "5" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
    largest.write_bytes(raw)
    train(CONFIG, tokens, tmp_path, resume=True)
    assert "falling back" in capsys.readouterr().err
    assert_same_run(tmp_path, undisturbed[0])


def test_a_damaged_checkpoint_says_why_once(tmp_path, caplog):
    """Orbax abandons its reads of the other arrays at the damage; none of them may report an error too."""
    rng = np.random.default_rng(0)
    state = {f"array_{i}": rng.normal(size=(50, 50)).astype(np.float32) for i in range(300)}
    with contextlib.closing(Checkpoints(tmp_path / "c")) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.finish()
        for path in (tmp_path / "c" / "1" / "state").rglob("d/*"):
            raw = np.fromfile(path, np.uint8)
            raw[::1000] ^= 0x55
            raw.tofile(path)
        with pytest.raises(CheckpointError, match=r"cannot be restored: .*OCDBT"):
            checkpoints.restore(1, jax.eval_shape(lambda: state))
    gc.collect()  # what is reported here fails the test: pytest treats unraisable exceptions as errors
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_full_disk_says_why_once(tmp_path, caplog):
    """Orbax abandons its writes of the other arrays at the first failure; none of them may report an error too."""
    rng = np.random.default_rng(0)
    state = {f"array_{i}": rng.normal(size=(50, 50)).astype(np.float32) for i in range(300)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(Checkpoints(tmp_path / "c")) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # only the arrays' file is larger
        try:
            checkpoints.save(2, state)
            with pytest.raises(CheckpointError, match=r"could not be written, .*: OUT_OF_RANGE: Error writing"):
                checkpoints.finish()
            gc.collect()  # as above
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.steps() == [1]
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "bool"])
def test_a_checksum_changes_with_any_element_and_any_exchange(kind):
    rng = np.random.default_rng(0)
    x = jax.numpy.asarray(np.maximum(10 * rng.normal(size=(3, 4, 5)), 0)).astype(kind)
    whole = int(_checksum(x))
    for at in np.ndindex(x.shape):
        changed = x.at[at].set(~x[at] if kind == "bool" else x[at] + 1)
        assert int(_checksum(changed)) != whole
    assert int(_checksum(x.swapaxes(0, 2).swapaxes(0, 2))) == whole
    assert int(_checksum(x[::-1])) != whole


def test_checksums_find_damage_that_the_storage_does_not(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32), "b": {"c": np.ones(3, np.float32)}}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state)
    checkpoints.finish()
    abstract = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, state))
    checkpoints.restore(1, abstract)
    manifest = tmp_path / "c" / "1" / "manifest" / "metadata"
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    entries["b/c"][0] ^= 1
    manifest.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(CheckpointError, match="damaged: b/c"):
        checkpoints.restore(1, abstract)
    checkpoints.close()


def test_a_run_goes_on_while_its_checkpoint_is_written(tmp_path, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    options = import_orbax().CheckpointManagerOptions

    def held_up(**kwargs):
        def wait():
            started.set()
            go_on.wait(60)

        return options(**kwargs, async_options=import_orbax().AsyncOptions(post_finalization_callback=wait))

    monkeypatch.setattr(import_orbax(), "CheckpointManagerOptions", held_up)
    with contextlib.closing(Checkpoints(tmp_path / "c")) as checkpoints:
        add_one = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = jax.numpy.arange(100_000, dtype=jax.numpy.float32)
        checkpoints.save(1, {"x": x})
        for _ in range(3):
            x = add_one(x)
        assert started.wait(60)
        checkpoints.check()  # does not wait either
        assert checkpoints._manager.is_saving_in_progress()
        go_on.set()
        checkpoints.finish()
        assert not checkpoints._manager.is_saving_in_progress()
        saved = checkpoints.restore(1, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
        np.testing.assert_array_equal(saved["x"], np.arange(100_000))
        np.testing.assert_array_equal(x, np.arange(100_000) + 3)


def test_a_write_that_fails_in_the_background_is_told_at_the_next_check(tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path / "c")) as checkpoints:
        checkpoints.save(1, {"x": np.zeros(3)})
        checkpoints.finish()

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._manager._checkpoint_deleter, "delete_steps", fail)
        checkpoints.save(2, {"x": np.ones(3)})
        while checkpoints._manager.is_saving_in_progress():
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written, .* No space left"):
            checkpoints.check()
        checkpoints.check()  # told once


def test_the_latest_few_and_the_best_checkpoint_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan"))]:
        checkpoints.save(step, {"a": np.zeros(2)}, loss)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(tmp_path, tokens, undisturbed, monkeypatch, caplog):
    """Simulates a full disk: from the fifth step on, no file may grow beyond a few kilobytes."""
    make_batch, (soft, hard) = loop.Loop.global_batch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(loop, at):
        if at == 4:
            loop.checkpoints.finish()
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        return make_batch(loop, at)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "global_batch", fill)
        try:
            message = "step 6 could not be written, earlier checkpoints are untouched: .* File too large"
            with pytest.raises(CheckpointError, match=message):
                train(CONFIG, tokens, tmp_path)
            gc.collect()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with contextlib.closing(Checkpoints(Run(tmp_path).checkpoints, read_only=True)) as checkpoints:
        assert checkpoints.steps()[-1] == 4
    assert not [record for record in caplog.records if record.name == "asyncio"]
    train(CONFIG, tokens, tmp_path, resume=True)
    assert_same_run(tmp_path, undisturbed[0])


def test_a_damaged_checkpoint_goes_only_when_a_good_one_has_come(tmp_path, tokens, undisturbed, monkeypatch):
    with stopping_after(monkeypatch, 5):
        train(CONFIG, tokens, tmp_path)
    (tmp_path / "checkpoints" / "5" / "manifest" / "metadata").write_text("{}")
    abstract = train_step.abstract_state(CONFIG)
    with contextlib.closing(Checkpoints(Run(tmp_path).checkpoints, keep=1)) as checkpoints:
        before = checkpoints.steps()
        assert before == [4, 5]
        warned: list[str] = []
        step, state = checkpoints.restore_latest(abstract, warned.append)
        assert (step, len(warned)) == (4, 1)

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", full)
            with pytest.raises(CheckpointError, match=r"earlier checkpoints are untouched: .*No space left"):
                checkpoints.save(6, state)
        assert sorted(checkpoints._manager.all_steps()) == [4, 5]
        checkpoints.save(6, state)
        assert sorted(checkpoints._manager.all_steps()) == [5, 6]  # until the next is on disk
        checkpoints.finish()
        assert sorted(checkpoints._manager.all_steps()) == [6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c, seed=6), r"train\.seed: 5 before, 6 now"),
        exhaustive(lambda c: dataclasses.replace(c, learning_rate=1e-3), r"train\.learning_rate"),
        exhaustive(lambda c: dataclasses.replace(c, model=c.model.replace(drop_rate=0.2)), r"model\.drop_rate_attn"),
    ],
)
def test_resume_with_another_config_is_refused_unless_forced(tmp_path, tokens, monkeypatch, change, message):
    with stopping_after(monkeypatch, 2):
        train(CONFIG, tokens, tmp_path)
    with pytest.raises(ConfigError, match=message):
        train(change(CONFIG), tokens, tmp_path, resume=True)
    forced = train(change(CONFIG), tokens, tmp_path, resume=True, force=True)
    assert forced.step == 8
    assert Run(tmp_path).config() == change(CONFIG)


@pytest.mark.exhaustive
def test_a_forced_resume_that_cannot_work_leaves_the_run_as_it_was(tmp_path, tokens, monkeypatch):
    with stopping_after(monkeypatch, 2):
        train(CONFIG, tokens, tmp_path)
    wider = dataclasses.replace(CONFIG, model=MODEL.replace(emb_dim=32))
    with pytest.raises(CheckpointError, match="no checkpoint fits"):
        train(wider, tokens, tmp_path, resume=True, force=True)
    assert Run(tmp_path).config() == CONFIG
    assert train(CONFIG, tokens, tmp_path, resume=True).step == 8


def test_an_update_that_ruins_the_parameters_is_not_saved(tmp_path, tokens):
    config = dataclasses.replace(CONFIG, steps=6, val_fraction=0.0, learning_rate=1e30, warmup_steps=0, keep=1)
    with pytest.raises(TrainingError):
        train(config, tokens, tmp_path)
    with contextlib.closing(Checkpoints(Run(tmp_path).checkpoints, read_only=True)) as checkpoints:
        assert checkpoints.steps() == []


def test_a_passing_error_while_restoring_deletes_nothing(tmp_path, tokens, monkeypatch):
    with stopping_after(monkeypatch, 5):
        train(CONFIG, tokens, tmp_path)

    def failing(*_, **__):
        raise RuntimeError("a passing fault")

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    before = checkpoints.steps()
    monkeypatch.setattr(import_orbax().StandardCheckpointHandler, "restore", failing)
    with pytest.raises(CheckpointError, match="no checkpoint fits"):
        checkpoints.restore_latest(train_step.abstract_state(CONFIG), print)
    checkpoints.close()
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", read_only=True)) as again:
        assert again.steps() == before == [4, 5]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit_with_their_codes(tmp_path, monkeypatch, number, code):
    (tmp_path / "config.toml").write_text(TOML, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with stopping_after(monkeypatch, 3, number):
        arguments = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
        assert main(["train", str(tmp_path / "config.toml"), *arguments]) == code
    assert int(final_state(tmp_path / "run")["step"]) == 3


def test_a_signal_that_comes_twice_at_once_counts_once(monkeypatch):
    # As when a whole job is signalled, and the parent of --restarts passes its own signal on.
    with signals.collected() as received:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert received == [signal.SIGTERM]
    monkeypatch.setattr(signals, "_ECHO", -1.0)
    with signals.collected():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_with_other_data_is_refused(undisturbed):
    with pytest.raises(ConfigError, match="data the tokens: identity"):
        train(CONFIG, Tokens.from_text(TEXT + "!", "bytes"), undisturbed[0], resume=True)


def test_two_runs_in_one_directory_are_refused(undisturbed, tokens):
    directory, _ = undisturbed
    before = metrics(directory)
    with pytest.raises(CheckpointError, match=r"jaxgpt train --resume .* continues it"):
        train(CONFIG, tokens, directory)
    with Run(directory).locked(), pytest.raises(CheckpointError, match="another trainer is running"):
        train(CONFIG, tokens, directory, resume=True)
    assert metrics(directory) == before


def test_a_run_resumes_from_its_directory_alone(tmp_path, undisturbed, monkeypatch, capsys):
    """Also from another working directory, and although the config file alone says something else."""
    (tmp_path / "config.toml").write_text(TOML.replace("steps = 8", "steps = 80"), encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with stopping_after(monkeypatch, 3):
        assert main(["train", "config.toml", "--data", "text.txt", "--out", "run", "--set", "steps=8"]) == 143
    assert "stopped by SIGTERM at step 3: jaxgpt train --resume run continues" in capsys.readouterr().err
    assert main(["train", "config.toml", "--resume", "run"]) == 2
    err = capsys.readouterr().err
    assert "config.toml differs from the config of run: train.steps: 8 before, 80 now" in err
    assert "--force" not in err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "../run"]) == 0
    assert_same_run(tmp_path / "run", undisturbed[0], dataclasses.replace(CONFIG, sample_tokens=0))
    (tmp_path / "text.txt").write_text(TEXT + "!", encoding="utf-8")
    assert main(["train", "--resume", "../run"]) == 2
    assert "data text.txt: identity" in capsys.readouterr().err
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    assert main(["train", "--resume", "../run"]) == 2
    assert f"no longer at {tmp_path / 'text.txt'}: say where it is now (--data)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "seed=6"], "train.seed: 5 before, 6 now"),
        (["--set", "steps=4"], "train.steps: 8 before, 4 now"),  # it would cut the run short
        (["--set", "model.n_layers=3"], "model.n_layers: 1 before, 3 now"),
        (["--init-from", "shakespeare"], "init-from: None before, 'shakespeare' now"),
        (["--data", "other.txt"], "data other.txt: identity"),
    ],
)
def test_what_is_given_to_a_resumed_run_and_differs_is_named(
    arguments, told, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT + "!", encoding="utf-8")
    before = metrics(undisturbed[0])
    data = [] if "--data" in arguments else ["--data", "text.txt"]
    assert main(["train", "--resume", str(undisturbed[0]), *data, *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.index("jaxgpt train --resume") < err.index("--force")  # which is never the first advice
    assert metrics(undisturbed[0]) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "run"], "a new run needs CONFIG and --data FILE"),
        (["config.toml", "--out", "run"], "a new run needs CONFIG and --data FILE"),
        (["--resume", "run"], "holds no run"),
        (["--resume", ""], "a path is empty"),
        (["config.toml", "--data", "text.txt", "--out", ""], "a path is empty"),
    ],
)
def test_arguments_that_neither_start_a_run_nor_continue_one(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_a_finished_run_says_so_and_can_be_trained_longer(undisturbed, tokens, tmp_path, capsys):
    run = shutil.copytree(undisturbed[0], tmp_path / "run")
    with pytest.raises(ConfigError, match="does not say where the run's data is"):  # it was given as tokens
        train(None, None, run, resume=True)
    tokens.save(tmp_path / "text.tokens")
    assert main(["train", "--resume", str(run), "--data", str(tmp_path / "text.tokens")]) == 0
    finished, done = capsys.readouterr().err.splitlines()
    assert finished == (
        f"the run is finished: step 8 of 8; to train longer: jaxgpt train --resume {run} --set steps=16"
    )
    assert done.startswith("done. Best: step ")
    assert_same_run(run, undisturbed[0])
    assert main(["train", "--resume", str(run), "--set", "steps=10"]) == 0  # it knows its data now
    assert "steps: 8 before, 10 now" in capsys.readouterr().err
    longer = dataclasses.replace(CONFIG, steps=10)
    assert int(final_state(run, longer)["step"]) == 10
    assert Run(run).config() == longer
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 11))


@pytest.mark.exhaustive
def test_a_config_file_that_differs_resumes_a_run_if_forced(undisturbed, tokens, tmp_path, capsys):
    run = shutil.copytree(undisturbed[0], tmp_path / "run")
    tokens.save(tmp_path / "text.tokens")
    (tmp_path / "config.toml").write_text(TOML.replace("steps = 8", "steps = 9").replace("= 1e-2", "= 1e-3"))
    arguments = ["train", str(tmp_path / "config.toml"), "--resume", str(run), "--data", str(tmp_path / "text.tokens")]
    assert main(arguments) == 2
    assert "train.steps: 8 before, 9 now; train.learning_rate: 0.01 before, 0.001 now" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert Run(run).config() == dataclasses.replace(
        CONFIG, steps=9, learning_rate=1e-3, sample_tokens=0, sample_prompt=""
    )


@pytest.mark.exhaustive
def test_a_fine_tuning_resumes_although_its_first_model_is_gone(two_layers, tmp_path, tokens, monkeypatch):
    with stopping_after(monkeypatch, 2):
        train(fine_tuning({}, steps=4), tokens, tmp_path / "run", init_from=two_layers)
    shutil.rmtree(two_layers)
    assert train(None, tokens, tmp_path / "run", resume=True).step == 4


def test_resume_without_a_run_is_refused(tmp_path, tokens):
    with pytest.raises(CheckpointError, match="holds no run"):
        train(CONFIG, tokens, tmp_path, resume=True)


def test_a_loss_that_stays_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, tokens, monkeypatch):
    make_batch = loop.batch

    def poisoned(ids, config, step, *rest):
        ids_BxT1 = make_batch(ids, config, step, *rest)
        return ids_BxT1 + 10**6 if step >= 3 else ids_BxT1

    monkeypatch.setattr(loop, "batch", poisoned)
    config = dataclasses.replace(CONFIG, steps=50, sample_tokens=0)
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to 6.*are good"):
        train(config, tokens, tmp_path)
    state = final_state(tmp_path, config)
    assert int(state["step"]) == 4  # step 4 was bad, and left the parameters unchanged
    assert int(state["updates"]) == 3
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to 6"):
        train(config, tokens, tmp_path, resume=True)  # stopping in between does not reset the count
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_tokens_of_another_tokenizer_or_vocabulary_are_refused(tmp_path, tokens):
    gpt2 = dataclasses.replace(CONFIG, model=MODEL.replace(tokenizer="gpt2", vocab_size=50257))
    with pytest.raises(DataError, match=r"'bytes'.*'gpt2'"):
        train(gpt2, tokens, tmp_path)
    narrow = dataclasses.replace(CONFIG, model=MODEL.replace(vocab_size=100), sample_tokens=0)
    with pytest.raises(DataError, match="outside the vocabulary: 0 to 99"):
        train(narrow, tokens, tmp_path)
    wordless = dataclasses.replace(CONFIG, model=MODEL.replace(vocab_size=256), sample_prompt="")
    with pytest.raises(
        ConfigError, match=r"sample_prompt: the prompt '' starts from the token '<\|endoftext\|>', id 256"
    ):
        train(wordless, tokens, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocab_size", [exhaustive(256), 259])
def test_a_model_with_more_or_fewer_ids_than_its_tokenizer_is_evaluated_and_sampled(
    vocab_size, tmp_path, tokens, monkeypatch
):
    said = []
    monkeypatch.setattr("jaxgpt.training.progress.TrainProgress.say", lambda self, text: said.append(text))
    ids = np.where(np.arange(len(tokens.ids_N)) % 7, tokens.ids_N, vocab_size - 1).astype(np.uint16)
    config = dataclasses.replace(CONFIG, model=MODEL.replace(vocab_size=vocab_size), steps=4)
    result = train(config, Tokens((Shard(ids),), "bytes", vocab_size), tmp_path / "run")
    assert math.isfinite(result.val_loss)
    assert any(text.startswith("The") for text in said), said


def test_bfloat16_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"compute\.param_dtype must be float32"):
        dataclasses.replace(CONFIG, compute=ComputeConfig(param_dtype="bfloat16"))


def test_without_the_extra_a_run_names_it_and_starts_nothing(tmp_path, tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(jaxgpt.MissingExtraError, match=r"jaxgpt\[train\]"):
        train(CONFIG, tokens, tmp_path)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.exhaustive
def test_validation_windows_are_as_long_as_the_training_ones(tmp_path, tokens):
    config = dataclasses.replace(CONFIG, seq_len=8, steps=4, sample_tokens=0)
    result = train(config, tokens, tmp_path)
    model, val_N = jaxgpt.GPT(MODEL), tokens.split(0.1)[1]
    assert result.val_loss == pytest.approx(evaluate(model, result.params, val_N, seq_len=8).loss)
    assert result.val_loss != pytest.approx(evaluate(model, result.params, val_N).loss)


def test_the_best_is_saved_whatever_the_interval(tmp_path, tokens):
    config = dataclasses.replace(CONFIG, eval_interval=3, checkpoint_interval=100, sample_tokens=0, keep=1)
    train(config, tokens, tmp_path)
    losses = Run(tmp_path).val_losses()
    assert sorted(losses) == [3, 6, 8]
    step, _, _ = load_run(tmp_path, "best")
    assert step == min(losses, key=losses.get)


@pytest.mark.exhaustive
def test_the_books_chapter_5_in_short(tmp_path):
    """configs/the-verdict.toml with a smaller model, trained on this project's prose, memorises its training text."""
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text(encoding="utf-8")[:2000]
    small = ["model.emb_dim=64", "model.n_heads=4", "model.n_layers=2", "model.context_length=32", "model.drop_rate=0"]
    faster = ["learning_rate=0.003", "steps=220", "sample_tokens=0", "eval_interval=110", "checkpoint_interval=220"]
    config = TrainConfig.from_file(root / "configs" / "the-verdict.toml", [*small, *faster])
    assert not config.model.qkv_bias
    assert not config.model.tie_embeddings
    result = train(config, Tokens.from_text(text, "gpt2"), tmp_path)
    lines = metrics(tmp_path)
    assert [line["loss"] for line in lines if "loss" in line][-1] < 1.5
    assert result.val_loss > 4


def test_text_shorter_than_the_context_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="training split has 9 tokens"):
        train(CONFIG, Tokens.from_text("0123456789", "bytes"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sampling_and_evaluation_do_not_touch_the_training(tmp_path, tokens, undisturbed):
    config = dataclasses.replace(CONFIG, eval_interval=8, checkpoint_interval=8, sample_tokens=0, log_interval=3)
    train(config, tokens, tmp_path)
    quiet, full = final_state(tmp_path), final_state(undisturbed[0])
    for a, b in zip(jax.tree.leaves(quiet), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_step_after_a_pause_is_watched_for_a_stall_too(tmp_path, tokens, monkeypatch):
    calls, pause = [], loop.Loop.pause
    for name in ("alive", "rest"):
        monkeypatch.setattr(loop.distributed, name, functools.partial(calls.append, name))
    monkeypatch.setattr(loop.Loop, "pause", lambda *given: (calls.append("pause"), pause(*given)))
    train(dataclasses.replace(CONFIG, eval_interval=4, checkpoint_interval=4, sample_tokens=0), tokens, tmp_path)
    assert [calls[i + 1] for i, call in enumerate(calls) if call == "pause"] == ["alive", "rest"]


TRAINED_WITH = [
    exhaustive({"compute": ComputeConfig(scan_layers=True)}),
    exhaustive({"compute": ComputeConfig(remat="block")}),
    exhaustive({"compute": ComputeConfig(remat="dots", dtype="bfloat16")}),
    exhaustive(
        {
            "model": MODEL.replace(attention_pattern="alternating", attention_window=5),
            "compute": ComputeConfig(scan_layers=True, remat="block"),
        }
    ),
]


@pytest.mark.parametrize("options", TRAINED_WITH)
def test_runs_with_the_models_options(tmp_path, tokens, options):
    config = dataclasses.replace(CONFIG, loss_chunk=13, grad_accumulation=2, **options)
    result = train(config, tokens, tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert result.config == config.model
    assert result.compute == config.compute
    assert load_run(tmp_path, "latest")[1] == jaxgpt.GPT(config.model, config.compute)


def fine_tuning(model, **train):
    """A config in which only these fields of the model are set."""
    return dataclasses.replace(TrainConfig.from_dict({"model": model}), warmup_steps=0, batch_size=4, **train)


def test_fine_tuning_starts_from_the_checkpoint_with_its_architecture(tmp_path, tokens):
    model, params = make_model(MODEL.replace(emb_dim=24, n_layers=2, tie_embeddings=False, drop_rate=0.0))
    jaxgpt.save(tmp_path / "model", model, params)
    config = fine_tuning({"drop_rate": 0.0}, steps=1, learning_rate=1e-9)
    result = train(config, tokens, tmp_path / "run", init_from=str(tmp_path / "model"))
    assert result.config.emb_dim == 24
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    start = evaluate(model, params, tokens.split(0.1)[1]).loss
    assert result.val_loss == pytest.approx(start, rel=1e-4)


@pytest.fixture
def two_layers(tmp_path):
    model, params = make_model(MODEL.replace(emb_dim=24, n_layers=2, drop_rate=0.0))
    jaxgpt.save(tmp_path / "model", model, params)
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"n_layers": 99, "emb_dim": 768},
            "emb_dim is 768 .* and 24 .*; n_layers is 99 in the config and 2 in the checkpoint",
        ),
        ({"n_layers": 12}, "n_layers is 12 in the config and 2 in the checkpoint"),
        ({"preset": "gpt2"}, "n_heads is 12 in the config and 2 in the checkpoint"),
        ({"context_length": 17}, "context_length is 17 .* and 16 .*can be cut, not extended"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2' in the config and 'bytes' in the checkpoint"),
    ],
)
def test_fields_that_the_user_set_and_the_checkpoint_contradicts_are_named(
    model, message, two_layers, tmp_path, tokens
):
    config = TrainConfig.from_dict({"model": model, "train": {"steps": 1}})
    with pytest.raises(ConfigError, match=message):
        train(config, tokens, tmp_path / "run", init_from=two_layers)
    assert not (tmp_path / "run").exists()


def test_a_config_may_say_what_a_run_starts_from_and_the_option_overrides_it(two_layers, tmp_path, tokens):
    config = fine_tuning({"drop_rate": 0.0}, steps=1, learning_rate=0.0, init_from=two_layers)
    result = train(config, tokens, tmp_path / "run")
    np.testing.assert_array_equal(result.params["pos_emb"]["weight"], jaxgpt.load(two_layers)[1]["pos_emb"]["weight"])
    assert Run(tmp_path / "run").init_from() == two_layers
    assert train(None, tokens, tmp_path / "run", resume=True).step == 1
    other, params = make_model(MODEL.replace(emb_dim=8, drop_rate=0.0))
    jaxgpt.save(tmp_path / "other", other, params)
    result = train(config, tokens, tmp_path / "second", init_from=str(tmp_path / "other"))
    assert result.config.emb_dim == 8
    assert train(None, tokens, tmp_path / "second", resume=True).config.emb_dim == 8


@pytest.mark.exhaustive
def test_a_model_given_in_python_is_set_as_a_whole_and_one_left_out_is_the_checkpoints(two_layers, tmp_path, tokens):
    left_out = TrainConfig(steps=1, batch_size=4)
    for config in (
        TrainConfig(model=GPTConfig(n_layers=12)),  # which is the default too
        dataclasses.replace(left_out, model=left_out.model.replace(n_layers=4)),
    ):
        with pytest.raises(ConfigError, match=f"n_layers is {config.model.n_layers} in the config and 2 in the check"):
            train(config, tokens, tmp_path / "run", init_from=two_layers)
    result = train(left_out, tokens, tmp_path / "run", init_from=two_layers)
    assert result.config == jaxgpt.load(two_layers, drop_rate=0.1)[0].config
    assert train(left_out, tokens, tmp_path / "run", resume=True).step == 1


def test_the_first_line_names_a_preset_and_a_warm_up_that_does_not_fit(tmp_path, tokens, capsys):
    gpt2 = TrainConfig(model=GPTConfig.preset("gpt2", drop_rate=0.0))
    data = Mixture(("a", "b"), (np.zeros(64), np.zeros(32)), (3.0, 1.0))
    assert preparation.first_line(gpt2, None, data, 1, None, 0).startswith("training gpt2: 12 layers of width 768")
    line = preparation.first_line(CONFIG, None, data, 1, None, 3)
    assert line.startswith("resuming at step 3 of 8, training a new model: 1 layers of width")
    read = CONFIG.steps * CONFIG.batch_size * CONFIG.T
    assert line.endswith(
        f" per step, 8 steps: {0.75 * read / 64:.3g} epochs of a (0.75 of the sequences), "
        f"{0.25 * read / 32:.3g} epochs of b (0.25 of the sequences)"
    )
    assert list(preparation.notes(CONFIG, None, Corpus(()))) == []
    (note,) = preparation.notes(dataclasses.replace(CONFIG, warmup_steps=30), None, Corpus(()))
    assert note == "warmup_steps 30 is too long for steps 8, and shortened to 0"


def test_fine_tuning_takes_a_shorter_context_and_says_what_it_trains(two_layers, tmp_path, tokens, capsys):
    tables = {
        "model": {"context_length": 8, "n_layers": 2},
        "train": {"steps": 1, "batch_size": 4, "val_fraction": 0.1},
    }
    result = train(TrainConfig.from_dict(tables), tokens, tmp_path / "run", init_from=two_layers)
    assert result.config.context_length == 8
    assert result.params["pos_emb"]["weight"].shape == (8, 24)
    first = capsys.readouterr().err.splitlines()[0]
    count = sum(leaf.size for leaf in jax.tree.leaves(result.params))
    train_N, val_N = tokens.split(0.1)
    for part in (
        f"fine-tuning {two_layers}: 2 layers of width 24, context 8, {count:,} parameters",
        f"{len(train_N):,} tokens to train on, {len(val_N):,} to validate",
        "1 device (cpu), attention blocked",
        "32 tokens per step",
    ):
        assert part in first


def test_a_dry_run_shows_what_the_run_would_do_and_writes_nothing(two_layers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    Path("run.toml").write_text("[lora]\nrank = 4\n[train]\nsteps = 6\nbatch_size = 4\n", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "run.toml", "--data", "text.txt", "--out", "run", "--init-from", two_layers]
    assert main([*arguments, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before
    assert err == ""
    # What it prints of the config is a config file, of the same run.
    text = out[: out.index("\nfine-tuning ")]
    Path("printed.toml").write_text(text, encoding="utf-8")
    config = TrainConfig.from_file("printed.toml")
    assert (config.lora.rank, config.steps, config.model.emb_dim) == (4, 6, 24)
    assert config.init_from == str(two_layers)
    corpus = Tokens.from_text(TEXT, "bytes")
    train_N, val_N = corpus.split(0.1)
    row = loop.batch(train_N, config, 0)[0]
    for part in (
        f"{len(train_N):,} tokens to train on, {len(val_N):,} to validate",
        f"tokens: 64 per step, 384 in 6 steps, which is {384 / len(train_N):.3g} times the training data",
        "the first batch begins (2 of 4 rows):\n  " + repr(bytes(row.tolist()).decode()),
        "memory: trained parameters ",
        "frozen parameters ",
        "a step adds ",
        "nothing was written",
    ):
        assert part in out
    # It refuses what the run would, and what does not fit.
    with monkeypatch.context() as patch:
        patch.setattr(memory, "capacity", lambda device: 1000)
        assert main([*arguments, "--dry-run"]) == 2
    assert "are needed at once, and there are" in capsys.readouterr().err
    for wrong, message in (
        (["--set", "seq_len=99"], "seq_len 99"),
        (["--set", "lora.matrices=x"], "matches no matrix"),
    ):
        assert main([*arguments, "--dry-run", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--dry-run"]) == 2
    assert not Path("run").exists()


def test_tokens_seen_and_the_share_of_the_peak_are_logged(tmp_path, tokens, capsys, monkeypatch):
    config = dataclasses.replace(CONFIG, steps=3, compute=ComputeConfig(dtype="bfloat16"), sample_tokens=0)
    monkeypatch.setitem(accounting.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    train(config, tokens, tmp_path / "run")
    lines = [line for line in Run(tmp_path / "run").read_metrics() if "loss" in line]
    assert [line["tokens"] for line in lines] == [64, 128, 192]
    flops = 3 * accounting.forward_flops(MODEL, 1, 16).total / 16  # per token
    for line in lines:
        assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / 1e9, rel=0.01, abs=1e-4)
    assert re.search(r"step 3/3  loss \S+  192 tokens  [\d,]+ tokens/s  MFU [\d.]+%  0 s left", capsys.readouterr().err)
    mesh = SimpleNamespace(devices=np.array(jax.devices()[:2]), size=2)
    assert speed.peak(config, mesh) == 2e9
    for other in (
        CONFIG,
        dataclasses.replace(config, lora=LoraConfig(rank=2)),
        dataclasses.replace(config, freeze="a"),
    ):
        assert speed.peak(other, None) is None
    monkeypatch.delitem(accounting.PEAK_FLOPS, jax.devices()[0].device_kind)
    assert speed.peak(config, None) is None  # a CPU's peak is not known
    assert [progress._short(n) for n in (999_999, 10**6, 314_572_800, 3 * 10**11)] == [
        "999,999",
        "1.0M",
        "315M",
        "300B",
    ]


def test_a_run_out_of_patience_stops_where_it_does_after_a_resume_too(tmp_path, tokens, capsys):
    # Without a learning rate no evaluation is better than the first.
    config = dataclasses.replace(CONFIG, learning_rate=0.0, eval_interval=1, patience=2, sample_tokens=0)
    run = Run(tmp_path / "run")
    assert train(config, tokens, run.directory).step == 3
    assert f"stopped at step 3: no better validation loss in 2 evaluations ({run.resume_command}" in (
        " ".join(capsys.readouterr().err.split())
    )
    before = metrics(run.directory)
    assert [line["step"] for line in before if "val_loss" in line] == [1, 2, 3]
    shutil.rmtree(run.checkpoints / "3")  # as if killed before
    for _ in range(2):
        assert train(None, tokens, run.directory, resume=True).step == 3
        assert metrics(run.directory) == before
    assert train(run.config(["patience=0"]), tokens, run.directory, resume=True).step == config.steps
    with pytest.raises(ConfigError, match="patience needs something to validate on"):
        train(dataclasses.replace(config, val_fraction=0.0), tokens, tmp_path / "other")


def test_patience_counts_evaluations_since_the_best_and_those_that_are_not_finite(tmp_path, tokens, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.5, math.nan, 0.5])

    def validate(loop, params, sequences, batch_size=8):
        loss = 1.0 if batch_size == 1 else next(losses)  # 1 asks whether the parameters are healthy
        return evaluation.Evaluation(loss, math.exp(loss), None, 10)

    monkeypatch.setattr(loop.Loop, "validate", validate)
    config = dataclasses.replace(CONFIG, eval_interval=1, patience=2, sample_tokens=0)
    assert train(config, tokens, tmp_path / "run").step == 6
    assert Run(tmp_path / "run").step("best") == 4


@pytest.mark.exhaustive
def test_a_resumed_fine_tuning_remembers_what_it_started_from(tmp_path, tokens):
    model, params = make_model(MODEL.replace(emb_dim=24, drop_rate=0.0))
    jaxgpt.save(tmp_path / "model", model, params)
    config = fine_tuning({"drop_rate": 0.0}, steps=2, learning_rate=1e-9)
    train(config, tokens, tmp_path / "run", init_from=str(tmp_path / "model"))
    jaxgpt.save(tmp_path / "other", model, params)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if killed before the first
    with pytest.raises(ConfigError, match="init-from"):
        train(config, tokens, tmp_path / "run", resume=True, init_from=str(tmp_path / "other"))
    result = train(config, tokens, tmp_path / "run", resume=True)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_export_and_load_give_the_runs_model(undisturbed, tmp_path, tokens):
    directory, result = undisturbed
    step, model, _ = load_run(directory, "latest")
    assert step == 8
    assert model.config.tokenizer == "bytes"
    assert main(["export", str(directory), str(tmp_path / "out"), "--step", "latest"]) == 0
    exported_model, exported = jaxgpt.load(tmp_path / "out")
    ids = random_ids(MODEL, 1, 5)
    np.testing.assert_array_equal(
        exported_model.apply({"params": exported}, ids), model.apply({"params": result.params}, ids)
    )
    assert main(["export", str(directory), str(tmp_path / "hf"), "--format", "huggingface"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2"
    with pytest.raises(CheckpointError, match="no checkpoint of step 77"):
        load_run(directory, 77)


def test_command_line_trains_resumes_and_evaluates(tmp_path, undisturbed, capsys):
    (tmp_path / "config.toml").write_text(TOML, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config, run = str(tmp_path / "config.toml"), str(tmp_path / "run")
    Tokens.from_text(TEXT, "bytes").save(tmp_path / "text.tokens")
    assert main(["train", config, "--data", str(tmp_path / "text.tokens"), "--out", run]) == 0
    out = capsys.readouterr()
    assert out.out == ""
    assert "step 8/8  loss" in out.err
    assert_same_run(run, undisturbed[0], dataclasses.replace(CONFIG, sample_tokens=0))
    assert main(["train", config, "--data", str(tmp_path / "text.txt"), "--out", run]) == 2
    assert f"jaxgpt train --resume {run} continues it" in capsys.readouterr().err
    assert main(["train", config, "--data", str(tmp_path / "text.txt"), "--out", run, "--set", "stepz=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["export", run, str(tmp_path / "model")]) == 0
    capsys.readouterr()
    arguments = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--json"]
    assert main([*arguments, "--last-fraction", "0.1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx([line for line in metrics(run) if "val_loss" in line][-1]["val_loss"])
    assert figures["tokens"] == 82


KILLED = """
import sys
from jaxgpt.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_a_run_killed_twenty_times_ends_equal_to_the_undisturbed_one(tmp_path):
    """SIGKILL at random moments of training and saving. Most of such a process's life is start-up, so the moments are
    counted from the first step that it reports."""
    (tmp_path / "config.toml").write_text(TOML, encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def command(out, checkpoint_interval=1):
        interval = f"checkpoint_interval={checkpoint_interval}"
        settings = ["--set", "steps=100", "--set", interval, "--set", "eval_interval=50"]
        data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / out)]
        return [sys.executable, "-c", KILLED, "train", str(tmp_path / "config.toml"), *data, *settings]

    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    subprocess.run(command("whole", 50), env=environment, check=True, capture_output=True)
    start, rng = command("killed"), np.random.default_rng(0)
    resume = [*start[:3], "train", "--resume", str(tmp_path / "killed")]
    for _ in range(20):
        began = (tmp_path / "killed" / "run.json").exists()
        process = subprocess.Popen(resume if began else start, env=environment, stderr=subprocess.PIPE, text=True)
        # The moment is a fraction of a step, however long that takes here: two steps are timed first.
        steps = (time.perf_counter() for line in process.stderr if "loss" in line)
        began = next(steps)
        time.sleep(rng.uniform(0, next(steps) - began))
        process.kill()
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL, "the run was over before it was killed: make it longer"
    assert Path(tmp_path / "killed" / "checkpoints").exists()
    before = len(metrics(tmp_path / "killed"))
    subprocess.run(resume, env=environment, check=True, capture_output=True)
    assert 0 < before < len(metrics(tmp_path / "killed"))
    config = dataclasses.replace(CONFIG, steps=100, sample_tokens=0)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", config)


@pytest.mark.parametrize("scan_layers", [False, exhaustive(True)])
def test_a_runs_directory_is_the_model_of_its_best_checkpoint(scan_layers, tmp_path, tokens, capsys):
    out = tmp_path / "a run"
    compute = ComputeConfig(scan_layers=scan_layers)
    train(dataclasses.replace(CONFIG, compute=compute, keep=3), tokens, out)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"Best: step {load_run(out)[0]}, validation loss " in last
    assert last.endswith(f"in {out}. To try it: jaxgpt generate --model '{out}' --prompt The")
    lines = [line | {"val_loss": 0.0} if "val_loss" in line and line["step"] == 4 else line for line in metrics(out)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    step, model, params = load_run(out)
    assert step == 4  # the best, and not the latest
    loaded, found = jaxgpt.load(out)
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert jaxgpt.load(str(out), param_dtype="bfloat16", context_length=8)[0] == jaxgpt.GPT(
        MODEL.replace(context_length=8), compute.replace(param_dtype="bfloat16")
    )
    assert main(["inspect", str(out), "--json"]) == 0
    assert main(["generate", "--model", str(out), "--prompt", "The", "--max-new-tokens", "4", "--greedy"]) == 0
    assert main(["convert", str(out), str(tmp_path / "model")]) == 0
    jax.tree.map(np.testing.assert_array_equal, jaxgpt.load(tmp_path / "model")[1], found)
    config = TrainConfig.from_dict({"train": {"steps": 1, "learning_rate": 0.0, "batch_size": 2}})
    tuned = train(config, tokens, tmp_path / "tuned", init_from=str(out))
    assert tuned.config == dataclasses.replace(
        MODEL, drop_rate_emb=0.1, drop_rate_attn=0.1, drop_rate_shortcut=0.1, drop_rate=0.1
    )


def test_a_run_without_a_checkpoint_is_told_so(tmp_path, tokens):
    train(dataclasses.replace(CONFIG, steps=1, warmup_steps=0), tokens, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        jaxgpt.load(tmp_path / "run")


@pytest.mark.exhaustive
def test_a_batch_that_needs_too_much_memory_is_one_line(tmp_path, tokens, capsys):
    tokens.save(tmp_path / "tokens")
    tables = CONFIG.to_dict()
    (tmp_path / "run.toml").write_text(to_toml(tables))
    words = ["train", str(tmp_path / "run.toml"), "--data", str(tmp_path / "tokens"), "--out", str(tmp_path / "run")]
    assert main([*words, "--set", "batch_size=1000000"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: [\d,.]+ GiB are needed at once, and there are [\d,.]+ [GM]iB: ", line)
    for remedy in ("grad_accumulation", "remat", "loss_chunk", "batch_size"):
        assert remedy in line
    assert main([*words, "--set", "steps=1"]) == 0  # nothing was done, so nothing is in the way


def test_a_batch_that_does_not_fit_is_never_made(tmp_path, tokens, monkeypatch):
    def batch(*_):
        raise AssertionError("made")

    monkeypatch.setattr(loop, "batch", batch)
    with pytest.raises(OutOfMemoryError, match="are needed at once"):
        train(dataclasses.replace(CONFIG, batch_size=10**6), tokens, tmp_path / "run")


def test_memory_that_runs_out_later_is_one_line_too(tmp_path, tokens, monkeypatch):
    def batch(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes.\nMore")

    monkeypatch.setattr(loop, "batch", batch)
    with pytest.raises(OutOfMemoryError, match=r"^RESOURCE_EXHAUSTED.*123 bytes. .there are .* GiB.: raise grad_acc"):
        train(CONFIG, tokens, tmp_path / "run")


def test_an_evaluation_that_needs_too_much_memory_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("To be, or not to be" * 30)

    def lower(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(evaluation, "_losses", SimpleNamespace(lower=lower))
    assert main(["evaluate", "--data", str(tmp_path / "a.txt")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("123 bytes.*lower --batch-size", line)


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Limits the memory that the package believes in."""

    def limit(text):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(memory, "LIMITS", (tmp_path / "none", tmp_path / "memory.max"))

    return limit


def test_a_containers_limit_is_the_memory_there_is(container):
    container("max\n")
    device = jax.devices()[0]
    whole = memory.capacity(device)
    container(f"{2**62}\n")
    assert memory.capacity(device) == whole
    container(f"{2**20}\n")
    assert memory.capacity(device) == 2**20 < whole


def test_the_memory_that_counts_is_that_of_the_device_with_the_parameters(tokens, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "capacity", lambda device: asked.append(device) or 2**40)
    model, params = make_model(MODEL)
    default, other = jax.devices()[:2]
    params = jax.device_put(params, other)
    assert evaluate(model, params, tokens.ids_N[:99]).tokens == 98
    jaxgpt.generate(model, params, [[1]], 2)
    assert set(asked) == {other}
    memory.check_bytes(1, "")
    assert asked[-1] == default


def test_a_backend_that_does_not_know_its_memory_refuses_nothing(container):
    def memory_stats():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    container(f"{2**20}")
    assert memory.capacity(SimpleNamespace(memory_stats=memory_stats)) == 2**20
    memory.check_memory(SimpleNamespace(memory_analysis=lambda: None), "")


def test_what_does_not_fit_is_refused_before_it_is_allocated(container, tokens, tmp_path, capsys):
    model, params = make_model(MODEL)
    jaxgpt.save(tmp_path / "model", model, params)
    container("4096")
    with pytest.raises(OutOfMemoryError, match=r"MiB are needed at once, and there are 0.0 MiB: lower batch_size"):
        evaluate(model, params, tokens.ids_N[:99])
    with pytest.raises(OutOfMemoryError, match="continue fewer prompts at once"):
        jaxgpt.generate(model, params, [[1]] * 40, 8)
    with pytest.raises(OutOfMemoryError, match="choose a param_dtype of fewer bytes"):
        jaxgpt.load(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "are needed at once" in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB\nmore"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nmore"),
    ],
)
def test_memory_that_runs_out_in_any_command_is_one_line(error, monkeypatch, capsys):
    def look(*_):
        raise error

    monkeypatch.setattr("jaxgpt.cli.inspect.read", look)
    assert main(["inspect", "shakespeare", "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"jaxgpt: error: {str(error).splitlines()[0]}: this needs more memory than there is"


def test_more_rows_than_there_are_sequences_cost_nothing(tokens):
    model, params = make_model(MODEL)
    assert evaluate(model, params, tokens.ids_N[:99], batch_size=10**8).tokens == 98

"""Trackers beside metrics.jsonl: fakes of them get every figure, and the real ones, where they are installed, too."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_trainer import CONFIG, TEXT

from jaxgpt.cli import main
from jaxgpt.data import Corpus, Tokens
from jaxgpt.errors import ConfigError, MissingExtraError
from jaxgpt.training import TRACKERS, train
from jaxgpt.training.run_directory import Run

TOKENS = Tokens.from_text(TEXT, "bytes")
pytestmark = pytest.mark.usefixtures("compiled_quickly")


class Fake(SimpleNamespace):
    """Stands for each library: notes how it is started, what it gets, and that it is closed."""

    Error = RuntimeError

    def __init__(self):
        super().__init__(started=[], logged=[], closed=0)

    def init(self, *args, **options):
        self.started.append((args, options))
        return self

    def SummaryWriter(self, *args, **options):
        return self.init(*args, **options)

    def log(self, metrics, step):
        self.logged += [(step, name, value) for name, value in metrics.items()]

    def add_scalar(self, name, value, step):
        self.logged.append((step, name, value))

    def flush(self):
        pass

    def close(self):
        self.closed += 1

    finish = close


@pytest.fixture
def fakes(monkeypatch):
    made = {name: Fake() for name in TRACKERS}
    for name, fake in made.items():
        monkeypatch.setitem(sys.modules, TRACKERS[name].library, fake)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return made


def test_trackers_get_every_figure_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, fakes):
    config = dataclasses.replace(CONFIG, steps=2, sample_tokens=0)
    train(config, TOKENS, tmp_path / "run", log_to=list(TRACKERS))
    run = Run(tmp_path / "run")
    figures = [(line["step"], name, line[name]) for line in run.read_metrics() for name in line if name != "step"]
    assert any(name == "val_loss" for _, name, _ in figures)
    for fake in fakes.values():
        assert (fake.logged, fake.closed) == (figures, 1)
    run.describe(config, Corpus(()), None)  # as a run does when it is resumed
    with run.logging_to(list(TRACKERS), 2, config):
        run.append({"step": 3, "loss": 1.0})
    (first, again), where = fakes["tensorboard"].started, str(tmp_path / "run" / "tensorboard")
    assert (first, again) == (((where,), {"purge_step": 1}), ((where,), {"purge_step": 3}))
    (first, again) = fakes["wandb"].started
    assert first == again
    assert first[1] | {"id": ""} == {
        "project": "jaxgpt",
        "name": "run",
        "id": "",
        "resume": "allow",
        "dir": str(tmp_path / "run"),
        "config": config.to_dict(),
    }
    name = {"name": f"run-{first[1]['id']}", "resume": "allow", "config": config.to_dict()}
    assert fakes["trackio"].started == [(("jaxgpt",), name)] * 2
    assert len(first[1]["id"]) == 16
    for fake in fakes.values():
        assert (fake.logged[len(figures) :], fake.closed) == ([(3, "loss", 1.0)], 2)


def test_of_several_processes_one_logs(tmp_path, fakes):
    with Run(tmp_path, writes=False).logging_to(list(TRACKERS), 0, CONFIG):
        assert not any(fake.started for fake in fakes.values())


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_without_its_extra_names_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, TRACKERS[name].library, None)
    with pytest.raises(MissingExtraError, match=rf"logging to {name} needs .*jaxgpt\[{name}\]"):
        train(CONFIG, TOKENS, tmp_path / "run", log_to=[name])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [(["wanbd"], r"no tracker 'wanbd'; did you mean 'wandb'\?"), (["wandb", "wandb"], "log_to names wandb twice")],
)
def test_trackers_that_do_not_exist_or_are_named_twice_are_refused(names, message, tmp_path, fakes, capsys):
    with pytest.raises(ConfigError, match=message):
        train(CONFIG, TOKENS, tmp_path / "run", log_to=names)
    with pytest.raises(SystemExit):
        main(["train", "--resume", "run", "--log-to", "wanbd"])
    assert "invalid choice: 'wanbd'" in capsys.readouterr().err


def test_a_tracker_that_does_not_start_says_why(tmp_path, fakes, monkeypatch):
    def fail(**_):
        raise Fake.Error("no API key")

    monkeypatch.setattr(fakes["wandb"], "init", fail)
    with (
        pytest.raises(ConfigError, match=r"wandb did not start: no API key \(with WANDB_MODE=offline"),
        Run(tmp_path).logging_to(["wandb"], 0, CONFIG),
    ):
        pass


# The libraries name their files after the second, in which no two runs begin.
REAL = """
import sys
import time
from pathlib import Path
from jaxgpt.training.trackers import TRACKERS
for step in (0, 1):
    tracker = TRACKERS[sys.argv[1]](Path("run"), "run", "0123456789abcdef", step, {"train": {"steps": 2}})
    tracker.log(step + 1, {"loss": 2.5, "tokens": 7})
    tracker.log(step + 1, {"val_loss": float("nan")})
    tracker.close()
    time.sleep(1.1)
"""


def logged_to_tensorboard(directory):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(directory / "run" / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def logged_to_wandb(directory):
    runs = sorted((directory / "run" / "wandb").glob("offline-run-*-0123456789abcdef"))
    assert all((run / "run-0123456789abcdef.wandb").stat().st_size > 0 for run in runs)
    return list(range(1, 1 + len(runs)))


def logged_to_trackio(directory):
    with sqlite3.connect(directory / "trackio" / "jaxgpt.db") as database:
        rows = database.execute("SELECT run_name, step FROM metrics").fetchall()
    assert {name for name, _ in rows} == {"run-0123456789abcdef"}
    return sorted({step for _, step in rows})


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "logged"),
    [("tensorboard", logged_to_tensorboard), ("wandb", logged_to_wandb), ("trackio", logged_to_trackio)],
)
def test_real_trackers_run_without_a_network_and_go_on_in_the_same_run(name, logged, tmp_path, monkeypatch):
    pytest.importorskip(TRACKERS[name].library)
    (tmp_path / "run").mkdir()
    for variable, value in {"HOME": tmp_path, "TRACKIO_DIR": tmp_path / "trackio", "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(variable, str(value))
    subprocess.run([sys.executable, "-c", REAL, name], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert logged(tmp_path) == [1, 2]

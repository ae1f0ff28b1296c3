"""What a notebook shows of configs, results and progress."""

from __future__ import annotations

import html.parser
import io
import sys
from types import ModuleType

import numpy as np
import pytest
from helpers import TINY
from rich.console import Console

import jaxgpt
from jaxgpt import notebook
from jaxgpt.training import progress
from jaxgpt.training.config import LoraConfig


class _Cells(html.parser.HTMLParser):
    """The rows of all tables, by caption; a bold row's first cell begins with '*'."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("*" * (tag == "th"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "caption":
            self.rows = self.tables.setdefault(data, [])
        else:
            self.rows[-1][-1] += data


def test_a_config_is_a_table_of_what_was_set():
    tables = _Cells(TINY.replace(n_layers=3)._repr_html_()).tables
    rows = dict(tables["GPTConfig"])
    assert rows["*n_layers"] == "*3"
    assert rows["activation"] == "'gelu_tanh'"  # as by default
    assert len(rows) == len(TINY.to_dict())


def test_a_runs_config_shows_its_tables():
    config = jaxgpt.TrainConfig(model=TINY, template="<b>{prompt}{response}", lora=LoraConfig(rank=8))
    tables = _Cells(config._repr_html_()).tables
    assert list(tables) == ["TrainConfig", "GPTConfig", "ComputeConfig", "MeshConfig", "LoraConfig"]
    assert dict(tables["TrainConfig"])["*template"] == "*'<b>{prompt}{response}'"
    assert dict(tables["LoraConfig"])["*rank"] == "*8"
    assert "<b>" not in config._repr_html_()


def test_results_show_the_shapes_of_their_arrays():
    result = jaxgpt.GenerationResult([np.arange(5)], [3], 0.5, None, ["length"])
    rows = dict(_Cells(result._repr_html_()).tables["GenerationResult"])
    assert rows["tokens"] == "[int64[5]]"
    assert rows["prompt_lengths"] == "[3]"
    assert len(repr(result)) < 200


@pytest.fixture
def shown(monkeypatch):
    """What a notebook displays, by stand-ins for IPython and ipywidgets."""
    displayed: list = []

    class Output:
        def __enter__(self):
            displayed.append("drawn")

        def __exit__(self, *error):
            pass

        def clear_output(self, wait):
            assert wait

        def close(self):
            displayed.append("closed")

    ipywidgets, ipython = ModuleType("ipywidgets"), ModuleType("IPython")
    ipywidgets.Output = Output  # type: ignore[attr-defined]
    ipython.display = ModuleType("IPython.display")  # type: ignore[attr-defined]
    ipython.display.display = displayed.append  # type: ignore[attr-defined]
    for name, module in (("ipywidgets", ipywidgets), ("IPython", ipython), ("IPython.display", ipython.display)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(notebook, "find_spec", lambda name: ipywidgets)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    return displayed


def lines(shown: list) -> list[str]:
    return [drawn.text for drawn in shown if getattr(drawn, "text", "").strip()]


@pytest.mark.parametrize("widgets", [False, True])
def test_training_draws_a_bar_in_a_notebook_that_has_widgets(widgets, shown, monkeypatch):
    if not widgets:
        monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    console = Console(file=io.StringIO(), force_jupyter=True)
    with progress.TrainProgress(10, console) as bar:
        bar.update(5, 1.25, 1000, 200.0, 5.0)
        bar.update(10, 1.0, 2000, 200.0, 0.0)
    if widgets:
        assert type(shown[0]).__name__ == "Output"
        last = lines(shown)[-1]
        assert "10/10" in last  # the bar's end, too
        assert "loss 1.0000" in last
    else:
        assert "drawn" not in shown


LONG_WORK = {
    "tokens": lambda model, params: jaxgpt.generate(model, params, [[1, 2], [3]], 40),
    "sequences": lambda model, params: jaxgpt.evaluate(model, params, np.arange(64) % 8, seq_len=8, batch_size=2),
    "continuations": lambda model, params: jaxgpt.score(
        model, params, [[1], [2, 3], [4, 5, 6, 7]], [[[1]], [[2]], [[3]]], batch_tokens=1
    ),
}


@pytest.mark.parametrize("what", LONG_WORK)
def test_long_work_has_a_bar_in_a_notebook_until_it_ends(what, tiny, shown, monkeypatch):
    monkeypatch.setattr(notebook, "AFTER", 0.0)
    LONG_WORK[what](*tiny)
    assert any(what in line for line in lines(shown))
    assert shown[-1] == "closed"


def test_work_within_other_work_has_no_bar_and_one_that_fails_closes_its_own(shown, monkeypatch):
    monkeypatch.setattr(notebook, "AFTER", 0.0)

    def work():
        with notebook.bar("outer") as show:
            show(1, 2)
            with notebook.bar("inner") as inner:
                inner(1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert any("outer" in line for line in lines(shown))
    assert not any("inner" in line for line in lines(shown))
    assert shown[-1] == "closed"
    before = len(shown)
    with notebook.only_bar(), notebook.bar("evaluation") as show:
        show(1, 2)
    assert len(shown) == before


@pytest.mark.parametrize("where", ["short", "without widgets", "not a notebook"])
def test_other_work_shows_nothing(where, shown, monkeypatch, capsys):
    if where != "short":
        monkeypatch.setattr(notebook, "AFTER", 0.0)
    if where == "without widgets":
        monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    if where == "not a notebook":
        monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    with notebook.bar("tokens") as show:
        show(1, 2)
    assert shown == []
    assert capsys.readouterr() == ("", "")

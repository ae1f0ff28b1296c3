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


@pytest.mark.parametrize("widgets", [False, True])
def test_training_draws_a_bar_in_a_notebook_that_has_widgets(widgets, monkeypatch):
    shown: list = []

    class Output:
        def __enter__(self):
            shown.append("drawn")

        def __exit__(self, *error):
            pass

        def clear_output(self, wait):
            assert wait

    ipywidgets, ipython = ModuleType("ipywidgets"), ModuleType("IPython")
    ipywidgets.Output = Output  # type: ignore[attr-defined]
    ipython.display = ModuleType("IPython.display")  # type: ignore[attr-defined]
    ipython.display.display = shown.append  # type: ignore[attr-defined]
    for name, module in (("ipywidgets", ipywidgets), ("IPython", ipython), ("IPython.display", ipython.display)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(progress, "find_spec", lambda name: ipywidgets if widgets and name == "ipywidgets" else None)
    console = Console(file=io.StringIO(), force_jupyter=True)
    with progress.TrainProgress(10, console) as bar:
        bar.update(5, 1.25, 1000, 200.0, 5.0)
        bar.update(10, 1.0, 2000, 200.0, 0.0)
    if widgets:
        assert isinstance(shown[0], Output)
        *_, last = [drawn.text for drawn in shown if getattr(drawn, "text", "").strip()]
        assert "10/10" in last  # the bar's end, too
        assert "loss 1.0000" in last
    else:
        assert "drawn" not in shown

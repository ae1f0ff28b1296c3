"""GPT-2's published texts and figures, from OpenAI's weights and the data sets: for where both are, which is not here.

    JAXGPT_GPT2=gpt2 JAXGPT_BENCHMARKS=data pytest -n0 -m exhaustive tests/test_published.py

JAXGPT_GPT2 is the 124M model, by any name or path that `jaxgpt.load` takes. JAXGPT_BENCHMARKS is a directory with the
files of the built-in tasks, under the names that `jaxgpt evaluate` tells; a task without its file is skipped. All of
HellaSwag takes hours on a CPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.scoring import TASKS, run_task

pytestmark = pytest.mark.exhaustive

FIGURES = [
    (name, published.metric, published.values["124M"])
    for name, task in TASKS.items()
    for published in task.published
    # The paper does not say how it measured, so its figures are no ones to reach.
    if "124M" in published.values and not published.source.startswith("Radford")
]


@pytest.fixture(scope="module")
def gpt2():
    if "JAXGPT_GPT2" not in os.environ:
        pytest.skip("JAXGPT_GPT2 does not name OpenAI's 124M model")
    return jaxgpt.load(os.environ["JAXGPT_GPT2"])


@pytest.fixture(scope="module")
def results(gpt2):
    """The metrics of a task, measured once."""
    measured = {}

    def metrics(name):
        folder = Path(os.environ.get("JAXGPT_BENCHMARKS", "data"))
        files = [folder / file.split()[-1] for file in TASKS[name].file.split(" or ")]
        there = [file for file in files if file.is_file()]
        if not there:
            pytest.skip(f"{folder} has no {TASKS[name].file}")
        if name not in measured:
            measured[name] = run_task(*gpt2, name, there[0]).metrics
        return measured[name]

    return metrics


def test_greedy_text_is_openais(gpt2):
    continuation = " forward, but it's not enough.\n\n\"I'm not going to sit here and say, 'I'm not going to do this,'"
    prompt = "Every effort moves"
    assert jaxgpt.generate_text(*gpt2, prompt, 30)[0] == prompt + continuation


def test_greedy_ids_are_openais(gpt2):
    continuation = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    assert jaxgpt.generate(*gpt2, [[464, 3290]], 18).new_tokens[0].tolist() == continuation


@pytest.mark.parametrize(("task", "metric", "value"), FIGURES)
def test_a_published_figure_is_reached(task, metric, value, results):
    # They are rounded, and were measured in other types.
    assert results(task)[metric] == pytest.approx(value, rel=0.01)

"""A process that generates all day keeps neither memory nor compilations, and its threads do not disturb each other."""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import make_model

from jaxgpt.config import GPTConfig
from jaxgpt.generation.sampling import Greedy, Temperature, TopK
from jaxgpt.generation.session import bucket, generate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# One layer: what is counted here does not depend on depth.
CONFIG = GPTConfig(vocab_size=61, context_length=32, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0)
SAMPLERS = (Greedy(), Temperature(1.3) | TopK(20))
BATCHES = (1, 2, 3)
GENERATIONS, WARM = 2000, 400


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)


def task(number):
    """The arguments of generation `number`: lengths (past the context too), batches, samplers, stop ids."""
    rng = random.Random(number)
    batch = rng.choice(BATCHES)
    longest = 12 if number % 10 else 48  # a tenth of them outgrow the context, where each token costs a full pass
    prompts = [[rng.randrange(61) for _ in range(rng.randint(1, longest))] for _ in range(batch)]
    return {
        "prompts": prompts,
        "max_new_tokens": rng.randint(0, 18),
        "sampler": rng.choice(SAMPLERS),
        "key": jax.random.key(number),
        "stop_ids": [rng.randrange(61) for _ in range(rng.randint(0, 4))],
    }


def run(model, number):
    return [row.tolist() for row in generate(*model, **task(number)).tokens]


def resident():
    """Resident memory of this process in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size from /proc")
def test_two_thousand_generations_keep_no_memory_and_compile_no_more(model, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for number in range(WARM):
            run(model, number)
        compiled = re.findall(r"Compiling jit\((prefill|decode)\)", caplog.text)
        caplog.clear()
        gc.collect()
        arrays, memory = len(jax.live_arrays()), resident()
        tracemalloc.start()
        for number in range(WARM, GENERATIONS):
            run(model, number)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        late = re.findall(r"Compiling jit\((\w+)\)", caplog.text)
    # For each batch and sampler: prompts in one of two buckets (16, 32), one cache, and one loop past the context.
    assert {bucket(n, 16, 32) for n in range(1, 33)} == {16, 32}
    assert 0 < len(compiled) <= len(BATCHES) * len(SAMPLERS) * (2 + 2)
    assert late == []
    assert len(jax.live_arrays()) <= arrays
    # Python's own objects: if generations kept only their ids, that would be 1,600 times 500 bytes.
    assert kept < 300_000
    # A generation's cache and logits are 20 kB; if kept, they would add up to 32 MB. The allocator's noise is less than
    # a fourth of that.
    assert resident() - memory < 8e6


@pytest.mark.exhaustive
def test_threads_that_generate_at_once_get_what_each_would_alone(model):
    numbers = [number for number in range(60) if number % 10]
    alone = [run(model, number) for number in numbers]
    with ThreadPoolExecutor(max_workers=8) as pool:
        together = list(pool.map(lambda number: run(model, number), numbers))
    assert together == alone
    assert len({str(rows) for rows in alone}) == len(numbers)


def test_threads_that_compile_at_once_get_the_same(model):
    fresh = make_model(CONFIG.replace(vocab_size=67))  # nothing of it is compiled yet
    with ThreadPoolExecutor(max_workers=4) as pool:
        together = list(pool.map(lambda _: generate(*fresh, [[1, 2, 3]], 12).tokens[0].tolist(), range(4)))
    assert together == [together[0]] * 4
    assert together[0] == generate(*fresh, np.array([[1, 2, 3]]), 12).tokens[0].tolist()

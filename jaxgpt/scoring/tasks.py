"""Published benchmarks, from files that the user has, each as one named variant: the same name often means different
sums."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.checks import did_you_mean
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.files import local
from jaxgpt.model import GPT
from jaxgpt.scoring import datasets
from jaxgpt.scoring.datasets import Example, Reading
from jaxgpt.scoring.likelihood import Score, score


@dataclasses.dataclass(frozen=True)
class Published:
    """Figures of GPT-2 for a metric, by size.

    Attributes:
        metric: the metric.
        source: where they are from; how that differs, if it does.
        values: per size.
    """

    metric: str
    source: str
    values: dict[str, float]

    def __str__(self) -> str:
        return f"{', '.join(f'{size} {value:g}' for size, value in self.values.items())} ({self.source})"


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        variant: what is measured, and how, in a sentence.
        file: the file that it reads.
        origin: where that file is from.
        read: from the file to examples.
        measure: from examples and their scores to metrics.
        published: figures of GPT-2.
    """

    variant: str
    file: str
    origin: str
    read: Callable[[Reading], Iterator[Example]]
    measure: Callable[[list[Example], list[list[Score]]], dict[str, float]]
    published: tuple[Published, ...]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a benchmark measured.

    Attributes:
        task: its name.
        variant: as in `Task`.
        file: the file that was read.
        examples: number of examples.
        metrics: values by name.
        published: figures of GPT-2 to compare with.
        seconds: time taken.
    """

    task: str
    variant: str
    file: str
    examples: int
    metrics: dict[str, float]
    published: tuple[Published, ...]
    seconds: float


def check_task(name: str, path: str | Path) -> Path:
    """Returns the file of a built-in task.

    Raises:
        ConfigError: for another name.
        DataError: if there is no such file; says which one it is and where it is from.
    """
    if name not in TASKS:
        raise ConfigError(
            f"no task {name!r} is built in{did_you_mean(name, TASKS)} (built in: {', '.join(TASKS)}; those of "
            "lm-evaluation-harness are named without a file)"
        )
    path, task = local(path), TASKS[name]
    if not path.is_file():
        raise DataError(
            f"{path}: {'is not a file' if path.exists() else 'does not exist'}: {name} reads {task.file}, from "
            f"{task.origin}: put it there, or give its place, {name}=PATH"
        )
    return path


def run_task(
    model: GPT,
    params: Any,
    name: str,
    path: str | Path,
    *,
    limit: int | None = None,
    stride: int = 0,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Measures a model by a benchmark.

    Args:
        model: the model.
        params: its parameters.
        name: one of `TASKS`.
        path: the benchmark's file.
        limit: only so many examples, the first ones.
        stride: of the sliding windows of "wikitext_guide"; 0 means the context.
        batch_tokens: as in `score`.
        progress: called with the number of continuations scored so far, and of all.

    Raises:
        ConfigError: for an unknown name.
        DataError: if the file is missing, damaged, or not the benchmark's.
        ValueError: for a limit or stride out of range.
        MissingExtraError, FloatingPointError: as `score`.
    """
    path, task, context = check_task(name, path), TASKS[name], model.config.context_length
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")
    if not 0 <= stride <= context:
        raise ValueError(f"stride must be from 1 to context_length={context}, not {stride}")
    started = time.perf_counter()
    reading = Reading(path, model.config.tokenizer, context, stride or context)
    examples = list(itertools.islice(task.read(reading), limit))
    if not examples or not any(example.pairs for example in examples):
        raise DataError(f"{path}: holds no examples of {name}, which reads {task.file}, from {task.origin}")
    scores = _scores(model, params, examples, batch_tokens, progress)
    return TaskResult(
        task=name,
        variant=task.variant,
        file=str(path),
        examples=len(examples),
        metrics=task.measure(examples, scores),
        published=task.published,
        seconds=time.perf_counter() - started,
    )


def _scores(
    model: GPT,
    params: Any,
    examples: list[Example],
    batch_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> list[list[Score]]:
    """The scores of each example's pairs; those with one context are scored together."""
    groups: list[tuple[Any, list[Any]]] = []
    for example in examples:
        for context, same in itertools.groupby(example.pairs, key=lambda pair: pair[0]):
            groups.append((context, [continuation for _, continuation in same]))
    total, done = sum(len(continuations) for _, continuations in groups), 0

    def advance(scored: int) -> None:
        nonlocal done
        done += scored
        if progress is not None:
            progress(done, total)

    prompts, continuations = zip(*groups, strict=True)
    scored = score(model, params, prompts, continuations, batch_tokens=batch_tokens, progress=advance)
    flat = itertools.chain.from_iterable(scored)
    return [list(itertools.islice(flat, len(example.pairs))) for example in examples]


def _accuracy(examples: list[Example], scores: list[list[Score]]) -> dict[str, float]:
    """How often the right choice is the likeliest: as a whole, and per unit of length."""
    right, right_per_length = 0, 0
    for (_, (label, lengths)), choices in zip(examples, scores, strict=True):
        logprobs = np.array([choice.logprob for choice in choices])
        right += int(np.argmax(logprobs)) == label
        right_per_length += int(np.argmax(logprobs / np.array(lengths))) == label
    return {"acc": right / len(examples), "acc_norm": right_per_length / len(examples)}


def _last_word(examples: list[Example], scores: list[list[Score]]) -> dict[str, float]:
    """How often greedy decoding gives the last word, and the perplexity of words (not of tokens)."""
    mean = sum(word.logprob for (word,) in scores) / len(scores)
    return {"acc": sum(word.is_greedy for (word,) in scores) / len(scores), "perplexity": _exp(-mean)}


def _perplexities(examples: list[Example], scores: list[list[Score]]) -> dict[str, float]:
    words, size, tokens = (sum(example.data[i] for example in examples) for i in range(3))
    nats = -sum(window.logprob for windows in scores for window in windows)
    return {
        "word_perplexity": _exp(nats / words),
        "byte_perplexity": _exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
        "token_perplexity": _exp(nats / tokens),
    }


def _token_perplexity(examples: list[Example], scores: list[list[Score]]) -> dict[str, float]:
    tokens = sum(example.data[2] for example in examples)
    return {"perplexity": _exp(-sum(window.logprob for (window,) in scores) / tokens)}


def _exp(nats: float) -> float:
    return math.inf if nats >= 709 else math.exp(nats)


_HARNESS = "lm-evaluation-harness"
_PAPER = "Radford et al. 2019"
_HELLASWAG = "https://github.com/rowanz/hellaswag, in data/"
_WIKITEXT = "wikitext-2-raw-v1.zip or wikitext-103-raw-v1.zip, whose test sets are the same"
_PAPER_WIKITEXT = (
    Published(
        "word_perplexity",
        f"{_PAPER}, WikiText-103; not said how",
        {"124M": 37.50, "355M": 26.37, "774M": 22.05, "1558M": 17.48},
    ),
    Published(
        "word_perplexity",
        f"{_PAPER}, WikiText-2; not said how",
        {"124M": 29.41, "355M": 22.76, "774M": 19.93, "1558M": 18.34},
    ),
)

# The built-in benchmarks by name. Those that lm-evaluation-harness has too bear its names, and give its numbers.
TASKS: dict[str, Task] = {
    "hellaswag": Task(
        f"HellaSwag as in {_HARNESS}: the likeliest of four endings, as a whole (acc) and per character (acc_norm)",
        "hellaswag_val.jsonl",
        _HELLASWAG,
        datasets.hellaswag,
        _accuracy,
        (
            Published("acc", _HARNESS, {"124M": 0.2892, "1558M": 0.4004}),
            Published("acc_norm", _HARNESS, {"124M": 0.3114, "1558M": 0.5089}),
        ),
    ),
    "hellaswag_llmc": Task(
        "HellaSwag as in llm.c: texts as they are; the likeliest of four endings, as a whole (acc) and per token "
        "(acc_norm)",
        "hellaswag_val.jsonl or llm.c's hellaswag_val.bin",
        _HELLASWAG,
        datasets.hellaswag_llmc,
        _accuracy,
        (
            Published("acc", "llm.c", {"124M": 0.2859, "1558M": 0.3842}),
            Published("acc_norm", "llm.c", {"124M": 0.2955, "355M": 0.3752, "774M": 0.4320, "1558M": 0.4893}),
        ),
    ),
    "lambada_openai": Task(
        f"LAMBADA, OpenAI's texts, as in {_HARNESS}: whether greedy decoding gives the last word (acc), and its "
        "perplexity",
        "lambada_test.jsonl",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        datasets.lambada_openai,
        _last_word,
        (
            Published("acc", _HARNESS, {"124M": 0.3256}),
            Published("perplexity", _HARNESS, {"124M": 40.06}),
            Published(
                "acc",
                f"{_PAPER}; with a filter of stop words",
                {"124M": 0.4599, "355M": 0.5548, "774M": 0.6012, "1558M": 0.6324},
            ),
            Published(
                "perplexity", f"{_PAPER}; not said how", {"124M": 35.13, "355M": 15.60, "774M": 10.87, "1558M": 8.63}
            ),
        ),
    ),
    "wikitext": Task(
        f"WikiText as in {_HARNESS}: each article from end-of-text on, detokenized, in windows of the context; words "
        "and bytes are counted before detokenizing",
        "wiki.test.raw",
        _WIKITEXT,
        datasets.wikitext,
        _perplexities,
        (Published("word_perplexity", _HARNESS, {"124M": 37.37}), *_PAPER_WIKITEXT),
    ),
    "wikitext_verbatim": Task(
        "WikiText as it is: each article from end-of-text on, not detokenized, in windows of the context",
        "wiki.test.raw",
        _WIKITEXT,
        datasets.wikitext_verbatim,
        _perplexities,
        (),
    ),
    "wikitext_guide": Task(
        "WikiText as in Hugging Face's perplexity guide: one text, not detokenized, in windows that start every "
        "--stride tokens; perplexity per token",
        "wiki.test.raw",
        _WIKITEXT,
        datasets.wikitext_guide,
        _token_perplexity,
        (
            Published("perplexity", "Hugging Face's guide, stride 1024", {"774M": 19.44}),
            Published("perplexity", "Hugging Face's guide, stride 512", {"774M": 16.45}),
        ),
    ),
}

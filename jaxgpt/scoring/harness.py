"""lm-evaluation-harness: a model as one of its models, and its tasks. (Extra: `eval`, which does not need torch.)"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.checks import did_you_mean
from jaxgpt.errors import ConfigError, require
from jaxgpt.generation import STREAM_CHUNK, Generation, completions, default_stop_ids, from_options
from jaxgpt.model import GPT, check_model
from jaxgpt.scoring.likelihood import score
from jaxgpt.scoring.pairs import rolling_windows
from jaxgpt.scoring.tasks import TASKS
from jaxgpt.tokenizer import get_tokenizer

# Tokens to generate where a task does not say; so does the harness.
DEFAULT_NEW_TOKENS = 256


def LMEvalModel(model: GPT, params: Any, *, batch_tokens: int = 4096, batch_size: int = 8) -> Any:
    """The model as lm-evaluation-harness takes one: `lm_eval.simple_evaluate(LMEvalModel(model, params), tasks=[...])`.

    Its answers are those of the harness's own `hf` model for the same weights. Texts are tokenized as by transformers:
    `<|endoftext|>` is a token.

    Args:
        model: the model; its tokenizer must have an end-of-text.
        params: its parameters.
        batch_tokens: about how many tokens to score at once.
        batch_size: how many texts to generate at once.

    Returns:
        An `lm_eval.api.model.TemplateLM`.

    Raises:
        MissingExtraError: without the extra `eval`.
        ConfigError: if the tokenizer has no end-of-text, from which the harness starts.
    """
    check_model("LMEvalModel(model, params)", model, params)
    adapter = _adapter()
    if get_tokenizer(model.config.tokenizer).start is None:
        raise ConfigError(
            f"the tokenizer {model.config.tokenizer!r} has no end-of-text, from which lm-evaluation-harness starts "
            "texts"
        )
    return adapter(model, params, batch_tokens, batch_size)


def check_tasks(names: Sequence[str]) -> None:
    """Checks the names of tasks of the harness, as far as is possible without their data.

    Raises:
        MissingExtraError: without the extra `eval`.
        ConfigError: for a name that it does not have, with the nearest one; for a built-in task, with its file.
    """
    # Without the harness, only the names of the built-in tasks are known.
    first, hint = names[0], ""
    if first in TASKS:
        hint = f", which reads {TASKS[first].file} as {first}=PATH,"
    elif near := did_you_mean(first, TASKS):
        hint = f" ({near.removeprefix('; ')})"
    require("lm_eval.tasks", "eval", f"the task {first}{hint} without a file")
    there = _task_manager().all_tasks
    for name in names:
        if name not in there and name in TASKS:
            raise ConfigError(f"the task {name!r} reads {TASKS[name].file}: give its place, {name}=PATH")
        if name not in there:
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}{did_you_mean(name, [*TASKS, *there])} "
                "(`lm-eval ls tasks` lists them)"
            )


def run_harness(
    model: GPT, params: Any, names: Sequence[str], *, limit: int | None = None, batch_tokens: int = 4096
) -> dict[str, dict[str, float]]:
    """Measures a model by tasks of the harness, which loads their data from the Hugging Face hub.

    Args:
        model: the model.
        params: its parameters.
        names: the tasks.
        limit: only so many examples per task, the first ones.
        batch_tokens: as in `score`.

    Returns:
        Per task, and per group's member, its metrics.

    Raises:
        MissingExtraError, ConfigError: as `check_tasks` and `LMEvalModel`.
    """
    check_tasks(names)
    harness = require("lm_eval", "eval", "jaxgpt evaluate --tasks")
    adapter = LMEvalModel(model, params, batch_tokens=batch_tokens)
    results = harness.simple_evaluate(
        adapter, tasks=list(names), limit=limit, bootstrap_iters=0, task_manager=_task_manager()
    )["results"]
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in metrics.items()
            if isinstance(value, (int, float)) and "_stderr" not in metric and metric != "sample_len"
        }
        for task, metrics in results.items()
    }


@functools.cache
def _task_manager() -> Any:
    """What knows the harness's tasks; it reads thousands of files."""
    return require("lm_eval.tasks", "eval", "jaxgpt evaluate --tasks").TaskManager()


@functools.cache
def _adapter() -> Any:
    """The class behind `LMEvalModel`, made here because the class above it is the harness's."""
    base = require("lm_eval.api.model", "eval", "jaxgpt.LMEvalModel").TemplateLM

    class Adapter(base):  # type: ignore[valid-type, misc]
        def __init__(self, model: GPT, params: Any, batch_tokens: int, batch_size: int):
            super().__init__()
            self.model, self.params, self.batch_tokens, self.batch_size = model, params, batch_tokens, batch_size
            self._tokenizer = get_tokenizer(model.config.tokenizer)

        @property
        def eot_token_id(self) -> int | None:
            return self._tokenizer.start

        @property
        def max_length(self) -> int:
            return self.model.config.context_length

        @property
        def tokenizer_name(self) -> str:
            return self.model.config.tokenizer.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self._tokenizer.encode(string, allow_special=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            # Requests with one context come one after another.
            groups = [(ids, list(same)) for ids, same in itertools.groupby(requests, key=lambda request: request[1])]
            scores = score(
                self.model,
                self.params,
                [context for context, _ in groups],
                [[continuation for _, _, continuation in same] for _, same in groups],
                batch_tokens=self.batch_tokens,
                progress=_bar(len(requests), "scoring", disable_tqdm),
            )
            answers = [(one.logprob, one.is_greedy) for group in scores for one in group]
            for (texts, _, _), answer in zip(requests, answers, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [request.args[0] for request in requests]
            windows = [
                list(rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length)) for text in texts
            ]
            flat = [(None, context, continuation) for group in windows for context, continuation in group]
            answers = iter(self._loglikelihood_tokens(flat, disable_tqdm))
            totals = [sum(logprob for logprob, _ in itertools.islice(answers, len(group))) for group in windows]
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = [""] * len(requests)
            prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
            advance = _bar(len(requests), "generating", disable_tqdm)

            def kind(i: int) -> str:
                return json.dumps(requests[i].args[1], sort_keys=True)

            # Those of one kind together, and of one kind those of like lengths.
            order = sorted(range(len(requests)), key=lambda i: (kind(i), -len(prompts[i])))
            for _, group in itertools.groupby(order, key=kind):
                for batch in _batched(group, self.batch_size):
                    options = requests[batch[0]].args[1]
                    written = _generate(self.model, self.params, [prompts[i] for i in batch], options)
                    for i, text in zip(batch, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    advance(len(batch))
            return texts

    return Adapter


def _batched(items: Any, size: int) -> Any:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _bar(total: int, what: str, disable: bool) -> Callable[[int], Any]:
    """What advances a bar like the harness's own."""
    return require("tqdm", "eval", "jaxgpt.LMEvalModel").tqdm(total=total, desc=what, disable=disable).update


def _generate(model: GPT, params: Any, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
    """Continues prompts until each has one of the texts `options["until"]`, which is not part of the result."""
    limits = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    new_tokens = next((options[name] for name in limits if options.get(name) is not None), DEFAULT_NEW_TOKENS)
    room = model.config.context_length - new_tokens
    if room < 1:
        raise ValueError(
            f"{new_tokens} new tokens leave no room for a prompt in context_length={model.config.context_length}"
        )
    until = options.get("until") or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text]
    temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
    sampler = from_options(temperature=temperature, top_k=options.get("top_k"), top_p=options.get("top_p"))
    run = Generation(
        model,
        params,
        [ids[-room:] for ids in prompts],
        new_tokens,
        sampler=sampler,
        key=0 if sampler.draws else None,
        stop_ids=default_stop_ids(model.config),
        chunk=STREAM_CHUNK,  # few tokens are drawn past a stop string
    )
    return completions(run, until)

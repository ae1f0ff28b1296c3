"""Runs the workloads of `benchmark` with what a user could use instead: transformers on PyTorch, and CTranslate2.

Weights are random, in Hugging Face's layout; threads are as many as the process may use. `python -m
jaxgpt.measuring.peers WORKLOAD PRESET PEER` prints one JSON object, as `python -m jaxgpt.measuring.benchmark` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxgpt.measuring.benchmark import NEW, PROMPT, Measurement, Workload, peak_bytes, questions, timed, workloads

# Name: the packages that the peer needs, and the (kind, dtype) of the workloads that it can run.
PEERS = {
    "transformers": (
        ("torch", "transformers"),
        {(kind, dtype) for kind in ("decode", "forward", "train") for dtype in ("float32", "bfloat16")},
    ),
    "lm_eval": (
        ("torch", "transformers", "lm_eval", "accelerate", "peft"),
        {("score", "float32"), ("score", "bfloat16")},
    ),
    "ctranslate2": (("ctranslate2", "torch", "transformers"), {("decode", "float32"), ("decode", "int8")}),
}


def available(work: Workload) -> list[str]:
    """The installed peers that can run a workload. None has a GPT with banded attention."""
    if work.config().banded_layers:
        return []
    return [
        name
        for name, (packages, able) in PEERS.items()
        if (work.kind, work.dtype) in able and all(find_spec(package) for package in packages)
    ]


def measure(work: Workload, peer: str) -> Measurement:
    """Runs a workload with a peer, in this process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    if peer == "ctranslate2":
        return Measurement(_ctranslate2(work, threads), peak_bytes())
    run = {"decode": _decode, "forward": _forward, "score": _score, "train": _train}[work.kind](work)
    return Measurement(timed(run, repeats=3, warm_up=2), peak_bytes())


def _model(work: Workload) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = work.config()
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            embd_pdrop=config.drop_rate_emb,
            attn_pdrop=config.drop_rate_attn,
            resid_pdrop=config.drop_rate_shortcut,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _ids(work: Workload, length: int) -> Any:
    import torch

    return torch.randint(0, work.config().vocab_size, (work.batch, length))


def _decode(work: Workload) -> Callable[[], Any]:
    import torch

    model, ids = _model(work).to(getattr(torch, work.dtype)).eval(), _ids(work, PROMPT)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )

    return run


def _forward(work: Workload) -> Callable[[], Any]:
    import torch

    model, ids = _model(work).to(getattr(torch, work.dtype)).eval(), _ids(work, work.length)

    def run() -> None:
        with torch.no_grad():
            model(ids)

    return run


def _score(work: Workload) -> Callable[[], Any]:
    """lm-evaluation-harness's own `hf` model."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Tokenizer

    from jaxgpt.tokenizer import get_tokenizer, write_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        config = work.config()
        write_tokenizer(Path(directory), get_tokenizer(config.tokenizer), context_length=config.context_length)
        tokenizer = GPT2Tokenizer.from_pretrained(directory)
    model = _model(work).to(getattr(torch, work.dtype)).eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32)
    requests = [
        (("", ""), prompt.tolist(), ids.tolist())
        for prompt, choices in zip(*questions(work), strict=True)
        for ids in choices
    ]
    return lambda: harness._loglikelihood_tokens(requests, disable_tqdm=True)


def _train(work: Workload) -> Callable[[], Any]:
    import torch

    model, ids = _model(work).train(), _ids(work, work.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def run() -> None:
        mixed = torch.autocast("cpu", torch.bfloat16) if work.dtype == "bfloat16" else contextlib.nullcontext()
        with mixed:
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return run


def _ctranslate2(work: Workload, threads: int) -> float:
    import ctranslate2
    from transformers import GPT2Tokenizer

    from jaxgpt.tokenizer import get_tokenizer, write_tokenizer

    with tempfile.TemporaryDirectory() as work_directory:
        source, converted = Path(work_directory) / "source", Path(work_directory) / "converted"
        _model(work).save_pretrained(source)
        config = work.config()
        write_tokenizer(source, get_tokenizer(config.tokenizer), context_length=config.context_length)
        GPT2Tokenizer.from_pretrained(source).save_pretrained(source)
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(converted), quantization=work.dtype)
        generator = ctranslate2.Generator(str(converted), device="cpu", intra_threads=threads, compute_type=work.dtype)
        prompts = [["<|endoftext|>"] * PROMPT] * work.batch

        def run() -> None:
            generator.generate_batch(
                prompts, max_length=NEW, min_length=NEW, sampling_topk=1, include_prompt_in_result=False
            )

        return timed(run, repeats=3, warm_up=1)


def main(arguments: list[str]) -> None:
    """Runs a workload and prints the measurement."""
    name, preset, peer = arguments
    work = next(work for work in workloads(preset) if work.name == name)
    print(json.dumps(dataclasses.asdict(measure(work, peer))))


if __name__ == "__main__":
    main(sys.argv[1:])

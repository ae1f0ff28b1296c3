"""Runs the same workloads with what a user could use instead.

| peer | decode | prompt | forward | score | train |
|---|---|---|---|---|---|
| transformers on PyTorch, eager | float32, bfloat16 | float32, bfloat16 | float32, bfloat16 | | float32, bfloat16 |
| the same through `torch.compile` | float32, bfloat16 | float32, bfloat16 | float32, bfloat16 | | float32, bfloat16 |
| lm-evaluation-harness's `hf` model | | | | float32, bfloat16 | |
| CTranslate2 | float32, int8 | float32 | | | |
| llama.cpp (float16 where the row says bfloat16, Q8_0 for int8) | all | float32, bfloat16 | | | |
| OpenVINO GenAI | all | float32, bfloat16 | | | |

On an NVIDIA GPU the first two run there, with its `scaled_dot_product_attention`, and the others are left out.

KerasHub's GPT-2 also runs on JAX, but the package needs TensorFlow. Weights are random; threads are as many as the
process may use; everything else is each program's default. `python -m jaxgpt.measuring.peers WORKLOAD PRESET PEER
[PLATFORM]` prints one JSON object, as `python -m jaxgpt.measuring.benchmark` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxgpt.measuring.benchmark import Measurement, cores, model_and_params, peak_bytes, timed
from jaxgpt.measuring.workloads import Workload, questions, workloads

Run = Callable[[], Any]

FLOATS = ("float32", "bfloat16")
ALL = (*FLOATS, "int8")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program to compare with.

    Attributes:
        packages: the modules that it needs.
        rows: the kinds of workloads that it can run, each with the dtypes.
        make: from a workload, and a directory of files, to what is timed.
        convert: writes these files, in another process, whose memory does not count; None if there are none.
        compiles: whether it needs a C++ compiler.
        on_gpus: whether it runs on NVIDIA GPUs here; the packages of the extra [bench] may, or may be for CPUs only.
    """

    packages: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    make: Callable[[Workload, Path], Run]
    convert: Callable[[Workload, Path], None] | None = None
    compiles: bool = False
    on_gpus: bool = False

    def can_run(self, work: Workload) -> bool:
        """Whether it has such a workload, installed or not. No peer has a GPT with banded attention."""
        here = work.platform == "cpu" or (work.platform == "gpu" and self.on_gpus)
        return here and work.dtype in self.rows.get(work.kind, ()) and not work.config().banded_layers

    def lacks(self) -> str:
        """What it lacks on this machine; '' if it can run."""
        absent = [package for package in self.packages if not find_spec(package)]
        if absent:
            return f"{', '.join(absent)} not installed"
        return "no C++ compiler" if self.compiles and not any(map(shutil.which, ("c++", "g++", "clang++"))) else ""


def available(work: Workload) -> list[str]:
    """The peers that can run a workload here."""
    return [name for name, peer in PEERS.items() if peer.can_run(work) and not peer.lacks()]


def missing(work: Workload) -> dict[str, str]:
    """The peers that could run a workload if they did not lack something here, each with what it lacks."""
    return {name: lacks for name, peer in PEERS.items() if peer.can_run(work) and (lacks := peer.lacks())}


def measure(work: Workload, name: str) -> Measurement:
    """Runs a workload with a peer, in this process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    peer = PEERS[name]
    with tempfile.TemporaryDirectory() as directory:
        if peer.convert is not None:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
                other.submit(peer.convert, work, Path(directory)).result()
        run = peer.make(work, Path(directory))
        return Measurement(timed(run, repeats=3, warm_up=2), _torch_peak_bytes(work) or peak_bytes())


# transformers on PyTorch, as it is and compiled


def _torch(work: Workload, directory: Path, compiled: bool = False) -> Run:
    import torch

    torch.set_num_threads(cores())
    device = _torch_device(work)
    if work.kind == "train":
        run = _torch_train(work, compiled)
    else:
        model = _torch_model(work).to(getattr(torch, work.dtype)).eval()
        if compiled:
            from torch._inductor import config as inductor

            inductor.freezing = device == "cpu"  # weights are constants, laid out for the products
        run = _torch_decode(work, model, compiled) if work.kind == "decode" else _torch_forward(work, model, compiled)
    return run if device == "cpu" else _until_done(run)


def _torch_device(work: Workload) -> str:
    """What torch calls the device.

    Raises:
        RuntimeError: if this torch does not see the GPU that JAX runs on.
    """
    import torch

    if work.platform == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU: install a build for CUDA from pytorch.org")
    return "cuda"


def _until_done(run: Run) -> Run:
    """`run`, and then waits until the GPU has done all of it."""
    import torch

    def both() -> None:
        run()
        torch.cuda.synchronize()

    return both


def _torch_peak_bytes(work: Workload) -> int:
    """The GPU memory that torch had at most; 0 on a CPU."""
    if work.platform == "cpu":
        return 0
    import torch

    return torch.cuda.max_memory_allocated()


def _torch_model(work: Workload) -> Any:
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
            attn_implementation="sdpa",
        )
    ).to(_torch_device(work))


def _torch_ids(work: Workload, length: int) -> Any:
    import torch

    return torch.randint(0, work.config().vocab_size, (work.batch, length), device=_torch_device(work))


def _torch_decode(work: Workload, model: Any, compiled: bool) -> Run:
    import torch
    from transformers import CompileConfig

    ids = _torch_ids(work, work.prompt_length)
    options: dict[str, Any] = {}
    if compiled:
        compile_config = CompileConfig()  # whose mode is that for accelerators, and generate compiles for these only
        if work.platform == "cpu":
            compile_config = CompileConfig(mode="default")
            compile_config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compile_config}

    def run() -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work.new_tokens,
                min_new_tokens=work.new_tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )

    return run


def _torch_forward(work: Workload, model: Any, compiled: bool) -> Run:
    import torch

    ids = _torch_ids(work, work.length)
    forward = torch.compile(model, mode="max-autotune") if compiled else model
    positions = 1 if work.kind == "prompt" else 0  # whose logits are computed: the last so many, or all

    def run() -> None:
        with torch.no_grad():
            forward(ids, use_cache=False, logits_to_keep=positions)

    return run


def _torch_train(work: Workload, compiled: bool) -> Run:
    import torch

    model, ids = _torch_model(work).train(), _torch_ids(work, work.length)
    device = _torch_device(work)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def run() -> None:
        mixed = torch.autocast(device, torch.bfloat16) if work.dtype == "bfloat16" else contextlib.nullcontext()
        with mixed:
            loss = forward(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return run


def _lm_eval(work: Workload, directory: Path) -> Run:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Tokenizer

    torch.set_num_threads(cores())
    _write_tokenizer(work, directory)
    model = _torch_model(work).to(getattr(torch, work.dtype)).eval()
    harness = HFLM(pretrained=model, tokenizer=GPT2Tokenizer.from_pretrained(directory), batch_size=32)
    requests = [
        (("", ""), prompt.tolist(), ids.tolist())
        for prompt, choices in zip(*questions(work), strict=True)
        for ids in choices
    ]
    return lambda: harness._loglikelihood_tokens(requests, disable_tqdm=True)


# Those that take Hugging Face's files


def _write_tokenizer(work: Workload, directory: Path) -> None:
    from jaxgpt.tokenizer import get_tokenizer, write_tokenizer

    config = work.config()
    write_tokenizer(directory, get_tokenizer(config.tokenizer), context_length=config.context_length)


def _convert_to_ctranslate2(work: Workload, directory: Path) -> None:
    from ctranslate2.converters import TransformersConverter
    from transformers import GPT2Tokenizer

    source = directory / "source"
    _torch_model(work).save_pretrained(source)
    _write_tokenizer(work, source)
    GPT2Tokenizer.from_pretrained(source).save_pretrained(source)
    TransformersConverter(str(source)).convert(str(directory / "converted"), quantization=work.dtype)


def _ctranslate2(work: Workload, directory: Path) -> Run:
    import ctranslate2

    generator = ctranslate2.Generator(
        str(directory / "converted"), device="cpu", intra_threads=cores(), compute_type=work.dtype
    )
    prompts = [["<|endoftext|>"] * work.prompt_length] * work.batch
    new = work.new_tokens
    return lambda: generator.generate_batch(
        prompts, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
    )


def _convert_to_openvino(work: Workload, directory: Path) -> None:
    from optimum.intel import OVModelForCausalLM

    source = directory / "source"
    _torch_model(work).save_pretrained(source)
    model = OVModelForCausalLM.from_pretrained(source, export=True, load_in_8bit=work.dtype == "int8", compile=False)
    model.save_pretrained(directory / "converted")


def _openvino(work: Workload, directory: Path) -> Run:
    import numpy as np
    import openvino
    import openvino_genai

    precision = "bf16" if work.dtype == "bfloat16" else "f32"
    # As by default, but it must not remember the prompt from one repetition to the next.
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = sys.maxsize
    pipeline = openvino_genai.LLMPipeline(
        str(directory / "converted"),
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_PRECISION_HINT=precision,
        INFERENCE_NUM_THREADS=cores(),
    )
    shape = work.batch, work.prompt_length
    ids = np.random.default_rng(0).integers(0, work.config().vocab_size, shape, np.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    options = openvino_genai.GenerationConfig(
        max_new_tokens=work.new_tokens, eos_token_id=0, ignore_eos=True, do_sample=False
    )
    return lambda: pipeline.generate(inputs, options)


# llama.cpp, from xllamacpp's wheel

_OUTTYPES = {"float32": "f32", "bfloat16": "f16", "int8": "q8_0"}


def _convert_to_gguf(work: Workload, directory: Path) -> None:
    from jaxgpt.config import ComputeConfig
    from jaxgpt.weights import write_gguf

    model, params = model_and_params(work.config(), ComputeConfig(), None)
    write_gguf(directory / "model.gguf", model, params, outtype=_OUTTYPES[work.dtype])


def _llama_cpp(work: Workload, directory: Path) -> Run:
    import numpy as np
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(directory / "model.gguf")
    settings.n_parallel, settings.warmup, settings.verbosity = work.batch, False, -1
    settings.n_ctx = work.batch * (work.prompt_length + work.new_tokens)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = cores()
    server = xllamacpp.Server(settings)
    config = work.config()
    # The server keeps a slot free: of a prompt that fills the context, it gets all tokens but one.
    shape = work.batch, min(work.prompt_length, config.context_length - 1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape).tolist()
    options = {"n_predict": work.new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    rows = ThreadPoolExecutor(work.batch)  # the server decodes what is asked at once together

    def complete(row: list[int]) -> None:
        answer = server.handle_completions({"prompt": row, **options})
        if answer.get("usage", {}).get("completion_tokens") != work.new_tokens:
            raise RuntimeError(f"llama.cpp: {answer}")

    return lambda: list(rows.map(complete, ids))


_TORCH = ("torch", "transformers")
_GENERATES = {"decode": ALL, "prompt": FLOATS}
_TORCH_ROWS = dict.fromkeys(("decode", "prompt", "forward", "train"), FLOATS)

PEERS = {
    "torch": Peer(_TORCH, _TORCH_ROWS, _torch, on_gpus=True),
    "torch.compile": Peer(_TORCH, _TORCH_ROWS, functools.partial(_torch, compiled=True), compiles=True, on_gpus=True),
    "lm_eval": Peer((*_TORCH, "lm_eval", "accelerate", "peft"), {"score": FLOATS}, _lm_eval),
    "CTranslate2": Peer(
        ("ctranslate2", *_TORCH),
        {"decode": ("float32", "int8"), "prompt": ("float32",)},
        _ctranslate2,
        _convert_to_ctranslate2,
    ),
    "llama.cpp": Peer(("xllamacpp", "gguf"), _GENERATES, _llama_cpp, _convert_to_gguf),
    "OpenVINO": Peer(("openvino_genai", "optimum", "nncf", *_TORCH), _GENERATES, _openvino, _convert_to_openvino),
}


def main(arguments: list[str]) -> None:
    """Runs a workload, by default of a CPU, and prints the measurement."""
    name, preset, peer, *platform = arguments
    work = next(work for work in workloads(preset, *platform) if work.name == name)
    print(json.dumps(dataclasses.asdict(measure(work, peer))))


if __name__ == "__main__":
    main(sys.argv[1:])

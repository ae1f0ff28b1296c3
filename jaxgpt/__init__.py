"""jaxgpt: GPT-2 in JAX and Flax, with parameters as a plain pytree that is passed explicitly."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# What is imported at the first use of its name, so that what needs no arrays does not wait for JAX. The block
# below says the same to type checkers and editors.
_MODULES = {
    "cache": ("Cache",),
    "config": ("GPTConfig",),
    "decode": ("scan_generate",),
    "errors": ("CheckpointError", "ConfigError", "DataError", "KernelError", "MissingExtraError", "TrainingError"),
    "evaluation": ("Evaluation", "evaluate"),
    "generation": ("GenerationResult", "generate"),
    "inference": ("prepare",),
    "inside": ("Inside", "look_inside"),
    "model": ("GPT", "FeedForward", "LayerNorm", "MultiHeadAttention", "TransformerBlock"),
    "sampling": ("Greedy", "MinP", "Temperature", "TopK", "TopP"),
    "sharding": ("make_mesh", "shard"),
    "text": ("generate_text", "stream"),
    "tokenizer": ("get_tokenizer",),
    "train_config": ("MeshConfig", "TrainConfig"),
    "trainer": ("TrainResult", "load_run", "train"),
    "weights": ("load", "save"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if TYPE_CHECKING:
    from jaxgpt.cache import Cache as Cache
    from jaxgpt.config import GPTConfig as GPTConfig
    from jaxgpt.decode import scan_generate as scan_generate
    from jaxgpt.errors import CheckpointError as CheckpointError
    from jaxgpt.errors import ConfigError as ConfigError
    from jaxgpt.errors import DataError as DataError
    from jaxgpt.errors import KernelError as KernelError
    from jaxgpt.errors import MissingExtraError as MissingExtraError
    from jaxgpt.errors import TrainingError as TrainingError
    from jaxgpt.evaluation import Evaluation as Evaluation
    from jaxgpt.evaluation import evaluate as evaluate
    from jaxgpt.generation import GenerationResult as GenerationResult
    from jaxgpt.generation import generate as generate
    from jaxgpt.inference import prepare as prepare
    from jaxgpt.inside import Inside as Inside
    from jaxgpt.inside import look_inside as look_inside
    from jaxgpt.model import GPT as GPT
    from jaxgpt.model import FeedForward as FeedForward
    from jaxgpt.model import LayerNorm as LayerNorm
    from jaxgpt.model import MultiHeadAttention as MultiHeadAttention
    from jaxgpt.model import TransformerBlock as TransformerBlock
    from jaxgpt.sampling import Greedy as Greedy
    from jaxgpt.sampling import MinP as MinP
    from jaxgpt.sampling import Temperature as Temperature
    from jaxgpt.sampling import TopK as TopK
    from jaxgpt.sampling import TopP as TopP
    from jaxgpt.sharding import make_mesh as make_mesh
    from jaxgpt.sharding import shard as shard
    from jaxgpt.text import generate_text as generate_text
    from jaxgpt.text import stream as stream
    from jaxgpt.tokenizer import get_tokenizer as get_tokenizer
    from jaxgpt.train_config import MeshConfig as MeshConfig
    from jaxgpt.train_config import TrainConfig as TrainConfig
    from jaxgpt.trainer import TrainResult as TrainResult
    from jaxgpt.trainer import load_run as load_run
    from jaxgpt.trainer import train as train
    from jaxgpt.weights import load as load
    from jaxgpt.weights import save as save
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
        value = getattr(import_module(f"jaxgpt.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})

"""Writes GPT-2s of transformers' Flax model, which version 5 no longer has; started by tests/test_parity_flax.py, with
the Python of an environment with transformers 4.57.1 and Flax.

python flax_world.py DIRECTORY

Each of `CASES` becomes DIRECTORY/NAME, as `save_pretrained` writes it, and DIRECTORY/NAME.npz: `ids` [B, T] and the
model's `logits` [B, T, V] in float32. DIRECTORY/greedy.npy [B, T + 6] is what the first generates after its ids.
DIRECTORY/facts.json is what docs/coming-from-flax.md speaks of: the `arguments` of `generate`, the `fields` of
`GenerationConfig` that it uses, `all_fields`, and the `shapes` of the untied model's parameters.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from transformers import FlaxGPT2LMHeadModel, GenerationConfig, GPT2Config
from transformers.generation.flax_utils import FlaxGenerationMixin

SIZES = {"vocab_size": 97, "n_positions": 16, "n_embd": 24, "n_head": 3, "n_layer": 3}
# Fields of the config, and options of save_pretrained.
CASES = {
    "tied": ({}, {}),
    "untied": (
        {"tie_word_embeddings": False, "n_inner": 37, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        {},
    ),
    "sharded": ({"activation_function": "gelu_pytorch_tanh"}, {"max_shard_size": "20KB"}),
    "safetensors": ({"activation_function": "relu"}, {"safe_serialization": True}),
    "bfloat16": ({}, {}),
}


def main() -> None:
    directory = Path(sys.argv[1])
    for name, (fields, options) in CASES.items():
        model = FlaxGPT2LMHeadModel(GPT2Config(**SIZES, **fields), seed=0)
        rng = np.random.default_rng(1)
        # As initialised, the biases are 0 and the norms 1, and the logits hardly depend on the text.
        noise = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), model.params)  # noqa: B023
        model.params = jax.tree.map(np.add, model.params, noise)
        if name == "bfloat16":
            model.params = model.to_bf16(model.params)
        model.save_pretrained(directory / name, **options)
        ids = rng.integers(0, SIZES["vocab_size"], (2, 10))
        logits = np.asarray(model(ids).logits)
        np.savez(directory / f"{name}.npz", ids=ids, logits=logits)
        if name == next(iter(CASES)):
            greedy = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).sequences
            np.save(directory / "greedy.npy", greedy)
        if name == "untied":
            (directory / "facts.json").write_text(json.dumps(facts(model)))


def facts(model: FlaxGPT2LMHeadModel) -> dict:
    named = re.findall(r'generation_config(?:\.|, ")(?!json)([a-z]\w+)', inspect.getsource(FlaxGenerationMixin))
    arguments = {*inspect.signature(model.generate).parameters, "attention_mask"} - {"kwargs"}
    return {
        "arguments": sorted(arguments),
        "fields": sorted({name for name in named if not hasattr(GenerationConfig, name)}),
        "all_fields": sorted(vars(GenerationConfig())),
        "shapes": {name: leaf.shape for name, leaf in traverse_util.flatten_dict(model.params, sep="/").items()},
    }


if __name__ == "__main__":
    main()

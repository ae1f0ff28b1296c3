"""The model's own vectors as a search: which lines of a text are most like a given one?

    python examples/nearest_lines.py docs/sonnets.txt "My love is like the summer sun"

A line's vector is the mean of what the model holds at its positions after the final norm.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxgpt

parser = argparse.ArgumentParser()
parser.add_argument("text", type=Path)
parser.add_argument("line")
parser.add_argument("--model", default="shakespeare")
args = parser.parse_args()

model, params = jaxgpt.load(args.model)
tokenizer = jaxgpt.get_tokenizer(model.config.tokenizer)
lines = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
encoded = [tokenizer.encode(line)[: model.config.context_length] for line in [args.line, *lines]]
lengths = np.array([len(ids) for ids in encoded])
ids = np.zeros((len(encoded), lengths.max()), np.int32)  # padding on the right: no position before it sees it
for row, tokens in zip(ids, encoded, strict=True):
    row[: len(tokens)] = tokens


@jax.jit
def vectors(params, ids, lengths):
    x, _ = model.apply({"params": params}, ids, method="features")
    inside = jnp.arange(ids.shape[1]) < lengths[:, None]
    mean = (x * inside[..., None]).sum(axis=1) / lengths[:, None]
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


chunks = [slice(start, start + 64) for start in range(0, len(ids), 64)]
unit = np.concatenate([vectors(params, ids[chunk], lengths[chunk]) for chunk in chunks])
similar = unit[1:] @ unit[0]
for i in np.argsort(-similar)[:5]:
    print(f"{similar[i]:.3f}  {lines[i]}")

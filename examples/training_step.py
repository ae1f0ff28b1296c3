"""Training in plain JAX and optax: a GPT goes on learning from a text.

    python examples/training_step.py docs/sonnets.txt --steps 20

`jaxgpt train` does the same with checkpoints, validation, meshes and resuming.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import optax

import jaxgpt

parser = argparse.ArgumentParser()
parser.add_argument("text", type=Path)
parser.add_argument("--model", default="shakespeare")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

model, params = jaxgpt.load(args.model)
ids = np.array(jaxgpt.get_tokenizer(model.config.tokenizer).encode(args.text.read_text(encoding="utf-8")))
optimizer = optax.adamw(3e-4)
opt_state = optimizer.init(params)


@jax.jit
def step(params, opt_state, batch):
    def loss(params):
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


rng = np.random.default_rng(0)
for i in range(1, args.steps + 1):
    starts = rng.integers(0, len(ids) - 64, size=4)
    params, opt_state, value = step(params, opt_state, np.stack([ids[s : s + 65] for s in starts]))
    if i == 1 or i % 10 == 0:
        print(f"step {i}: loss {value:.2f}")

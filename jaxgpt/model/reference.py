"""GPT-2 in NumPy float64, written from the formulas and sharing no code with the package.

The parity tests compare `jaxgpt` with it. It only reads attributes of a config. `params` is the package's tree
with NumPy leaves; all weights are [out, in].
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(name, x):
    if name == "relu":
        return np.where(x > 0, x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "tanh":
        return np.tanh(x)
    if name == "gelu":
        return x * 0.5 * (1 + _erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(name)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(p, x, eps):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return p["scale"] * (x - mean) / np.sqrt(variance + eps) + p.get("shift", 0)


def linear(p, x):
    return x @ p["weight"].T + p.get("bias", 0)


def attention_weights(q, k, window=None, divisor=None):
    """One head of one sequence: q and k [T, K] to weights [T, T]. Position t sees the last `window` ones up to t.
    Scores are divided by sqrt(K), or by `divisor`."""
    T, K = q.shape
    scores = q @ k.T / (math.sqrt(K) if divisor is None else divisor)
    for t in range(T):
        scores[t, t + 1 :] = -np.inf
        if window is not None:
            scores[t, : max(0, t - window + 1)] = -np.inf
    return softmax(scores)


def attention(p, config, x, window=None, layer=0):
    """One sequence [T, D] to [T, D]; `layer` counts from 0."""
    biases = p["qkv"].get("bias", np.zeros((3, config.emb_dim)))
    q, k, v = (x @ p["qkv"]["weight"][i].T + biases[i] for i in range(3))
    width = config.emb_dim // config.n_heads
    divisor = 1.0
    if config.scale_attn_weights:
        divisor *= math.sqrt(width)
    if config.scale_attn_by_inverse_layer_idx:
        divisor *= layer + 1
    heads = []
    for h in range(config.n_heads):
        columns = slice(h * width, (h + 1) * width)
        heads.append(attention_weights(q[:, columns], k[:, columns], window, divisor) @ v[:, columns])
    return linear(p["out_proj"], np.concatenate(heads, axis=-1))


def feed_forward(p, config, x):
    return linear(p["fc_out"], activate(config.activation, linear(p["fc_in"], x)))


def block(p, config, x, window=None, layer=0):
    x = x + attention(p["att"], config, layer_norm(p["norm1"], x, config.layer_norm_eps), window, layer)
    return x + feed_forward(p["ff"], config, layer_norm(p["norm2"], x, config.layer_norm_eps))


def block_params(params, i):
    """The parameters of block `i`, from either layout of the tree."""
    if "trf_blocks" not in params:
        return params[f"trf_blocks_{i}"]

    def pick(node):
        return {name: pick(child) for name, child in node.items()} if isinstance(node, dict) else node[i]

    return pick(params["trf_blocks"])


def gpt(params, config, ids):
    """Ids [B, T] to logits [B, T, V]."""
    rows = []
    for row in np.asarray(ids):
        x = params["tok_emb"]["weight"][row] + params["pos_emb"]["weight"][: len(row)]
        for i in range(config.n_layers):
            banded = config.attention_pattern == "alternating" and i % 2 == 1
            x = block(block_params(params, i), config, x, config.attention_window if banded else None, i)
        x = layer_norm(params["final_norm"], x, config.layer_norm_eps)
        head = params["tok_emb"] if config.tie_embeddings else params["out_head"]
        rows.append(x @ head["weight"].T)
    return np.stack(rows)


def loss(params, config, ids):
    """Mean cross-entropy, in nats, of each token except the first, given those before it."""
    ids = np.asarray(ids)
    probabilities = softmax(gpt(params, config, ids[:, :-1]))
    losses = [
        -math.log(probabilities[b, t, ids[b, t + 1]]) for b in range(ids.shape[0]) for t in range(ids.shape[1] - 1)
    ]
    return sum(losses) / len(losses)


def generate_greedy(params, config, prompt, max_new_tokens):
    """The book's generator for one prompt: for each token, crop to the last `context_length` ids, count positions
    from 0 again and run the whole forward pass. Returns the prompt and the new ids."""
    ids = [int(token) for token in prompt]
    for _ in range(max_new_tokens):
        logits = gpt(params, config, [ids[-config.context_length :]])
        ids.append(int(np.argmax(logits[0, -1])))
    return ids

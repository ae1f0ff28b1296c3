"""Makes openai/ and openai.npz: a tiny GPT-2 that TensorFlow's own code stored, and its logits by OpenAI's formula.

    python tests/goldens/make_openai.py

needs tensorflow, and nothing of jaxgpt. The default tests read the files and do not need it. (TensorFlow 2.21 wrote
these.) It is a fine-tuned checkpoint, as gpt-2-simple names it, with an optimizer's state for some of the variables.

    openai/       what OpenAI's directory holds, except model.ckpt.meta and the tokenizer; weights are float32
    openai.npz    ids [2, 11], and their logits [2, 11, 61], computed in float64
"""

import json
import os
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf

HERE = Path(__file__).parent
V, C, D, H, L = 61, 16, 16, 2, 2


def norm(p, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}/g"] + p[f"{name}/b"]


def conv1d(p, name, x):
    return x @ p[f"{name}/w"][0] + p[f"{name}/b"]


def attention(p, name, x):
    B, T, _ = x.shape
    q, k, v = (
        part.reshape(B, T, H, D // H).transpose(0, 2, 1, 3) for part in np.split(conv1d(p, f"{name}/c_attn", x), 3, -1)
    )
    w = q @ k.transpose(0, 1, 3, 2) / np.sqrt(D // H)
    seen = np.tri(T)
    w = w * seen - 1e10 * (1 - seen)
    w = np.exp(w - w.max(-1, keepdims=True))
    a = w / w.sum(-1, keepdims=True) @ v
    return conv1d(p, f"{name}/c_proj", a.transpose(0, 2, 1, 3).reshape(B, T, D))


def logits(p, ids):
    x = p["model/wte"][ids] + p["model/wpe"][: ids.shape[1]]
    for i in range(L):
        x = x + attention(p, f"model/h{i}/attn", norm(p, f"model/h{i}/ln_1", x))
        h = conv1d(p, f"model/h{i}/mlp/c_fc", norm(p, f"model/h{i}/ln_2", x))
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + conv1d(p, f"model/h{i}/mlp/c_proj", h)
    return norm(p, "model/ln_f", x) @ p["model/wte"].T


def shapes():
    yield from (("model/wpe", [C, D]), ("model/wte", [V, D]))
    for i in range(L):
        h = f"model/h{i}"
        sizes = {"attn/c_attn": (D, 3 * D), "attn/c_proj": (D, D), "mlp/c_fc": (D, 4 * D), "mlp/c_proj": (4 * D, D)}
        for name, (size_in, size_out) in sizes.items():
            yield from ((f"{h}/{name}/w", [1, size_in, size_out]), (f"{h}/{name}/b", [size_out]))
        for name in ("ln_1", "ln_2"):
            yield from ((f"{h}/{name}/g", [D]), (f"{h}/{name}/b", [D]))
    yield from (("model/ln_f/g", [D]), ("model/ln_f/b", [D]))


def main():
    tf.disable_eager_execution()
    rng = np.random.default_rng(0)
    values = {
        name: np.float32((0.25 if len(shape) > 1 else 0.2) * rng.normal(size=shape) + name.endswith("/g"))
        for name, shape in shapes()
    }
    ids = rng.integers(0, V, (2, 11), dtype=np.int32)
    exact = logits({name: np.float64(value) for name, value in values.items()}, ids)
    variables = {name: tf.get_variable(name, initializer=value) for name, value in values.items()}
    trained = [variables["model/ln_f/g"], variables["model/h1/attn/c_proj/w"]]
    step = tf.train.get_or_create_global_step()
    train = tf.train.AdamOptimizer(0.0).minimize(sum(tf.reduce_sum(v**2) for v in trained), step, trained)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(3):
            session.run(train)
        saver = tf.train.Saver()
        os.chdir(HERE)  # or the file `checkpoint` would hold an absolute path
        saver.save(session, "openai/model", global_step=step, write_meta_graph=False)
        for name, value in session.run(variables).items():
            assert np.array_equal(value, values[name]), name
    sizes = {"n_vocab": V, "n_ctx": C, "n_embd": D, "n_head": H, "n_layer": L}
    (HERE / "openai" / "hparams.json").write_text(json.dumps(sizes, indent=2) + "\n")
    np.savez_compressed(HERE / "openai.npz", ids=ids, openai=exact)


if __name__ == "__main__":
    main()

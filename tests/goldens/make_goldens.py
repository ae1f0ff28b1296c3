"""Makes the files of this directory: tiny models in the layouts of others, and what their own code computes.

    python tests/goldens/make_goldens.py

needs torch and transformers, and nothing of jaxgpt. The default tests read the files and need neither. Weights
are float32; the logits in expected.npz are computed in float64, so they serve as exact.

    huggingface/     transformers' GPT2LMHeadModel, as `save_pretrained` writes it
    book.safetensors the state dict of chapter 4's GPTModel, "Build a Large Language Model (From Scratch)"
    nanogpt.pt       nanoGPT's ckpt.pt, from a compiled model without biases
    expected.npz     ids [2, 11] and, a model, logits [2, 11, 61]
"""

import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
V, C, D, H, L = 61, 16, 16, 2, 2


class Attention(nn.Module):
    """The book's MultiHeadAttention, or with `packed` nanoGPT's: the same but for where the weights lie."""

    def __init__(self, packed, qkv_bias, out_bias):
        super().__init__()
        self.packed = packed
        if packed:
            self.c_attn = nn.Linear(D, 3 * D, bias=qkv_bias)
            self.c_proj = nn.Linear(D, D, bias=out_bias)
        else:
            self.W_query, self.W_key, self.W_value = (nn.Linear(D, D, bias=qkv_bias) for _ in range(3))
            self.out_proj = nn.Linear(D, D, bias=out_bias)
            self.register_buffer("mask", torch.triu(torch.ones(C, C), diagonal=1))

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).split(D, dim=2) if self.packed else (self.W_query(x), self.W_key(x), self.W_value(x))
        q, k, v = (y.view(B, T, H, D // H).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(2, 3) / (D // H) ** 0.5
        scores = scores.masked_fill(torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1), -torch.inf)
        context = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, T, D)
        return (self.c_proj if self.packed else self.out_proj)(context)


class BookNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - x.mean(dim=-1, keepdim=True)) / torch.sqrt(variance + 1e-5) + self.shift


class BookFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D))

    def forward(self, x):
        return self.layers(x)


class BookBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.att, self.ff = Attention(packed=False, qkv_bias=False, out_bias=True), BookFeedForward()
        self.norm1, self.norm2 = BookNorm(), BookNorm()

    def forward(self, x):
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class BookGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(V, D), nn.Embedding(C, D)
        self.trf_blocks = nn.Sequential(*(BookBlock() for _ in range(L)))
        self.final_norm = BookNorm()
        self.out_head = nn.Linear(D, V, bias=False)

    def forward(self, ids):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


class NanoMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.attn, self.mlp = Attention(packed=True, qkv_bias=False, out_bias=False), NanoMLP()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, D),
                "wpe": nn.Embedding(C, D),
                "h": nn.ModuleList(NanoBlock() for _ in range(L)),
                "ln_f": nn.LayerNorm(D, bias=False),
            }
        )
        self.lm_head = nn.Linear(D, V, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


@torch.no_grad()
def randomise(model):
    """Draws every parameter anew, biases and norms too, so that none can be lost unseen."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim == 1:
            is_scale = "scale" in name or ("ln" in name and name.endswith("weight"))
            parameter.copy_(0.2 * noise + (1 if is_scale else 0))
        else:
            parameter.copy_(0.25 * noise)
    return model.eval()


@torch.no_grad()
def exact_logits(model, ids):
    return copy.deepcopy(model).double()(ids)


def main():
    torch.manual_seed(0)
    ids = torch.randint(0, V, (2, 11))
    config = GPT2Config(
        vocab_size=V, n_positions=C, n_embd=D, n_head=H, n_layer=L, bos_token_id=V - 1, eos_token_id=V - 1
    )
    huggingface = randomise(GPT2LMHeadModel(config))
    book, nano = randomise(BookGPT()), randomise(NanoGPT())
    np.savez_compressed(
        HERE / "expected.npz",
        ids=ids.numpy().astype(np.int32),
        huggingface=exact_logits(huggingface, ids).logits.numpy(),
        book=exact_logits(book, ids).numpy(),
        nanogpt=exact_logits(nano, ids).numpy(),
    )
    huggingface.save_pretrained(HERE / "huggingface")
    save_file(book.state_dict(), HERE / "book.safetensors")
    model_args = {"n_layer": L, "n_head": H, "n_embd": D, "block_size": C, "bias": False, "vocab_size": V}
    state = {f"_orig_mod.{name}": tensor for name, tensor in nano.state_dict().items()}
    torch.save({"model": state, "model_args": {**model_args, "dropout": 0.0}, "iter_num": 0}, HERE / "nanogpt.pt")


if __name__ == "__main__":
    main()

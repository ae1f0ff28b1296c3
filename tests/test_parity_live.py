"""Parity with transformers' GPT-2 itself, at the full size of GPT-2 small. Needs the extra [parity], takes 1-2 min."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from helpers import cross_entropy

import jaxgpt

pytestmark = [pytest.mark.parity, pytest.mark.exhaustive]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs():
    """transformers' GPT-2 small with random weights. As initialised it repeats its last token forever, so the
    blocks' matrices are made larger, and the biases and norms are moved away from 0 and 1."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif ".h." in name:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("transformers") / "gpt2"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(directory):
    return jaxgpt.load(directory)


def random_ids(*shape):
    return np.random.default_rng(0).integers(0, 50257, shape, dtype=np.int32)


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def test_logits_agree_over_the_whole_context(theirs, ours):
    model, params = ours
    ids = random_ids(1, 1024)
    want = their_logits(theirs, ids)
    got = np.asarray(jax.jit(model.apply)({"params": params}, ids))
    assert np.abs(got - want).max() <= 5e-5


def test_greedy_ids_agree(theirs, ours):
    model, params = ours
    prompt = random_ids(1, 9)
    result = jaxgpt.generate(model, params, prompt, max_new_tokens=64)
    ids = torch.from_numpy(prompt).long()
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=64, max_new_tokens=64, pad_token_id=0
    )
    assert result.tokens[0].tolist() == want[0].tolist()
    assert len(result.tokens[0]) == 73
    assert len(set(result.tokens[0][9:].tolist())) > 20


def test_every_gradient_of_the_loss_agrees(theirs, ours, tmp_path):
    model, params = ours
    ids = random_ids(2, 96)
    theirs.zero_grad()
    their_loss = theirs(torch.from_numpy(ids).long(), labels=torch.from_numpy(ids).long()).loss
    their_loss.backward()
    # Their gradients pass through the same conversion as their weights.
    gradient_model = transformers.GPT2LMHeadModel(theirs.config)
    with torch.no_grad():
        for parameter, source in zip(gradient_model.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(source.grad)
    gradient_model.save_pretrained(tmp_path / "gradients")
    _, want = jaxgpt.load(tmp_path / "gradients")

    our_loss, got = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, model)))(params, ids)
    assert float(our_loss) == pytest.approx(their_loss.item(), rel=1e-6)
    errors = {
        jax.tree_util.keystr(path): float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))
        for (path, mine), exact in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    }
    assert len(errors) == 148
    assert max(errors.values()) <= 1e-4, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_transformers_loads_what_we_export_and_agrees(theirs, ours, tmp_path):
    model, params = ours
    jaxgpt.save(tmp_path / "out", model, params, format="huggingface")
    again, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    ids = random_ids(1, 32)
    assert np.array_equal(their_logits(again.eval(), ids), their_logits(theirs, ids))
    want = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    got = {name: tensor.numpy() for name, tensor in again.state_dict().items()}
    assert want.keys() == got.keys()
    assert all(np.array_equal(got[name], tensor) for name, tensor in want.items())

"""Ten optimizer steps against torch: the same model, batches, schedule, clipping and AdamW."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers import TINY, random_ids

import jaxgpt
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.optimizer import schedule
from jaxgpt.training.step import init_state, make_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.exhaustive]

CONFIG = TrainConfig(
    model=TINY, steps=10, batch_size=8, warmup_steps=3, learning_rate=1e-2, weight_decay=0.1, clip_norm=1.0
)


def torch_losses(directory, batches):
    model = transformers.GPT2LMHeadModel.from_pretrained(directory).train()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=1e-8)
    rates = schedule(CONFIG, CONFIG.learning_rate)
    losses = []
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = float(rates(step))
        ids = torch.tensor(ids, dtype=torch.long)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"grad_accumulation": 4}, {"loss_chunk": 30}], ids=str)
def test_ten_steps_of_losses_equal_torchs(tmp_path, options):
    config = dataclasses.replace(CONFIG, **options)
    batches = [random_ids(TINY, 8, TINY.context_length + 1, seed=step) for step in range(10)]
    state = init_state(config)
    jaxgpt.save(tmp_path / "start", jaxgpt.GPT(TINY), state["params"], format="huggingface")
    step = jax.jit(make_step(config))
    losses = []
    for ids in batches:
        state, metrics = step(state, ids)
        losses.append(float(metrics["loss"]))
    assert losses[0] != pytest.approx(losses[-1], abs=0.01)
    np.testing.assert_allclose(losses, torch_losses(tmp_path / "start", batches), rtol=2e-5)

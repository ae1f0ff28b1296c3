"""The switches of config.json against transformers' GPT-2, with tiny models. Needs the extra [parity]; a minute."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from helpers import cross_entropy

import jaxgpt
from jaxgpt.weights import config_keys, huggingface

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "n_positions": 16, "n_embd": 24, "n_head": 3, "n_layer": 3}
SIZES |= dict.fromkeys(("bos_token_id", "eos_token_id"))
BY_LAYER, UNSCALED = {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}
SWITCHES = {
    "default": {},
    "by layer": BY_LAYER,
    "unscaled": UNSCALED,
    "unscaled but by layer": UNSCALED | BY_LAYER,
    "as Stanford's and CodeParrot": BY_LAYER | {"reorder_and_upcast_attn": True},
    "unscaled and upcast": UNSCALED | {"reorder_and_upcast_attn": True},
    "wide and untied": {"n_inner": 37, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
}
IDS = np.random.default_rng(0).integers(0, 97, (2, 12), dtype=np.int32)


def their_model(switches, kind="GPT2LMHeadModel", implementation="eager"):
    """With larger weights than at initialisation, so that attention is not uniform, and biases that are not 0."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    config.update(switches)
    model = getattr(transformers, kind)._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ".ln_" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3) + norm)
    return model


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def our_logits(model, params):
    return np.asarray(jax.jit(model.apply)({"params": params}, IDS))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_logits_gradients_and_greedy_ids_are_those_of_transformers(switches, tmp_path):
    theirs = their_model(switches)
    theirs.save_pretrained(tmp_path)
    model, params = jaxgpt.load(tmp_path)
    want = their_logits(theirs)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(our_logits(model, params), want, rtol=0, atol=2e-5)

    ids = torch.from_numpy(IDS).long()
    theirs(ids, labels=ids).loss.backward()
    gradients = transformers.GPT2LMHeadModel(theirs.config)
    with torch.no_grad():
        for parameter, source in zip(gradients.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(source.grad)
    gradients.save_pretrained(tmp_path / "gradients")
    _, expected = jaxgpt.load(tmp_path / "gradients")
    got = jax.jit(jax.grad(functools.partial(cross_entropy, model)))(params, IDS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)

    greedy = theirs.generate(ids[:, :4], attention_mask=torch.ones_like(ids[:, :4]), do_sample=False, max_new_tokens=12)
    result = jaxgpt.generate(model, params, IDS[:, :4], 12)
    assert [row.tolist() for row in result.tokens] == greedy.tolist()
    assert len(set(greedy[:, 4:].flatten().tolist())) > 3


def test_the_switches_matter():
    logits = {name: their_logits(their_model(switches)) for name, switches in SWITCHES.items()}
    for name in ("by layer", "unscaled", "unscaled but by layer"):
        assert np.abs(logits[name] - logits["default"]).max() > 0.1
    np.testing.assert_allclose(logits["as Stanford's and CodeParrot"], logits["by layer"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["by layer", "unscaled", "as Stanford's and CodeParrot"])
def test_transformers_reads_our_export_with_the_switches(name, implementation, tmp_path):
    theirs = their_model(SWITCHES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = jaxgpt.load(tmp_path / "theirs")
    jaxgpt.save(tmp_path / "ours", model, params, format="huggingface")
    again, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation=implementation
    )
    assert not any(report.values()), report
    np.testing.assert_allclose(their_logits(again.eval()), their_logits(theirs), rtol=0, atol=1e-5)
    back, same = jaxgpt.load(tmp_path / "ours")
    assert back == model
    assert jax.tree.all(jax.tree.map(np.array_equal, same, params))


def test_each_activation_is_that_of_transformers():
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    for name, ours in huggingface._ACTIVATIONS.items():
        theirs = transformers.activations.ACT2FN[name](torch.from_numpy(x)).numpy()
        got = np.asarray(jaxgpt.model.ops.activation(ours)(x))
        np.testing.assert_allclose(got, theirs, rtol=0, atol=1e-6, err_msg=name)
    assert set(jaxgpt.config.GPTConfig.__dataclass_fields__["activation"].metadata["setting"].choices) == set(
        huggingface._ACTIVATIONS.values()
    )


def test_every_key_that_transformers_writes_is_honoured_refused_or_ignored_for_a_reason(tmp_path):
    fields = transformers.GPT2Config(**SIZES).to_dict()
    known = {key for _, keys, _ in huggingface._FIELDS for key in keys} | set(config_keys.OFF)
    known |= {key for keys in config_keys.WITHOUT_EFFECT.values() for key in keys}
    assert fields.keys() <= known
    assert {field.name for field in dataclasses.fields(transformers.GPT2Config)} <= known
    # Old files have these in config.json too.
    generation = {key: value or 1 for key, value in transformers.GenerationConfig().to_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps({**generation, **fields}, default=str))
    assert jaxgpt.weights.load_config(tmp_path).n_layers == 3


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("GPT2Model", None),
        ("GPT2ForSequenceClassification", "score.weight"),
        ("GPT2ForTokenClassification", "classifier.weight"),
        ("GPT2ForQuestionAnswering", "qa_outputs.weight"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head.summary.weight"),
    ],
)
def test_other_classes_of_transformers_load_or_have_their_heads_named(kind, extra, tmp_path):
    theirs = their_model(BY_LAYER, kind)
    theirs.save_pretrained(tmp_path)
    if extra:
        with pytest.raises(jaxgpt.CheckpointError, match=f"unexpected: .*'{extra}'"):
            jaxgpt.load(tmp_path)
        return
    model, params = jaxgpt.load(tmp_path)
    with torch.no_grad():
        features = theirs(torch.from_numpy(IDS).long()).last_hidden_state
        want = (features @ theirs.wte.weight.T).numpy()
    np.testing.assert_allclose(our_logits(model, params), want, rtol=0, atol=2e-5)

"""GPTConfig: what it accepts, what it refuses and how it says so, presets and files."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from jaxgpt.config import PRESETS, GPTConfig
from jaxgpt.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"

# What the architecture depends on; the rest says how to compute and store it.
ARCHITECTURE = {
    "vocab_size",
    "context_length",
    "emb_dim",
    "n_heads",
    "n_layers",
    "ffn_dim",
    "drop_rate",
    "qkv_bias",
    "tie_embeddings",
    "bias",
    "activation",
    "layer_norm_eps",
    "tokenizer",
}

INT_FIELDS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "ffn_dim")
RATE_FIELDS = ("drop_rate", "drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")
BOOL_FIELDS = ("qkv_bias", "tie_embeddings", "bias", "scan_layers")
CHOICE_FIELDS = ("activation", "param_dtype", "dtype", "tokenizer", "remat")


def test_the_fields_above_are_all_there_are():
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    assert {*INT_FIELDS, *RATE_FIELDS, *BOOL_FIELDS, *CHOICE_FIELDS, "layer_norm_eps", "embedding_std"} == fields


def test_defaults_are_gpt2_small():
    assert GPTConfig() == GPTConfig.preset("gpt2")
    assert GPTConfig().ffn_dim == 3072
    assert GPTConfig().head_dim == 64


def test_branch_rates_follow_the_default_rate_unless_given():
    config = GPTConfig(drop_rate=0.3, drop_rate_attn=0.0)
    assert (config.drop_rate_emb, config.drop_rate_attn, config.drop_rate_shortcut) == (0.3, 0.0, 0.3)


@pytest.mark.parametrize("name", INT_FIELDS)
@pytest.mark.parametrize("value", [0, -1, 10**9, 1.5, 12.0, True, "12"])
def test_sizes_must_be_positive_ints_of_a_sane_size(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be "):
        GPTConfig(**{name: value})


@pytest.mark.parametrize("name", RATE_FIELDS)
@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), float("inf"), True, "0.1", 10**400])
def test_dropout_rates_lie_from_0_to_below_1(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be "):
        GPTConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -1e-5, 1, float("nan"), "1e-5", None])
def test_layer_norm_eps_lies_between_0_and_1(value):
    with pytest.raises(ConfigError, match=r"^layer_norm_eps must "):
        GPTConfig(layer_norm_eps=value)


@pytest.mark.parametrize("value", [0, -1.0, 11, float("nan"), "0.02", None])
def test_embedding_std_is_positive_and_sane(value):
    with pytest.raises(ConfigError, match=r"^embedding_std must "):
        GPTConfig(embedding_std=value)


@pytest.mark.parametrize("name", BOOL_FIELDS)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_switches_must_be_bools(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be a bool, not {value!r}"):
        GPTConfig(**{name: value})


@pytest.mark.parametrize("name", CHOICE_FIELDS)
@pytest.mark.parametrize("value", ["", "swish", 3, None])
def test_choices_must_be_known_names(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be "):
        GPTConfig(**{name: value})


def test_a_misspelt_choice_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"activation must be one of .*, not 'gelu_tan'; did you mean 'gelu_tanh'\?"):
        GPTConfig(activation="gelu_tan")


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="emb_dim must be a multiple of n_heads: 768 is not one of 7"):
        GPTConfig(n_heads=7)


def test_an_unknown_key_is_told_the_nearest_field():
    with pytest.raises(ConfigError, match=r"config: unknown key 'n_layer'; did you mean 'n_layers'\?"):
        GPTConfig.from_dict({"n_layer": 2})


def test_is_frozen_and_hashable_by_value():
    config = GPTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 3  # type: ignore[misc]
    assert hash(config) == hash(GPTConfig())
    assert len({config, GPTConfig(), GPTConfig(n_layers=3)}) == 2


def test_to_dict_round_trips_through_json():
    config = GPTConfig.preset("book-355m", drop_rate_attn=0.0, ffn_dim=100, scan_layers=True)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_moves_what_was_derived_and_keeps_what_was_set():
    assert GPTConfig().replace(emb_dim=96, drop_rate=0.0) == GPTConfig(emb_dim=96, drop_rate=0.0)
    kept = GPTConfig(ffn_dim=100, drop_rate_emb=0.5).replace(emb_dim=96, drop_rate=0.0)
    assert (kept.ffn_dim, kept.drop_rate_emb, kept.drop_rate_attn) == (100, 0.5, 0.0)


def test_replace_validates():
    with pytest.raises(ConfigError, match="n_heads must be from 1"):
        GPTConfig().replace(n_heads=0)
    with pytest.raises(ConfigError, match="unknown key 'layers'"):
        GPTConfig().replace(layers=2)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_and_their_kind(name):
    config = GPTConfig.preset(name)
    assert config.vocab_size == 50257
    assert config.context_length == (2048 if name.startswith("gpt3-") else 1024)
    assert (config.tie_embeddings, config.qkv_bias) == ((False, False) if name.startswith("book-") else (True, True))


def test_a_preset_takes_overrides():
    assert GPTConfig.preset("gpt2", n_layers=2) == GPTConfig(n_layers=2)
    with pytest.raises(ConfigError, match="preset gpt2: unknown key 'n_layer'"):
        GPTConfig.preset("gpt2", n_layer=2)


def test_an_unknown_preset_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"no preset 'gpt2-mediun'; did you mean 'gpt2-medium'\?"):
        GPTConfig.preset("gpt2-mediun")


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_also_a_file_that_spells_it_out(name):
    path = CONFIGS / f"{name}.toml"
    assert GPTConfig.from_file(path) == GPTConfig.preset(name)
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))["model"]) == ARCHITECTURE


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_toml_file_may_start_from_a_preset(tmp_path):
    path = write(tmp_path / "a.toml", '[model]\npreset = "book-124m"\nn_layers = 2\n\n[train]\nsteps = 3\n')
    assert GPTConfig.from_file(path) == GPTConfig.preset("book-124m", n_layers=2)


def test_a_json_file_is_one_object(tmp_path):
    path = write(tmp_path / "a.json", '{"preset": "gpt2", "emb_dim": 96, "drop_rate": 0}')
    assert GPTConfig.from_file(path) == GPTConfig(emb_dim=96, drop_rate=0.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "[model\n", "cannot be read as TOML"),
        ("a.toml", "[model]\nn_layers = " + "9" * 5000, "cannot be read as TOML"),
        ("a.toml", "[model]\nx = " + "[" * 100_000, "cannot be read as TOML"),
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.json", "[1]", r"expected a \[model\] table \(TOML\) or one object \(JSON\)"),
        ("a.toml", "n_layers = 2\n", r"expected a \[model\] table"),
        ("a.toml", "model = 3\n", r"expected a \[model\] table"),
        ("a.toml", "[model]\nn_layer = 2\n", "unknown key 'n_layer'; did you mean 'n_layers'?"),
        ("a.toml", '[model]\npreset = "gpt2"\nname = "x"\n', "unknown key 'name'"),
        ("a.toml", '[model]\npreset = "gpt-2"\n', "no preset 'gpt-2'; did you mean 'gpt2'?"),
        ("a.toml", '[model]\npreset = ["gpt2"]\n', "no preset \\['gpt2'\\]"),
        ("a.json", '{"n_layers": 1e999}', "n_layers must be an int, not inf"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=f"{name}: .*{message}"):
        GPTConfig.from_file(path)


def test_a_missing_or_undecodable_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read as TOML"):
        GPTConfig.from_file(tmp_path / "missing.toml")
    (tmp_path / "latin.json").write_bytes(b'{"tokenizer": "\xe9"}')
    with pytest.raises(ConfigError, match=r"latin\.json: cannot be read as JSON"):
        GPTConfig.from_file(tmp_path / "latin.json")

"""GPTConfig: what it accepts, what it refuses and with which message, presets and files."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
from helpers import to_toml
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.config import PRESETS, ComputeConfig, GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.fields import SYNONYMS, settings
from jaxgpt.parallel.mesh import MeshConfig
from jaxgpt.training import config as training_config
from jaxgpt.training.config import TABLES, LoraConfig, TrainConfig
from jaxgpt.training.optimizer import schedule

CONFIGS = Path(__file__).parent.parent / "configs"

# The fields that determine the architecture; the rest say how to compute and store it.
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
BAND = {"attention_pattern", "attention_window"}
# Table 2.1 of Brown et al. 2020: tokens per step, and the learning rate.
GPT3_TRAINING = {
    "gpt3-125m": (0.5e6, 6.0e-4),
    "gpt3-350m": (0.5e6, 3.0e-4),
    "gpt3-760m": (0.5e6, 2.5e-4),
    "gpt3-1.3b": (1e6, 2.0e-4),
    "gpt3-2.7b": (1e6, 1.6e-4),
    "gpt3-6.7b": (2e6, 1.2e-4),
    "gpt3-13b": (2e6, 1.0e-4),
    "gpt3-175b": (3.2e6, 0.6e-4),
}

INT_FIELDS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "ffn_dim", "attention_window")
RATE_FIELDS = ("drop_rate", "drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")
BOOL_FIELDS = ("qkv_bias", "tie_embeddings", "bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
CHOICE_FIELDS = ("activation", "attention_pattern")
# Of `ComputeConfig`.
COMPUTE_BOOLS = ("scan_layers", "custom_derivatives", "native_sequences", "native_kernel")
COMPUTE_CHOICES = {declared.name: declared.choices for declared in settings(ComputeConfig) if declared.choices}


def test_the_fields_above_are_all_there_are():
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    assert {
        *INT_FIELDS,
        *RATE_FIELDS,
        *BOOL_FIELDS,
        *CHOICE_FIELDS,
        "layer_norm_eps",
        "embedding_std",
        "tokenizer",
    } == fields
    assert {*COMPUTE_BOOLS, *COMPUTE_CHOICES} == set(ComputeConfig().to_dict())
    assert set(COMPUTE_CHOICES) == {"dtype", "param_dtype", "activation_dtype", "remat", "attention"}


def with_field(name, value):
    """The config that has this field, with this value."""
    return (ComputeConfig if name in ComputeConfig().to_dict() else GPTConfig)(**{name: value})


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


@pytest.mark.parametrize("name", BOOL_FIELDS + COMPUTE_BOOLS)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_switches_must_be_bools(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be a bool, not {value!r}"):
        with_field(name, value)


@pytest.mark.parametrize("name", [*CHOICE_FIELDS, *COMPUTE_CHOICES, "tokenizer"])
@pytest.mark.parametrize("value", ["", "swish", 3, None])
def test_choices_must_be_known_names(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} must be "):
        with_field(name, value)


def test_a_misspelt_choice_is_told_the_nearest():
    with pytest.raises(ConfigError, match=r"activation must be one of .*, not 'gelu_tan'; did you mean 'gelu_tanh'\?"):
        GPTConfig(activation="gelu_tan")
    with pytest.raises(ConfigError, match=r"remat must be one of none, block, dots, not 'dot'; did you mean 'dots'\?"):
        ComputeConfig(remat="dot")


@pytest.mark.parametrize(
    ("cls", "field", "value", "message"),
    [
        (GPTConfig, "n_layers", 4097, "n_layers must be from 1 to 4096, not 4097"),
        (GPTConfig, "drop_rate", 1.0, "drop_rate must be at least 0 and below 1, not 1.0"),
        (GPTConfig, "layer_norm_eps", 0, "layer_norm_eps must be above 0 and below 1, not 0"),
        (GPTConfig, "embedding_std", 10.5, "embedding_std must be above 0 and at most 10, not 10.5"),
        (
            ComputeConfig,
            "remat",
            "blocks",
            "remat must be one of none, block, dots, not 'blocks'; did you mean 'block'?",
        ),
        (TrainConfig, "steps", 0, "steps must be from 1 to 1000000000, not 0"),
        (TrainConfig, "learning_rate", -1, "learning_rate must be 0 or more, not -1"),
        (TrainConfig, "seed", 0.5, "seed must be an int, not 0.5"),
        (
            TrainConfig,
            "sequences",
            "slide",
            "sequences must be one of random, sliding, not 'slide'; did you mean 'sliding'?",
        ),
        (MeshConfig, "fsdp", -2, "mesh.fsdp must be 1 or more, or -1 for what the other axes leave, not -2"),
    ],
)
def test_a_value_out_of_range_is_told_what_is_allowed(cls, field, value, message):
    needed = {"model": GPTConfig()} if cls is TrainConfig else {}
    with pytest.raises(ConfigError) as raised:
        cls(**needed, **{field: value})
    assert str(raised.value) == message


@pytest.mark.parametrize("cls", [GPTConfig, ComputeConfig, TrainConfig, MeshConfig, LoraConfig])
def test_every_field_is_declared_with_a_range_that_holds_to_its_ends(cls):
    tables = {"model", "compute", "mesh", "lora", "model_defaults"} if cls is TrainConfig else set()
    assert {field.name for field in dataclasses.fields(cls)} - tables == {declared.name for declared in settings(cls)}
    for declared in settings(cls):
        step = 1 if declared.type == "int" else 1e-9
        inside = [declared.low, declared.high, declared.also, *declared.choices]
        outside = [declared.above, declared.below]
        if declared.type in ("int", "float"):
            assert declared.low is not None or declared.above is not None, declared.name
            outside.append(None if declared.low is None else declared.low - step)
            outside.append(None if declared.high is None else declared.high + step)
        for value in inside:
            if value is not None:
                declared.check(value)
        for value in outside:
            if value not in (None, declared.also):
                with pytest.raises(
                    ConfigError, match=rf"^here\.{declared.name} must be {re.escape(declared.allowed)}, "
                ):
                    declared.check(value, prefix="here.")


@pytest.mark.parametrize("cls", [GPTConfig, ComputeConfig, TrainConfig, MeshConfig, LoraConfig])
def test_the_docstring_tells_every_fields_meaning(cls):
    told = cls.__doc__.partition("\nAttributes:\n")[2].replace("\n        ", " ")
    assert told.split("\n") == [f"    {declared.name}: {declared}" for declared in settings(cls)]


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="emb_dim must be a multiple of n_heads: 768 is not one of 7"):
        GPTConfig(n_heads=7)


def test_every_second_layer_of_an_alternating_model_is_banded():
    config = GPTConfig(attention_pattern="alternating", attention_window=255, context_length=256, n_layers=5)
    assert list(config.banded_layers) == [1, 3]
    assert list(config.replace(n_layers=1).banded_layers) == []
    assert list(config.replace(attention_pattern="dense").banded_layers) == []
    assert list(config.replace(attention_window=256).banded_layers) == []  # all of the context is in the band


def test_scores_are_scaled_by_the_width_of_a_head_and_by_the_layer():
    config = GPTConfig(n_layers=3)
    assert config.attention_scales == (1 / 8,) * 3
    assert config.replace(scale_attn_by_inverse_layer_idx=True).attention_scales == (1 / 8, 1 / 16, 1 / 24)
    unscaled = config.replace(scale_attn_weights=False)
    assert unscaled.attention_scales == (1, 1, 1)
    assert unscaled.replace(scale_attn_by_inverse_layer_idx=True).attention_scales == (1, 1 / 2, 1 / 3)


def test_an_unknown_key_is_told_the_nearest_field():
    with pytest.raises(ConfigError, match=r"config: unknown key 'n_layer'; did you mean 'n_layers'\?"):
        GPTConfig.from_dict({"n_layer": 2})
    with pytest.raises(ConfigError, match=r"config: unknown key 'scan_layer'; did you mean 'scan_layers'\?"):
        ComputeConfig.from_dict({"scan_layer": True})


def test_is_frozen_and_hashable_by_value():
    config = GPTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layers = 3  # type: ignore[misc]
    assert hash(config) == hash(GPTConfig())
    assert len({config, GPTConfig(), GPTConfig(n_layers=3)}) == 2


def test_replace_moves_what_was_derived_and_keeps_what_was_set():
    assert GPTConfig().replace(emb_dim=96, drop_rate=0.0) == GPTConfig(emb_dim=96, drop_rate=0.0)
    kept = GPTConfig(ffn_dim=100, drop_rate_emb=0.5).replace(emb_dim=96, drop_rate=0.0)
    assert (kept.ffn_dim, kept.drop_rate_emb, kept.drop_rate_attn) == (100, 0.5, 0.0)


def test_replace_validates():
    with pytest.raises(ConfigError, match="n_heads must be from 1"):
        GPTConfig().replace(n_heads=0)
    with pytest.raises(ConfigError, match="unknown key 'layers'"):
        GPTConfig().replace(layers=2)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("gpt2", "gpt3-", "book-"))])
def test_preset_names_and_their_kind(name):
    config = GPTConfig.preset(name)
    assert config.vocab_size == 50257
    assert config.context_length == (2048 if name.startswith("gpt3-") else 1024)
    assert len(config.banded_layers) == (config.n_layers // 2 if name.startswith("gpt3-") else 0)
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
    spelt = ARCHITECTURE | (BAND if GPTConfig.preset(name).banded_layers else set())
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))["model"]) == spelt


@pytest.mark.parametrize(("name", "published"), GPT3_TRAINING.items(), ids=GPT3_TRAINING)
def test_gpt3_files_hold_the_published_training(name, published):
    config = TrainConfig.from_file(CONFIGS / f"{name}.toml")
    assert config.model == GPTConfig.preset(name)
    tokens, learning_rate = published
    assert config.T == 2048
    assert config.learning_rate == learning_rate
    assert config.batch_size % 256 == 0
    assert config.batch_size * 2048 == pytest.approx(tokens, rel=0.05)
    step = config.batch_size * 2048
    assert config.steps * step == pytest.approx(300e9, abs=step / 2)
    assert config.warmup_steps * step == pytest.approx(375e6, abs=step / 2)
    narrow = {"dtype": "bfloat16", "activation_dtype": "bfloat16"}
    assert config.compute == ComputeConfig(**narrow, scan_layers=True, remat="block")  # as docs/scaling.md plans it
    same = {"beta1": 0.9, "beta2": 0.95, "clip_norm": 1.0, "weight_decay": 0.1, "final_learning_rate": 0.1}
    assert {field: getattr(config, field) for field in same} == same
    assert config.optimizer == "adamw"


def test_gpt3_files_are_all_there():
    assert set(GPT3_TRAINING) == {name for name in PRESETS if name.startswith("gpt3-")}


def test_recipes_are_taken_by_name_from_a_checkout_and_from_a_wheel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    assert {"finetune-gpt2", "lora-gpt2", "gpt2", "gpt3-1.3b", "the-verdict"} <= names
    for name in names:
        assert TrainConfig.from_file(name, ["seed=3"]) == TrainConfig.from_file(CONFIGS / f"{name}.toml", ["seed=3"])
    with pytest.raises(ConfigError, match=r"lora-gtp2: no such file or recipe; did you mean 'lora-gpt2'\? \(recipes: "):
        TrainConfig.from_file("lora-gtp2")
    for path in ("lora-gpt2.toml", "./lora-gpt2", tmp_path / "lora-gpt2"):  # these are files, not names
        with pytest.raises(ConfigError, match=r"cannot be read as TOML: .*No such file"):
            TrainConfig.from_file(path)
    write(tmp_path / "lora-gpt2", "[train]\nsteps = 7\n")
    assert TrainConfig.from_file("lora-gpt2").steps == 7
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    checkout, wheel = training_config._RECIPES
    assert checkout == CONFIGS
    assert [CONFIGS.parent / inside for inside in included.values()] == [wheel]


def test_recipes_for_fine_tuning_have_the_rates_that_people_use():
    whole, adapters = (TrainConfig.from_file(f"{name}-gpt2") for name in ("finetune", "lora"))
    assert 1e-5 <= whole.learning_rate <= 5e-5
    assert 1e-4 <= adapters.learning_rate <= 1e-3
    assert (whole.lora.rank, adapters.lora.rank) == (0, 16)
    for config in (whole, adapters):
        assert config.init_from == "gpt2"
        assert config.compute.dtype == "bfloat16"
        assert config.patience
        assert not any(config.is_set(name) for name in config.model.to_dict())  # the model is the checkpoint's


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


# --- any values at all

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(1, 64),
    st.sampled_from([2**63, -(10**400), 10**400, 10**5000, "gelu", "alternating", "bytes", "bfloat16", "gpt2"]),
    st.floats(),
    st.floats(0, 1),
    st.text(st.characters(), max_size=6),  # lone surrogates too
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)


def odd_fields(kind):
    names = [field.name for field in dataclasses.fields(kind)]
    keys = st.one_of(
        st.sampled_from([*names, "preset"]), st.text(st.characters(), max_size=12), st.integers(), st.none()
    )
    return st.dictionaries(keys, ODD, max_size=4)


def accepted(make):
    """Returns what `make` returns, or None if it raises a ConfigError that can be printed. Anything else fails."""
    try:
        return make()
    except ConfigError as error:
        message = str(error)
    assert 10 < len(message) < 1000
    assert message.encode()
    return None


@given(odd_fields(GPTConfig))
@example({"n_layers": 10**5000})
@example({"drop_rate": 10**5000})
@example({10**5000: 1})
def test_any_values_make_a_valid_config_or_a_config_error(fields):
    config = accepted(lambda: GPTConfig.from_fields(fields, source="here"))
    if config is None:
        return
    assert hash(config) == hash(GPTConfig.from_dict(config.to_dict()))
    assert config.emb_dim == config.n_heads * config.head_dim
    assert all(1 <= getattr(config, name) <= 2**24 for name in INT_FIELDS)
    assert all(0 <= float(getattr(config, name)) < 1 for name in RATE_FIELDS)
    for name, value in fields.items():
        assert name == "preset" or value is None or getattr(config, name) == value


@given(odd_fields(ComputeConfig))
@example({"dtype": 10**5000})
@example({10**5000: 1})
def test_any_values_make_a_valid_compute_config_or_a_config_error(fields):
    config = accepted(lambda: ComputeConfig.from_dict(fields))
    if config is not None:
        assert hash(config) == hash(ComputeConfig.from_dict(config.to_dict()))
        assert all(getattr(config, name) == value for name, value in fields.items())


names = st.one_of(st.sampled_from(["model", "compute", "train", "mesh", "lora"]), st.text(max_size=5), st.none())
tables = st.one_of(*map(odd_fields, (GPTConfig, ComputeConfig, TrainConfig, MeshConfig, LoraConfig)), ODD)


@given(st.dictionaries(names, tables, max_size=3))
@example({"train": {"steps": 10**5000}})
@example({"train": {"seq_len": 10**5000}})
@example({"train": {"warmup_steps": 10**5000}})
@example({10**5000: 1})
@example({"train": {"learning_rate": 10**400}})
@example({"mesh": {10**5000: 1}})
def test_any_tables_make_a_valid_training_config_or_a_config_error(tables):
    config = accepted(lambda: TrainConfig.from_dict(tables))
    if config is not None:
        assert config.batch_size % config.grad_accumulation == 0
        assert all(abs(float(getattr(config, name))) < 1e400 for name in ("learning_rate", "clip_norm", "weight_decay"))


def choices(cls, field):
    return next(declared.choices for declared in settings(cls) if declared.name == field)


rates = st.floats(0, 0.999)
configs = st.builds(
    lambda n_heads, head_dim, **rest: GPTConfig(n_heads=n_heads, emb_dim=n_heads * head_dim, **rest),
    n_heads=st.integers(1, 12),
    head_dim=st.integers(1, 99),
    vocab_size=st.integers(1, 2**24),
    context_length=st.integers(1, 2**22),
    n_layers=st.integers(1, 4096),
    ffn_dim=st.one_of(st.none(), st.integers(1, 2**20)),
    attention_window=st.integers(1, 2**22),
    layer_norm_eps=st.floats(1e-300, 0.99),
    embedding_std=st.floats(1e-300, 10),
    tokenizer=st.sampled_from(["gpt2", "bytes", "none", "bpe-0123456789abcdef"]),
    **{name: rates if name == "drop_rate" else st.one_of(st.none(), rates) for name in RATE_FIELDS},
    **{name: st.booleans() for name in BOOL_FIELDS},
    **{name: st.sampled_from(choices(GPTConfig, name)) for name in CHOICE_FIELDS},
)
computes = st.builds(
    ComputeConfig,
    **{name: st.booleans() for name in COMPUTE_BOOLS},
    **{name: st.sampled_from(choices) for name, choices in COMPUTE_CHOICES.items()},
)
train_configs = st.builds(
    TrainConfig,
    model=configs,
    compute=computes.map(lambda compute: compute.replace(param_dtype="float32")),
    mesh=st.builds(MeshConfig, data=st.sampled_from([-1, 1, 4]), fsdp=st.integers(1, 2**20)),
    steps=st.integers(101, 10**9),
    learning_rate=st.floats(0, 1e300),
    optimizer=st.sampled_from(choices(TrainConfig, "optimizer")),
    sequences=st.sampled_from(choices(TrainConfig, "sequences")),
    beta1=st.floats(0, 0.999),
    sample_prompt=st.text(st.characters(exclude_categories=["C"]), max_size=20),
)

loras = st.builds(LoraConfig, rank=st.integers(1, 2**16), alpha=st.floats(0, 1e9), matrices=st.just("att, *head"))
adapter_configs = st.builds(
    lambda config, lora: dataclasses.replace(config, optimizer="adamw", lora=lora), train_configs, loras
)


@given(config=configs)
def test_every_config_comes_back_from_a_dict_from_json_and_from_toml(config, tmp_path):
    assert GPTConfig.from_dict(config.to_dict()) == config
    assert config.replace() == config
    path = write(tmp_path / "a.json", json.dumps(config.to_dict()))
    assert GPTConfig.from_file(path) == config
    path = write(tmp_path / "a.toml", to_toml({"model": config.to_dict()}))
    assert GPTConfig.from_file(path) == config


@given(compute=computes)
def test_every_compute_config_comes_back_from_a_dict_and_from_json(compute):
    assert ComputeConfig.from_dict(json.loads(json.dumps(compute.to_dict()))) == compute
    assert compute.replace() == compute
    assert compute.portable() == compute.replace(native_sequences=False, native_kernel=False, attention="auto")


@given(config=st.one_of(train_configs, adapter_configs))
def test_every_training_config_comes_back_from_a_dict_and_from_toml(config, tmp_path):
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert MeshConfig.parse(str(config.mesh)) == config.mesh
    path = write(tmp_path / "a.toml", to_toml(config.to_dict()))
    assert TrainConfig.from_file(path) == config
    changed = TrainConfig.from_file(path, ["seed=7", "model.n_layers=3", "compute.remat=dots"])
    assert changed.model == config.model.replace(n_layers=3)
    assert changed.compute == config.compute.replace(remat="dots")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.dtype=bfloat16",
            r"\[model\]: unknown key 'dtype'; did you mean dtype of \[compute\] .--set compute.dtype=",
        ),
        ("remat=block", r"\[train\]: unknown key 'remat'; did you mean remat of \[compute\]"),
        ("compute.n_layers=3", r"\[compute\]: unknown key 'n_layers'; did you mean n_layers of \[model\]"),
        ("model.steps=3", r"\[model\]: unknown key 'steps'; did you mean steps of \[train\] .--set steps="),
        ("n_layer=3", r"\[train\]: unknown key 'n_layer'; did you mean n_layers of \[model\] .--set model.n_layers="),
        ("block_size=8", r"did you mean context_length of \[model\]"),
        ("lr=1e-4", "unknown key 'lr'; did you mean 'learning_rate'"),
        ("max_iters=5", "unknown key 'max_iters'; did you mean 'steps'"),
        ("model.n_embd=5", "unknown key 'n_embd'; did you mean 'emb_dim'"),
        ("steps.n=3", "the tables are model, compute, mesh, lora, train"),
    ],
)
def test_a_field_in_the_wrong_table_is_told_its_own(override, message, tmp_path):
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_file(tmp_path / "run.toml", [override])
    assert "run.toml" not in str(caught.value)


def test_synonyms_name_fields_and_hide_none():
    fields = {declared.name for cls in TABLES.values() for declared in settings(cls)}
    assert set(SYNONYMS.values()) <= fields
    assert not set(SYNONYMS) & fields


def test_the_file_is_blamed_for_its_own_faults_and_set_for_its_own(tmp_path):
    path = write(tmp_path / "run.toml", "[train]\nsteps = 50\n")
    with pytest.raises(ConfigError, match=r"^--set steps=x \[train\]: steps must be an int, not 'x'"):
        TrainConfig.from_file(path, ["seed=7", "steps=x"])
    write(path, "[train]\nstep = 50\n")
    with pytest.raises(ConfigError, match=r"run.toml \[train\]: unknown key 'step'; did you mean 'steps'"):
        TrainConfig.from_file(path, ["seed=7"])


@pytest.mark.parametrize(("escape", "character"), [(r"\n", "\n"), (r"\t", "\t")])
def test_escapes_of_set_need_quotes(escape, character, tmp_path):
    path = write(tmp_path / "run.toml", "[train]\nsteps = 50\n")
    with pytest.raises(ConfigError, match=r"^--set template: \\[nt] is a line break or a tab only in a quoted text"):
        TrainConfig.from_file(path, [f"template=Q: {{q}}{escape}A: {{response}}"])
    quoted = TrainConfig.from_file(path, [f'template="Q: {{q}}{escape}A: {{response}}"'])
    assert quoted.template == f"Q: {{q}}{character}A: {{response}}"


@pytest.mark.parametrize("override", ["model.n_layers=0", "compute.dtype=float16", "model.ffn_dim=x", "seed=null"])
def test_a_value_that_its_field_does_not_allow_is_told_with_the_set_it_came_from(override, tmp_path):
    path = write(tmp_path / "run.toml", "[train]\nsteps = 50\n")
    name = override.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"^--set {override} \[\w+\]: {name} must be "):
        TrainConfig.from_file(path, ["steps=60", override])
    assert TrainConfig.from_file(path, ["model.ffn_dim=null"]).model.ffn_dim == 3072  # as without it


def test_which_fields_of_the_model_were_set_is_known():
    def set_fields(config):
        return {name for name in config.model.to_dict() if config.is_set(name)}

    assert set_fields(TrainConfig()) == set()
    assert set_fields(TrainConfig(model=GPTConfig())) == set(GPTConfig().to_dict())
    config = TrainConfig.from_dict({"model": {"n_layers": 12}})
    assert set_fields(config) == {"n_layers"}
    assert set_fields(dataclasses.replace(config, steps=500)) == {"n_layers"}
    assert set_fields(dataclasses.replace(config, model=config.model.replace(n_heads=8))) == {"n_layers", "n_heads"}
    assert set_fields(TrainConfig.from_dict({"model": {"preset": "gpt2"}})) == {"n_layers", "emb_dim", "n_heads"}


def test_a_warm_up_longer_than_the_run_gives_way(tmp_path):
    config = TrainConfig.from_file(CONFIGS / "shakespeare.toml", ["steps=50"])
    assert config.warmup_steps == 50
    assert config.warmup == 5
    assert dataclasses.replace(config, steps=101).warmup == 50
    rates = [float(schedule(config, 1.0)(step)) for step in range(50)]
    assert rates.index(max(rates)) == 5

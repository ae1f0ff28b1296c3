"""The command line: what it imports, how it fails, and what `inspect` prints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

import jaxgpt
from jaxgpt import cli
from jaxgpt.cli import COMMANDS, main
from jaxgpt.config import PRESETS, ComputeConfig, GPTConfig
from jaxgpt.errors import CheckpointError, ConfigError, DataError, MissingExtraError, TrainingError
from jaxgpt.fields import settings
from jaxgpt.parallel.mesh import MeshConfig
from jaxgpt.textfile import parse_value
from jaxgpt.training.config import LoraConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SCRIPTS = Path(__file__).parent.parent / "scripts"
SCRIPT_COMMANDS = {
    "convert": "convert",
    "evaluate": "evaluate",
    "generate": "generate",
    "inspect_model": "inspect",
    "tokenize_text": "tokenize",
    "train": "train",
}
HEAVY = (
    "jax",
    "flax",
    "optax",
    "torch",
    "orbax",
    "matplotlib",
    "huggingface_hub",
    "tensorboardX",
    "wandb",
    "trackio",
    "transformers",
    "pyarrow",
)


def python(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, encoding="utf-8", **options)


def heavy_modules_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has imported after running `code`."""
    done = python("-c", f"import sys\n{code}\nprint('\\n' + ' '.join({{*{HEAVY!r}}} & {{*sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def command(monkeypatch):
    """Makes a function the subcommand `jaxgpt probe`."""

    def install(run):
        module = ModuleType("jaxgpt_probe")
        module.add_arguments, module.run = lambda parser: None, run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "jaxgpt_probe", module)
        monkeypatch.setitem(COMMANDS, "probe", ("jaxgpt_probe", "for a test"))

    return install


def raising(error: BaseException):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=lambda a: " ".join(a)
)
def test_help_imports_nothing_heavy(arguments):
    code = f"from jaxgpt.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert end.code == 0"
    assert heavy_modules_after(code) == set()


def test_inspecting_a_preset_imports_nothing_heavy():
    assert heavy_modules_after("from jaxgpt.cli import main\nassert main(['inspect', 'gpt2']) == 0") == set()


def test_importing_the_package_imports_nothing_heavy():
    assert heavy_modules_after("import jaxgpt; jaxgpt.GPTConfig.preset('gpt2'); jaxgpt.get_tokenizer('bytes')") == set()


def test_every_public_name_is_there_and_pulls_in_no_extra():
    code = "import jaxgpt\nfor name in dir(jaxgpt): assert getattr(jaxgpt, name) is not None or name[0] == '_'"
    assert heavy_modules_after(code) <= {"jax", "flax", "optax"}


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No jaxgpt attribute GTP"):
        _ = jaxgpt.GTP  # type: ignore[attr-defined]


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    out = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{summary}$", out, re.MULTILINE)


@pytest.mark.parametrize("columns", [80, 120])
def test_train_help_lists_every_field_of_the_config(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < columns
    listed = {table: {} for table in ("[model]", "[compute]", "[mesh]", "[lora]", "[train]")}
    for line in lines[lines.index("[model]") :]:
        if line.startswith("["):
            table, key = line, ""
        elif line:
            name = re.match(r"  (\S*) *", line)[1]
            key, text = name or key, line[28:] if line[27] == " " else ""
            listed[table][key] = f"{listed[table].get(key, '')} {text}".strip()
    assert ", ".join(PRESETS) in listed["[model]"].pop("model.preset")
    for table, prefix, cls in (
        ("[model]", "model.", GPTConfig),
        ("[compute]", "compute.", ComputeConfig),
        ("[train]", "", TrainConfig),
        ("[mesh]", "mesh.", MeshConfig),
        ("[lora]", "lora.", LoraConfig),
    ):
        fields = {field.name: field for field in dataclasses.fields(cls) if "setting" in field.metadata}
        assert list(listed[table]) == [prefix + name for name in fields]
        for declared in settings(cls):
            text = listed[table][prefix + declared.name]
            assert text.startswith(f"{declared.help} (default: ")
            assert declared.allowed in text
            default = fields[declared.name].default
            if default is not None:
                shown = re.search(r" \(default: ([^;]*?)(; .*)?\)$", text)[1]
                assert parse_value(shown) == default, text
    for key, text in {"model.ffn_dim": "4 * emb_dim", "model.drop_rate_attn": "drop_rate"}.items():
        assert f"(default: {text}; " in listed["[model]"][key]


def test_what_the_help_of_train_lists_can_be_set(tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nwarmup_steps = 0\n")
    for prefix, cls in (
        ("model.", GPTConfig),
        ("compute.", ComputeConfig),
        ("", TrainConfig),
        ("mesh.", MeshConfig),
        ("lora.", LoraConfig),
    ):
        overrides = [f"{prefix}{d.name}={d.default_text}" for d in settings(cls) if not d.derived]
        assert TrainConfig.from_file(tmp_path / "run.toml", overrides).model == GPTConfig()


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"jaxgpt {jaxgpt.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["gnerate"], ["inspect"], ["inspect", "gpt2", "--bogus"]])
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("n_layers is\nwrong"),
        CheckpointError("a/b", "is truncated"),
        DataError("too short"),
        TrainingError("the loss is NaN"),
        MissingExtraError("torch", "torch", "reading a .pth file"),
        FileNotFoundError(2, "No such file or directory", "prompt.txt"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_users_is_one_line_and_exits_with_2(error, command, capsys):
    command(raising(error))
    assert main(["probe"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"jaxgpt: error: {' '.join(str(error).split())}\n"


def test_a_value_error_is_the_users_only_if_the_package_raised_it(command, capsys):
    command(lambda args: jaxgpt.get_tokenizer("bytes").decode([999]))
    assert main(["probe"]) == 2
    assert capsys.readouterr().err.startswith("jaxgpt: error: token id 999 at position 0")
    command(raising(ValueError("a fault")))  # raised here, outside the package
    with pytest.raises(ValueError, match="a fault"):
        main(["probe"])


def test_other_exceptions_keep_their_traceback(command):
    command(raising(ZeroDivisionError("a fault")))
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


def test_ctrl_c_is_quiet_and_exits_with_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main(["probe"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_commands_exit_code_is_returned(command):
    command(lambda args: 143)
    assert main(["probe"]) == 143


@pytest.mark.skipif(os.name != "posix", reason="closed pipes are reported otherwise")
@pytest.mark.parametrize("argv", [["--help"], ["inspect", "gpt2"], ["inspect", "gpt3-175b", "--json"]])
def test_a_reader_that_leaves_ends_it_quietly(argv):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from jaxgpt.cli import main; sys.exit(main())", *argv]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # unbuffered, argparse itself ignores the closed pipe
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_text_that_the_terminal_cannot_show_is_replaced(tmp_path):
    (tmp_path / "é.json").write_text("{}", encoding="utf-8")
    code = "from jaxgpt.cli import main; main(['inspect', 'é.json'])"
    done = python("-c", code, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"})
    assert done.stdout.startswith("?.json: n_layers 12, "), done.stderr


def test_the_scripts_are_those_listed():
    assert {path.stem for path in SCRIPTS.glob("*.py")} >= set(SCRIPT_COMMANDS)
    assert set(SCRIPT_COMMANDS.values()) <= set(COMMANDS)


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, name in SCRIPT_COMMANDS.items() if name in COMMANDS]
)
def test_a_script_is_its_subcommand(script, name, tmp_path):
    done = python(str(SCRIPTS / f"{script}.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: jaxgpt {name} ")


def inspect(capsys, *argv: str) -> str:
    assert main(["inspect", *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_fits_its_width_and_states_the_total(name, capsys):
    out = inspect(capsys, name)
    total = json.loads(inspect(capsys, name, "--json"))["parameters"]["total"]
    assert re.search(rf"^ total +{total:,} +100\.00%$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 120
    assert "…" not in out


def test_inspect_folds_the_blocks_unless_asked(capsys):
    folded, whole = inspect(capsys, "book-124m"), inspect(capsys, "book-124m", "--all")
    assert re.search(r"^ trf_blocks_0 to 11, each: +85,026,816 +52\.16%$", folded, re.MULTILINE)
    assert re.search(r"^   att/qkv/weight +3 x 768 x 768 +12 x 1,769,472 +13\.03%$", folded, re.MULTILINE)
    assert "trf_blocks_11/att/qkv/weight" not in folded
    assert re.search(r"^ trf_blocks_11/att/qkv/weight +3 x 768 x 768 +1,769,472 +1\.09%$", whole, re.MULTILINE)


def test_inspect_explains_the_counts_that_differ(capsys):
    book = inspect(capsys, "book-124m")
    assert "163,009,536" in book
    assert "the count would be 124,412,160; names such as 124M mean that one" in " ".join(book.split())
    assert "117M: an early miscount" in book
    assert "163,037,184 in all" in inspect(capsys, "gpt2")
    assert "117M" not in inspect(capsys, "gpt3-125m")
    assert "banded in 1, 3, ..., where a query sees 256 positions" in " ".join(inspect(capsys, "gpt3-125m").split())
    assert "banded" not in inspect(capsys, "gpt2")


def test_inspect_prints_sizes_in_the_unit_that_it_names(capsys):
    out, report = inspect(capsys, "gpt2"), json.loads(inspect(capsys, "gpt2", "--json"))
    assert report["parameter_bytes"]["float32"] == 497_759_232
    assert re.search(r"parameters in float32 +474\.70 MiB", out)
    printed = [float(size.replace(",", "")) for size in re.findall(r"([\d,.]+) MiB\n", out)]
    kinds = ("parameter_bytes", "training_bytes", "cache_bytes")
    exact = [size for kind in kinds for size in report[kind].values()]
    assert printed == [round(size / 2**20, 2) for size in exact]
    book = inspect(capsys, "book-124m")
    assert "621.83 MiB" in book
    assert "1 MiB is 1,048,576 bytes; the book prints the same numbers as MB." in book


def test_inspect_json_holds_the_numbers(capsys):
    report = json.loads(inspect(capsys, "book-124m", "--json", "--batch", "2"))
    assert report["model"] == "book-124m"
    assert report["config"]["emb_dim"] == 768
    assert report["parameters"]["by_component"]["out_head"] == 38_597_376
    assert report["parameters"]["without_embeddings"] == 85_028_352
    assert report["parameter_bytes"] == {
        "float32": 652_038_144,
        "bfloat16": 326_019_072,
        "int8": 164_028_552,
    }
    assert (report["batch"], report["length"]) == (2, 1024)
    assert report["forward_flops"]["linear"] == 505_987_203_072
    assert report["training_flops"]["linear"] == 3 * 505_987_203_072
    # Parameters, gradients and two moments; with LoRA only of the adapters, in the blocks' linear layers.
    adapters = 16 * 12 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert report["training_bytes"] == {
        "whole": 16 * 163_009_536,
        "lora_rank_16": 4 * 163_009_536 + 16 * adapters,
        "lora_rank_16_bfloat16": 2 * 163_009_536 + 16 * adapters,
    }
    assert report["cache_bytes"]["float32"] == 2 * 12 * 2 * 1024 * 768 * 4
    assert report["cache_bytes"]["int8"] == 2 * 12 * 2 * 1024 * (768 + 4 * 12)  # a float32 scale per head
    assert report["tree"][2] == {"path": "trf_blocks_0/norm1/scale", "shape": [768], "parameters": 768}
    assert sum(leaf["parameters"] for leaf in report["tree"]) == report["parameters"]["total"]


def test_inspect_reads_a_config_file(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text('[model]\npreset = "gpt2"\nn_layers = 1\n', encoding="utf-8")
    out = inspect(capsys, str(path), "--length", "8")
    assert re.search(r"^ trf_blocks_0: +7,087,872 ", out, re.MULTILINE)
    assert "forward pass, 1 x 8, linear layers" in out


def test_inspect_refuses_a_length_beyond_the_context(capsys):
    assert main(["inspect", "gpt2", "--length", "1025"]) == 2
    assert capsys.readouterr().err == "jaxgpt: error: length 1025 is beyond context_length=1024\n"


def test_inspect_refuses_what_is_not_a_model(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("jaxgpt: error: ")


def test_main_reads_the_processs_own_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxgpt", "inspect", "gpt2", "--json"])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 124_439_808


def test_inspect_reads_a_checkpoints_config(tiny, tmp_path, capsys):
    model, params = tiny
    jaxgpt.save(tmp_path / "model", model, params)
    report = json.loads(inspect(capsys, str(tmp_path / "model"), "--json"))
    assert report["config"] == model.config.to_dict()
    assert report["parameters"]["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_wrong_option_shows_the_subcommands_usage_and_the_nearest_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--promt", "Ab"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: jaxgpt generate ")
    assert "unrecognized arguments: --promt Ab; did you mean '--prompt'?" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "gpt2", "--force"], "--force belongs to --plot"),
        (["inspect", "gpt2", "--all", "--json"], "--all and --json exclude each other"),
        (["train", "gpt2", "--data", "a", "--out", "b", "--force"], "--force belongs to --resume"),
        (["train", "gpt2", "--data", "a", "--out", "b", "--dry-run", "--verify"], "--verify has no effect with --dry"),
    ],
)
def test_an_option_without_effect_is_an_error(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--model", "shakespear", "--prompt", "a"],
            "shakespear: no such file.*did you mean 'shakespeare'",
        ),
        (["inspect", "gpt3-125"], "gpt3-125: no such file.*did you mean 'gpt3-125m'"),
        (["generate", "--model", "gpt3-125m", "--prompt", "a"], "a preset without published weights"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest_before_the_hub_is_asked(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("jaxgpt.hub.download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)

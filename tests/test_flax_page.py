"""The tables of docs/coming-from-flax.md: what they say is there is there, and what they say is not is not."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from flax import serialization, traverse_util

import jaxgpt
from jaxgpt import cli
from jaxgpt.fields import SYNONYMS, settings
from jaxgpt.generation.options import SAMPLING
from jaxgpt.generation.prompts import refuse_unknown
from jaxgpt.model import leaves
from jaxgpt.training.config import TABLES, TrainConfig
from jaxgpt.weights import huggingface

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from-flax.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
NONE = "no counterpart"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its head."""
    section = re.split(r"^#+ ", PROSE.partition(f"# {heading}\n")[2], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(lines) > 10, heading
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    return parser


GENERATE = [(name, answer) for names, answer in rows("Generating") for name in code(names)]
WITHOUT_EFFECT = code(
    PROSE.partition("All other fields of `GenerationConfig`, such as")[2].partition(" were accepted")[0]
)
SCRIPT = [(name, *answer) for names, *answer in rows("run_clm_flax.py") for name in code(names)]


@pytest.mark.parametrize(("option", "answer"), GENERATE, ids=[option for option, _ in GENERATE])
def test_options_of_generate_are_answered_as_its_errors_answer_them(option, answer):
    if option in {*inspect.signature(jaxgpt.generate).parameters, *SAMPLING}:
        assert f"`{option}`" in answer
        return
    with pytest.raises(TypeError, match=f"no option '{option}'") as caught:
        refuse_unknown({option: None})
    hint = str(caught.value).partition(": use ")[2]
    assert answer.replace("`", "").startswith(hint or NONE)


def test_options_that_flax_accepted_without_effect_exist_or_have_another_name():
    assert len(WITHOUT_EFFECT) == 6
    assert set(WITHOUT_EFFECT) - set(SAMPLING) == {"stop_strings", "prompt_lookup_num_tokens"}
    with pytest.raises(TypeError, match=r"use stop=.* in generate_text"):
        refuse_unknown({"stop_strings": None})
    with pytest.raises(TypeError, match=r"use lookup=n, which counts the last id too"):
        refuse_unknown({"prompt_lookup_num_tokens": 3})


@pytest.mark.parametrize(("option", "answer", "remark"), SCRIPT, ids=[option for option, *_ in SCRIPT])
def test_options_of_the_script_name_options_and_settings_of_train(option, answer, remark):
    flags = [flag for action in parser("train")._actions for flag in action.option_strings]
    fields = {
        declared.name if table == "train" else f"{table}.{declared.name}"
        for table, config in TABLES.items()
        for declared in settings(config)
    } | {"model.preset"}
    if answer == NONE:
        assert option not in fields
        assert f"--{option.replace('_', '-')}" not in flags
    else:
        assert code(answer)
        assert set(code(answer)) <= {*flags, *fields}
    if meant := SYNONYMS.get(option):
        assert meant in re.split(r"[`.]", answer + remark)


def test_the_script_has_its_options_once():
    assert len(SCRIPT) == len({option for option, *_ in SCRIPT}) == 42


def test_fields_of_the_configuration_are_those_that_are_read():
    table = {keys[0]: ours for ours, keys, _ in huggingface._FIELDS}
    assert {code(theirs)[0]: code(ours)[0] for theirs, ours in rows("The fields of the configuration")} == table


def test_parameters_have_the_names_shapes_and_values_of_the_table(tmp_path):
    sizes = {"V": 11, "C": 5, "D": 6, "F": 7, "3D": 18, "3": 3}
    rng = np.random.default_rng(0)
    flat, expected = {}, {}
    for theirs, shape, ours, our_shape in rows("Parameters"):
        array = rng.normal(size=[sizes[n] for n in shape.split(", ")]).astype(np.float32)
        flat[code(theirs)[0].replace("../", "")] = array
        turned = array.T if "lm_head" in theirs else array
        expected[code(ours)[0]] = turned.reshape([sizes[n] for n in our_shape.split(", ")])
    tree = {name if name.startswith("lm_head") else f"transformer/{name}": array for name, array in flat.items()}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.to_bytes(traverse_util.unflatten_dict(tree, sep="/")))
    config = {"vocab_size": 11, "n_positions": 5, "n_embd": 6, "n_head": 2, "n_layer": 1, "n_inner": 7}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "tie_word_embeddings": False} | config))
    params = leaves(jaxgpt.load(tmp_path)[1])
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def test_the_file_of_settings_is_one_and_says_what_the_table_says():
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    tables = tomllib.loads(text)
    TrainConfig.from_dict(tables)
    named = {name for _, answer, _ in SCRIPT for name in code(answer)}
    given = {*tables["train"], *(f"compute.{name}" for name in tables["compute"])}
    # What the script had no option for, and `beta1`, whose default is the script's.
    assert given - named == {"sequences", "final_learning_rate", "clip_norm"}
    left = {"beta1", "seq_len", "eval_sequences", "model.preset", "model.tokenizer"}
    assert {name for name in named - given if not name.startswith("--")} == left


def test_commands_on_the_page_are_understood():
    commands = re.findall(r"^    (jaxgpt .*)$|`(jaxgpt \w+ [^`]+)`", PAGE, re.MULTILINE)
    assert len(commands) == 5
    for command in map("".join, commands):
        _, name, *arguments = shlex.split(command)
        parser(name).parse_args(arguments)


def test_calls_on_the_page_name_functions_and_their_arguments():
    calls = [
        node
        for text in code(PROSE)
        if "jaxgpt." in text and "(" in text
        for node in ast.walk(ast.parse(text.replace(r"\|", "|")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("jaxgpt.")
    ]
    assert len(calls) > 20
    fields = {declared.name for table in ("model", "compute") for declared in settings(TABLES[table])}
    for call in calls:
        function = jaxgpt
        for part in ast.unparse(call.func).split(".")[1:]:
            function = getattr(function, part)
        known = set(inspect.signature(function).parameters) | (fields if function is jaxgpt.load else set())
        assert {keyword.arg for keyword in call.keywords} <= known, ast.unparse(call)

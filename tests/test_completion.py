"""What a shell is offered when TAB is pressed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import exhaustive

from jaxgpt import cli
from jaxgpt.cli import COMMANDS, completion
from jaxgpt.weights import formats

pytest.importorskip("argcomplete", reason="needs argcomplete (extra [completion])")

PROGRAMS = Path(sys.executable).parent
# As a shell's own function does it when TAB is pressed after $line.
BASH = """
eval "$(register-python-argcomplete jaxgpt)"
export COMP_LINE=$line COMP_POINT=${#line} COMP_TYPE=9
COMP_WORDS=($line)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete jaxgpt
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = """
register-python-argcomplete --shell fish jaxgpt | source
complete --do-complete $line
"""


def offered(shell: str, script: str, line: str, directory: Path) -> set[str]:
    """The words that the shell offers for the last one of the line."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [shell, "-c", script],
        cwd=directory,
        env={**os.environ, "PATH": path, "line": line},
        capture_output=True,
        text=True,
        check=True,
    )
    return {answer.split("\t")[0].strip() for answer in done.stdout.splitlines()}


LINES = {
    "jaxgpt gen": {"generate"},
    "jaxgpt e": {"evaluate", "export"},
    "jaxgpt generate --no-rep": {"--no-repeat-ngram-size"},
    "jaxgpt generate --dtype b": {"bfloat16"},
    "jaxgpt train finetune-": {"finetune-gpt2"},
    "jaxgpt train sonnets": {"sonnets.toml"},
    "jaxgpt inspect gpt2-": {"gpt2-large", "gpt2-medium", "gpt2-xl"},
    "jaxgpt convert shake": {"shakespeare"},
    "jaxgpt train gpt2 --set grad_acc": {"grad_accumulation="},
    "jaxgpt train gpt2 --set lora.r": {"lora.rank="},
}


@pytest.mark.parametrize("shell", ["bash", exhaustive("fish")])
def test_a_shell_is_offered_commands_options_and_names(shell, tmp_path):
    (tmp_path / "sonnets.toml").touch()
    for line, words in LINES.items():
        assert offered(shell, BASH if shell == "bash" else FISH, line, tmp_path) == words, line


def test_completing_imports_nothing_heavy(tmp_path):
    from test_cli import HEAVY

    code = (
        "import argcomplete, sys\n"
        f"def told(*_, **__): raise SystemExit(' '.join({{*{HEAVY!r}}} & {{*sys.modules}}) or 0)\n"
        "argcomplete.autocomplete = told\n"
        "from jaxgpt.cli import main\n"
        "main()\n"
    )
    for command in COMMANDS:
        environment = {**os.environ, completion.VARIABLE: "1", "COMP_LINE": f"jaxgpt {command} "}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_process_that_does_not_complete_does_without_argcomplete(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert cli.main(shlex.split("inspect gpt2")) == 0


def test_the_bundled_models_are_offered():
    assert set(completion.BUNDLED) == set(formats.BUNDLED)

"""The README and the pages under docs/ do what they say."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jax
import matplotlib
import numpy as np
import pytest
from helpers import exhaustive

import jaxgpt
from jaxgpt import cli, config
from jaxgpt.cli import plan, train
from jaxgpt.parallel.mesh import MeshConfig
from jaxgpt.planning import plan as planner
from jaxgpt.training.config import TrainConfig
from jaxgpt.weights import formats as weights

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
MESH_COMMAND = re.compile(
    r"(?:^    |`)(?:jaxgpt (?:train|plan) )?((?:configs/)?gpt3-\S+ [^`\n]*--(?:mesh|topology) [^`\n#]*)", re.M
)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty directory, with the pictures' style, for a page's code to run in; undoes what the code sets."""
    (tmp_path / "pictures").mkdir()
    shutil.copy(PICTURES / "style.mplstyle", tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    before = [(table, dict(table)) for table in (config.PRESETS, weights.FORMATS, weights.FILE_FORMATS)]
    # Readers' JAX widens and converts.
    usual = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with matplotlib.rc_context({"backend": "agg"}), np.printoptions(), usual[0], usual[1]:
        yield tmp_path
    for table, entries in before:
        table.clear()
        table.update(entries)


# CONTRIBUTING has the shortest code, enough to show in the default tier that pages are read correctly. The chapters run
# as notebooks, in test_chapters.py.
@pytest.mark.parametrize(
    "page",
    [
        page if page.name == "CONTRIBUTING.md" else exhaustive(page)
        for page in PAGES
        if "```python" in page.read_text(encoding="utf-8") and not page.name.startswith(("chapter-", "appendix-"))
    ],
    ids=str,
)
def test_code_on_the_page_runs_and_prints_what_it_shows(page, workplace):
    text = page.read_text(encoding="utf-8")
    namespace: dict = {}
    for code, expected in BLOCK.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        # The README shows little of what it prints.
        if expected or page.name != "README.md":
            assert printed.getvalue() == expected, code
    shown = {name for name in re.findall(r"\]\(pictures/([\w-]+\.svg)\)", text) if page.parent == PICTURES.parent}
    drawn = {path.name for path in (workplace / "pictures").glob("*.svg")}
    assert shown == drawn
    for name in drawn:
        assert_same_picture(workplace / "pictures" / name, PICTURES / name)


def assert_same_picture(drawn: Path, committed: Path) -> None:
    """Compares the artists that represent data, to within 15 points of some 150, because a training without clipping
    goes another way where sums are rounded otherwise; other matplotlib versions may differ elsewhere."""
    data, expected = plotted(drawn), plotted(committed)
    assert data.keys() == expected.keys()
    assert data, f"{drawn.name} marks no artist as data: set gid='data ...'"
    for name, numbers in data.items():
        assert len(numbers) == len(expected[name]), name
        np.testing.assert_allclose(numbers, expected[name], atol=15, err_msg=f"{committed.name}: {name}")


def plotted(picture: Path) -> dict[str, list[float]]:
    """All coordinates and colours (0 to 255) of each artist marked as data, by the artist's id."""
    result = {}
    for group in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}g"):
        if group.get("id", "").startswith("data "):
            numbers: list[float] = []
            for element in group.iter():
                for colour in re.findall("#([0-9a-f]{6})", element.get("style", "")):
                    numbers += bytes.fromhex(colour)
                numbers += map(float, NUMBER.findall(element.get("d", "")))
            result[group.get("id", "")] = numbers
    return result


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_code_on_the_page_is_not_cut(page):
    # What fits between the two bars of the documentation, where they leave the least: `ruff format --line-length 84`.
    code = "".join(code for code, _ in BLOCK.findall(page.read_text(encoding="utf-8")))
    assert [line for line in code.splitlines() if len(line) > 84] == []


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", [exhaustive(path, id=path.stem) for path in EXAMPLES])
def test_the_command_of_an_example_runs(example):
    _, *command = shlex.split(re.findall(r"^    (python examples/.*)$", example.read_text(encoding="utf-8"), re.M)[0])
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True)
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", done.stdout)]
    assert len(numbers) >= 3
    assert numbers == sorted(numbers, reverse=True)  # the loss falls; the likest line comes first


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{target}#{anchor}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, hyphens for spaces, and no other punctuation."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(slugs)) == len(slugs), "GitHub numbers headings that are equal"
    return set(slugs)


@pytest.mark.parametrize(("page", "commands"), [("README.md", 2), ("docs/devices.md", 2), ("docs/scaling.md", 13)])
def test_meshes_on_the_page_divide_the_models_and_their_batches(page, commands):
    found = MESH_COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) == commands
    for command in found:
        parser = argparse.ArgumentParser()
        (plan if "--topology" in command else train).add_arguments(parser)
        args = parser.parse_args(shlex.split(command))
        if "--topology" in command:
            source = str(ROOT / args.config) if args.config.startswith("configs/") else args.config
            planner.resolve(source, planner.Topology.parse(args.topology), args.mesh, args.set, args.batch)
        else:
            run = TrainConfig.from_file(ROOT / args.config, args.set)
            planner.check(dataclasses.replace(run, mesh=MeshConfig.parse(args.mesh)))


def test_readme_names_every_module_and_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    apart = {"__init__.py", "__init__.pyi", "__main__.py", "__pycache__", "assets", "py.typed", "version.py"}
    for entry in (ROOT / "jaxgpt").iterdir():
        name = f"{entry.name}/" if entry.is_dir() else entry.name
        assert entry.name in apart or f"`{name}`" in readme, name


def test_api_pages_have_every_module_command_and_public_name(monkeypatch):
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.rst")}
    text = "\n".join(pages.values())
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "jaxgpt").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    apart = {"jaxgpt", "jaxgpt.__main__", "jaxgpt.version", *(module for module, _ in cli.COMMANDS.values())}
    documented = set(re.findall(r"automodule:: (\S+)", text))
    assert documented == modules - apart
    assert re.findall(r"command-help:: (\S+)", text) == list(cli.COMMANDS)
    assert ".. public-names::\n" in pages["index"]
    # The extra [docs] may not be installed, and conf.py only needs docutils to be importable.
    monkeypatch.setitem(sys.modules, "docutils", SimpleNamespace(nodes=None))
    monkeypatch.setitem(sys.modules, "docutils.parsers.rst", SimpleNamespace(Directive=object))
    groups = runpy.run_path(str(ROOT / "docs" / "conf.py"))["public_names"]()
    assert list(groups) == ["Models", "Text", "Checkpoints", "Training", "Errors"]
    named = [name for names in groups.values() for name in names]
    assert sorted(named) == sorted(set(jaxgpt.__all__) - {"__version__"})
    for name in named:
        public = getattr(jaxgpt, name)
        assert public.__module__ in documented, name
        assert public.__doc__, name


def test_readme_has_at_most_200_lines_and_the_model_fewer_as_it_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    (says, file), *_ = re.findall(r"\[under (\d+) lines\]\((.+?)\)", readme)
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) < int(says)


def test_readme_commands_are_the_two():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert '    pip install -e . && python scripts/generate.py --prompt "To be, or not to be"\n' in readme
    assert "    pip install -e '.[test]' && pytest\n" in readme


def test_every_row_of_the_errors_page_has_tests_and_each_is_there():
    rows: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## ") and line != "## What every input gives":  # its tables have headings of their own
            rows[line.removeprefix("## ")] = []
        elif line.startswith("| "):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
            assert len(cells) == (3 if list(rows) == ["Messages"] else 2), line
            assert all(cells), line
            if cells not in (["input", "what happens"], ["message", "why", "what to do"]):
                rows[list(rows)[-1]].append(cells[0].replace(r"\|", "|"))
    assert sum(map(len, rows.values())) >= 40
    tests = tomllib.loads((ROOT / "tests" / "errors.toml").read_text(encoding="utf-8"))
    assert {heading: list(of_row) for heading, of_row in tests.items()} == rows
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").glob("test_*.py")]
    known = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for of_row in tests.values():
        for row, named in of_row.items():
            assert named, f"no test covers {row}"
            assert all(name.startswith("test_") for name in named), named
            assert set(named) <= known, f"no such test: {set(named) - known}"


def test_the_messages_on_the_errors_page_are_those_of_the_package():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page.partition("## What every input gives")[0], re.MULTILINE)
    assert len(messages) >= 30
    known = []
    for path in (ROOT / "jaxgpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                known.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.append(node.value)
    # A part of a message may itself be made elsewhere, such as "; did you mean ...?".
    for message in messages:
        parts = [part.strip(" :;?,") for part in message.split("…")]
        assert any(all(part in text for part in parts) for text in known), message

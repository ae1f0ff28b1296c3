"""Sphinx: the pages of docs/, and the API from the docstrings. `sphinx-build -W -b html docs build/docs`."""

import argparse
import functools
import inspect
import re
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

import jaxgpt
from jaxgpt.cli import COMMANDS
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.fields import settings
from jaxgpt.parallel import MeshConfig
from jaxgpt.training.config import LoraConfig, TrainConfig

project = "jaxgpt"
copyright = "2026, the jaxgpt authors"
version = release = jaxgpt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".rst": "restructuredtext", ".md": "markdown", ".myst": "markdown"}
exclude_patterns = ["pictures/*.mplstyle"]
html_theme = "furo"
html_title = "jaxgpt"
html_show_sourcelink = False
html_copy_source = False
html_css_files = ["wide.css"]
html_static_path = ["static"]
# The button copies what is typed: neither prompts nor output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

smartquotes = False  # "gpt2" is a value
default_role = "code"  # docstrings mark code as Markdown does, with single backticks
add_module_names = False
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# A class is described where it is and, once more, where its package exports it: a link may go to either.
suppress_warnings = ["ref.python"]
napoleon_use_ivar = True
napoleon_use_rtype = False
myst_heading_anchors = 4

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
PAGES = {"README.md": "index.myst", "CONTRIBUTING.md": "contributing.myst", "CHANGELOG.md": "changelog.myst"}


def link_to_pages(text: str, base: Path) -> str:
    """The text of a page in `base`, with its links into the repository, which are right on GitHub, turned into links
    to the pages built here; those to files that have no page become plain text."""

    def replaced(link: re.Match[str]) -> str:
        label, target, anchor = link[1], (base / link[2]).resolve().relative_to(ROOT), link[3] or ""
        if target.parts[0] == "jaxgpt" and target.suffix == ".py":
            module = ".".join(target.with_suffix("").parts).removesuffix(".__init__")
            return f"{{py:mod}}`{label} <{module}>`"
        page = PAGES.get(str(target)) or ("/".join(target.parts[1:]) if target.parts[0] == "docs" else None)
        return f"[{label}](/{page}{anchor})" if page else label

    return LINK.sub(replaced, text).replace("](docs/pictures/", "](/pictures/")


def as_restructured_text(lines: list[str]) -> None:
    """Two things that docstrings write as Markdown does: an indented block is code, and `|` draws a table."""
    result: list[str] = []
    section = False
    for i, line in enumerate(lines):
        before = lines[i - 1].strip() if i else ""
        section |= line in SECTIONS
        if line.startswith("    ") and not section and not before and not (result and result[-1].startswith("    ")):
            opens = next((kept for kept in reversed(result) if kept.strip()), "")
            if not opens.startswith(("    ", "- ", "  ")):
                result += ["::", ""]
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r" \|(?= )", line.strip("|"))]
            if not before:
                result += [".. list-table::", "   :header-rows: 1", ""]
            if set(line) <= set("|-: "):
                continue
            result += [f"   {'-' if j else '* -'} {cell}".replace("   - ", "     - ") for j, cell in enumerate(cells)]
            continue
        result.append(line)
    lines[:] = result


SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")


class CommandHelp(Directive):
    """`.. command-help:: generate`: what `jaxgpt generate --help` prints."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        form = functools.partial(argparse.HelpFormatter, max_help_position=26, width=80)
        parser = argparse.ArgumentParser(f"jaxgpt {name}", formatter_class=form)
        import_module(COMMANDS[name][0]).add_arguments(parser)
        help_text = parser.format_help()
        return [nodes.literal_block(help_text, help_text, language="text")]


def public_names() -> dict[str, list[str]]:
    """Those of `jaxgpt/__init__.pyi`, by the heading above them there."""
    groups: dict[str, list[str]] = {}
    for line in (ROOT / "jaxgpt" / "__init__.pyi").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"# (\w+)", line):
            names = groups.setdefault(heading[1], [])
        elif groups:  # what comes before the first heading is no part of the table
            names += re.findall(r"\b(\w+) as \1\b", line)
    return groups


class PublicNames(Directive):
    """`.. public-names::`: a table of the public names, each with the first sentence of its docstring."""

    def run(self):
        rows = [".. list-table::", "   :widths: 32 68", ""]
        for heading, names in public_names().items():
            rows += [f"   * - **{heading}**", "     -"]
            for name in names:
                public = getattr(jaxgpt, name)
                kind = "class" if inspect.isclass(public) else "func"
                role = "exc" if heading == "Errors" else kind
                sentence = re.split(r"(?<=\.)\s", inspect.getdoc(public), maxsplit=1)[0]
                rows += [
                    f"   * - :{role}:`~jaxgpt.{name}`",
                    f"     - {' '.join(sentence.split())}",
                ]
        self.state_machine.insert_input(rows, "jaxgpt/__init__.pyi")
        return []


# The tables of a config file, and the dataclasses that declare their keys.
CONFIG_TABLES = {
    "model": GPTConfig,
    "compute": ComputeConfig,
    "train": TrainConfig,
    "lora": LoraConfig,
    "mesh": MeshConfig,
}


class ConfigKeys(Directive):
    """`.. config-keys:: train`: a table of the keys of a config file's `[train]`, from the dataclass's declarations."""

    required_arguments = 1

    def run(self):
        rows = [".. list-table::", "   :header-rows: 1", "   :widths: 26 16 58", ""]
        rows += ["   * - key", "     - default", "     - meaning"]
        for key in settings(CONFIG_TABLES[self.arguments[0]]):
            allowed = f" ({key.allowed})" if key.allowed else ""
            meaning = f"{key.help}{allowed}".replace("\\", "\\\\").replace("*", r"\*")
            default = key.default_text or '""'
            rows += [f"   * - ``{key.name}``", f"     - ``{default}``", f"     - {key.type}: {meaning}"]
        self.state_machine.insert_input(rows, "jaxgpt/fields.py")
        return []


def setup(app):
    """Called by Sphinx."""

    def page_read(app, name, source):
        source[0] = link_to_pages(source[0], ROOT / "docs")

    def include_read(app, path, parent, source):
        source[0] = link_to_pages(source[0], ROOT)

    def docstring_read(app, what, name, obj, options, lines):
        as_restructured_text(lines)

    app.add_directive("command-help", CommandHelp)
    app.add_directive("public-names", PublicNames)
    app.add_directive("config-keys", ConfigKeys)
    app.connect("source-read", page_read)
    app.connect("include-read", include_read)
    app.connect("autodoc-process-docstring", docstring_read, priority=400)  # before napoleon, which has 500

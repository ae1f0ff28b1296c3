"""The documentation as HTML: what a browser makes of it, and the examples of the API reference.

The pages are those of `sphinx-build -b html docs build/docs`, or of another directory that JAXGPT_PAGES names.
"""

from __future__ import annotations

import doctest
import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
from helpers import exhaustive

import jaxgpt
from jaxgpt.fields import settings

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
BUILT = Path(os.environ.get("JAXGPT_PAGES", ROOT / "build" / "docs"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Frames, because a browser's own window cannot be as narrow as a phone.
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body>FRAMES<pre id="measured"></pre><script>
onload = () => {
  const measured = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, found = {page: frame.src, wide: [], cut: [], buttons: 0};
    for (let width = 320; width <= 1920; width += 16) {
      frame.style.width = width + "px";
      if (page.documentElement.scrollWidth > page.documentElement.clientWidth) found.wide.push(width);
      if (width >= 1008)
        for (const code of page.querySelectorAll(".highlight-python pre"))
          if (code.scrollWidth > code.clientWidth) found.cut.push([width, code.textContent.slice(0, 60)]);
    }
    found.blocks = page.querySelectorAll("div.highlight pre").length;
    found.buttons = page.querySelectorAll("button.copybtn").length;
    measured.push(found);
    frame.remove();
  }
  document.getElementById("measured").textContent = JSON.stringify(measured);
};
</script>"""


def dom_of(page: Path, profile: Path) -> str:
    """The page after its scripts have run, from a browser without a network."""
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--virtual-time-budget=60000"),
        *("--dump-dom", page.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=1800, check=True).stdout


@pytest.mark.exhaustive
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to measure the pages with")
@pytest.mark.skipif(not (BUILT / "index.html").exists(), reason=f"no pages in {BUILT}: build them with sphinx-build")
def test_no_page_is_wider_than_the_window_and_no_code_is_cut(tmp_path):
    inside = [path for path in BUILT.rglob("*.html") if not {"_modules", "_static"} & {*path.parts}]
    frames = "".join(f'<iframe src="{page.as_uri()}" style="height: 800px"></iframe>' for page in inside)
    (tmp_path / "measure.html").write_text(MEASURE.replace("FRAMES", frames), encoding="utf-8")
    dom = dom_of(tmp_path / "measure.html", tmp_path / "profile")
    pages = json.loads(html.unescape(dom.partition('<pre id="measured">')[2].partition("</pre>")[0]))
    assert len(pages) == len(inside) >= 20
    assert {page["page"]: page["wide"] for page in pages if page["wide"]} == {}
    assert {page["page"]: page["cut"] for page in pages if page["cut"]} == {}
    # Search results and indices hold no code.
    assert sum(page["blocks"] for page in pages) == sum(page["buttons"] for page in pages) > 100


@pytest.mark.exhaustive
@pytest.mark.skipif(not (BUILT / "index.html").exists(), reason=f"no pages in {BUILT}: build them with sphinx-build")
def test_links_in_the_pages_lead_somewhere():
    """Those to other pages and headings; and nothing, such as NAME@REVISION, is taken for an address of mail."""
    pages = {path: path.read_text(encoding="utf-8") for path in BUILT.rglob("*.html") if "_modules" not in path.parts}
    headings = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    count = 0
    for page, text in pages.items():
        for link in map(html.unescape, re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"]+)"', text)):
            assert not link.startswith("mailto:"), f"{page.name}: {link}"
            if re.match("https?:|data:", link):
                continue
            target, _, heading = map(unquote, link.partition("#"))
            to = Path(os.path.normpath(page.parent / target)) if target else page
            assert to.exists(), f"{page.name}: {link}"
            assert not heading or to not in headings or heading in headings[to], f"{page.name}: {link}"
            count += 1
    assert count > 1000


PAGES = {"Models": "models", "Text": "text", "Checkpoints": "checkpoints", "Training": "training", "Errors": "errors"}


@pytest.fixture
def conf(monkeypatch) -> SimpleNamespace:
    """docs/conf.py, without docutils, which the extra [docs] has."""
    monkeypatch.setitem(sys.modules, "docutils", SimpleNamespace(nodes=None))
    monkeypatch.setitem(sys.modules, "docutils.parsers.rst", SimpleNamespace(Directive=object))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "conf.py")))


def test_the_reference_shows_every_public_name_with_an_example(conf):
    groups = conf.public_names()
    assert list(groups) == list(PAGES)
    for heading, names in groups.items():
        text = (REFERENCE / f"{PAGES[heading]}.rst").read_text(encoding="utf-8")
        documented = re.findall(r"^\.\. auto\w+:: jaxgpt\.(\w+)$", text, re.MULTILINE)
        assert documented == names
        for name, section in zip(names, re.split(r"^\.\. auto\w+:: ", text, flags=re.MULTILINE)[1:], strict=True):
            example = "\n".join(re.findall(r"^(?:>>>|\.\.\.|    ) ?(.*)$", section, re.MULTILINE))
            assert name in example or f".{name}" in example, f"no example of {name}"


@pytest.mark.parametrize("page", ["models", "errors", *map(exhaustive, ["text", "checkpoints", "training"])])
def test_examples_of_the_reference_print_what_they_show(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = doctest.testfile(str(REFERENCE / f"{page}.rst"), module_relative=False, encoding="utf-8")
    assert done.attempted > 5
    assert done.failed == 0


def test_every_config_key_is_in_a_table(conf):
    text = (REFERENCE / "configuration.rst").read_text(encoding="utf-8")
    assert re.findall(r"\.\. config-keys:: (\w+)", text) == list(conf.CONFIG_TABLES)
    written = jaxgpt.TrainConfig(model=jaxgpt.GPTConfig()).to_dict()
    assert set(conf.CONFIG_TABLES) == set(written)
    for table, cls in conf.CONFIG_TABLES.items():
        assert {declared.name for declared in settings(cls)} == set(written[table])
        inserted = []
        directive = conf.ConfigKeys()
        directive.arguments = [table]
        directive.state_machine = SimpleNamespace(insert_input=lambda rows, source, to=inserted: to.extend(rows))
        directive.run()
        rows = "\n".join(inserted)
        for declared in settings(cls):
            assert f"``{declared.name}``" in rows
            assert declared.help.replace("*", r"\*") in rows.replace("\\\\", "\\")
    for example in re.findall(r"code-block:: toml\n\n((?:   .*\n|\n)+)", text):
        file = tomllib.loads(example.replace("\n   ", "\n").removeprefix("   "))
        assert set(file) <= set(conf.CONFIG_TABLES)
        assert jaxgpt.GPTConfig.from_fields(file["model"], "the page").n_layers == 12
        assert set(file["train"]) <= {declared.name for declared in settings(jaxgpt.TrainConfig)}

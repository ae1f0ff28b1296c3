"""scripts/debian_prose.py makes passages of pages."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "debian_prose.py"
POD = """=encoding utf8

=head1 NAME

perlfoo - foo C<< $x->{y} >>
in Perl

=head2 Café

=over 4

=item first

The first, which is longer than the line
of seventy-six columns that pod2text writes.

    verbatim  code

=back
"""
ITEM = "The first, which is longer than the line of seventy-six columns that pod2text writes."
HTML = """<html><head><title>Dropped</title></head><body><div><p>An  <i>early</i>
paragraph &amp; more</p><h2>B.1 Why?</h2><blockquote><p>Quoted.</p></blockquote>
<ul><li>One<li>Two</li></ul>end</body></html>"""

needs_pod2text = pytest.mark.skipif(not shutil.which("pod2text"), reason="pod2text is a part of Perl")


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_html_becomes_headings_and_paragraphs(script, tmp_path):
    page = tmp_path / "secB1.html"
    page.write_text(HTML, encoding="utf-8")
    assert list(script.html_blocks(page)) == [
        ("An early paragraph & more", False),
        ("B.1 Why?", True),
        ("Quoted.", False),
        ("One", False),
        ("Two", False),
        ("end", False),
    ]


@needs_pod2text
def test_pod_becomes_headings_and_paragraphs_that_are_not_wrapped(script, tmp_path):
    page = tmp_path / "perlfoo.pod"
    page.write_text(POD, encoding="utf-8")
    assert list(script.pod_blocks(page)) == [
        ("NAME", True),
        ("perlfoo - foo $x->{y} in Perl", False),
        ("Café", True),
        (f"first\n    {ITEM}", False),
        ("verbatim  code", False),
    ]


def test_passages_begin_at_headings_and_are_not_much_longer_than_asked(script):
    def passages(*texts: str) -> list[str]:
        # Headings are upper case here.
        return list(script.passages(script.Block(text, text.isupper()) for text in texts))

    long = "x" * script.PASSAGE
    assert passages() == []
    assert passages("A", "a", "B", "C", "c", "c") == ["A\n\na", "B\n\nC\n\nc\n\nc"]
    assert passages("A", long, "b", "c") == [f"A\n\n{long}", "b\n\nc"]
    assert passages(long[1:], "b", "c") == [f"{long[1:]}\n\nb", "c"]
    assert passages("a", "B") == ["a"]  # nothing stands under B


@needs_pod2text
def test_the_script_writes_each_passage_once(script, tmp_path, monkeypatch, capsys):
    pods, pages = tmp_path / "in/usr/share/perl/5/pod", tmp_path / "in/usr/share/doc/anarchism/html"
    for folder, text, names in [(pods, POD, ("perla.pod", "perlb.pod", "perltoc.pod")), (pages, HTML, ("a.html",))]:
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(text if name != "perltoc.pod" else "=head1 A\n\ntoc\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["debian_prose.py", str(tmp_path / "in"), str(tmp_path / "out")])
    script.main()
    records = [json.loads(line) for line in (tmp_path / "out" / "perl.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records == [
        {"text": "NAME\n\nperlfoo - foo $x->{y} in Perl"},
        {"text": f"Café\n\nfirst\n    {ITEM}\n\nverbatim  code"},
    ]
    assert "anarchism.jsonl: 2 passages of 28 characters on average\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "pod2text was not found"), ("/bin/pod2text", "does not hold both packages: 0 pod files, 0 FAQ pages")],
)
def test_what_is_missing_is_told(script, found, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: found)
    monkeypatch.setattr(sys, "argv", ["debian_prose.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        script.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

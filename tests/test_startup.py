"""What the command sets up before JAX starts: the compile cache, and the allocator."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt import startup


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A user's environment: only the cache's home is set."""
    for name in list(os.environ):
        if name.startswith("JAX"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # monkeypatch undoes at the end only what it knows about.
    for name in ("DIR", "X"):
        monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", "")
        monkeypatch.delenv(f"JAX_COMPILATION_CACHE_{name}")
    for name in ("MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"):
        monkeypatch.setenv(f"JAX_PERSISTENT_CACHE_{name}", "")
        monkeypatch.delenv(f"JAX_PERSISTENT_CACHE_{name}")
    return tmp_path / "jaxgpt" / f"xla-{startup._processor()}"


def test_the_compile_cache_is_the_users_own(environment):
    startup.use_compile_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(environment)
    assert stat.S_IMODE(environment.stat().st_mode) == 0o700


def test_a_cache_that_was_chosen_already_stays(environment, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    startup.use_compile_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"
    assert not environment.exists()


def test_the_compile_cache_can_be_switched_off(environment, monkeypatch):
    monkeypatch.setenv("JAXGPT_COMPILE_CACHE", "0")
    startup.use_compile_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert not environment.exists()


@pytest.mark.parametrize("leaf", [False, True])
def test_a_cache_that_others_can_write_to_is_not_used(environment, leaf):
    environment.mkdir(parents=True)
    shared = environment if leaf else environment.parent
    shared.chmod(0o770)
    with pytest.warns(UserWarning, match=f"others can write to {shared}"):
        startup.use_compile_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_home_that_cannot_hold_a_cache_is_no_error(environment, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="no compile cache: .*JAXGPT_COMPILE_CACHE=0 switches it off"):
        startup.use_compile_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_cache_past_its_size_loses_its_oldest_entries(environment, monkeypatch):
    environment.mkdir(parents=True, mode=0o700)
    for i in range(6):
        (environment / f"{i}").write_bytes(bytes(100))
        os.utime(environment / f"{i}", (i, i))
    monkeypatch.setattr(startup, "CACHE_BYTES", 600)
    startup.use_compile_cache()
    assert len(list(environment.iterdir())) == 6
    monkeypatch.setattr(startup, "CACHE_BYTES", 500)
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    startup.use_compile_cache()
    assert sorted(entry.name for entry in environment.iterdir()) == ["4", "5"]


def entries(directory):
    """Names and modification times, without the files next to them that record when each was read."""
    return {e.name: e.stat().st_mtime_ns for e in directory.iterdir() if not e.name.endswith("-atime")}


@pytest.mark.exhaustive
def test_the_second_process_compiles_nothing(environment, monkeypatch):
    # Without this, a program near the minimum compile time may or may not be kept.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = [sys.executable, "-m", "jaxgpt", "generate", "--prompt", "A", "--max-new-tokens", "8"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    kept = entries(environment)
    assert any("decode" in name for name in kept)
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == first.stdout
    assert entries(environment) == kept
    for done in (first, second):
        assert [line.split(" in ")[0] for line in done.stderr.splitlines()] == ["8 tokens"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_stays_with_the_process():
    program = """
import resource, sys
import numpy as np
from jaxgpt import startup
if sys.argv[1] == "keep":
    startup.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    keep, give = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give")
    )
    assert keep < give / 10


@pytest.mark.parametrize(
    ("asked", "installed", "found", "advice"),
    [
        ("cuda", ["cpu"], "has no 'cuda'; installed: cpu", "or install it: pip install 'jaxgpt[cuda]'"),
        ("gpu,cpu", ["cpu", "tpu"], "has no 'gpu'; installed: cpu, tpu", "or install it: pip install 'jaxgpt[cuda]'"),
        (
            "tpu",
            ["cpu", "cuda", "gpu"],
            "has no 'tpu'; installed: cpu, cuda",
            "or install it: pip install 'jaxgpt[tpu]'",
        ),
        ("cdua", ["cpu"], "has no 'cdua'; installed: cpu", "Unset JAX_PLATFORMS; did you mean 'cuda'?"),
        # Installing anything would not help: libtpu is here, and a TPU is not.
        ("tpu", ["cpu", "tpu"], "cannot use that here (no /dev/accel); installed: cpu, tpu", "look for the device"),
    ],
)
def test_advice_on_a_platform_fits_what_is_asked_and_what_is_installed(asked, installed, found, advice):
    line = startup._platform_advice(asked, installed, RuntimeError("no /dev/accel\nTrace"))
    assert line.startswith(f"JAX_PLATFORMS={asked}, and ")
    first, _, second = line.partition(". ")
    assert found in first
    assert advice in second
    assert ("install" in second) == (asked not in ("cdua", *installed))


@pytest.mark.parametrize("before", [None, "elsewhere"])
def test_a_child_finds_the_package_that_only_its_parents_path_knows(before, tmp_path, monkeypatch):
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    package = tmp_path / "jaxgpt"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "startup.py").write_text(Path(startup.__file__).read_text())
    (package / "checks.py").write_text("did_you_mean = first_line = None")
    (package / "child.py").write_text("import os; print(__file__, os.environ['SETTING'])")
    program = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1]); from jaxgpt import startup; "
        "environment = startup.child_environment(SETTING='set'); print(environment['PYTHONPATH']); "
        "subprocess.run([sys.executable, '-m', 'jaxgpt.child'], env=environment, check=True)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path.parent)
    path, ran = sorted(done.stdout.splitlines(), key=lambda line: line.endswith(" set"))
    assert ran == f"{package / 'child.py'} set"
    assert path.split(os.pathsep) == [str(tmp_path), *([] if before is None else [before])]


def test_whatever_starts_a_module_of_the_package_gives_it_this_environment():
    for source in Path(startup.__file__).parent.rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        assert text.count("[sys.executable") == text.count("startup.child_environment("), source


def test_a_child_of_an_installed_package_is_given_no_path(monkeypatch):
    root = str(Path(startup.__file__).parents[1])
    monkeypatch.setattr(startup.site, "getsitepackages", lambda: [root])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert startup.child_environment()["PYTHONPATH"] == "elsewhere"

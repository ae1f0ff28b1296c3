"""`jaxgpt doctor` passes on a good installation, and finds and reports each kind of damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import exhaustive
from huggingface_hub import constants

from jaxgpt.cli import main
from jaxgpt.cpu import kernel
from jaxgpt.measuring import doctor
from jaxgpt.model import ops


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return tmp_path


def only(monkeypatch, *names):
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})


@pytest.mark.exhaustive
def test_a_good_installation_passes_every_check(home, capsys):
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks] == list(doctor.CHECKS)
    assert len(checks) == 15
    assert all(check["good"] and check["found"] and not check["advice"] for check in checks)


@pytest.mark.parametrize("dtype", [exhaustive("float32"), exhaustive("bfloat16"), "int8"])
def test_wrong_arithmetic_is_found_in_every_type(dtype, monkeypatch, capsys):
    only(monkeypatch, f"arithmetic in {dtype}")
    layer_norm = ops.layer_norm
    # A variance that is 10% too large, as if the sum were divided by the wrong number.
    monkeypatch.setattr(ops, "layer_norm", lambda *arguments, **options: 0.9 * layer_norm(*arguments, **options))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"FAIL  arithmetic in {dtype}: logits: off by" in out
    assert "what to do: this build of JAX computes wrong results" in out


def test_a_product_that_loses_its_last_rows_is_found(monkeypatch, capsys):
    only(monkeypatch, "large product")
    product = ops.product
    monkeypatch.setattr(ops, "product", lambda *arguments: product(*arguments).at[..., 32_768:].set(99))
    assert main(["doctor"]) == 1
    assert "FAIL  large product: largest of 50,257 products: off by" in capsys.readouterr().out


def test_damaged_files_are_found(monkeypatch, capsys, tmp_path):
    only(monkeypatch, "bundled model")
    shutil.copytree(doctor.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(doctor, "ASSETS", tmp_path / "assets")
    model = tmp_path / "assets" / "shakespeare" / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    assert main(["doctor"]) == 1
    assert "its sha256 is" in capsys.readouterr().out
    model.unlink()
    assert main(["doctor"]) == 1
    assert "No such file" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_told(home, monkeypatch, capsys):
    only(monkeypatch, "compile cache")
    (home / "jaxgpt").touch()
    assert main(["doctor"]) == 1
    assert "what to do: make it writable by you alone, or set XDG_CACHE_HOME or JAXGPT_COMPILE_CACHE=0" in (
        capsys.readouterr().out
    )


def test_a_hub_cache_that_cannot_be_written_is_told(monkeypatch, capsys, tmp_path):
    only(monkeypatch, "hub cache")
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "there"))
    assert main(["doctor"]) == 0
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert main(["doctor"]) == 1
    assert "what to do: make it writable, set HF_HOME, or set HF_HUB_OFFLINE=1" in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["doctor"]) == 0
    assert "is only read, because of HF_HUB_OFFLINE" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["doctor"]) == 0
    assert "without the extra [hub] nothing is downloaded" in capsys.readouterr().out


def test_a_kernel_that_went_bad_is_told(home, monkeypatch, capsys):
    only(monkeypatch, "native kernel")
    monkeypatch.delenv(kernel.VARIABLE)
    assert main(["doctor"]) == 0
    assert "not built: jaxgpt build-kernel" in capsys.readouterr().out
    kernel.path().parent.mkdir(parents=True)
    kernel.path().write_bytes(b"no library")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  native kernel: the kernel is wrong" in out
    assert "does not load" in out
    assert "what to do: run jaxgpt build-kernel, or set JAXGPT_KERNEL=0" in out


def test_a_check_that_raises_has_failed_and_the_others_still_run(monkeypatch, capsys):
    def broken():
        raise ImportError("No module named 'tiktoken'")

    monkeypatch.setattr(doctor, "CHECKS", {"tokenizer": broken, "versions": doctor.CHECKS["versions"]})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  tokenizer: ImportError: No module named 'tiktoken' (test_doctor.py, line" in out
    assert "ok    versions: jaxgpt" in out


@pytest.mark.parametrize("platform", ["cuda", exhaustive("tpu"), exhaustive("gpu"), exhaustive("cdua")])
def test_a_platform_that_jax_lacks_is_one_failure_and_one_line(platform, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": platform, "XDG_CACHE_HOME": str(tmp_path)}

    def run(*arguments):
        command = [sys.executable, "-m", "jaxgpt", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = run("generate", "--prompt", "a")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"jaxgpt: error: JAX_PLATFORMS={platform}, and this JAX has no '{platform}'")
    assert "; installed: cpu" in line
    done = run("doctor", "--json")
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    (failed,) = (check for check in checks.values() if check["good"] is False)
    assert f"JAX_PLATFORMS={platform}" in failed["found"]
    assert "Unset JAX_PLATFORMS" in failed["advice"]
    assert checks["generation"]["found"] == "skipped, because JAX has no device"
    assert checks["tokenizer"]["good"]

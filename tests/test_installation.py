"""What pyproject.toml asks for, and the versions that CI installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# What CI installs from constraints.txt. Of the other extras it takes the newest.
PINNED = ("completion", "data", "dev", "docs", "hub", "plot", "test", "train")


def test_the_constraints_have_an_allowed_version_of_each_requirement():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in versions.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(line for extra in PINNED for line in extras[extra])]
    for requirement in map(Requirement, required):
        if requirement.name == "jaxgpt":
            assert requirement.extras <= set(PINNED)
        else:
            version = pinned.get(canonicalize_name(requirement.name), "none")
            assert requirement.specifier.contains(version), f"{requirement}, but {version}: run .ci/constraints"

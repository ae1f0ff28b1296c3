"""Fixtures shared by all test modules."""

from __future__ import annotations

import pytest
from helpers import TINY, make_model


@pytest.fixture(scope="session")
def tiny():
    """(model, params) of the smallest configuration, its parameters random in every leaf."""
    return make_model(TINY)

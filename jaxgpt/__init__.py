"""jaxgpt: GPT-2 in JAX and Flax, with parameters as a plain pytree that is passed explicitly."""

from __future__ import annotations

__version__ = "0.1.0"

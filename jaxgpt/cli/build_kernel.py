"""`jaxgpt build-kernel`: the C++ kernel for this machine's processor, for every later process of this user."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """Builds the kernel, checks it against float64, and prints where it is.

    Raises:
        KernelError: if it cannot be built.
    """
    from jaxgpt.cpu import kernel

    path = kernel.build()
    print(f"{path}: built and checked; jaxgpt generate uses it from now on ({kernel.VARIABLE}=0 leaves it unused)")
    return 0

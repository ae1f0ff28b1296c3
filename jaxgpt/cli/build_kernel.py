"""`jaxgpt build-kernel`: builds the C++ kernel for this machine's processor; later processes of this user use it."""

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
    print(f"{path}: built and checked; jaxgpt generate uses it from now on ({kernel.VARIABLE}=0 turns it off)")
    return 0

"""Runs `jaxgpt inspect`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))

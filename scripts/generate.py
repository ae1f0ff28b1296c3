"""Runs `jaxgpt generate`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))

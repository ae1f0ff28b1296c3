"""Runs `jaxgpt tokenize`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenize", *sys.argv[1:]]))

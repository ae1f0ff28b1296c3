"""Runs `jaxgpt benchmark`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))

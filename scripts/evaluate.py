"""Runs `jaxgpt evaluate`."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

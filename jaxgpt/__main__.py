"""`python -m jaxgpt`: the `jaxgpt` command."""

import sys

from jaxgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())

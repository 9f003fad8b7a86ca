"""Runs `actstore` as `python -m actstore.cli`, where the console command is not on the path."""

import sys

from actstore.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""What every test may rely on."""

import os

# pytest-xdist gives its workers the terminal's width; commands that tests call would wrap their tables to it.
os.environ.pop("COLUMNS", None)

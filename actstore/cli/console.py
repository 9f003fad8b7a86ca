"""How does a command write to a terminal, a pipe or a file, whatever their width and their encoding?"""

import io
import os
import sys
from typing import NoReturn

from rich.console import Console

from actstore.show import visible

_PIPE_WIDTH = 120
"""Columns where no terminal says how wide it is: enough for a context."""


class _PipedConsole(Console):
    """A console that leaves a reader who has gone (head, less) to the command line's own handling."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def output_console() -> Console:
    """Return a console on stdout; nothing printed on it is read as markup or coloured by what it looks like."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return _PipedConsole(markup=False, highlight=False, emoji=False, width=None if known else _PIPE_WIDTH)


def visible_lines(text: str) -> str:
    r"""Return `text` with hidden characters as escapes, its line breaks kept: messages quote foreign names.

    >>> visible_lines("no file 'a\x1b[2J'\nat all")
    "no file 'a\\x1b[2J'\nat all"
    """
    return "\n".join(map(visible, text.split("\n")))


def prepare_streams() -> None:
    """Make stdout and stderr take any text: what their encoding lacks is escaped, and a closed one swallows it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

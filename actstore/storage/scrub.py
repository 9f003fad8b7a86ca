"""Which parts of a text could be a credential?

Everything that a user put into the storage options is treated as secret, except what is known to be harmless.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_HARMLESS = frozenset(
    {"endpoint_url", "region_name", "account_name", "project", "profile", "addressing_style", "mode"}
)
_MIN_LENGTH = 4
"""Shorter values are no credentials, and replacing them would garble messages."""


def scrub(text: str, options: Mapping[str, Any]) -> str:
    """Return `text` with every secret value of `options` replaced by `***`.

    >>> scrub("denied: key=hunter22", {"secret": "hunter22"})
    'denied: key=***'
    """
    for secret in sorted(_secrets(options), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts in `options` that are not known to be harmless, however deep."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, bytes):
            yield value.decode("utf-8", "replace")
        elif isinstance(value, str) and name not in _HARMLESS and len(value) >= _MIN_LENGTH:
            yield value

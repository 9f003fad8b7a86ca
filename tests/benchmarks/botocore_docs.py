"""What do the service models of botocore say? A real, labelled corpus of about 84,000 texts that needs no download.

Every `documentation` of a service's operations, shapes and members is a text, without its HTML; each distinct text of at
least 80 characters is kept once. Labels: the service, and what kind of thing the text is about.
"""

import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore

LEAST_CHARS = 80
_TAG = re.compile(r"<[^>]+>")
_SPACE = re.compile(r"\s+")


def plain_text(documentation: str) -> str:
    """Return a text without tags and entities, its white space single.

    >>> plain_text("<p>A &lt;b&gt;  <code>key</code>.</p>")
    'A <b> key .'
    """
    return _SPACE.sub(" ", html.unescape(_TAG.sub(" ", documentation))).strip()


def botocore_documents() -> Iterator[dict[str, Any]]:
    """Yield `{"text", "service", "kind"}`, in the order of the services' names; the same for one version of botocore."""
    seen: set[str] = set()
    for service, path in _models():
        for text, kind in _texts(path):
            if len(text) >= LEAST_CHARS and text not in seen:
                seen.add(text)
                yield {"text": text, "service": service, "kind": kind}


def _models() -> list[tuple[str, Path]]:
    """Return each service with its newest model."""
    found: dict[str, Path] = {}
    for path in sorted((Path(botocore.__file__).parent / "data").glob("*/*/service-2.json*")):
        found[path.parent.parent.name] = path
    return sorted(found.items())


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    data = path.read_bytes()
    model = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    for operation in model.get("operations", {}).values():
        yield plain_text(operation.get("documentation", "")), "operation"
    shapes = model.get("shapes", {})
    for shape in shapes.values():
        kind = "exception" if shape.get("exception") else f"shape:{shape['type']}"
        yield plain_text(shape.get("documentation", "")), kind
        for member in shape.get("members", {}).values():
            kind = f"member:{shapes.get(member['shape'], {}).get('type', 'unknown')}"
            yield plain_text(member.get("documentation", "")), kind

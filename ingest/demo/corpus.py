"""Which text does the demo read?

Text that ships with every Python: the language reference of `pydoc_data.topics`, docstrings of the standard
library, and short functions from its source. Source files are parsed, never imported, so nothing runs and no
window opens. The answer is a list of documents in an order that depends only on the text itself.
"""

import ast
import hashlib
import importlib
import importlib.util
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import ErrorKind, NotFoundError

KINDS = ("topic", "docstring", "source")
_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_HELD_OUT_EVERY = 10
"""One document in ten is never trained on: enough text (about 150,000 characters) for a loss that does not jump."""


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text and where in Python it stands."""

    key: str
    """Unique: kind, module and qualified name."""
    text: str
    """The text, without indentation that only its place in a file explains."""
    kind: str
    """One of `KINDS`."""
    module: str
    """Dotted name of the module whose file holds the text."""
    name: str
    """Qualified name in the module, or the topic."""

    @property
    def is_held_out(self) -> bool:
        """Whether no demo model is trained on it; decided by the text, so that it never changes sides."""
        return _digest(self.text)[0] % _HELD_OUT_EVERY == 0

    def record(self) -> dict[str, object]:
        """The document as a row for `import_corpus`: its text, its key and five metadata columns."""
        return {
            "id": self.key,
            "text": self.text,
            "kind": self.kind,
            "module": self.module,
            "name": self.name,
            "n_chars": len(self.text),
            "split": "held-out" if self.is_held_out else "train",
        }


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much text is taken, in characters."""

    trained_per_kind: int = 520_000
    """Text of each kind that the models may see: together about 500,000 tokens, four passes in a minute of CPU."""
    stored_per_kind: int = 130_000
    """Text of each kind that is ingested: together about 125,000 tokens, so two runs fit in 1 GB."""
    min_document: int = 160
    """A shorter text has no context worth showing."""
    max_document: int = 6_000
    """A longer text is cut between paragraphs."""


def read_documents(bounds: Bounds, modules: Collection[str] | None = None) -> list[Document]:
    """All documents the demo trains on or holds out, at most `trained_per_kind` characters of each kind.

    Reads about 340 files of the standard library, 7 MB, in three seconds; only those of `modules` if given. The order is
    that of the texts' SHA-256.

    Raises:
        NotFoundError: this Python has no standard library in readable `.py` files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [*topic_documents(_topics(), bounds)]
    for module, path in stdlib_files(root):
        if modules is not None and module not in modules:
            continue
        with tokenize.open(path) as file:
            found += parse_module(module, file.read(), bounds)
    chosen = take(found, max_chars_per_kind=bounds.trained_per_kind)
    if not {"docstring", "source"} <= {document.kind for document in chosen}:
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"the demo reads text from Python's standard library in {str(root)!r}, and found none in .py files there; "
            "run it with a Python that has its library as source",
        )
    return chosen


def stored_documents(documents: Iterable[Document], bounds: Bounds) -> list[Document]:
    """The documents that go into the store: held-out ones first, then trained ones, up to `stored_per_kind`."""
    ordered = sorted(documents, key=lambda document: (not document.is_held_out, _digest(document.text)))
    chosen = take(ordered, max_chars_per_kind=bounds.stored_per_kind, in_order=True)
    return sorted(chosen, key=lambda document: document.key)


def stdlib_files(root: Path) -> list[tuple[str, Path]]:
    """Dotted module names and files of the standard library, sorted: single-file modules and well-known packages."""
    paths = sorted(root.glob("*.py"))
    for package in _PACKAGES:
        paths += sorted(path for path in (root / package).rglob("*.py") if "test" not in path.parts)
    return [(_module_name(path.relative_to(root)), path) for path in paths]


def parse_module(module: str, source: str, bounds: Bounds) -> list[Document]:
    """Docstrings of a module, its classes and functions, and its short functions without their docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files of the library are not our business
        tree = ast.parse(source)
    lines = source.split("\n")  # as `ast` counts them: splitlines() also cuts at form feeds
    found = []
    for name, node in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring and bounds.min_document <= len(docstring) <= bounds.max_document:
            found.append(Document(f"docstring/{module}:{name}", docstring, "docstring", module, name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _has_code(node):
            text = _function_text(node, lines)
            if bounds.min_document <= len(text) <= bounds.max_document // 3:
                found.append(Document(f"source/{module}:{name}", text, "source", module, name))
    return found


def topic_documents(topics: Mapping[str, str], bounds: Bounds) -> Iterator[Document]:
    """The language reference, cut between paragraphs; a paragraph that a shorter topic has too is left out."""
    seen: set[str] = set()
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        paragraphs = [text.strip("\n") for text in topics[topic].split("\n\n")]
        new = [text for text in paragraphs if text.strip() and text not in seen]
        seen.update(new)
        for i, text in enumerate(_pieces(new, bounds.max_document)):
            if len(text) >= bounds.min_document:
                yield Document(f"topic/{topic}:{i}", text, "topic", "pydoc_data.topics", topic)


def take(documents: Iterable[Document], *, max_chars_per_kind: int, in_order: bool = False) -> list[Document]:
    """Distinct texts up to a number of characters of each kind, in the order of their SHA-256 (or as given).

    The first of two documents with one text or one key stays. Text that UTF-8 cannot hold is left out.
    """
    by_text: dict[str, Document] = {}
    for document in documents:
        if not _SURROGATE.search(document.text):
            by_text.setdefault(document.text, document)
    distinct = list({document.key: document for document in reversed(by_text.values())}.values())[::-1]
    if not in_order:
        distinct.sort(key=lambda document: _digest(document.text))
    left = dict.fromkeys(KINDS, max_chars_per_kind)
    chosen = []
    for document in distinct:
        if len(document.text) <= left[document.kind]:
            left[document.kind] -= len(document.text)
            chosen.append(document)
    return chosen


def _topics() -> Mapping[str, str]:
    """The language reference, empty where a distribution leaves it out."""
    if importlib.util.find_spec("pydoc_data") is None:
        return {}
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    return topics


def _definitions(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}" if name else child.name)


def _has_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether anything is left of a function without its docstring."""
    return len(node.body) > 1 or ast.get_docstring(node, clean=False) is None


def _function_text(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's own lines without its docstring, moved to the left margin."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = set(range(first, (node.end_lineno or first) + 1))
    if ast.get_docstring(node, clean=False) is not None:
        kept -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    text = "\n".join(lines[number - 1].rstrip() for number in sorted(kept))
    return textwrap.dedent(text)


def _pieces(paragraphs: Iterable[str], max_chars: int) -> Iterator[str]:
    """Paragraphs joined up to `max_chars`; a single longer paragraph stays whole."""
    piece = ""
    for paragraph in paragraphs:
        if piece and len(piece) + len(paragraph) + 2 > max_chars:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece:
        yield piece


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

"""Is the demo's text what stands in Python's library, each piece once, in an order that only the text decides?"""

import ast
import hashlib
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.ingest.demo.corpus import (
    KINDS,
    Bounds,
    Document,
    parse_module,
    read_documents,
    stdlib_files,
    stored_documents,
    take,
    topic_documents,
)

SMALL = Bounds(trained_per_kind=40_000, stored_per_kind=15_000)
ALL = Bounds(min_document=1, max_document=10_000)

SOURCE = '''"""Module words."""
import os

@decorate(
    1)
def first(a):
    """First words.

    More words.
    """
    x = """not
a docstring"""
    return a\x0c

class Outer:
    "Outer words."

    class Inner:
        async def method(self):
            \'\'\'Method words.\'\'\'
            return [
                self,
            ]

    def only_words(self):
        """Only words."""
'''


def test_a_module_gives_its_docstrings_and_its_functions_without_them():
    found = {document.key: document for document in parse_module("pkg.mod", SOURCE, ALL)}
    texts = {key: document.text for key, document in found.items()}
    assert texts == {
        "docstring/pkg.mod:": "Module words.",
        "docstring/pkg.mod:first": "First words.\n\nMore words.",
        "docstring/pkg.mod:Outer": "Outer words.",
        "docstring/pkg.mod:Outer.Inner.method": "Method words.",
        "docstring/pkg.mod:Outer.only_words": "Only words.",
        "source/pkg.mod:first": (
            '@decorate(\n    1)\ndef first(a):\n    x = """not\na docstring"""\n    return a'
        ),
        "source/pkg.mod:Outer.Inner.method": ("async def method(self):\n    return [\n        self,\n    ]"),
    }
    assert {document.module for document in found.values()} == {"pkg.mod"}
    assert found["source/pkg.mod:first"].record()["n_chars"] == len(texts["source/pkg.mod:first"])


@pytest.mark.parametrize("module", ["textwrap", "json.decoder", "heapq", "asyncio.queues"])
def test_functions_of_the_library_are_the_same_code_when_parsed_again(module):
    path = dict(stdlib_files(Path(sysconfig.get_path("stdlib"))))[module]
    source = path.read_text()
    originals: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if node.body:
                originals.setdefault(node.name, []).append(ast.unparse(node))
    found = [document for document in parse_module(module, source, ALL) if document.kind == "source"]
    assert len(found) > 4
    for document in found:
        [again] = ast.parse(document.text).body
        assert ast.unparse(again) in originals[document.name.rsplit(".", 1)[-1]]


def test_topics_are_cut_between_paragraphs_and_each_paragraph_is_told_once():
    shared = "shared " * 10
    topics = {
        "LONG": "\n\n".join([shared, *(f"long {i} " * 12 for i in range(9)), "x" * 700]),
        "SHORT": f"{shared}\n\nshort {'s' * 30}\n",
    }
    found = list(topic_documents(topics, Bounds(min_document=10, max_document=300)))
    assert [document.key for document in found][:2] == ["topic/SHORT:0", "topic/LONG:0"]
    assert all(len(document.text) <= 300 or document.text == "x" * 700 for document in found)
    told = [paragraph for document in found for paragraph in document.text.split("\n\n")]
    expected = {paragraph.strip("\n") for text in topics.values() for paragraph in text.split("\n\n")}
    assert sorted(told) == sorted(expected)
    assert sum(shared.strip() in document.text for document in found) == 1


documents = st.builds(
    lambda text, kind, key: Document(key, text, kind, "m", "n"),
    st.text(alphabet="ab\ud800", min_size=1, max_size=6),
    st.sampled_from(KINDS),
    st.sampled_from([f"k{i}" for i in range(8)]),
)


@given(st.lists(documents, max_size=12), st.integers(0, 12))
def test_taken_documents_are_distinct_bounded_and_ordered_by_their_hash(given, limit):
    taken = take(given, max_chars_per_kind=limit)
    assert len({document.text for document in taken}) == len(taken) == len({d.key for d in taken})
    for kind in KINDS:
        assert sum(len(document.text) for document in taken if document.kind == kind) <= limit
    assert all("\ud800" not in document.text for document in taken)
    hashes = [hashlib.sha256(document.text.encode()).hexdigest() for document in taken]
    assert hashes == sorted(hashes)
    # Nothing that would have fitted was left out, but for texts and keys that came before.
    if limit >= sum(len(document.text) for document in given):
        storable = [document for document in given if "\ud800" not in document.text]
        assert {d.text for d in storable} - {d.text for d in taken} <= {
            d.text for d in storable if [e.key for e in storable].count(d.key) > 1
        }


def test_the_library_gives_all_kinds_in_the_order_of_their_hashes_and_held_out_text_is_stored_first():
    found = read_documents(SMALL)
    hashes = [hashlib.sha256(document.text.encode()).hexdigest() for document in found]
    assert hashes == sorted(hashes)
    assert {document.kind for document in found} == set(KINDS)
    assert len({document.key for document in found}) == len({document.text for document in found})
    assert all(SMALL.min_document <= len(document.text) for document in found)
    for document in found:
        first = hashlib.sha256(document.text.encode()).digest()[0]
        assert document.is_held_out == (first % 10 == 0)
        assert document.record()["split"] == ("held-out" if document.is_held_out else "train")
    stored = stored_documents(found, SMALL)
    assert {document.key for document in stored} < {document.key for document in found}
    for kind in KINDS:
        held_out = {document.key for document in found if document.is_held_out and document.kind == kind}
        if sum(len(document.text) for document in found if document.key in held_out) <= SMALL.stored_per_kind:
            assert held_out <= {document.key for document in stored}

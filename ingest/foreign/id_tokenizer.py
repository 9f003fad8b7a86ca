"""What tokenizer does a tokenization have whose token ids came without one?

A real `tokenizer.json`, so that every reader finds what it expects: a word-level model with the words `<0>`, `<17>`, ... for
the ids that occur, cutting at white space. It turns the text that `IdSpeller` writes back into the same ids.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from actstore.ingest.tokenizers import FastTokenizer

from .spelling import id_word

NAME = "none: the numbers of the tokens"


def id_tokenizer(token_ids: Iterable[int], special_ids: Iterable[int]) -> FastTokenizer:
    """Return the tokenizer of the given ids.

    >>> backend = id_tokenizer([4, 17], []).backend()
    >>> backend.encode("<17> <4>").ids, backend.decode([17, 4])
    ([17, 4], '<17> <4>')
    """
    model = {"type": "WordLevel", "vocab": {id_word(i): i for i in sorted(set(token_ids))}, "unk_token": ""}
    parsed: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    special = tuple(sorted(set(special_ids)))
    return FastTokenizer(
        tokenizer_json=json.dumps(parsed, separators=(",", ":")).encode(),
        special_ids=special,
        config={"split_special_tokens": True, "special_tokens": {}, "special_ids": list(special)},
        name=NAME,
        max_length=None,
    )


def words_table(words: Mapping[int, str]) -> pa.Table:
    """Return the vocabulary, `token_id` (int32) and `token`, by id."""
    ids = sorted(words)
    schema = pa.schema([pa.field("token_id", pa.int32(), False), pa.field("token", pa.string(), False)])
    return pa.Table.from_arrays(
        [pa.array(ids, pa.int32()), pa.array([words[i] for i in ids], pa.string())], schema=schema
    )

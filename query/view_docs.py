"""Which views can SQL ask, and what do their columns mean? The documentation that `view_columns` and DESCRIBE give."""

from dataclasses import dataclass

import pyarrow as pa

SqlType = tuple[str, str, pa.DataType, str]
"""Name, DuckDB type, Arrow type, meaning of a column."""


def _column(name: str, type_: str, meaning: str) -> SqlType:
    arrow = {
        "VARCHAR": pa.string(),
        "BIGINT": pa.int64(),
        "INTEGER": pa.int32(),
        "BOOLEAN": pa.bool_(),
        "FLOAT[]": pa.list_(pa.float32()),
    }
    return (name, type_, arrow[type_], meaning)


@dataclass(frozen=True, slots=True)
class View:
    """One view: what it is for and what its columns mean."""

    meaning: str
    columns: tuple[SqlType, ...]

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the documented columns."""
        return pa.schema([pa.field(name, arrow) for name, _, arrow, _ in self.columns])


_NBYTES = _column("nbytes", "BIGINT", "stored bytes")
_CREATED = _column("created_version", "BIGINT", "store version that created it")

VIEWS: dict[str, View] = {
    "runs": View(
        "runs: one model revision over one tokenization",
        (
            _column("run", "VARCHAR", "the run's name"),
            _column("model", "VARCHAR", "architecture or name of the model, as its configuration says"),
            _column("model_source", "VARCHAR", "path or hub name that the model was loaded from"),
            _column("revision", "VARCHAR", "commit of the model on the hub; null for a local folder"),
            _column("tokenization", "VARCHAR", "tokenization whose rows the run covers"),
            _column("corpus", "VARCHAR", "corpus behind the tokenization"),
            _column(
                "keep",
                "VARCHAR",
                "what is stored: dense (token rows), pooled (document vectors), or dense,pooled",
            ),
            _column("dtype", "VARCHAR", "stored number type: float32, float16, bfloat16 or int8"),
            _column("compute_dtype", "VARCHAR", "number type of the forward pass"),
            _column("codec", "VARCHAR", "how shards are encoded: hot, lz4 or cold"),
            _column("attn_implementation", "VARCHAR", "attention implementation of the forward pass"),
            _column("n_hook_points", "INTEGER", "hook points stored"),
            _column("n_rows", "BIGINT", "token rows stored so far"),
            _column("n_units", "BIGINT", "units stored so far"),
            _column("n_units_planned", "BIGINT", "units of the tokenization"),
            _column("is_complete", "BOOLEAN", "every unit is stored and the run is sealed"),
            _column("nonfinite", "BIGINT", "NaN or infinite values stored"),
            _NBYTES,
            _CREATED,
            _column("fingerprint", "VARCHAR", "SHA-256 of the configuration"),
            _column("config", "VARCHAR", "the configuration as JSON"),
        ),
    ),
    "hook_points": View(
        "hook points stored, one row per run and hook point",
        (
            _column("run", "VARCHAR", "the run's name"),
            _column("hook_point", "VARCHAR", "canonical name of the place in the model"),
            _column("layer", "INTEGER", "layer, from 0; null outside the layers"),
            _column("d_model", "INTEGER", "activations per row"),
            _column("n_rows", "BIGINT", "token rows stored so far"),
            _NBYTES,
            _column("nonfinite", "BIGINT", "NaN or infinite values stored"),
        ),
    ),
    "corpora": View(
        "corpora: immutable sets of documents",
        (
            _column("corpus", "VARCHAR", "the corpus's name"),
            _column("n_documents", "BIGINT", "documents"),
            _column("text_bytes", "BIGINT", "bytes of text as UTF-8"),
            _column("n_parts", "BIGINT", "stored Parquet parts"),
            _NBYTES,
            _CREATED,
            _column("content_sha256", "VARCHAR", "hash of all documents"),
            _column("columns", "VARCHAR", "JSON object: Arrow type of every column of its documents"),
        ),
    ),
    "documents": View(
        "documents of every corpus, with the union of their metadata columns",
        (
            _column("corpus", "VARCHAR", "the corpus's name"),
            _column("doc_id", "BIGINT", "number of the document in its corpus, from 0"),
            _column("text", "VARCHAR", "the document's text"),
            _column("source_key", "VARCHAR", "id, path or line that the source gave the document"),
        ),
    ),
    "tokenizations": View(
        "tokenizations: a corpus cut by one tokenizer into rows",
        (
            _column("tokenization", "VARCHAR", "its id"),
            _column("corpus", "VARCHAR", "corpus that it cuts"),
            _column("window", "BIGINT", "tokens per model window"),
            _column("overlap", "BIGINT", "tokens that neighbouring windows share"),
            _column("add_special_tokens", "BOOLEAN", "whether the tokenizer added its special tokens"),
            _column("rows_per_unit", "BIGINT", "row numbers that each unit spans"),
            _column("n_rows", "BIGINT", "token rows"),
            _column("n_units", "BIGINT", "units"),
            _column("n_documents", "BIGINT", "documents cut; null until complete"),
            _column("is_complete", "BOOLEAN", "every unit is stored"),
            _column("tokenizer_sha256", "VARCHAR", "hash of the tokenizer"),
            _NBYTES,
            _CREATED,
        ),
    ),
    "tokens": View(
        "token rows of every tokenization; join documents on (corpus, doc_id)",
        (
            _column("tokenization", "VARCHAR", "id of the tokenization"),
            _column("corpus", "VARCHAR", "corpus of the document"),
            _column(
                "row",
                "BIGINT",
                "global token row: the row of the activations of every run of the tokenization",
            ),
            _column("doc_id", "BIGINT", "number of the document in its corpus"),
            _column("position", "INTEGER", "index of the token in its document"),
            _column("token_id", "INTEGER", "number of the token in the vocabulary"),
            _column("token", "VARCHAR", "readable text of the token"),
            _column("char_start", "INTEGER", "first character in the document's text, in code points"),
            _column("char_end", "INTEGER", "one past the last character"),
            _column(
                "is_special", "BOOLEAN", "whether the tokenizer added it (beginning of text, separator, ...)"
            ),
            _column("window", "INTEGER", "model window in the document, from 0"),
            _column("window_position", "INTEGER", "index in the window: the position that the model saw"),
            _column(
                "role", "VARCHAR", "who wrote the message that it is part of; null outside of conversations"
            ),
        ),
    ),
    "pooled": View(
        "pooled vectors of the runs that keep them, one row per run, hook point, pooling and document. Documents that lie in "
        "several units are there once the run is complete; run.pooled() has them before. Join documents through runs.corpus",
        (
            _column("run", "VARCHAR", "the run's name"),
            _column("hook_point", "VARCHAR", "canonical name of the place in the model"),
            _column(
                "pooling", "VARCHAR", "mean, last, max or weighted_mean (weights grow with the position)"
            ),
            _column("doc_id", "BIGINT", "number of the document in the run's corpus"),
            _column(
                "n_tokens",
                "BIGINT",
                "tokens that entered the vector; each position of the document counts once",
            ),
            _column(
                "vector", "FLOAT[]", "the vector, as long as the hook point's d_model; null without a token"
            ),
        ),
    ),
    "units": View(
        "stored units of every collection: the pieces that are written and committed whole",
        (
            _column("kind", "VARCHAR", "corpus, tokenization, run, ..."),
            _column("id", "VARCHAR", "name of the collection"),
            _column("unit", "BIGINT", "number of the unit"),
            _column("rows", "BIGINT", "token rows, or documents of a corpus"),
            _column("nonfinite", "BIGINT", "NaN or infinite values"),
            _NBYTES,
            _column("version", "BIGINT", "store version that made it live"),
        ),
    ),
    "view_columns": View(
        "this documentation: every column of every view",
        (
            _column("view", "VARCHAR", "name of the view"),
            _column("column_name", "VARCHAR", "name of the column"),
            _column("column_type", "VARCHAR", "DuckDB type"),
            _column("meaning", "VARCHAR", "what it holds, with its unit"),
        ),
    ),
}

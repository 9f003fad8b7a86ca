"""Which views can SQL ask, and what do their columns mean? The documentation that `view_columns` and DESCRIBE give."""

from dataclasses import dataclass

import pyarrow as pa

SqlType = tuple[str, str, pa.DataType, str]
"""Name, DuckDB type, Arrow type, meaning of a column."""

TOP_TOKENS = "STRUCT(token_id INTEGER, count BIGINT, mean DOUBLE)[]"
LOGITS = "STRUCT(token_id INTEGER, token VARCHAR, logit FLOAT)[]"


def _column(name: str, type_: str, meaning: str) -> SqlType:
    arrow = {
        "VARCHAR": pa.string(),
        "BIGINT": pa.int64(),
        "INTEGER": pa.int32(),
        "BOOLEAN": pa.bool_(),
        "FLOAT": pa.float32(),
        "DOUBLE": pa.float64(),
        "FLOAT[]": pa.list_(pa.float32()),
        "INTEGER[]": pa.list_(pa.int32()),
        "BIGINT[]": pa.list_(pa.int64()),
        TOP_TOKENS: pa.list_(
            pa.struct([("token_id", pa.int32()), ("count", pa.int64()), ("mean", pa.float64())])
        ),
        LOGITS: pa.list_(
            pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logit", pa.float32())])
        ),
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
_DICTIONARY = _column("dictionary", "VARCHAR", "the dictionary's name")
_ENCODED_RUN = _column("run", "VARCHAR", "the run that was encoded")
_LATENT = _column("latent", "INTEGER", "number of the latent in its dictionary")
_CODES = (
    _DICTIONARY,
    _ENCODED_RUN,
    _column("row", "BIGINT", "token row of the run's tokenization"),
    _LATENT,
    _column("value", "FLOAT", "the latent's value there, above 0; where it does not fire there is no row"),
    _column("tokenization", "VARCHAR", "whose rows they are: join tokens USING (tokenization, row)"),
)

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
    "dictionaries": View(
        "dictionaries: sparse autoencoders and transcoders",
        (
            _DICTIONARY,
            _column("kind", "VARCHAR", "sae or transcoder"),
            _column("activation", "VARCHAR", "relu, topk, batchtopk, jumprelu, gated, ..."),
            _column("n_latents", "BIGINT", "latents"),
            _column("d_in", "INTEGER", "width of the rows that it encodes"),
            _column("d_out", "INTEGER", "width of what it decodes to"),
            _column("k", "DOUBLE", "latents per row, of activations that fix it; null otherwise"),
            _column("hook_point", "VARCHAR", "where its rows come from"),
            _column("hook_point_out", "VARCHAR", "where a transcoder's output belongs; null of an sae"),
            _column("source", "VARCHAR", "format that it was imported from, or how it was trained"),
            _column("is_complete", "BOOLEAN", "its weights are stored"),
            _NBYTES,
            _CREATED,
            _column(
                "fingerprint", "VARCHAR", "SHA-256 of the configuration, which holds that of the weights"
            ),
            _column("config", "VARCHAR", "the configuration as JSON"),
        ),
    ),
    "encodings": View(
        "runs encoded with dictionaries: what codes, postings, pooled_codes and latents are of, and how complete they are",
        (
            _DICTIONARY,
            _ENCODED_RUN,
            _column("hook_point", "VARCHAR", "place whose activations were encoded"),
            _column("tokenization", "VARCHAR", "tokenization that the rows belong to"),
            _column("value_dtype", "VARCHAR", "number type of the values: float16 or float32"),
            _column("n_latents", "BIGINT", "latents of the dictionary"),
            _column("n_rows", "BIGINT", "token rows encoded so far, those on which nothing fires included"),
            _column("n_codes", "BIGINT", "codes stored so far"),
            _column("is_complete", "BOOLEAN", "every stored row of the run is encoded"),
            _column("has_postings", "BOOLEAN", "postings and statistics of all latents are stored"),
            _column("nbytes", "BIGINT", "stored bytes of codes, pooled codes, postings and statistics"),
            _CREATED,
        ),
    ),
    "latents": View(
        "statistics of every latent of a dictionary on a run, exact over all its rows; those of all latents are there once "
        "encodings.has_postings",
        (
            _DICTIONARY,
            _ENCODED_RUN,
            _LATENT,
            _column("n_tokens", "BIGINT", "rows on which it fires"),
            _column("n_docs", "BIGINT", "documents in which it fires"),
            _column("density", "DOUBLE", "share of the rows on which it fires"),
            _column("doc_density", "DOUBLE", "share of the documents in which it fires"),
            _column("mean", "DOUBLE", "mean of its values where it fires; null of a dead latent"),
            _column("max", "DOUBLE", "largest value; null of a dead latent"),
            _column("sum", "DOUBLE", "sum of its values"),
            _column("max_row", "BIGINT", "first row with the largest value"),
            _column(
                "quantiles", "FLOAT[]", "0.5, 0.9, 0.95, 0.99 and 0.999 quantile of the values where it fires"
            ),
            _column(
                "hist_bins",
                "INTEGER[]",
                "histogram: float16 bits of the values without their lowest 6, ascending",
            ),
            _column("hist_counts", "BIGINT[]", "histogram: values in each bin"),
            _column("top_tokens_by_count", TOP_TOKENS, "tokens on which it fires most often"),
            _column("top_tokens_by_mean", TOP_TOKENS, "tokens on which it fires most strongly"),
            _column("single_token_score", "DOUBLE", "share of its firing that is on its most frequent token"),
            _column("decoder_norm", "DOUBLE", "length of its decoder direction"),
            _column("is_dead", "BOOLEAN", "it fires on no row"),
            _column("is_ultra_dense", "BOOLEAN", "it fires on more than 10 % of the rows"),
            _column("promoted", LOGITS, "vocabulary that its decoder raises most; null without a model"),
            _column("suppressed", LOGITS, "vocabulary that its decoder lowers most; null without a model"),
        ),
    ),
    "codes": View(
        "codes: which latents fire on which rows, of every encoded run, the units encoded so far. Decoded for the query: "
        "conditions on dictionary, run, row and latent (=, IN, <, BETWEEN) are looked up instead of read through",
        _CODES,
    ),
    "postings": View(
        "the rows of codes of those runs whose postings are complete: conditions on latent are looked up",
        _CODES,
    ),
    "pooled_codes": View(
        "codes of whole documents, the latents of largest sum of each; documents that lie in units not encoded yet are not there",
        (
            _DICTIONARY,
            _ENCODED_RUN,
            _column("doc_id", "BIGINT", "number of the document in the run's corpus"),
            _LATENT,
            _column("max", "FLOAT", "the latent's largest value in the document"),
            _column(
                "mean", "DOUBLE", "its mean over all tokens pooled, those on which it does not fire included"
            ),
            _column("sum", "DOUBLE", "sum of its values"),
            _column("count", "BIGINT", "tokens on which it fires"),
        ),
    ),
    "indexes": View(
        "indexes: what is indexed of each run's hook points, one row for every generation",
        (
            _column("index", "VARCHAR", "the index's name"),
            _column("run", "VARCHAR", "the run that it is of"),
            _column("hook_point", "VARCHAR", "where its vectors come from"),
            _column("of", "VARCHAR", "tokens: rows of the run; documents: pooled vectors"),
            _column("pooling", "VARCHAR", "which pooled vectors; null of tokens"),
            _column("purpose", "VARCHAR", "nearest (neighbours) or directions"),
            _column("kind", "VARCHAR", "flat, ivf_sq8, ivf_rabitq or scan_sq8"),
            _column("metric", "VARCHAR", "cosine, ip or l2"),
            _column(
                "transform", "VARCHAR", "steps applied to rows before they are compared, with commas between"
            ),
            _column("first_dims", "BIGINT", "number of first dimensions that are indexed; null for all"),
            _column("generation", "BIGINT", "number among the indexes of its hook point and purpose"),
            _column("state", "VARCHAR", "used, superseded (a newer one has its rows) or unfinished"),
            _column("n_rows", "BIGINT", "rows (documents) that it covers"),
            _column("n_indexed", "BIGINT", "vectors in it"),
            _column("n_shards", "BIGINT", "files it is cut into"),
            _column("coverage", "DOUBLE", "share of the run's stored rows (documents) that it covers"),
            _column("recall", "DOUBLE", "share of the 10 nearest found at the largest effort measured"),
            _column("effort_95", "BIGINT", "least effort that finds 95 % of them; null where none does"),
            _NBYTES,
            _CREATED,
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

"""SQL over documents and tokens: import, tokenize (no model is needed for that), then SELECT; joins are the point."""

import inspect
import tempfile
import textwrap
from pathlib import Path

import actstore
from actstore import ingest
from actstore.ingest.demo.train import make_tokenizer

DOCUMENTS = [
    {"name": name, "text": inspect.getsource(function), "is_public": not name.startswith("_")}
    for name, function in inspect.getmembers(textwrap.TextWrapper, inspect.isfunction)
]

QUERIES = {
    "What can be asked": "SHOW TABLES",
    "What the columns of tokens mean": """
        SELECT column_name, column_type, meaning FROM view_columns WHERE view = 'tokens'""",
    "Longest functions": """
        SELECT d.name, d.is_public, count(*) AS n_tokens, max(t."window") + 1 AS n_windows
        FROM tokens t JOIN documents d USING (corpus, doc_id)
        GROUP BY ALL ORDER BY n_tokens DESC LIMIT 5""",
    "What stands before a token most often": """
        WITH pairs AS (
            SELECT token, lag(token) OVER (PARTITION BY corpus, doc_id ORDER BY position) AS before FROM tokens)
        SELECT before, count(*) AS n FROM pairs WHERE token = $token GROUP BY before ORDER BY n DESC, before LIMIT 5""",
}


def main(folder: Path) -> None:
    tokenizer = make_tokenizer([d["text"] for d in DOCUMENTS], vocab_size=400, window=64)
    tokenizer.save_pretrained(folder / "tokenizer")
    store = actstore.open(folder / "my.store", create=True)
    ingest.import_corpus(store, "textwrap", DOCUMENTS, id_column="name", columns=["name", "is_public"])
    ingest.tokenize_corpus(store, "textwrap", str(folder / "tokenizer"), window=64)

    for title, query in QUERIES.items():
        # Values go in as parameters, never into the text of a query.
        answer = store.sql(query, {"token": " self"} if "$token" in query else None)
        print(f"\n{title}\n{answer}")

    # An answer is an Arrow table: .to_pandas(), .to_polars(), .to_dicts(), .to_json().
    rows = store.sql("SELECT DISTINCT token, length(token) AS n FROM tokens ORDER BY n DESC, token LIMIT 3")
    print("\nlongest tokens:", rows.to_dicts(), "\nanswered from version", rows.meta.version)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))

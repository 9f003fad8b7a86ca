"""How does data come into a store? Corpora, tokenizations, and the activations of models over them.

    from actstore import ingest
    ingest.import_corpus(store, "news", "news.jsonl")
    ingest.run(store, ingest.IngestConfig(corpus="news", model="gpt2", hook_points=["layers.*.resid_post"], run="gpt2@news"))

Needs the extra `ingest` (torch, transformers, Ray), which are imported only when something uses them.
"""

from .config import IngestConfig
from .foreign import ImportRunReport, import_run
from .importing import ImportReport, import_corpus
from .job import IngestReport
from .job import run_ingest as run
from .sources import SourceList
from .tokenizing import TokenizeReport, tokenize_corpus

__all__ = [
    "ImportReport",
    "ImportRunReport",
    "IngestConfig",
    "IngestReport",
    "SourceList",
    "TokenizeReport",
    "import_corpus",
    "import_run",
    "run",
    "tokenize_corpus",
]

"""How does data come into a store? Corpora, tokenizations, and the activations of models over them.

    from actstore import ingest
    ingest.import_corpus(store, "news", "news.jsonl")
    ingest.run(store, ingest.IngestConfig(corpus="news", model="gpt2", hook_points=["layers.*.resid_post"], run="gpt2@news"))

And sparse dictionaries over the activations: trained or imported, then the run encoded with them.

    ingest.train_sae(store, "gpt2@news", "layers.6.resid_post", ingest.SaeTrainConfig(name="sae"))
    ingest.encode(store, "sae", "gpt2@news")

And indexes for nearest neighbours and directions, which need the extra `cpu` or `gpu` (FAISS):

    ingest.build_index(store, "gpt2@news", "layers.6.resid_post")

Needs the extra `ingest` (torch, transformers, Ray), which are imported only when something uses them.
"""

from .config import IngestConfig
from .dictionaries import ImportDictionaryReport, import_dictionary
from .encoding.encode import EncodeReport, encode
from .encoding.postings_job import build_postings
from .foreign import ImportRunReport, import_run
from .importing import ImportReport, import_corpus
from .indexing import IndexReport, build_index
from .job import IngestReport
from .job import run_ingest as run
from .sources import SourceList
from .tokenizing import TokenizeReport, tokenize_corpus
from .training import SaeTrainConfig, SaeTrainReport, train_sae

__all__ = [
    "EncodeReport",
    "ImportDictionaryReport",
    "ImportReport",
    "ImportRunReport",
    "IndexReport",
    "IngestConfig",
    "IngestReport",
    "SaeTrainConfig",
    "SaeTrainReport",
    "SourceList",
    "TokenizeReport",
    "build_index",
    "build_postings",
    "encode",
    "import_corpus",
    "import_dictionary",
    "import_run",
    "run",
    "tokenize_corpus",
    "train_sae",
]

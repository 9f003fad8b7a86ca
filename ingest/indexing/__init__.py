"""How does a hook point get an index? Kinds of FAISS indexes, the job that builds them, and how their recall is measured."""

from .job import IndexReport, build_index

__all__ = ["IndexReport", "build_index"]

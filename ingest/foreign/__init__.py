"""How do activations that another program harvested become a run of the store?

`import_run` reads three formats: folders of SAELens's `CacheActivationsRunner`, folders of vLLM's hidden-state connectors
and of `speculators`, and plain arrays with a table of tokens.
"""

from .job import ImportRunReport, import_run

__all__ = ["ImportRunReport", "import_run"]

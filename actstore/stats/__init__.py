"""What is known about a hook point's activations without reading them again?

Per unit and hook point: row counts, mean and squared deviations per dimension, extremes, sketches of values and of the rows'
L2 norms, the rows of largest norm, and dimensions of large values. All parts merge exactly (moments up to float64
rounding, sketches within their stated error), so a run's statistics are the fold of its units' (FORMAT.md, section 7.3).
"""

from actstore.stats.blocks import RowTokens, block_stats, read_stats
from actstore.stats.outliers import OUTLIER_MAGNITUDE
from actstore.stats.sinks import SINK_NORM_RATIO, PositionNorms, RowNorms, SinkRow, Sinks
from actstore.stats.sketch import NORM_GAMMA, ValueSketch
from actstore.stats.table import STATS_SCHEMA, is_stats_key, run_stats, stats_from_table, stats_to_table
from actstore.stats.values import HookPointStats, empty_stats, merge_stats

__all__ = [
    "NORM_GAMMA",
    "OUTLIER_MAGNITUDE",
    "SINK_NORM_RATIO",
    "STATS_SCHEMA",
    "HookPointStats",
    "PositionNorms",
    "RowNorms",
    "RowTokens",
    "SinkRow",
    "Sinks",
    "ValueSketch",
    "block_stats",
    "empty_stats",
    "is_stats_key",
    "merge_stats",
    "read_stats",
    "run_stats",
    "stats_from_table",
    "stats_to_table",
]

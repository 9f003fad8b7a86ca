"""Does every index cover live units of its run, each once, and count their rows? (FORMAT.md, invariant I8)"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator

from actstore.log.state import State
from actstore.log.values import Collection


def broken_indexes(state: State) -> Iterator[tuple[str, str]]:
    """Yield the folder of each index that breaks I8, and what is wrong with it."""
    for (kind, id), collection in sorted(state.collections.items(), key=lambda item: item[0]):
        if kind == "index":
            problem = _problem(state, collection)
            if problem is not None:
                yield f"indexes/{id}", problem


def _problem(state: State, index: Collection) -> str | None:
    config = index.config
    try:
        run = state.collections.get(("run", str(config["run"])))
        shards = [[(int(a), int(b)) for a, b in ranges] for ranges in config["shards"]]
        of_tokens = config["of"] == "tokens"
        fingerprint = config["run_fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        return f"its configuration does not describe an index ({error!r})"
    if run is None or run.fingerprint != fingerprint:
        return f"it is of run {config['run']!r}, which the store does not have with that configuration"
    ranges = sorted(pair for ranges in shards for pair in ranges)
    if any(not 0 <= a < b for a, b in ranges) or any(
        before[1] > after[0] for before, after in itertools.pairwise(ranges)
    ):
        return "its shards have ranges in common, or empty ones"
    extra = [unit for unit in index.units if unit > len(shards)]
    if extra:
        return f"it has a unit {extra[0]}, and {len(shards)} shards"
    live = sorted(run.units)
    rows_before = list(itertools.accumulate((run.units[u].rows for u in live), initial=0))
    for number, unit in index.units.items():
        if number == 0 or not of_tokens:
            continue
        missing, rows = 0, 0
        for a, b in shards[number - 1]:
            low, high = bisect_left(live, a), bisect_left(live, b)
            missing += b - a - (high - low)
            rows += rows_before[high] - rows_before[low]
        if missing or rows != unit.rows:
            return (
                f"shard {number - 1} covers {missing} units that are not live, and has {unit.rows} rows where the others "
                f"have {rows}"
            )
    return None

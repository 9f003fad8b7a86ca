"""Does a dictionary belong to a run? Only if the run has its hook point, as wide as it needs."""

import re
from collections.abc import Mapping

from actstore.dictionary import Dictionary
from actstore.dictionary_data import DictionaryData
from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import describe_hook_points
from actstore.run import Run

_RESIDUAL = re.compile(r"layers\.(\d+)\.(resid_pre|resid_post)")


def check_fits(dictionary: Dictionary | DictionaryData, run: Run) -> str:
    """Return the hook point of `run` whose rows the dictionary encodes.

    That is the dictionary's own; or, where the run has only its other name, the residual stream between two layers, which is
    `resid_post` of one and `resid_pre` of the next.

    Raises:
        InvalidInputError: the run has no such hook point, or one of another width.
    """
    widths = {h["name"]: h["d_model"] for h in run.collection.config["hook_points"]}
    return fitting_hook_point(dictionary, f"run {run.id!r}", widths)


def fitting_hook_point(dictionary: Dictionary | DictionaryData, run: str, widths: Mapping[str, int]) -> str:
    """Return the same for a run that need not exist: `run` is what messages call it, `widths` is by hook point.

    Raises:
        InvalidInputError: as `check_fits`.
    """
    what = f"dictionary {dictionary.name!r}" if isinstance(dictionary, Dictionary) else "the dictionary"
    spec = dictionary.spec
    found = next((name for name in _names(spec.hook_point) if name in widths), None)
    if found is None:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{what} encodes {spec.hook_point}, and {run} has {describe_hook_points(list(widths))}: name a run with "
            "that hook point, or import the dictionary with the right one (--hook-point)",
        )
    if widths[found] != spec.d_in:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{what} encodes rows of {spec.d_in} numbers, and {found} of {run} has {widths[found]}: it was made for "
            "another model",
        )
    return found


def _names(hook_point: str) -> list[str]:
    """Return the names under which a run may have the rows of a hook point.

    >>> _names("layers.4.resid_pre"), _names("embed")
    (['layers.4.resid_pre', 'layers.3.resid_post'], ['embed'])
    """
    residual = _RESIDUAL.fullmatch(hook_point)
    if residual is None:
        return [hook_point]
    layer = int(residual[1])
    if residual[2] == "resid_post":
        return [hook_point, f"layers.{layer + 1}.resid_pre"]
    return [hook_point, f"layers.{layer - 1}.resid_post"] if layer else [hook_point]

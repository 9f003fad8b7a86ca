"""What is a pattern over latents? Conditions on firing, joined by `&`, `|` and `~`.

    fires(latent("sae", 3)) & (fires(latent("sae", 9)) > 0.5) & ~fires(latent("sae", 4))

A pattern becomes a list of conjunctions (its disjunctive normal form): each names latents that must fire and latents that must
not. `~` is moved inwards to the latents first (De Morgan), so `~(a & b)` means `~a | ~b`.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from actstore.errors import ErrorKind, InvalidInputError
from actstore.targets import Latent, latent, parse_target

MAX_LEAVES = 32
"""Most conditions in one pattern."""

MAX_CONJUNCTIONS = 64
"""Most alternatives that a pattern may stand for once written out."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A condition on which latents fire near each other; joined by `&`, `|`, `~`."""

    def __and__(self, other: "Pattern | Latent") -> "Pattern":
        return AllOf((self, _check(other)))

    def __or__(self, other: "Pattern | Latent") -> "Pattern":
        return AnyOf((self, _check(other)))

    def __invert__(self) -> "Pattern":
        return Absent(self)

    def __bool__(self) -> NoReturn:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "a pattern is neither true nor false: join patterns with & | ~ instead of and, or, not, and a second bound with "
            "fires(latent, above=..., below=...)",
        )


@dataclass(frozen=True, slots=True)
class Fires(Pattern):
    """A latent's value on a token lies above a bound."""

    latent: Latent
    above: float = 0.0
    """The value must be larger than this; stored codes are all above 0."""

    below: float = math.inf
    """The value must be smaller than this."""

    def __gt__(self, bound: float) -> "Fires":
        return fires(self.latent, bound, self.below)

    def __lt__(self, bound: float) -> "Fires":
        return fires(self.latent, self.above, bound)

    @property
    def label(self) -> str:
        """The condition as answers name it."""
        low = f" > {_number(self.above)}" if self.above > 0 else ""
        high = f" < {_number(self.below)}" if self.below < math.inf else ""
        return f"{self.latent.label}{low}{high}"


@dataclass(frozen=True, slots=True)
class AllOf(Pattern):
    """Every part holds."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class AnyOf(Pattern):
    """At least one part holds."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Absent(Pattern):
    """The part does not hold."""

    part: Pattern

    def __invert__(self) -> Pattern:
        return self.part


@dataclass(frozen=True, slots=True)
class Conjunction:
    """Latents that fire near each other while others stay silent."""

    positive: tuple[Fires, ...]
    """At least one, in the order of the pattern; the first is the anchor: its row is the answer."""

    negative: tuple[Fires, ...]


def fires(target: Latent | str, above: float = 0.0, below: float = math.inf) -> Fires:
    """Return the condition that a latent's value lies strictly between two bounds.

    Args:
        target: `actstore.latent(...)`, or its text `latent:DICTIONARY:INDEX`.
        above: Lower bound, 0 or more; 0 means that it fires at all.
        below: Upper bound.

    Raises:
        InvalidInputError: no latent, or bounds between which nothing lies.

    >>> (fires("latent:sae:3") > 0.5).label
    'latent:sae:3 > 0.5'
    """
    found = parse_target(target) if isinstance(target, str) else target
    if not isinstance(found, Latent):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"fires() takes actstore.latent(dictionary, index), got {target!r:.80}: patterns are over latents",
        )
    low, high = _check_bound(above), _check_bound(below)
    if not low < high:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"nothing lies above {low:g} and below {high:g}: swap or widen the bounds"
        )
    return Fires(found, low, high)


def parse_pattern(text: str, dictionary: str) -> Pattern:
    """Return the pattern that a command line names.

    Args:
        text: Latent numbers joined by `&`, `|`, `~` and brackets, each with `> BOUND` or `< BOUND` after it if wanted;
            `latent:DICTIONARY:INDEX` names a latent of another dictionary.
        dictionary: Dictionary of the plain numbers.

    Raises:
        InvalidInputError: the text is no pattern; the message says where it ends to be one.

    >>> [c.positive[0].label for c in conjunctions(parse_pattern("3 > 0.5 & ~4 | latent:b:9", "sae"))]
    ['latent:sae:3 > 0.5', 'latent:b:9']
    """
    reader = _Reader(text, dictionary)
    pattern = reader.either()
    reader.end()
    return pattern


def conjunctions(pattern: Pattern | Latent) -> list[Conjunction]:
    """Return the alternatives of a pattern, in its order, each without repeats; impossible ones are left out.

    Raises:
        InvalidInputError: no pattern, one too large, or an alternative in which no latent has to fire.
    """
    found = _check(pattern)
    n_leaves = sum(1 for _ in leaves(found))
    if n_leaves > MAX_LEAVES:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE, f"the pattern has {n_leaves} conditions, at most {MAX_LEAVES} are accepted"
        )
    written = []
    for terms in _written_out(found, wanted=True):
        positive = tuple(dict.fromkeys(leaf for leaf, wanted in terms if wanted))
        negative = tuple(dict.fromkeys(leaf for leaf, wanted in terms if not wanted))
        if not positive:
            silent = ", ".join(leaf.label for leaf in negative)
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"the pattern also holds where only latents are silent ({silent}), which is almost everywhere: "
                "join every ~ by & with a latent that must fire",
            )
        if not set(positive) & set(negative):
            written.append(Conjunction(positive, negative))
    return list(dict.fromkeys(written))


def leaves(pattern: Pattern) -> Iterator[Fires]:
    """Yield every condition of a pattern, in its order."""
    # A loop, not recursion: thousands of latents joined by `|` are as many levels, and are to be refused by their number.
    stack = [pattern]
    while stack:
        item = stack.pop()
        if isinstance(item, Fires):
            yield item
        elif isinstance(item, (AllOf, AnyOf)):
            stack.extend(reversed(item.parts))
        elif isinstance(item, Absent):
            stack.append(item.part)


def describe(pattern: Pattern | Latent) -> str:
    """Return a pattern as text, for the echo of a question.

    >>> describe(fires("latent:s:1") & ~(fires("latent:s:2") | fires("latent:s:3")))
    'latent:s:1 & ~(latent:s:2 | latent:s:3)'
    """
    found = _check(pattern)
    if isinstance(found, Fires):
        return found.label
    if isinstance(found, Absent):
        inner = describe(found.part)
        return f"~({inner})" if isinstance(found.part, (AllOf, AnyOf)) or " " in inner else f"~{inner}"
    assert isinstance(found, (AllOf, AnyOf))
    mark = " & " if isinstance(found, AllOf) else " | "
    return mark.join(
        f"({describe(part)})" if isinstance(part, AnyOf) and mark == " & " else describe(part)
        for part in found.parts
    )


_Terms = tuple[tuple[Fires, bool], ...]


def _written_out(pattern: Pattern, *, wanted: bool) -> list[_Terms]:
    """Return the disjunctive normal form: alternatives of (condition, whether it must hold)."""
    if isinstance(pattern, Fires):
        return [((pattern, wanted),)]
    if isinstance(pattern, Absent):
        return _written_out(pattern.part, wanted=not wanted)
    assert isinstance(pattern, (AllOf, AnyOf))
    parts = [_written_out(part, wanted=wanted) for part in pattern.parts]
    if isinstance(pattern, AnyOf) == wanted:
        written = [terms for part in parts for terms in part]
    else:
        if math.prod(map(len, parts)) > MAX_CONJUNCTIONS:
            _refuse_size()
        written = [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]
    if len(written) > MAX_CONJUNCTIONS:
        _refuse_size()
    return written


def _refuse_size() -> NoReturn:
    raise InvalidInputError(
        ErrorKind.TOO_LARGE,
        f"the pattern stands for more than {MAX_CONJUNCTIONS} alternatives: ask for some of them at a time",
    )


def _check(value: object) -> Pattern:
    if isinstance(value, Latent):
        return Fires(value)
    if isinstance(value, Pattern):
        return value
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT,
        f"a pattern is made of fires(latent(dictionary, index)) with & | ~, got {value!r:.80}",
    )


def _check_bound(bound: float) -> float:
    try:
        value = math.nan if isinstance(bound, (bool, str)) else float(bound)
    except (TypeError, ValueError):
        value = math.nan
    if not value >= 0:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"a bound on a latent's value is a number of 0 or more, got {bound!r:.80}"
        )
    return value


def _number(bound: float) -> str:
    """Return a bound as text that is read back as the same number."""
    return repr(bound).removesuffix(".0")


_TOKEN = re.compile(
    r"\s*(?:(?P<mark>[&|~()])|(?P<latent>latent:[^\s&|~()<>]+|\d+(?![\d.]))|(?P<compare>[<>]))"
)
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)")


class _Reader:
    """Reads a pattern's text by recursive descent: `|` binds loosest, then `&`, then `~`."""

    def __init__(self, text: str, dictionary: str) -> None:
        if not isinstance(text, str) or len(text) > 4096:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"a pattern is a text like '3 & ~(4 | 5)', got {text!r:.80}"
            )
        self._text = text
        self._dictionary = dictionary
        self._at = 0
        self._depth = 0

    def either(self) -> Pattern:
        found = self._both()
        while self._take("|"):
            found = found | self._both()
        return found

    def end(self) -> None:
        if self._text[self._at :].strip():
            self._refuse("& or |, or its end")

    def _both(self) -> Pattern:
        found = self._one()
        while self._take("&"):
            found = found & self._one()
        return found

    def _one(self) -> Pattern:
        self._depth += 1
        if self._depth > 4 * MAX_LEAVES:
            self._refuse("fewer brackets")
        found: Pattern
        if self._take("~"):
            found = ~self._one()
        elif self._take("("):
            found = self.either()
            if not self._take(")"):
                self._refuse(")")
        else:
            found = self._leaf()
        self._depth -= 1
        return found

    def _leaf(self) -> Fires:
        match = _TOKEN.match(self._text, self._at)
        if match is None or match["latent"] is None:
            self._refuse("a latent's number")
        self._at = match.end()
        name = match["latent"]
        if name.isdigit():
            # Numbers too long for an index are refused where targets are read.
            name = f"latent:{self._dictionary}:{name}"
            parse_target(name)
            leaf = fires(latent(self._dictionary, int(name.rpartition(":")[2])))
        else:
            leaf = fires(name)
        above, below = leaf.above, leaf.below
        while (compare := self._compare()) is not None:
            sign, bound = compare
            above, below = (bound, below) if sign == ">" else (above, bound)
        return fires(leaf.latent, above, below)

    def _compare(self) -> tuple[str, float] | None:
        match = _TOKEN.match(self._text, self._at)
        if match is None or match["compare"] is None:
            return None
        self._at = match.end()
        number = _NUMBER.match(self._text, self._at)
        if number is None:
            self._refuse("a number")
        self._at = number.end()
        return match["compare"], float(number[1])

    def _take(self, mark: str) -> bool:
        match = _TOKEN.match(self._text, self._at)
        if match is None or match["mark"] != mark:
            return False
        self._at = match.end()
        return True

    def _refuse(self, wanted: str) -> NoReturn:
        rest = self._text[self._at :].strip()
        found = f"found {rest[:20]!r}" if rest else "it ended"
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"pattern {self._text!r:.200} cannot be read: at its character {self._at} {wanted} was expected, {found}",
        )

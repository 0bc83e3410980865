"""Intervals of numbers, written as in mathematics: ``[0, inf)``, ``(0, 1]``."""

from __future__ import annotations

import math
import re

_BOUND = r"(-?(?:inf|\d+(?:\.\d+)?))"
_INTERVAL = re.compile(rf"([\[(]){_BOUND}, {_BOUND}([\])])")


class Interval:
    """The numbers between two bounds, in the usual notation: a square bracket takes its bound in, a round one does not.

    >>> [number in Interval("(0, 1]") for number in (0, 0.5, 1)]
    [False, True, True]
    """

    def __init__(self, notation: str) -> None:
        parts = _INTERVAL.fullmatch(notation)
        if parts is None or float(parts[2]) >= float(parts[3]):
            raise ValueError(f"an interval is written like '[0, inf)' or '(0, 1]', got {notation!r}")
        self.notation = notation
        self.opening, self.low, self.high, self.closing = parts.groups()

    def __contains__(self, number: float) -> bool:
        above = float(self.low) <= number if self.opening == "[" else float(self.low) < number
        return above and (number <= float(self.high) if self.closing == "]" else number < float(self.high))

    def demand(self, number: float) -> str:
        """What is asked of a ``number`` that lies outside.

        >>> Interval("[1, inf)").demand(0), Interval("(0, 1)").demand(1)
        ('must be at least 1', 'must lie in (0, 1)')
        """
        if self.notation == "(-inf, inf)":
            return "must be finite"
        if self.high != "inf":
            return f"must lie in {self.notation}"
        finite = "" if self.closing == "]" or number < math.inf else " and finite"
        return f"must be {'at least' if self.opening == '[' else 'above'} {self.low}{finite}"

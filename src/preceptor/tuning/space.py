"""What is searched: ranges and choices for keys of a configuration, as they are typed on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from preceptor.config import schema
from preceptor.errors import ConfigError, did_you_mean, short_repr

HOW = "give KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B,C"


class Dimension(NamedTuple):
    """The values that one key may take: a range, or ``choices`` where there are some."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # even in the logarithm, as learning rates are
    whole: bool = False
    choices: tuple[str, ...] = ()

    def corners(self) -> tuple[Any, ...]:
        """Values whose being allowed speaks for all between them."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def assignment(self, value: Any) -> str:
        """``key=value`` as ``--set`` takes it.

        >>> Dimension("update.learning_rate", 1e-6, 1e-3, log=True).assignment(0.00003)
        'update.learning_rate=3e-05'
        """
        return f"{self.key}={value}"

    def text(self) -> str:
        """The dimension as it is typed.

        >>> Dimension("update.steps", 10, 90, whole=True).text()
        'update.steps=10:90'
        """
        values = ",".join(self.choices) or ":".join(str(corner) for corner in self.corners())
        return f"{self.key}={values}{':log' if self.log else ''}"


def parsed_search(words: Sequence[str], cls: Any) -> tuple[Dimension, ...]:
    """The dimensions that ``words`` name, for a configuration of class ``cls``.

    Raises :class:`ConfigError` with every fault: an unknown key with the nearest one, a range that is none.
    """
    found: list[Dimension] = []
    faults: list[str] = []
    for word in words:
        try:
            found.append(_dimension(word, cls))
        except ConfigError as error:
            faults += error.faults
    keys = [dimension.key for dimension in found]
    faults += [f"--search names {key} twice" for key in sorted({key for key in keys if keys.count(key) > 1})]
    if not words:
        faults.append(f"a search needs what to vary; {HOW} with --search")
    if faults:
        raise ConfigError(*faults)
    return tuple(found)


def _dimension(word: str, cls: Any) -> Dimension:
    key, equals, values = word.partition("=")
    keys = schema(cls)
    if key == "seed":
        raise ConfigError("--search cannot range over the seed: the luckiest seed is no better configuration")
    if key not in keys:
        raise ConfigError(f"--search: there is no key {short_repr(key)}{did_you_mean(key[:100], keys)}")
    if not (equals and values):
        raise ConfigError(f"--search {short_repr(word)}: {HOW}")
    if ":" not in values:
        # Each once, in the order typed.
        choices = tuple(dict.fromkeys(part.strip() for part in values.split(",") if part.strip()))
        if len(choices) < 2:
            raise ConfigError(f"--search {short_repr(word)} leaves nothing to choose; {HOW}")
        return Dimension(key, choices=choices)
    kind = keys[key].annotation
    if kind not in (int, float):
        raise ConfigError(f"--search: {key} is no number, so that it has no range; name its choices: {key}=A,B")
    low_text, high_text, *rest = values.split(":")
    low, high = _number(low_text, word), _number(high_text, word)
    if rest not in ([], ["log"]):
        raise ConfigError(f"--search {short_repr(word)}: only `log` may follow a range{did_you_mean(rest[0], ['log'])}")
    if not low < high:
        raise ConfigError(f"--search {short_repr(word)}: the lower bound must be below the upper one")
    if rest and low <= 0:
        raise ConfigError(f"--search {short_repr(word)}: a logarithmic range must begin above 0")
    if kind is int and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"--search {short_repr(word)}: {key} is a whole number")
    return Dimension(key, low, high, bool(rest), kind is int)


def _number(text: str, word: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"--search {short_repr(word)}: {short_repr(text)} is no number; {HOW}")
    return number

"""Reading: a language model writes queries, and attention over the remaining pairs chooses what is read next."""

from __future__ import annotations

from preceptor.systems.base import System, lazy
from preceptor.systems.reading.config import CHOICES, FLAGS, INPUTS, ReadingConfig

SYSTEM = System(
    name="reading",
    summary="a language model learns in which order to read an article",
    Config=ReadingConfig,
    streams=(
        "article",
        "query",
        "selection",
        "reference",
        "shuffle",
        "calibration_query",
        "calibration_selection",
        "evaluation_query",
        "evaluation_selection",
        "evaluation_orders",
    ),
    train=lazy("preceptor.systems.reading.loop:train"),
    result=lazy("preceptor.systems.reading.evaluate:result"),
    sections=lazy("preceptor.systems.reading.report:sections"),
    verify=lazy("preceptor.systems.reading.verify:verify"),
    flags=FLAGS,
    inputs=INPUTS,
    choices=CHOICES,
    extendable=("update.steps",),
    distributed=True,
)

"""What an arm is worth: paired comparison, intervals over seeds and items, and a verdict in words. No I/O."""

from __future__ import annotations

from preceptor.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    crossed_p_value,
    interquartile_mean,
    mean,
    paired_bootstrap,
    probability_of_improvement,
)
from preceptor.evaluation.summary import (
    Comparison,
    Estimate,
    Gap,
    QueryText,
    Record,
    compare,
    gap_closed,
    percentile_among,
    query_text,
    summarise,
)
from preceptor.evaluation.verdict import claims

__all__ = [
    "Comparison",
    "Estimate",
    "Gap",
    "Interval",
    "QueryText",
    "Record",
    "bootstrap_interval",
    "claims",
    "compare",
    "crossed_p_value",
    "gap_closed",
    "interquartile_mean",
    "mean",
    "paired_bootstrap",
    "percentile_among",
    "probability_of_improvement",
    "query_text",
    "summarise",
]

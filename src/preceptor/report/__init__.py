"""What a run shows: figures, a terminal table and a self-contained page, all made from the run folder alone."""

from __future__ import annotations

from preceptor.report.page import build_report
from preceptor.report.table import arms_tables

__all__ = ["arms_tables", "build_report"]

"""What the page shows of a curriculum run: the curves of every method, and what was measured and decided."""

from __future__ import annotations

from preceptor.report.decisions import decisions_section
from preceptor.report.run_folder import RunFolder
from preceptor.report.sections import GENERAL_LINES, Section


def sections(run: RunFolder) -> list[Section]:
    """The curves and the decisions; what ``result.json`` declares is drawn before them."""
    return [Section("Training", GENERAL_LINES), *decisions_section(run)]

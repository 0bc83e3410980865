"""What the page shows of a curriculum run: the curves of every method, and what was measured and decided."""

from __future__ import annotations

from preceptor.report.decisions import decisions_section
from preceptor.report.run_folder import RunFolder
from preceptor.report.sections import GENERAL_LINES, Lines, Section
from preceptor.systems.curriculum.kinds import kind_of

TEACHER_LEAD = (
    "Each update of the teacher trains students on some sets of tasks; beside it stands the same teacher paid with the "
    "rewards of other students. Sets differ in difficulty, and the curves rise and fall with them; the gap counts."
)
TEACHER_LINES = (
    Lines(
        "Success of its students, on the way",
        "share of answers",
        {"learned.success": "learned", "shuffled.success": "shuffled rewards"},
        limits=(0.0, 1.0),
    ),
    Lines(
        "Entropy of the weights, over its maximum",
        "share",
        {"learned.entropy": "learned", "shuffled.entropy": "shuffled rewards"},
        limits=(0.0, 1.0),
    ),
    Lines("KL of an update", "nats per draw", {"learned.kl": "learned", "shuffled.kl": "shuffled rewards"}),
)


def sections(run: RunFolder) -> list[Section]:
    """The curves and the decisions; what ``result.json`` declares is drawn before them."""
    config = (run.result or {}).get("config") or run.manifest.get("config") or {}
    if kind_of(config) == "teacher":
        return [Section("The teacher in training", TEACHER_LINES, lead=TEACHER_LEAD), *decisions_section(run)]
    return [Section("Training", GENERAL_LINES), *decisions_section(run)]

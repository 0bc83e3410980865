"""What a replay compares: a recorded reward and the same reward computed again."""

from __future__ import annotations

from typing import NamedTuple


class Replayed(NamedTuple):
    """One recorded reward beside the same one recomputed from the recorded decisions alone."""

    where: str  # such as "step 3, episode 17"
    recorded: float
    recomputed: float

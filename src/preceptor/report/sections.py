"""What a system shows on its page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A titled part of the page; what it holds is still to come."""

    title: str

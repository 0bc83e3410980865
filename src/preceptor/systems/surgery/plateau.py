"""When learning has stopped paying: the slope of the held-out loss over the last measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PlateauWatch:
    """Says at which step the loss first fell more slowly than a threshold.

    The slope is that of the least-squares line through the last ``window`` measurements.

    Args:
        window: measurements, at least 2.
        slope: nats per 100 steps; a plateau falls more slowly.

    Attributes:
        step: where the plateau was found, or None.

    >>> watch = PlateauWatch(window=2, slope=0.1)
    >>> for step, loss in ((100, 3.0), (200, 2.0), (300, 1.95)):
    ...     _ = watch.measure(step, loss)
    >>> watch.step  # from 2.0 to 1.95 is 0.05 in 100 steps
    300
    """

    def __init__(self, *, window: int, slope: float) -> None:
        self._window = window
        self._slope = slope
        self._points: list[tuple[int, float]] = []
        self.step: int | None = None

    def measure(self, step: int, loss: float) -> bool:
        """Take in a measurement; whether it is the one that shows the plateau."""
        self._points = [*self._points, (step, loss)][-self._window :]
        if self.step is not None or len(self._points) < self._window or 100 * _slope(self._points) < -self._slope:
            return False
        self.step = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"points": [list(point) for point in self._points], "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._points = [(int(step), float(loss)) for step, loss in state["points"]]
        self.step = state["step"]


def _slope(points: Sequence[tuple[int, float]]) -> float:
    mean_step = sum(step for step, _ in points) / len(points)
    mean_loss = sum(loss for _, loss in points) / len(points)
    covariance = sum((step - mean_step) * (loss - mean_loss) for step, loss in points)
    return covariance / sum((step - mean_step) ** 2 for step, _ in points)

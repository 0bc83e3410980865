"""Ctrl-C and SIGTERM: the first asks the run to finish its step and save, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from functools import partial
from types import FrameType
from typing import Any, Self

from preceptor.errors import Interrupted


class StopSignals:
    """While entered, turns the first SIGINT or SIGTERM into ``requested`` and the second into ``Interrupted``.

    The previous handlers are back when the block is left, and before ``Interrupted`` is raised, so that a third signal
    does what it always does. Outside the main thread, where Python allows no handlers, signals are left alone.

    Args:
        says_so: tell on stderr that the first signal has come; not in a run on many processes, each of which gets it.
    """

    def __init__(self, *, says_so: bool = True) -> None:
        self._says_so = says_so
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._lets_one_pass = False

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.signal_number is not None

    def let_launcher_pass(self) -> None:
        """After the block, the first SIGTERM does nothing, unless it has come already.

        A launcher that sees a process die ends all others with SIGTERM, while they have still to say what happened.
        """
        self._lets_one_pass = self.signal_number != signal.SIGTERM

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: the handler was not installed from Python and cannot be put back from here.
            handler = signal.SIG_DFL if handler is None else handler
            if number == signal.SIGTERM and self._lets_one_pass:
                signal.signal(number, partial(_put_back, handler))
            else:
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # The first signal only sets a number; the run looks at it between two steps.
        name = signal.Signals(number).name
        if self.requested:
            # Handlers go back first, so that a third Ctrl-C ends the process in any state.
            self._restore()
            raise Interrupted(f"stopped at once by {name}; what was saved is safe, resume continues from there", number)
        self.signal_number = number
        if not self._says_so:
            return
        # Not print: the signal may have come while print held its lock. A closed stderr is no reason to die here.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing this step and saving; once more stops at once\n".encode())


def _put_back(handler: Any, number: int, _: FrameType | None) -> None:
    signal.signal(number, handler)

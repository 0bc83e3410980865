"""Signals that wait while a method puts things in order, and come through as ever everywhere else.

A handler that raises, as Ctrl-C's does, may do so between any two bytecodes, also between the start of ``__exit__`` and
its first statement, so nothing that ``__exit__`` itself does can be in time. What can be: a handler that is in place
before, and that asks the interrupted stack whether a critical method is on it.
"""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any


class DeferredSignals:
    """While installed, a signal that lands in a critical method waits for ``deliver``; others pass straight through.

    Only signals with a Python handler are of interest: any other kills the process or does nothing to it. Outside the
    main thread, where Python runs no handlers, there is nothing to do.

    Args:
        critical: code of a method → whether the object, its ``self``, is still in disorder.
    """

    def __init__(self, critical: Mapping[CodeType, Callable[[Any], bool]]) -> None:
        self._critical = critical
        self.waiting: list[tuple[Callable[[int, FrameType | None], Any], int]] = []

    def install(self) -> None:
        """Stand before every Python handler that is set now."""
        if threading.current_thread() is threading.main_thread():
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler) and not isinstance(handler, _Deferring):
                    signal.signal(number, _Deferring(self, handler))

    def uninstall(self) -> None:
        """Put the handlers back that ``install`` found, but for those that somebody has replaced since.

        One that stays, because another signal's handler raised here, does no harm: it passes its signal on.
        """
        if threading.current_thread() is threading.main_thread():
            for number in sorted(signal.valid_signals(), reverse=True):  # Ctrl-C, the likeliest to raise, near the end
                handler = signal.getsignal(number)
                if isinstance(handler, _Deferring):
                    signal.signal(number, handler.previous)

    def deliver(self) -> None:
        """Call the handlers of the signals that waited; every one of them, also if one raises."""
        if self.waiting and threading.current_thread() is threading.main_thread():
            handler, number = self.waiting.pop(0)
            try:
                handler(number, inspect.currentframe())
            finally:
                self.deliver()

    def in_disorder(self, frame: FrameType | None) -> bool:
        """Whether a critical method of an object in disorder is on the stack that ends in ``frame``."""
        while frame is not None:
            is_in_disorder = self._critical.get(frame.f_code)
            if is_in_disorder is not None and is_in_disorder(frame.f_locals["self"]):
                return True
            frame = frame.f_back
        return False


@dataclass(frozen=True)
class _Deferring:
    """The handler that stands before ``previous``."""

    signals: DeferredSignals
    previous: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signals.in_disorder(frame):
            self.signals.waiting.append((self.previous, number))
        else:
            self.previous(number, frame)

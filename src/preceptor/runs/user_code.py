"""Calling what a user has written, a reward or an embedder: what goes wrong there is named with function and line."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from preceptor.errors import DataError, short_repr

GRACE_SECONDS = 10.0
"""How long code that catches the interruption too may go on before the process is ended; a run can be resumed."""


class _TimeUp(BaseException):
    """Not an ``Exception``, which user code is likely to catch."""


def call(what: str, function: Callable[..., Any], *arguments: Any, timeout: float = 0.0) -> Any:
    """``function(*arguments)``.

    Args:
        what: the thing in messages, such as ``the reward rewards.py:brevity``.
        function: the user's.
        arguments: positional ones.
        timeout: seconds; 0 sets no limit. It needs the main thread.

    Raises:
        DataError: it raised, left the process, or took longer; the user's line is named.
    """
    try:
        with _deadline(what, timeout):
            return function(*arguments)
    except KeyboardInterrupt:  # the person at the keyboard, and `Interrupted` with them
        raise
    except BaseException as error:  # whatever a user's code raises, SystemExit among it, is told as its own
        raise DataError(
            f"{what} {_what_happened(error, timeout)} ({_place(error, function)}); mend it and resume"
        ) from error


def call_for_numbers(
    what: str, function: Callable[..., Any], *arguments: Any, count: int, each: str, timeout: float = 0.0
) -> list[float]:
    """The ``count`` numbers that ``function(*arguments)`` returns, one for each ``each``.

    Raises:
        DataError: as :func:`call`, or it returned something else.
    """

    def numbers() -> list[float]:
        returned = function(*arguments)
        place = _definition(function)
        if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
            kind = f"{type(returned).__name__} {short_repr(returned)}" if returned is not None else "None"
            raise _Unfit(f"returned {kind}, not a list of {count} numbers ({place})")
        values = list(islice(returned, count + 1))  # a generator may never end
        if len(values) != count:
            told = "more" if len(values) > count else str(len(values))
            raise _Unfit(f"returned {told} numbers for {count} {each} ({place})")
        return [_number(value, index, place) for index, value in enumerate(values)]

    try:
        return list(call(what, numbers, timeout=timeout))
    except DataError as error:
        if isinstance(error.__cause__, _Unfit):
            raise DataError(f"{what} {error.__cause__}; mend it and resume") from error
        raise


class _Unfit(Exception):
    """What came back is not what was asked for; the message says what it is."""


def _number(value: Any, index: int, place: str) -> float:
    if not isinstance(value, str | bytes):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            return float(value)
    kind = "None" if value is None else f"{type(value).__name__} {short_repr(value)}"
    raise _Unfit(f"returned {kind} at place {index}, not a number ({place})")


def import_fault(error: BaseException) -> str:
    """Why a user's module could not be read, with the line where there is one."""
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno})"
    if isinstance(error, ImportError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_foreign(frame.filename)]
    where = f" (line {frames[-1].lineno})" if frames else ""
    return _what_happened(error, 0) + where


@contextlib.contextmanager
def _deadline(what: str, seconds: float) -> Iterator[None]:
    """Raises ``_TimeUp`` in the block after ``seconds``, again each second; ends the process where that is caught."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def alarm(_number: int, _frame: FrameType | None) -> None:
        raise _TimeUp

    def end() -> None:
        line = f"{what} took longer than {seconds:g} s and does not let itself be stopped; mend it and resume"
        os.write(2, f"\npreceptor: error: {line}\n".encode())
        os._exit(DataError.exit_code)

    watchdog = threading.Timer(seconds + GRACE_SECONDS, end)
    watchdog.daemon = True
    previous = signal.signal(signal.SIGALRM, alarm)
    watchdog.start()
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watchdog.cancel()
        signal.signal(signal.SIGALRM, previous)


def _what_happened(error: BaseException, timeout: float) -> str:
    if isinstance(error, _TimeUp):
        return f"took longer than {timeout:g} s"
    if isinstance(error, SystemExit):
        return f"left the process with {short_repr(error.code)}"
    said = " ".join(str(error).split())[:200]
    return f"raised {type(error).__name__}" + (f": {said}" if said else "")


def _place(error: BaseException, function: Callable[..., Any]) -> str:
    """The innermost line of the user's own code that the error came through: neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_foreign(frame.filename)]
    if not own:
        return _definition(function)
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name}"


def _definition(function: Callable[..., Any]) -> str:
    """Where the function begins."""
    code = getattr(inspect.unwrap(function), "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if code is None:
        return repr(function)[:80]
    return f"{Path(code.co_filename).name}, line {code.co_firstlineno}, in {code.co_name}"


def _is_foreign(filename: str) -> bool:
    """Preceptor's files, the standard library's, and those of installed packages."""
    if filename.startswith("<"):
        return True
    path = Path(filename).resolve()
    roots = (Path(__file__).parent, Path(os.__file__).parent, Path(sys.prefix) / "lib")
    return any(path.is_relative_to(root.resolve()) for root in roots)

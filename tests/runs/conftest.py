"""A disk that fails or dies at any chosen operation, and children that are forked after torch has been imported."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

OPERATIONS = ("open", "write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir")
KILLED = 77

_FSYNC = os.fsync

Hook = Callable[[int, str, tuple[Any, ...]], None]


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process wrote is in the page cache either way; waiting for the disk would only make this slow.

    That ``fsync`` is called, and when, is tested by the order of the calls.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def real_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _FSYNC)


class Disk:
    """Calls a hook before each operation on the disk; the hook may raise, write a part, or end the process."""

    def __init__(self) -> None:
        self.real = {name: getattr(os, name) for name in OPERATIONS}

    @contextlib.contextmanager
    def watched(self, hook: Hook) -> Iterator[None]:
        """Numbers the operations of the block from 0 and calls ``hook(index, name, arguments)`` before each."""
        index = -1

        def wrap(name: str) -> Callable[..., Any]:
            def operation(*args: Any, **kwargs: Any) -> Any:
                nonlocal index
                index += 1
                hook(index, name, args)
                return self.real[name](*args, **kwargs)

            return operation

        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, wrap(name))
            yield

    def operations_of(self, action: Callable[[], object]) -> list[tuple[str, tuple[Any, ...]]]:
        """What ``action`` does to the disk, in order."""
        seen: list[tuple[str, tuple[Any, ...]]] = []
        with self.watched(lambda _, name, args: seen.append((name, args))):
            action()
        return seen

    def dies_at(self, chosen: int, *, torn: bool) -> Hook:
        """Ends the process right before operation ``chosen``; ``torn``: after half of it, when it is a write."""

        def hook(index: int, name: str, args: tuple[Any, ...]) -> None:
            if index == chosen:
                if torn and name == "write":
                    self.real["write"](args[0], args[1][: len(args[1]) // 2])
                os._exit(KILLED)

        return hook

    def fails_at(self, chosen: int, number: int) -> Hook:
        """Raises ``OSError`` number ``number`` in place of operation ``chosen``, or after half of it in a write."""

        def hook(index: int, name: str, args: tuple[Any, ...]) -> None:
            if index == chosen:
                if name == "write":
                    self.real["write"](args[0], args[1][: len(args[1]) // 2])
                raise OSError(number, os.strerror(number))

        return hook


@pytest.fixture
def disk() -> Disk:
    return Disk()


class Child:
    """A forked process that runs ``action`` and exits with what it returns (``None`` is 0, an exception 99)."""

    def __init__(self, action: Callable[[], int | None]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads of torch that idle here
            self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                status = action() or 0
            except BaseException:  # noqa: BLE001 (a child must never fall into the parent's code)
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait(self) -> int:
        """The exit status; minus the signal's number when a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def fork() -> type[Child]:
    return Child

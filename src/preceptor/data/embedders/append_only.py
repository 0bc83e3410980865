"""Append-only files that survive a kill, a power cut and a second process.

Two rules make them safe. Whoever appends holds the file's exclusive lock and first cuts off what a killed writer left
behind, so records stay aligned. And an append returns only after ``fsync``: what a caller has been given is on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from preceptor.errors import LockedError, StorageError

LOCK_SECONDS = 1200.0  # longer than one purchase with all its retries, so that waiting this long means a stuck process


def file_lock(path: Path, *, timeout: float = LOCK_SECONDS) -> filelock.BaseFileLock:
    """The lock of ``path``: an OS lock on ``<path>.lock``, re-entrant, freed by the kernel when its holder dies."""
    return filelock.FileLock(path.with_name(path.name + ".lock"), timeout=timeout)


@contextmanager
def exclusive(lock: filelock.BaseFileLock) -> Iterator[None]:
    """Hold ``lock``; :class:`LockedError` after its timeout, :class:`StorageError` where no lock can be made."""
    path = Path(lock.lock_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise LockedError(
            f"{path} is held by another process for more than {lock.timeout:,.0f} s; end that process and try again"
        ) from None
    except OSError as error:
        raise StorageError(
            f"cannot lock {path}: {error.strerror or error}; check permissions and free space"
        ) from error
    try:
        yield
    finally:
        lock.release()


def append_durably(path: Path, data: bytes, *, at: int) -> None:
    """Cut ``path`` to ``at`` bytes, append ``data`` and force it to disk. The caller holds the lock.

    ``at`` is the end of the last whole record: anything behind it is a torn write that nobody has used. Raises
    :class:`StorageError` (disk full, permissions, device) and then leaves every record before ``at`` as it was.
    """
    try:
        created = not path.exists()
        with path.open("wb" if created else "r+b") as file:
            file.truncate(at)
            file.seek(at)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if created and os.name == "posix":  # a new name is durable only when its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise StorageError(
            f"cannot append {len(data):,} bytes to {path}: {error.strerror or error}; earlier records are intact, "
            "free some space or fix the permissions and run again"
        ) from error

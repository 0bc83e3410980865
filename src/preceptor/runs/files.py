"""Writing files so that a reader finds the old content or the new, never a part of either.

At the end, the lock by which a folder is one process's: dropped by the kernel however the process ends.

Everything goes through ``os`` calls that can fail one by one (in the tests they do); every failure becomes one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from preceptor.errors import LockedError, StorageError

TEMPORARY = ".tmp-"
"""Prefix of everything half-written; what carries it after a crash is rubbish."""


class Digest(NamedTuple):
    """Size in bytes and SHA-256 in hexadecimal of a file's content."""

    size: int
    sha256: str


@contextlib.contextmanager
def storage_errors(action: str, *, safe: str = "") -> Iterator[None]:
    """Turns an ``OSError`` in the block into a ``StorageError`` that names ``action`` and what is still ``safe``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"disk full: cannot {action}{place}; free some space and resume"
        else:
            reason = f"cannot {action}: {error.strerror or error}{place}"
        raise StorageError(f"{reason}; {safe}" if safe else reason) from error


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of ``data``; one ``os.write`` may take only a part (at most 2 GiB on Linux)."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Digest:
    """Writes ``chunks`` one after the other to ``path``, waits until they are on the disk, and returns their digest."""
    size, sha256 = 0, hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for chunk in chunks:
            write_all(descriptor, chunk)
            sha256.update(chunk)
            size += len(chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Digest(size, sha256.hexdigest())


def file_digest(path: Path) -> Digest:
    """The digest of a file as it is on the disk now."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(file.tell(), sha256)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Puts ``text`` in the place of ``path`` in one step; a failure leaves the old content.

    Raises ``StorageError``. One process at a time: the temporary name is fixed.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with storage_errors(f"write {path}"):
        try:
            write_file(temporary, [text.encode()])
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


# ---- one process per folder -----------------------------------------------------------------------------------------

LOCK_NAME = "run.lock"

_PATIENCE = 0.2
"""Seconds for which a lock is tried: an onlooker (``is_locked``) may hold it for an instant."""


class FolderLock:
    """Holds ``folder`` for this process until ``release`` or its death, ``kill -9`` included.

    Raises ``LockedError`` naming the holder when another process (or another lock in this one) has it. The file stays
    when the lock is released: removing it would let two processes lock two files of one name. It must be kept: the lock
    ends with the object.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_NAME
        # Released by whichever thread closes the run, so its state is not one thread's.
        self._lock = FileLock(path, timeout=_PATIENCE, poll_interval=0.01, thread_local=False)
        with storage_errors(f"lock {folder}"):
            os.stat(folder)  # raises where there is none: the lock would make it
            try:
                self._lock.acquire()
            except Timeout:
                raise LockedError(f"run folder {folder} is in use by {_holder(path)}; wait for it or stop it") from None
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}))

    def release(self) -> None:
        """Lets the next process in; a second call does nothing."""
        self._lock.release()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[FolderLock]:
    """Locks ``path``; unlocks again if the block fails."""
    with contextlib.ExitStack() as on_failure:
        lock = FolderLock(path)
        on_failure.callback(lock.release)
        yield lock
        on_failure.pop_all()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of ``folder``; tried by taking it for an instant, with other onlookers."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:  # none was ever taken, or it is not ours to look at
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _holder(path: Path) -> str:
    """``pid 4121 since 10:14 (host a)``, with the date when it is not today's."""
    try:
        fields = json.loads(path.read_bytes())
        since = datetime.fromisoformat(fields["since"])
        pid, host = int(fields["pid"]), str(fields["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # which has the lock and is about to write its note
    today = since.date() == datetime.now(since.tzinfo).date()
    return f"pid {pid} since {since:{'%H:%M' if today else '%Y-%m-%d %H:%M'}} (host {host})"

"""One process per run folder: an advisory ``flock``, which the kernel drops however the process ends. POSIX only."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from preceptor.errors import LockedError
from preceptor.runs.files import storage_errors, write_all

LOCK_NAME = "run.lock"

_PAUSES = (0.001, 0.01, 0.05)
"""Seconds between attempts."""


class FolderLock:
    """Holds ``folder`` for this process until ``release`` or its death, ``kill -9`` included.

    Raises ``LockedError`` naming the holder when another process (or another lock in this one) has it. The file stays
    when the lock is released: removing it would let two processes lock two files of one name. A forked child that
    outlives its parent keeps the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage_errors(f"lock {folder}"):
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        if not _taken(descriptor):
            holder = _holder(os.read(descriptor, 4096))
            os.close(descriptor)
            raise LockedError(f"run folder {folder} is in use by {holder}; wait for it or stop it")
        with storage_errors(f"lock {folder}"):
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            note = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            os.ftruncate(descriptor, 0)
            write_all(descriptor, json.dumps(note).encode())
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Lets the next process in; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


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


def _taken(descriptor: int) -> bool:
    """Takes the lock; tries again for a moment, since an onlooker may hold it just then."""
    for pause in (*_PAUSES, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if pause is not None:
                time.sleep(pause)
        else:
            return True
    return False


def _holder(note: bytes) -> str:
    """``pid 4121 since 10:14 (host a)``, with the date when it is not today's."""
    try:
        fields = json.loads(note)
        since = datetime.fromisoformat(fields["since"])
        pid, host = int(fields["pid"]), str(fields["host"])
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has the lock and is about to write its note
    today = since.date() == datetime.now(since.tzinfo).date()
    return f"pid {pid} since {since:{'%H:%M' if today else '%Y-%m-%d %H:%M'}} (host {host})"

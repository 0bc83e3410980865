"""One process per run folder: a file lock, dropped by the kernel however the process ends, and a note of its holder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from preceptor.errors import LockedError
from preceptor.runs.files import storage_errors

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

"""Writing files so that a reader finds the old content or the new, never a part of either.

Everything goes through ``os`` calls that can fail one by one (in the tests they do); every failure becomes one line.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from preceptor.errors import StorageError

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

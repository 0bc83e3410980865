"""A durable store of embedding vectors: bought once, identical forever.

A hosted model may answer the same text with slightly different numbers (text-embedding-ada-002 does), so a run can only
be repeated or resumed exactly if every vector is kept, and kept *before* it is used.

The file is one header line and then records of one size: key (32 bytes), vector (``dimension`` little-endian float32),
CRC-32 of both. The size gives a torn last record away, the CRC any other damage.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.data.embedders.append_only import append_durably, exclusive, file_lock
from preceptor.errors import DataError, ShapeError, StorageError

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_CRC_BYTES = 4
_SPARE_BYTES = 1 << 20  # left free on the disk for the rest of the run's small files


def vector_key(version: str, text: str) -> bytes:
    """sha256 of ``version`` (model and dimension), a zero byte and the exact UTF-8 bytes of ``text``.

    No normalisation: texts that differ in one byte are different texts. Raises :class:`DataError` where ``text`` has no
    UTF-8 form (a lone surrogate).

    >>> vector_key("text-embedding-3-small/512", "Ice floats.").hex()[:8]
    'f397b272'
    """
    try:
        return hashlib.sha256(version.encode() + b"\0" + text.encode()).digest()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has no UTF-8 form: {text[error.start]!r} at character {error.start}; remove that character"
        ) from None


class VectorCache:
    """Vectors of one dimension on disk, by key. Processes may share the file; one object belongs to one thread.

    Only keys and offsets are held in memory (about 150 bytes a vector). A record that fails its checksum counts as
    missing; ``num_damaged`` says how many there are, and each scan that meets new ones logs a warning.
    """

    def __init__(self, path: Path, *, dimension: int) -> None:
        self.path = path
        self.dimension = dimension
        self.num_damaged = 0
        self._header = f"preceptor vectors 1, dimension {dimension}\n".encode()
        self._record_bytes = KEY_BYTES + 4 * dimension + _CRC_BYTES
        self._offsets: dict[bytes, int] = {}
        self._end = 0  # end of the last whole record that has been scanned; 0 until the header was seen
        self._lock = file_lock(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: bytes) -> bool:
        return key in self._offsets

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other processes from appending; re-entrant. See :func:`append_only.exclusive`."""
        return exclusive(self._lock)

    def refresh(self) -> None:
        """Index what was appended since the last call, by this process or another.

        A torn last record is left out (and overwritten by the next append). Raises :class:`StorageError` if the file
        cannot be read or is not a vector file of this dimension.
        """
        try:
            size = self.path.stat().st_size
            if size < self._end:  # deleted or replaced under us: believe the disk
                self._offsets.clear()
                self._end = self.num_damaged = 0
            if size > self._end:
                self._scan()
        except FileNotFoundError:
            self._offsets.clear()
            self._end = self.num_damaged = 0
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}; check its permissions") from error

    def _scan(self) -> None:
        damaged = 0
        with self.path.open("rb") as file:
            if self._end == 0:
                header = file.read(len(self._header))
                if header != self._header:
                    if self._header.startswith(header):
                        return  # the writer was killed inside the header: the file is empty
                    raise StorageError(
                        f"{self.path} is not a vector file of dimension {self.dimension} "
                        f"(it starts with {header[:24]!r}); move it away or choose another cache folder"
                    )
                self._end = len(self._header)
            file.seek(self._end)
            while len(record := file.read(self._record_bytes)) == self._record_bytes:
                if _checksum(record[:-_CRC_BYTES]) == record[-_CRC_BYTES:]:
                    self._offsets[record[:KEY_BYTES]] = self._end
                else:
                    damaged += 1
                self._end += self._record_bytes
        if damaged:
            self.num_damaged += damaged
            logger.warning("%s: %d records are damaged and count as missing", self.path, damaged)

    def get(self, keys: Sequence[bytes]) -> Float[Tensor, "text dimension"]:
        """The vectors of ``keys`` in order, float32 on the CPU. ``KeyError`` for a key that is not in the cache."""
        vectors = np.empty((len(keys), self.dimension), dtype="<f4")
        if keys:
            try:
                with self.path.open("rb") as file:
                    for row, key in enumerate(keys):
                        file.seek(self._offsets[key])
                        record = file.read(self._record_bytes)
                        if record[:KEY_BYTES] != key or _checksum(record[:-_CRC_BYTES]) != record[-_CRC_BYTES:]:
                            raise StorageError(f"{self.path} was changed while in use; start again with the same cache")
                        vectors[row] = np.frombuffer(record, dtype="<f4", count=self.dimension, offset=KEY_BYTES)
            except StorageError:
                raise
            except OSError as error:
                raise StorageError(
                    f"cannot read {self.path}: {error.strerror or error}; check its permissions"
                ) from error
        return torch.from_numpy(vectors.astype(np.float32, copy=False))

    def append(self, vectors: Mapping[bytes, npt.NDArray[np.float32]]) -> None:
        """Put ``vectors`` on disk; when this returns they survive a power cut. Re-appending a key replaces its vector.

        Raises :class:`ShapeError` for a vector of another dimension and :class:`StorageError` if the disk refuses.
        """
        records = bytearray()
        for key, vector in vectors.items():
            if len(key) != KEY_BYTES or vector.shape != (self.dimension,):
                raise ShapeError(
                    f"vector has shape {vector.shape} under a key of {len(key)} bytes; "
                    f"{self.path} holds ({self.dimension},) under {KEY_BYTES}"
                )
            record = key + vector.astype("<f4").tobytes()
            records += record + _checksum(record)
        if not records:
            return
        with self.exclusive():
            self.refresh()
            append_durably(self.path, bytes(records) if self._end else self._header + bytes(records), at=self._end)
            self.refresh()
            if not all(key in self for key in vectors):  # else the caller would believe the disk, and buy again
                raise StorageError(f"{self.path} does not read back what was written; check the disk")

    def require_space(self, num_vectors: int) -> None:
        """Raise :class:`StorageError` unless the disk has room for ``num_vectors`` more."""
        needed = num_vectors * self._record_bytes + _SPARE_BYTES
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise StorageError(
                f"disk full: {self.path.parent} has {free:,} bytes free, {num_vectors:,} vectors need {needed:,}; "
                "free some space and run again, nothing was bought"
            )


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC_BYTES, "little")

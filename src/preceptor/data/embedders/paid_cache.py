"""Embeddings that were paid for, and the money they cost, in one SQLite file that processes may share.

A hosted model may answer the same text with slightly different numbers (text-embedding-ada-002 does), so a run can only
be repeated or resumed exactly if every vector is kept. Spending is recorded before a request leaves: a process that
dies in between leaves its reservation standing, since the service may have billed it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt

from preceptor.errors import ConfigError, DataError, LockedError, ServiceError, StorageError

NANO = 10**9
LOCK_SECONDS = 1200.0  # longer than one purchase with all its retries: who waits longer waits for a stuck process
_SPARE_BYTES = 1 << 20  # left free on the disk for SQLite's log and the run's small files
_FORMAT = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS vectors (
    version TEXT NOT NULL, sha256 BLOB NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (version, sha256)
);
CREATE TABLE IF NOT EXISTS purchases (id INTEGER PRIMARY KEY, nano_usd INTEGER NOT NULL, note TEXT NOT NULL);
"""

Vector = npt.NDArray[np.float32]


def text_key(text: str) -> bytes:
    r"""sha256 of the exact UTF-8 bytes of ``text``: texts that differ in one byte are different texts.

    Raises :class:`DataError` where ``text`` has no UTF-8 form (a lone surrogate).

    >>> text_key("Ice floats.").hex()[:8]
    '4da31077'
    """
    try:
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has no UTF-8 form: {text[error.start]!r} at character {error.start}; remove that character"
        ) from None


def format_usd(nano_usd: int) -> str:
    """Exact dollars with at least two decimals.

    >>> format_usd(1_000_000_000), format_usd(123_450), format_usd(1_234_500_000_000)
    ('$1.00', '$0.00012345', '$1,234.50')
    """
    fraction = f"{nano_usd % NANO:09d}".rstrip("0").ljust(2, "0")
    return f"${nano_usd // NANO:,}.{fraction}"


class PaidCache:
    """Vectors of one embedding model on disk, and a cap on all spending ever recorded in the same file.

    Money is counted in whole nano-dollars (1e-9 USD): a price of $0.02 per million tokens is 20 of them per token, so
    sums are exact.

    Args:
        path: the SQLite file, made when missing; deleting it starts a new budget.
        version: the model; vectors of other versions in the same file stay apart.
        dimension: components of each vector.
        max_usd: the cap in US dollars, finite and at least 0; fractions of a nano-dollar are cut off.

    Every method raises :class:`StorageError` where the disk refuses or the file is damaged.
    """

    def __init__(self, path: Path, *, version: str, dimension: int, max_usd: float) -> None:
        if not (math.isfinite(max_usd) and max_usd >= 0):
            raise ConfigError(f"max_usd must be a finite number of US dollars of at least 0, got {max_usd}")
        self.path = path
        self.version = version
        self.dimension = dimension
        # Through str and Decimal: as a binary fraction an amount may lie just below itself, and int() cuts.
        self.cap = int(Decimal(str(max_usd)) * NANO)
        with self.exclusive(), self._database() as database:
            # 0 is a new file; a later format must not be read as if it were this one.
            (found,) = database.execute("PRAGMA user_version").fetchone()
            if found not in (0, _FORMAT):
                raise StorageError(f"{path} has format {found}, this version reads {_FORMAT}; choose another folder")
            database.execute("PRAGMA journal_mode=WAL")  # kept in the file: readers never wait for a writer
            database.executescript(_TABLES)
            database.execute(f"PRAGMA user_version={_FORMAT}")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        # A connection for each use: none is shared by threads or inherited by a forked worker.
        try:
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as database:
                database.execute("PRAGMA synchronous=FULL")  # a commit survives a power cut
                yield database
        except sqlite3.Error as error:
            raise StorageError(
                f"{self.path}: {error}; free some space, fix the permissions, or move the file away if it is damaged"
            ) from error

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from buying; the kernel frees the lock when its holder dies."""
        path = self.path.with_name(self.path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=LOCK_SECONDS)
            lock.acquire()
        except filelock.Timeout:
            raise LockedError(
                f"{path} has been held by another process for {LOCK_SECONDS:,.0f} s; end that process and try again"
            ) from None
        except OSError as error:
            raise StorageError(
                f"cannot lock {path}: {error.strerror or error}; check permissions and free space"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def __len__(self) -> int:
        with self._database() as database:
            (count,) = database.execute("SELECT count(*) FROM vectors WHERE version = ?", (self.version,)).fetchone()
        return int(count)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Vector]:
        """The vectors of those ``keys`` that are cached; one that is damaged counts as missing."""
        vectors: dict[bytes, Vector] = {}
        query = "SELECT vector FROM vectors WHERE version = ? AND sha256 = ?"
        with self._database() as database:
            for key in keys:
                row = database.execute(query, (self.version, key)).fetchone()
                # A row of another length was cut short or is of another dimension.
                if row is not None and len(row[0]) == 4 * self.dimension:
                    vectors[key] = np.frombuffer(row[0], dtype="<f4").astype(np.float32)
        return vectors

    @property
    def spent(self) -> int:
        """Nano-dollars spent or reserved so far, by every process that uses this file."""
        with self._database() as database:
            return _spent(database)

    @property
    def remaining(self) -> int:
        """Nano-dollars left under the cap, at least 0."""
        return max(0, self.cap - self.spent)

    def state(self) -> str:
        """In words: ``"$0.40 of $1.00 spent, 12 texts cached"``."""
        return f"{format_usd(self.spent)} of {format_usd(self.cap)} spent, {len(self):,} texts cached"

    def reserve(self, nano_usd: int, *, note: str) -> int:
        """Record ``nano_usd`` before a request; the number of the purchase, for `settle`.

        Raises :class:`ServiceError`, and records nothing, if that would pass the cap.
        """
        with self._database() as database, database:
            # Sum and entry in one write transaction: two processes cannot both take the last dollar.
            database.execute("BEGIN IMMEDIATE")
            if nano_usd == 0 or _spent(database) + nano_usd <= self.cap:
                row = database.execute("INSERT INTO purchases (nano_usd, note) VALUES (?, ?)", (nano_usd, note))
                return int(row.lastrowid or 0)
        raise ServiceError(
            f"budget reached: {self.state()}; nothing is lost; the next call may cost {format_usd(nano_usd)}, "
            "raise max_usd to go on"
        )

    def settle(self, purchase: int, nano_usd: int | None, vectors: Mapping[bytes, Vector] | None = None) -> None:
        """Store what a purchase brought and correct its reservation to ``nano_usd``, both or neither.

        ``None`` leaves the reservation as it is.
        """
        rows = [(self.version, key, vector.astype("<f4").tobytes()) for key, vector in (vectors or {}).items()]
        with self._database() as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
            if nano_usd is not None:
                database.execute("UPDATE purchases SET nano_usd = ? WHERE id = ?", (nano_usd, purchase))

    def require_space(self, num_vectors: int) -> None:
        """Raise :class:`StorageError` unless the disk has room for ``num_vectors`` more."""
        # 200 bytes for the key, the index and SQLite's own.
        needed = 2 * num_vectors * (4 * self.dimension + 200) + _SPARE_BYTES  # in the log, then in the table
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise StorageError(
                f"disk full: {self.path.parent} has {free:,} bytes free, {num_vectors:,} vectors need {needed:,}; "
                "free some space and run again, nothing was bought"
            )


def _spent(database: sqlite3.Connection) -> int:
    (total,) = database.execute("SELECT coalesce(sum(nano_usd), 0) FROM purchases").fetchone()
    return int(total)

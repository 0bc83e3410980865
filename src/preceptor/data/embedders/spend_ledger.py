"""A spending cap that holds across crashes, restarts and processes.

Money is counted in whole nano-dollars (1e-9 USD): a price of $0.02 per million tokens is 20 of them per token, so sums
are exact. Each line of the ledger is one signed entry; the worst case is entered *before* a call and corrected after
it. A process that dies in between leaves the worst case standing, since it may have been billed.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path

from preceptor.data.embedders.append_only import append_durably, exclusive, file_lock
from preceptor.errors import ConfigError, StorageError

NANO = 10**9


def format_usd(nano_usd: int) -> str:
    """Exact dollars with at least two decimals.

    >>> format_usd(1_000_000_000), format_usd(123_450), format_usd(1_234_500_000_000)
    ('$1.00', '$0.00012345', '$1,234.50')
    """
    fraction = f"{nano_usd % NANO:09d}".rstrip("0").ljust(2, "0")
    return f"${nano_usd // NANO:,}.{fraction}"


class SpendLedger:
    """What was spent, on disk, and the cap that :meth:`reserve` never lets it pass.

    Args:
        path: the ledger, JSON Lines; deleting it starts a new budget.
        max_usd: the cap in US dollars, finite and at least 0; fractions of a nano-dollar are cut off.
    """

    def __init__(self, path: Path, *, max_usd: float) -> None:
        if not (math.isfinite(max_usd) and max_usd >= 0):
            raise ConfigError(f"max_usd must be a finite number of US dollars of at least 0, got {max_usd}")
        self.path = path
        self.cap = int(Decimal(str(max_usd)) * NANO)
        self._spent = 0
        self._end = 0
        self._num_lines = 0
        self._lock = file_lock(path)

    @property
    def spent(self) -> int:
        """Nano-dollars spent or reserved so far, by every process that uses this ledger."""
        self._refresh()
        return self._spent

    @property
    def remaining(self) -> int:
        """Nano-dollars left under the cap, at least 0."""
        return max(0, self.cap - self.spent)

    def state(self) -> str:
        """In words: ``"$0.40 of $1.00 spent"``."""
        return f"{format_usd(self.spent)} of {format_usd(self.cap)} spent"

    def reserve(self, nano_usd: int, *, note: str) -> bool:
        """Enter ``nano_usd`` before a call. False, and nothing entered, if that would pass the cap."""
        with exclusive(self._lock):
            if nano_usd > self.remaining:
                return False
            self._enter(nano_usd, note=note)
            return True

    def settle(self, *, reserved: int, actual: int, note: str) -> None:
        """Correct an earlier reservation to what the call did cost."""
        if actual != reserved:
            with exclusive(self._lock):
                self._refresh()
                self._enter(actual - reserved, note=note)

    def _enter(self, nano_usd: int, *, note: str) -> None:
        line = json.dumps({"nano_usd": nano_usd, "note": note}) + "\n"
        append_durably(self.path, line.encode(), at=self._end)
        self._refresh()

    def _refresh(self) -> None:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._end:  # deleted and begun anew under us
                    self._spent = self._end = self._num_lines = 0
                file.seek(self._end)
                # A last line without its end was torn by a kill. To drop it is safe: a torn reservation precedes a call
                # that was never made, a torn correction leaves the worst case standing.
                for line in file.read().splitlines(keepends=True):
                    if line.endswith(b"\n"):
                        self._spent += self._amount(line)
                        self._end += len(line)
                        self._num_lines += 1
        except FileNotFoundError:
            self._spent = self._end = self._num_lines = 0
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}; check its permissions") from error

    def _amount(self, line: bytes) -> int:
        try:
            amount = json.loads(line)["nano_usd"]
            if type(amount) is int:
                return amount
        except (ValueError, KeyError, TypeError):
            pass
        raise StorageError(
            f"{self.path} line {self._num_lines + 1} is damaged, so what was spent is unknown; "
            "repair the line or move the ledger away to start a new budget"
        )

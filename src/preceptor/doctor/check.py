"""One check and how it reads."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Check(NamedTuple):
    """What was looked at, what was found, and what to do about it if it is not well."""

    status: Literal["ok", "warn", "fail"]
    name: str
    figure: str
    remedy: str = ""

    def line(self) -> str:
        """The check as one line.

        >>> print(Check("fail", "KL at step 0", "0.3 nats", "load the same weights twice").line())
        fail  KL at step 0: 0.3 nats; load the same weights twice
        """
        # A remedy for what is well would read like a fault.
        remedy = f"; {self.remedy}" if self.remedy and self.status != "ok" else ""
        return f"{self.status:<4}  {self.name}: {self.figure}{remedy}"


def judged(good: bool, name: str, figure: str, remedy: str) -> Check:
    """``ok`` or ``fail``."""
    return Check("ok" if good else "fail", name, figure, remedy)

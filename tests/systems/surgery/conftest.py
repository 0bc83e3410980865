"""What the tests of surgery share: a disk that is not waited for."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """That checkpoints are synced is tested where they are written; here waiting for the disk only makes it slow."""
    monkeypatch.setattr(os, "fsync", lambda _: None)

"""A cache folder for the tests of environments."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache folder for all of these tests, and never the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("PRECEPTOR_CACHE_DIR", str(folder))
    return folder

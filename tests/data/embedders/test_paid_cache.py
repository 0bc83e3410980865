"""What was paid for survives kills and a second process, and the cap holds exactly, whatever dies in between."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import sqlite3
from collections import namedtuple
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from preceptor.data.embedders import paid_cache
from preceptor.data.embedders.paid_cache import PaidCache, format_usd, text_key
from preceptor.errors import ConfigError, DataError, LockedError, ServiceError, StorageError

DIMENSION = 3


def vector(number: int) -> np.ndarray:
    return np.array([number, -0.5 * number, 1e-7], dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "embeddings.sqlite3"


def opened(path: Path, **options: Any) -> PaidCache:
    return PaidCache(path, **({"version": "model/3", "dimension": DIMENSION, "max_usd": 1e-6} | options))


def bought(cache: PaidCache, *numbers: int, nano_usd: int = 0) -> None:
    purchase = cache.reserve(nano_usd, note="test")
    cache.settle(purchase, nano_usd, {text_key(f"text {number}"): vector(number) for number in numbers})


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_the_key_is_sha256_of_the_exact_bytes() -> None:
    assert text_key("é") == hashlib.sha256(b"\xc3\xa9").digest()
    assert text_key("é") != text_key("e\u0301")  # the same glyph in other bytes is another text
    with pytest.raises(DataError, match=r"'\\ud800' at character 2"):
        text_key("ab\ud800")


def test_vectors_come_back_bit_for_bit_in_one_file(path: Path) -> None:
    cache = opened(path)
    bought(cache, 0, 1)
    bought(cache, 2)
    found = opened(path).get([text_key("text 2"), text_key("text 0"), text_key("text 9")])
    assert set(found) == {text_key("text 2"), text_key("text 0")}
    assert found[text_key("text 2")].dtype == np.float32
    assert np.array_equal(found[text_key("text 2")], vector(2))
    assert len(cache) == 3
    assert {entry.name for entry in path.parent.iterdir()} <= {path.name, path.name + ".lock"}


def test_versions_share_the_file_and_the_budget_but_no_vector(path: Path) -> None:
    bought(opened(path), 1, nano_usd=600)
    other = opened(path, version="other/3")
    assert other.get([text_key("text 1")]) == {}
    assert len(other) == 0
    assert other.spent == 600


def test_a_damaged_vector_counts_as_missing_and_can_be_replaced(path: Path) -> None:
    cache = opened(path)
    bought(cache, 1)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE vectors SET vector = x'00'")
    database.close()
    assert cache.get([text_key("text 1")]) == {}
    bought(cache, 1)
    assert np.array_equal(cache.get([text_key("text 1")])[text_key("text 1")], vector(1))


def test_foreign_and_later_files_are_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"a diary, long enough to be no empty database" * 40)
    with pytest.raises(StorageError, match="not a database"):
        opened(path)
    assert path.read_bytes().startswith(b"a diary")
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(StorageError, match="has format 9, this version reads 1"):
        opened(path)


def test_a_full_disk_is_met_before_the_purchase(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 500, 500))
    # 2 * 10 * (12 bytes of numbers + 200 of key and index) and 1 MiB to spare
    with pytest.raises(StorageError, match=r"disk full: .* has 500 bytes free, 10 vectors need 1,052,816"):
        cache.require_space(10)


def test_what_the_database_refuses_is_a_storage_error(path: Path) -> None:
    cache = opened(path)
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE vectors")
    database.close()
    with pytest.raises(StorageError, match=r"embeddings\.sqlite3: no such table: vectors; free some space"):
        cache.get([text_key("text 1")])


# --- money ------------------------------------------------------------------------------------------------------------


def test_money_is_exact(path: Path) -> None:
    # 0.1 + 0.2 dollars is 0.3 dollars, which binary floats would miss.
    assert opened(path, max_usd=0.1).cap + opened(path, max_usd=0.2).cap == 300_000_000
    assert format_usd(300_000_000) == "$0.30"
    assert format_usd(20) == "$0.00000002"
    assert format_usd(0) == "$0.00"


def test_reservations_stop_at_the_cap_and_corrections_free_it(path: Path) -> None:
    cache = opened(path)  # 1,000 nano-dollars
    first = cache.reserve(600, note="a")
    with pytest.raises(ServiceError, match=r"budget reached: \$0\.0000006 of \$0\.000001 spent, 0 texts cached"):
        cache.reserve(401, note="b")
    cache.reserve(400, note="c")
    assert (cache.spent, cache.remaining) == (1000, 0)
    cache.settle(first, 150)
    assert (cache.spent, cache.remaining) == (550, 450)
    cache.settle(first, None)  # what it did cost is not known: the entry stays
    assert cache.spent == 550
    again = opened(path)
    again.reserve(450, note="e")
    assert cache.spent == 1000  # what another process spends counts at once
    assert opened(path, max_usd=5e-7).remaining == 0  # a lowered cap is passed already; never negative


def test_cost_and_vectors_are_stored_together_or_not_at_all(path: Path) -> None:
    cache = opened(path)
    purchase = cache.reserve(600, note="a")
    with pytest.raises(OverflowError):  # no 64-bit integer: fails between the vectors and the cost
        cache.settle(purchase, 10**30, {text_key("text 1"): vector(1)})
    assert (cache.spent, len(cache)) == (600, 0)


def _reserve_all(path: Path) -> int:
    cache, taken = opened(path), 0
    while True:
        try:
            cache.reserve(7, note="race")
        except ServiceError:
            return taken
        taken += 7


def test_racing_processes_never_pass_the_cap_together(path: Path) -> None:
    opened(path)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        taken = pool.map(_reserve_all, [path] * 3)
    assert sum(taken) == opened(path).spent == 994  # 142 times 7; the 143rd would pass 1,000


@pytest.mark.parametrize("cap", [-0.01, float("nan"), float("inf")])
def test_a_cap_is_a_number_of_dollars(path: Path, cap: float) -> None:
    with pytest.raises(ConfigError, match="max_usd"):
        opened(path, max_usd=cap)


def test_the_lock_excludes_others_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(path)
    monkeypatch.setattr(paid_cache, "LOCK_SECONDS", 0.05)
    with (
        filelock.FileLock(path.with_name(path.name + ".lock")),
        pytest.raises(LockedError, match=r"embeddings\.sqlite3\.lock has been held by another process"),
        cache.exclusive(),
    ):
        pass
    with cache.exclusive():
        pass

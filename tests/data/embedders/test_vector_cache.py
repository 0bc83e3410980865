"""What is in the cache survives kills, torn writes and a second process; damage is named."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from preceptor.data.embedders import append_only
from preceptor.data.embedders.append_only import exclusive, file_lock
from preceptor.data.embedders.vector_cache import VectorCache, vector_key
from preceptor.errors import DataError, LockedError, ShapeError, StorageError

DIMENSION = 3
HEADER = len(b"preceptor vectors 1, dimension 3\n")
RECORD = 32 + 4 * DIMENSION + 4


def key(number: int) -> bytes:
    return vector_key("model/3", f"text {number}")


def vector(number: int) -> np.ndarray:
    return np.array([number, -0.5 * number, 1e-7], dtype=np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model-3.vectors"


def filled(path: Path, count: int) -> VectorCache:
    cache = VectorCache(path, dimension=DIMENSION)
    for number in range(count):
        cache.append({key(number): vector(number)})
    return cache


def reopened(path: Path) -> VectorCache:
    cache = VectorCache(path, dimension=DIMENSION)
    cache.refresh()
    return cache


def test_the_key_is_sha256_of_version_and_exact_bytes() -> None:
    assert vector_key("m/3", "é") == hashlib.sha256(b"m/3\x00\xc3\xa9").digest()
    assert vector_key("m/3", "é") != vector_key("m/3", "e\u0301")  # the same glyph in other bytes is another text
    assert vector_key("m/3", "a") != vector_key("m/31", "a")
    with pytest.raises(DataError, match=r"'\\ud800' at character 2"):
        vector_key("m/3", "ab\ud800")


def test_vectors_come_back_bit_for_bit_in_the_order_asked(path: Path) -> None:
    filled(path, 3)
    assert path.stat().st_size == HEADER + 3 * RECORD
    got = reopened(path).get([key(2), key(0), key(2)])
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), np.stack([vector(2), vector(0), vector(2)]))
    assert reopened(path).get([]).shape == (0, DIMENSION)
    with pytest.raises(KeyError):
        reopened(path).get([key(9)])


@pytest.mark.parametrize("length", range(HEADER + 3 * RECORD))
def test_a_file_cut_anywhere_keeps_every_whole_record_and_takes_new_ones(path: Path, length: int) -> None:
    filled(path, 3)
    path.write_bytes(path.read_bytes()[:length])
    cache = reopened(path)
    whole = max(0, (length - HEADER) // RECORD)
    assert [key(number) in cache for number in range(3)] == [number < whole for number in range(3)]
    assert cache.num_damaged == 0  # a torn end was never used by anyone, so it is no damage
    cache.append({key(7): vector(7)})
    assert path.stat().st_size == HEADER + (whole + 1) * RECORD  # the torn end is gone, records stay aligned
    again = reopened(path)
    assert len(again) == whole + 1
    assert np.array_equal(again.get([key(7)]).numpy()[0], vector(7))


def test_every_flipped_bit_of_a_record_is_noticed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(path, 3)
    intact = path.read_bytes()
    start = HEADER + RECORD
    with caplog.at_level(logging.WARNING):
        for bit in range(8 * RECORD):
            damaged = bytearray(intact)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            cache = reopened(path)
            assert cache.num_damaged == 1
            assert set(cache._offsets) == {key(0), key(2)}
    assert len(caplog.records) == 8 * RECORD
    assert "model-3.vectors: 1 records are damaged and count as missing" in caplog.text
    cache.append({key(1): vector(5)})  # bought again: the new record counts
    assert np.array_equal(reopened(path).get([key(1)]).numpy()[0], vector(5))


def test_zeros_left_by_a_power_cut_are_no_vectors(path: Path) -> None:
    filled(path, 1)
    with path.open("ab") as file:
        file.write(bytes(2 * RECORD))
    cache = reopened(path)
    assert (len(cache), cache.num_damaged) == (1, 2)


def test_damage_after_the_scan_is_not_handed_out(path: Path) -> None:
    cache = filled(path, 1)
    with path.open("r+b") as file:
        file.seek(HEADER + 33)
        file.write(b"\xff")
    with pytest.raises(StorageError, match="was changed while in use"):
        cache.get([key(0)])


def test_a_second_user_sees_appends_and_appends_behind_them(path: Path) -> None:
    first, second = filled(path, 1), reopened(path)
    second.append({key(1): vector(1)})
    first.append({key(2): vector(2)})
    second.refresh()
    assert np.array_equal(second.get([key(0), key(1), key(2)]).numpy(), np.stack([vector(n) for n in range(3)]))
    shutil.rmtree(path.parent)
    first.refresh()
    assert len(first) == 0


def test_append_is_on_disk_before_it_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(append_only.os, "fsync", lambda descriptor: synced.append(path.stat().st_size))
    filled(path, 1)
    assert synced == [HEADER + RECORD] * 2  # the file with all its bytes, then its folder


def test_a_full_disk_is_a_storage_error_and_harms_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(path, 2)
    intact = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(append_only.os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device; earlier records are intact"):
            cache.append({key(3): vector(3)})
    assert path.read_bytes()[: len(intact)] == intact
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 500, 500))
    with pytest.raises(StorageError, match=r"disk full: .* has 500 bytes free, 10 vectors need 1,049,056"):
        cache.require_space(10)  # 10 * 48 bytes and 1 MiB to spare


def test_foreign_files_and_shapes_are_refused(path: Path) -> None:
    filled(path, 1)
    with pytest.raises(StorageError, match="not a vector file of dimension 4"):
        VectorCache(path, dimension=4).refresh()
    with pytest.raises(ShapeError, match=r"shape \(2,\)"):
        reopened(path).append({key(0): np.zeros(2, dtype=np.float32)})
    path.write_bytes(b"a diary")
    with pytest.raises(StorageError, match="starts with b'a diary'"):
        filled(path, 1)
    assert path.read_bytes() == b"a diary"


def test_the_lock_excludes_others_and_says_so(path: Path) -> None:
    cache = filled(path, 1)
    with cache.exclusive():
        cache.append({key(1): vector(1)})  # re-entrant
        with (
            pytest.raises(LockedError, match=r"model-3.vectors.lock is held by another process"),
            exclusive(file_lock(path, timeout=0.05)),
        ):
            pass
    with exclusive(file_lock(path, timeout=0.05)):
        pass

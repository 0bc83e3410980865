from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from preceptor.errors import StorageError
from preceptor.runs.files import file_digest, replace_file, storage_errors, write_file


def test_digest_is_of_what_is_on_the_disk(tmp_path: Path) -> None:
    digest = write_file(tmp_path / "a", [b"abc", b"", b"def"])
    assert digest == file_digest(tmp_path / "a") == (6, hashlib.sha256(b"abcdef").hexdigest())


def test_a_device_that_takes_a_part_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write_file(tmp_path / "a", [b"0123456789"])
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_really_full_device_is_called_disk_full() -> None:
    expected = "disk full: cannot write it; free some space and resume; b is intact"
    with pytest.raises(StorageError, match=expected), storage_errors("write it", safe="b is intact"):
        write_file(Path("/dev/full"), [b"x"])


def test_replacing_is_all_or_nothing(tmp_path: Path, disk, fork) -> None:
    path = tmp_path / "result.json"
    replace_file(path, "old")
    operations = disk.operations_of(lambda: replace_file(tmp_path / "other", "new"))
    assert [name for name, _ in operations] == ["open", "write", "fsync", "replace", "open", "fsync"]
    for torn in (False, True):
        for index in range(len(operations)):
            replace_file(path, "old")

            def die(index: int = index, torn: bool = torn) -> None:
                with disk.watched(disk.dies_at(index, torn=torn)):
                    replace_file(path, "new text")

            assert fork(die).wait() == 77
            assert path.read_text() == ("old" if index <= 3 else "new text")


def test_a_failed_replacement_leaves_the_old_file_and_no_other(tmp_path: Path, disk) -> None:
    path = tmp_path / "result.json"
    replace_file(path, "old")
    for index in range(4):
        with (
            disk.watched(disk.fails_at(index, errno.ENOSPC)),
            pytest.raises(StorageError, match="disk full: cannot write"),
        ):
            replace_file(path, "new text")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["result.json"]

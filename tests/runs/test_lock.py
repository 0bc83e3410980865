from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from preceptor.errors import LockedError, StorageError
from preceptor.runs.files import FolderLock


def test_the_holder_is_named_and_release_frees(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(LockedError) as caught:
        FolderLock(tmp_path)
    host = re.escape(socket.gethostname())
    expected = (
        rf"run folder {re.escape(str(tmp_path))} is in use by pid {os.getpid()} since \d\d:\d\d \(host {host}\); "
    )
    assert re.match(expected, str(caught.value))
    assert caught.value.exit_code == 4
    lock.release()
    lock.release()
    FolderLock(tmp_path).release()


@pytest.mark.parametrize(
    ("note", "holder"),
    [
        (b"", "another process"),
        (b"{", "another process"),
        (b'{"pid": 1, "host": "a", "since": "2020-01-02T03:04:05+00:00"}', r"pid 1 since 2020-01-02 03:04 \(host a\)"),
    ],
)
def test_a_note_that_is_old_or_not_yet_written(tmp_path: Path, note: bytes, holder: str) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / "run.lock").write_bytes(note)
    with pytest.raises(LockedError, match=f"is in use by {holder}; wait"):
        FolderLock(tmp_path)
    lock.release()


def test_a_longer_old_note_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(b"x" * 500)
    FolderLock(tmp_path).release()
    assert json.loads((tmp_path / "run.lock").read_bytes())["pid"] == os.getpid()


def test_a_killed_holder_frees_the_folder(tmp_path: Path, fork) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        lock = FolderLock(tmp_path)  # noqa: F841 - a lock that nobody keeps is released
        os.write(writer, b"x")
        time.sleep(60)

    child = fork(hold)
    assert os.read(reader, 1) == b"x"
    with pytest.raises(LockedError, match=f"pid {child.pid} since"):
        FolderLock(tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    FolderLock(tmp_path).release()


def test_of_two_racing_processes_exactly_one_wins(tmp_path: Path, fork) -> None:
    for index in range(20):
        folder = tmp_path / str(index)
        folder.mkdir()
        (start, go), (told, tell), (finish, done) = os.pipe(), os.pipe(), os.pipe()

        def race(folder=folder, start=start, go=go, tell=tell, finish=finish, done=done) -> None:
            os.close(go)
            os.close(done)
            os.read(start, 1)  # both wake up when the parent closes its end
            try:
                lock = FolderLock(folder)  # noqa: F841 - kept until the process ends
            except LockedError:
                os.write(tell, b"0")
            else:
                os.write(tell, b"1")
                os.read(finish, 1)  # the winner holds on until the other one has tried

        children = [fork(race), fork(race)]
        os.close(go)
        outcomes = os.read(told, 1) + os.read(told, 1)
        os.close(done)
        assert sorted(outcomes) == sorted(b"01")
        assert [child.wait() for child in children] == [0, 0]
        for descriptor in (start, told, tell, finish):
            os.close(descriptor)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot lock .*: No such file"):
        FolderLock(tmp_path / "none")

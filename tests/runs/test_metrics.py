from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preceptor.errors import StorageError
from preceptor.runs.metrics import JsonlLog, read_jsonl


def metrics(folder: Path) -> JsonlLog:
    return JsonlLog(folder / "metrics.jsonl", one_row_per_step=True)


def decisions(folder: Path) -> JsonlLog:
    return JsonlLog(folder / "decisions.jsonl", one_row_per_step=False)


def steps(log: JsonlLog) -> list[int]:
    return [row["step"] for row in read_jsonl(log.path)]


def test_a_row_is_readable_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    log = metrics(tmp_path)
    log.append({"step": 1, "reward": 0.5})
    log.append({"step": 4, "reward": math.nan})
    assert (
        log.path.read_text()
        == '{"step": 1, "reward": 0.5}\n{"step": 4, "reward": null, "nonfinite": {"reward": "nan"}}\n'
    )
    assert (log.num_rows, log.last_step) == (2, 4)
    again = metrics(tmp_path)
    assert (again.num_rows, again.last_step) == (2, 4)


def test_steps_out_of_order_are_refused(tmp_path: Path) -> None:
    log = metrics(tmp_path)
    log.append({"step": 3})
    for row in ({"step": 3}, {"step": 2}, {"reward": 1.0}):
        with pytest.raises(ValueError, match=r"metrics.jsonl: step (3|2|None) after step 3; .* strictly increasing"):
            log.append(row)
    many = decisions(tmp_path)
    many.append({"step": 3}, {"step": 3}, {"step": 4})
    with pytest.raises(ValueError, match="step 3 after step 4; steps must be never decreasing"):
        many.append({"step": 4}, {"step": 3})
    assert steps(log) == [3]
    assert steps(many) == [3, 3, 4], "of a refused batch no row is written"


def test_truncating_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    log = metrics(tmp_path)
    log.append(*({"step": step, "x": "ä" * step} for step in range(1, 8)))
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"step": 8, "x"')
    log = metrics(tmp_path)
    assert log.last_step == 7
    log.truncate_after(5)
    assert steps(log) == [1, 2, 3, 4, 5]
    assert whole.startswith(log.path.read_bytes())
    log.append(*({"step": step, "x": "ä" * step} for step in (6, 7)))
    assert log.path.read_bytes() == whole
    log.truncate_after(-1)
    assert log.path.read_bytes() == b""
    log.append({"step": 1})
    assert steps(log) == [1]


def test_truncating_what_is_not_there(tmp_path: Path) -> None:
    log = metrics(tmp_path)
    log.truncate_after(5)
    assert not log.path.exists()


def test_rows_of_the_checkpoints_own_step_are_told_apart_by_their_number(tmp_path: Path) -> None:
    log = decisions(tmp_path)
    log.append({"step": 5, "arm": "learned"}, {"step": 5, "arm": "learned"})
    at_checkpoint = log.num_rows
    log.append({"step": 5, "arm": "random"}, {"step": 6, "arm": "learned"})
    log.truncate_after(5, num_rows=at_checkpoint)
    assert [row["arm"] for row in read_jsonl(log.path)] == ["learned", "learned"]
    log.truncate_after(5, num_rows=0)
    assert log.path.read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 10, 21, 22])
def test_appending_after_a_torn_line_does_not_glue(tmp_path: Path, cut: int) -> None:
    log = metrics(tmp_path)
    log.append({"step": 1, "x": 0.25}, {"step": 2, "x": 0.25})
    data = log.path.read_bytes()
    log.path.write_bytes(data[:-cut])
    log = metrics(tmp_path)
    assert log.last_step == 1
    log.append({"step": 2, "x": 0.25})
    assert log.path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    ['{"step": 2', "[]", '{"no": 1}', '{"step": "x"}', "\x00\x00"],
    ids=["cut", "list", "no step", "text", "zeros"],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(StorageError, match=r"metrics.jsonl line 2 is damaged: .*; restore the file from a copy"):
        list(read_jsonl(path))
    path.write_text('{"step": 1}\n' + line + "\n")
    assert list(read_jsonl(path)) == [{"step": 1}]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*: No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_a_full_disk_takes_no_half_row(tmp_path: Path, disk) -> None:
    log = metrics(tmp_path)
    log.append({"step": 1})
    with (
        disk.watched(disk.fails_at(0, errno.ENOSPC)),
        pytest.raises(StorageError, match=r"disk full: .*up to step 1 are"),
    ):
        log.append({"step": 2, "reward": 1.0})
    assert log.path.read_text() == '{"step": 1}\n'

    def nothing_works(index: int, name: str, args: tuple[object, ...]) -> None:
        disk.fails_at(index, errno.ENOSPC)(index, name, args)

    with disk.watched(nothing_works), pytest.raises(StorageError, match="disk full"):
        log.append({"step": 2, "reward": 1.0})
    log.append({"step": 2, "reward": 1.0})
    assert steps(log) == [1, 2]
    with disk.watched(disk.fails_at(0, errno.EIO)), pytest.raises(StorageError, match="cannot sync"):
        log.sync()


def test_sync_and_close_reach_the_disk(tmp_path: Path, disk) -> None:
    log = metrics(tmp_path)
    assert disk.operations_of(log.sync) == []
    log.append({"step": 1})
    assert [name for name, _ in disk.operations_of(log.sync)] == ["fsync"]
    assert [name for name, _ in disk.operations_of(log.close)] == ["fsync"]
    log.append({"step": 2})
    assert steps(log) == [1, 2]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_never_two_rows_for_one_step_whatever_is_killed(tmp_path_factory, data: st.DataObject) -> None:
    """Random runs: log, save, be killed at any byte, resume at a checkpoint, and end as an unbroken run does."""
    folder = tmp_path_factory.mktemp("log")
    save_every = data.draw(st.integers(1, 4))
    log, saved = metrics(folder), (0, 0)
    step = 0
    for _ in range(data.draw(st.integers(0, 4))):
        for _ in range(data.draw(st.integers(0, 7))):
            step += 1
            log.append({"step": step, "reward": step / 3})
            if step % save_every == 0:
                saved = (step, log.num_rows)
        log.close()
        lines = log.path.read_bytes().splitlines(keepends=True) if log.path.exists() else []
        durable = sum(map(len, lines[: saved[1]]))  # a checkpoint syncs the log first
        if lines:
            os.truncate(log.path, data.draw(st.integers(durable, sum(map(len, lines)))))
        log = metrics(folder)
        step = saved[0]
        log.truncate_after(step, num_rows=saved[1])
        assert log.num_rows == saved[1]
    while step < 12:
        step += 1
        log.append({"step": step, "reward": step / 3})
    expected = "".join(json.dumps({"step": number, "reward": number / 3}) + "\n" for number in range(1, step + 1))
    assert (log.path.read_text() if log.path.exists() else "") == expected

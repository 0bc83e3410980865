from __future__ import annotations

import io
import os
import pty
import re
import select
import sys

import pytest

from preceptor.runs.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


ROW = {
    "reward": -1.23456,
    "kl": 0.01,
    "selection_entropy": 0.8,
    "passed": 0.25,
    "tokens_per_second": 1234.5,
    "other": 9,
}


def test_plain_lines_come_every_few_seconds_and_at_both_ends() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, every_seconds=10, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += 1.0
        progress.update(step, ROW if step == 1 else {"reward": float("nan")})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "step 1/100  reward -1.23  KL 0.01  selection entropy 0.8  passed 0.25  tokens/s 1,234  1:39 left"
    )
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in (*range(1, 100, 10), 100)]
    assert lines[1] == "step 11/100  reward nan  1:29 left", "NaN is shown"
    assert lines[-1] == "step 100/100  reward nan"


def test_time_left_of_a_resumed_run_is_by_its_own_pace() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, first_step=900, stream=stream, clock=clock)
    clock.now = 100.0
    progress.update(910, {})
    assert stream.getvalue() == "step 910/1000  15:00 left\n", "10 steps took 100 s, 90 are left"
    clock.now = 200.0
    assert Progress(7200, stream=stream, clock=clock)._seconds_left(0) is None


def test_long_times_have_hours() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(7446, stream=stream, clock=clock)
    clock.now = 1.0
    progress.update(1, {})
    assert stream.getvalue() == "step 1/7446  2:04:05 left\n"


def test_brackets_of_article_text_are_not_markup() -> None:
    stream = io.StringIO()
    Progress(1, stream=stream).notice("article '[bold]x[/bold]' skipped :smile:")
    assert stream.getvalue() == "article '[bold]x[/bold]' skipped :smile:\n"


def test_workers_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, enabled=False)
    progress.update(1, ROW)
    progress.notice("text")
    progress.close()
    assert capfd.readouterr() == ("", "")


def test_the_default_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(2).update(1, ROW)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 1/2  reward -1.23")


def drained(terminal: int) -> str:
    """All that was written to a pseudo-terminal; one read gives only what the kernel has passed on so far."""
    chunks = []
    while select.select([terminal], [], [], 0.5)[0]:
        chunks.append(os.read(terminal, 100_000))
    return b"".join(chunks).decode()


def test_a_terminal_gets_a_bar_that_is_left_tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    before = sys.stdout, sys.stderr
    with open(theirs, "w") as terminal:
        progress = Progress(4, stream=terminal)
        for step in (1, 2, 3, 4):
            progress.update(step, {"reward": float(step), "kl": 0.5})
        progress.notice("a notice [x]")
        progress.close()
        progress.close()
        assert (sys.stdout, sys.stderr) == before
        terminal.flush()
        text = drained(ours)
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "1/4 reward 1  KL 0.5" in plain
    assert "4/4 reward 4  KL 0.5" in plain
    assert "a notice [x]\r\n" in plain
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and shown again"

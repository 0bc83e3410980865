from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from preceptor.errors import Interrupted, PreceptorError
from preceptor.runs.signals import StopSignals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def test_the_first_signal_only_asks(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.signal_number == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert capfd.readouterr().err == "\nSIGTERM: finishing this step and saving; once more stops at once\n"


@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_stops_at_once_and_the_third_is_as_ever(second: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    at_raise: list[object] = []

    def work() -> None:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            try:
                os.kill(os.getpid(), second)
                time.sleep(5)
            finally:
                at_raise.extend(signal.getsignal(number) for number in SIGNALS)

    with pytest.raises(Interrupted, match=f"stopped at once by {second.name}") as caught:
        work()
    assert at_raise == before
    assert caught.value.exit_code == 128 + second
    assert isinstance(caught.value, PreceptorError)


def test_a_launchers_signal_does_not_cut_short_what_is_to_be_said() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        stop.let_launcher_pass()
    os.kill(os.getpid(), signal.SIGTERM)  # would end the process, as it ends one that knows nothing of a launcher
    assert [signal.getsignal(number) for number in SIGNALS] == before, "the next one does what it always does"

    # The launcher's has come already: there is none to wait for.
    with StopSignals(says_so=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.let_launcher_pass()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_handlers_are_back_after_an_error() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]

    def work() -> None:
        with StopSignals():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        work()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with StopSignals() as stop:
            seen.append(stop.requested)
            seen.append([signal.getsignal(number) for number in SIGNALS] == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]

"""The cap holds exactly, whatever dies in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.data.embedders.spend_ledger import SpendLedger, format_usd
from preceptor.errors import ConfigError, StorageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spend.jsonl"


def test_money_is_exact() -> None:
    # 0.1 + 0.2 dollars is 0.3 dollars, which binary floats would miss.
    assert SpendLedger(Path("x"), max_usd=0.1).cap + SpendLedger(Path("x"), max_usd=0.2).cap == 300_000_000
    assert format_usd(300_000_000) == "$0.30"
    assert format_usd(20) == "$0.00000002"
    assert format_usd(0) == "$0.00"


def test_reservations_stop_at_the_cap_and_corrections_free_it(path: Path) -> None:
    ledger = SpendLedger(path, max_usd=1e-6)  # 1,000 nano-dollars
    assert ledger.reserve(600, note="a")
    assert not ledger.reserve(401, note="b")
    assert ledger.reserve(400, note="c")
    assert (ledger.spent, ledger.remaining) == (1000, 0)
    ledger.settle(reserved=600, actual=150, note="a")
    assert (ledger.spent, ledger.remaining) == (550, 450)
    assert ledger.state() == "$0.00000055 of $0.000001 spent"
    again = SpendLedger(path, max_usd=1e-6)
    assert not again.reserve(451, note="d")
    assert again.reserve(450, note="e")
    assert ledger.spent == 1000  # what another process spends counts at once
    assert SpendLedger(path, max_usd=5e-7).remaining == 0  # a lowered cap is passed already; never negative


def test_a_torn_last_line_is_dropped_on_the_safe_side(path: Path) -> None:
    ledger = SpendLedger(path, max_usd=1.0)
    ledger.reserve(600, note="a")
    ledger.settle(reserved=600, actual=100, note="a")
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        spent = SpendLedger(path, max_usd=1.0).spent
        assert spent == (0 if length < first else 600 if length < len(text) else 100)
    path.write_bytes(text[:-3])
    again = SpendLedger(path, max_usd=1.0)
    assert again.reserve(50, note="b")
    assert again.spent == SpendLedger(path, max_usd=1.0).spent == 650


def test_a_damaged_line_is_named_and_nothing_is_guessed(path: Path) -> None:
    path.write_text('{"nano_usd": 5}\n{"nano_usd": "7"}\n')
    with pytest.raises(StorageError, match=r"spend\.jsonl line 2 is damaged"):
        SpendLedger(path, max_usd=1.0).reserve(1, note="a")


@pytest.mark.parametrize("cap", [-0.01, float("nan"), float("inf")])
def test_a_cap_is_a_number_of_dollars(path: Path, cap: float) -> None:
    with pytest.raises(ConfigError, match="max_usd"):
        SpendLedger(path, max_usd=cap)

"""What is left ready for a GPU, at tiny sizes on the CPU: every part runs, and what time runs out on is not lost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_graph, gpu_session
from benchmarks.models import starter
from preceptor.lm.decode import Decoder
from preceptor.lm.sampling import Sampling


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("part", ["decode", "update", "busy", "graphs", "episodes"])
def test_a_part_appends_its_rows(part: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert gpu_session.main(["--measure", part, "--out", str(tmp_path), "--quick"]) == 0
    first, second = rows(tmp_path / "rows.jsonl")
    assert first["benchmark"] == second["benchmark"] == f"gpu {part}"
    if part == "busy":
        assert first["kernels_a_step"] > 10
        assert first["seconds_a_step"] > 0
    else:
        assert all(clocks["wall"]["median"] > 0 for clocks in first["seconds"].values())


def largest_gap() -> float:
    """Between the logits of a decoder and those of the step of fixed shape, over 40 tokens that the decoder samples."""
    lm = starter()
    prompts = torch.randint(3, lm.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(lm, batch_size=3)
    decoder.append(prompts.tolist())
    fixed = gpu_graph.GraphedDecoder(lm, prompts, slots=64)
    fixed.read()
    fixed.generate(30, sampling=Sampling(), generator=torch.Generator().manual_seed(9))
    fixed.read()  # again, over slots that hold something
    gaps = []
    for number in range(40):
        gaps.append(float((decoder.next_log_probs - fixed.logits.log_softmax(-1)).abs().max()))
        tokens = decoder.generate(1, sampling=Sampling(), generator=torch.Generator().manual_seed(number)).tokens
        fixed.token.copy_(tokens)
        fixed.step()
    return max(gaps)


def test_the_step_that_a_graph_replays_gives_what_a_decoder_gives() -> None:
    assert largest_gap() < 1e-4  # rounding: other kernels


def test_a_step_that_writes_to_one_slot_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(gpu_graph.FixedLayer):
        def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.slot = torch.full_like(self.slot, 20)
            return super().update(keys, values)

    monkeypatch.setattr(gpu_graph, "FixedLayer", Wrong)
    assert largest_gap() > 0.1


def test_a_step_that_sees_slots_of_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_graph.GraphedDecoder.__init__

    def wrong(self: gpu_graph.GraphedDecoder, *given: object, **named: object) -> None:
        made(self, *given, **named)  # type: ignore[arg-type]
        self.every_slot.zero_()  # no slot lies beyond the present one

    monkeypatch.setattr(gpu_graph.GraphedDecoder, "__init__", wrong)
    assert largest_gap() > 0.1


def test_goals_are_shares_of_the_measured_limits() -> None:
    lm = gpu.model(quick=True)
    goals = {"decode": ("generate()", 0.60), "update": ("Transformers", 0.45)}
    for part, (peer, goal) in goals.items():
        (comparison,) = gpu.PARTS[part](lm, True)
        (bar,) = comparison.bars
        assert (bar.against, bar.limit_at_least) == (peer, goal)
        assert "ours" in comparison.ideal_seconds


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_the_grpo_step_runs_in_bfloat16_on_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="a peer of the test extra")
    gpu_session.measure_part("grpo", tmp_path, quick=True)
    (row,) = rows(tmp_path / "rows.jsonl")
    assert row["benchmark"] == "gpu grpo"
    assert row["seconds"].keys() == {"ours", "TRL GRPOTrainer"}  # weights in bfloat16 have one way of ours
    assert all(0 < clocks["generation"]["median"] < clocks["wall"]["median"] for clocks in row["seconds"].values())


def test_a_part_out_of_time_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has a child of its own that outlives a plain kill and holds the output open."""
    sleeping = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    words = {
        "decode": [sys.executable, "-c", sleeping],
        "update": [sys.executable, "-c", "print('measured')"],
        "busy": [sys.executable, "-c", "raise SystemExit('no kernel')"],
    }
    monkeypatch.setattr(gpu_session, "command", lambda part, out, quick: words[part])
    monkeypatch.setitem(gpu_session.LIMITS, "decode", 2.0)
    begin = time.monotonic()
    assert not gpu_session.session(["decode", "update", "busy"], tmp_path, seconds=60, quick=True)
    assert time.monotonic() - begin < 30
    ended = rows(tmp_path / "parts.jsonl")
    assert [(row["part"], row["status"]) for row in ended] == [
        ("decode", "out of time"),
        ("update", "done"),
        ("busy", "failed"),
    ]
    assert [row["tail"].strip() for row in ended] == ["begun", "measured", "no kernel"]


def test_a_session_ends_when_its_own_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "command", lambda part, out, quick: ["sleep", "60"])
    assert not gpu_session.session(["decode", "update"], tmp_path, seconds=2, quick=True)
    assert [row["status"] for row in rows(tmp_path / "parts.jsonl")] == ["out of time", "not begun"]


def test_parts_are_commands_that_exist(tmp_path: Path) -> None:
    for part in gpu_session.LIMITS:
        words = gpu_session.command(part, tmp_path, quick=False)
        assert words[0] == sys.executable
        assert "--quick" not in words
    for quick, device in ((False, "cuda"), (True, "cpu")):
        words = gpu_session.command("smoke-bandit", tmp_path, quick=quick)
        assert words[words.index("--device") + 1] == device
    assert set(gpu.PARTS) < set(gpu_session.LIMITS)


def test_an_unknown_part_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_session.main(["decod"])
    assert "there is no part 'decod' (did you mean 'decode'?)" in capsys.readouterr().err

"""A run whose device's memory runs out: it goes on with fewer rows in a pass, says so, and a resume knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.runs.metrics import read_jsonl
from preceptor.systems.reading import loss
from preceptor.systems.reading.environment import Trajectories
from preceptor.systems.reading.policy import Keys, Policy
from preceptor.systems.reading.state import State
from tests.systems.reading.planted import learn, planted_config, planted_run, planted_setup

CONFIG = planted_config("update.steps=3", "update.query_kl_coefficient=0.01", "save_every=2")


def trained(folder: Path, *, limit: int = 10**6) -> tuple[list[dict[str, Any]], dict[str, Any], State]:
    """Metrics, newest checkpoint and a new state that has loaded it; more than ``limit`` rows at once do not fit."""
    real = loss.score_actions

    def short_of_memory(policy: Policy, part: Trajectories, keys: Keys, **options: Any) -> Any:
        if len(part) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(policy, part, keys, **options)

    with pytest.MonkeyPatch.context() as patch, planted_run(folder, CONFIG) as run:
        patch.setattr(loss, "score_actions", short_of_memory)
        setup = planted_setup(CONFIG, run)
        learn(setup)
        newest = run.checkpoints.latest()
        assert newest is not None
        state = State(setup.policy, setup.initial_policy.lm, CONFIG.update)
        streams = {name: generator.get_state() for name, generator in setup.generators().items()}
        state.load_state_dict({name: part for name, part in newest.state.items() if name != "run"})
    return list(read_jsonl(folder / "metrics.jsonl")), {**newest.state, "streams": streams}, state


def test_a_run_goes_on_with_fewer_rows_in_a_pass_and_learns_the_same(tmp_path: Path) -> None:
    assert CONFIG.update.micro_batch_size == 0
    batch = CONFIG.episode.batch_size
    plenty, checkpoint, state = trained(tmp_path / "plenty")
    assert state.micro_batch.found == 0
    assert all("micro_batch_size" not in row for row in plenty)
    short, short_checkpoint, state = trained(tmp_path / "short", limit=batch // 3)
    assert state.micro_batch.found == batch // 4 > 1
    assert short_checkpoint["micro_batch"] == {"found": batch // 4}
    assert [row["micro_batch_size"] for row in short] == [batch // 4] * 3
    for one, other in zip(plenty, short, strict=True):
        for name in ("reward", "policy_loss", "query_kl", "gradient_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5)
    for name, generator_state in checkpoint["streams"].items():
        assert torch.equal(short_checkpoint["streams"][name], generator_state), name
    notices = (tmp_path / "short" / "notices.log").read_text()
    assert notices.count(f"memory ran out; from now on {batch // 4} rows go through") == 1


def test_a_checkpoint_of_before_trials_is_read(tmp_path: Path) -> None:
    _, checkpoint, state = trained(tmp_path / "run")
    parts = {name: part for name, part in checkpoint.items() if name not in ("run", "streams", "micro_batch")}
    state.load_state_dict(parts)
    assert state.micro_batch.found == 0

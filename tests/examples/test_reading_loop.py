"""The reading method in one file does what the system does: same orders, same rewards, same losses."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from preceptor.config import load_config, to_dict
from preceptor.runs.folder import create_run
from preceptor.systems.base import Services
from preceptor.systems.reading import SYSTEM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "reading_loop.py"
NUM_UPDATES, SEED = 4, 3


def test_the_example_is_the_system(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    config = load_config(
        SYSTEM.Config,
        overrides=[
            f"seed={SEED}", f"update.steps={NUM_UPDATES}", f"data.num_pairs={example['NUM_PAIRS']}",
            f"episode.batch_size={example['NUM_EPISODES']}", f"episode.query_tokens={example['QUERY_TOKENS']}",
            "evaluation.every=0", "evaluation.num_episodes=1", "evaluation.num_orders=2", "evaluation.best_of=1",
            "evaluation.beam_width=1",
        ],
    )  # fmt: skip
    run = create_run(
        tmp_path / "run",
        system="reading",
        config=to_dict(config),
        seed=config.seed,
        save_every=config.save_every,
        streams=SYSTEM.streams,
        threads=1,
        quiet=True,
    )
    with run:
        SYSTEM.train(config, run, Services(cache_dir=tmp_path / "cache"))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    decisions = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()]

    def system_orders(step: int) -> list[list[int]]:
        first = (step - 1) * example["NUM_EPISODES"]
        episodes = [row for row in decisions if first <= row["episode"] < first + example["NUM_EPISODES"]]
        return [[span["pair"] for span in row["policy_spans"] if span["kind"] == "value"] for row in episodes]

    num_different = 0
    for row, (orders, reward, policy_loss) in zip(metrics, example["learn"](NUM_UPDATES, seed=SEED), strict=True):
        assert orders == system_orders(row["step"])
        # The same mathematics summed in another order; float32 rounding through four updates stays below 1e-5.
        assert reward == pytest.approx(row["reward"], abs=1e-5)
        assert policy_loss == pytest.approx(row["policy_loss"], abs=1e-5)
        num_different += len({tuple(order) for order in orders})
    assert num_different > NUM_UPDATES  # the orders vary, so that equal ones say something

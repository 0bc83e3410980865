"""A run from Python instead of the command line: configuration, run folder, training, result, page."""

from __future__ import annotations

import tempfile
from pathlib import Path

from preceptor.config import load_config, to_dict
from preceptor.report.page import build_report
from preceptor.runs.folder import create_run
from preceptor.systems.base import Services
from preceptor.systems.reading import SYSTEM


def main(folder: Path) -> None:
    config = load_config(
        SYSTEM.Config,
        overrides=["data.num_pairs=4", "episode.batch_size=4", "episode.query_tokens=4", "update.steps=2",
                   "evaluation.num_episodes=4", "evaluation.num_orders=8"],
    )  # fmt: skip
    run = create_run(
        folder,
        system="reading",
        config=to_dict(config),
        seed=config.seed,
        save_every=config.save_every,
        streams=SYSTEM.streams,
        quiet=True,
    )
    with run:
        result = SYSTEM.train(config, run, Services(cache_dir=folder / "cache"))
        run.write_result(result)
    for arm, metrics in result["arms"].items():
        print(f"{arm:<20}{metrics['order_gain']['mean']:+.4f} nats per value token")
    print(result["verdict"])
    print(f"read in this order: {result['order']}")
    print(build_report(folder))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as parent:
        main(Path(parent) / "run")

"""``python -m campaigns soak|fuzz [--seed N] [--seconds N] [--out DIR] [CLASS …]``; exit code 1 if anything failed."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from campaigns.tally import Campaign


def main() -> int:
    """Run the classes in turn until each has its number of trials or the time is up."""
    parser = argparse.ArgumentParser(prog="python -m campaigns", description=__doc__)
    parser.add_argument("campaign", choices=("soak", "fuzz"))
    parser.add_argument("classes", nargs="*", help="only these classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--out", type=Path, default=Path("build/campaigns"))
    options = parser.parse_intermixed_args()
    classes = importlib.import_module(f"campaigns.{options.campaign}").CLASSES
    if unknown := set(options.classes) - classes.keys():
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(classes)}")
    folder = options.out.resolve() / f"{options.campaign}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: each for name, each in classes.items() if not options.classes or name in options.classes}
    return Campaign(folder, seed=options.seed).run(chosen, seconds=options.seconds)


if __name__ == "__main__":
    sys.exit(main())

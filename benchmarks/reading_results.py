"""Runs of reading over seeds and articles, and one result over all of them: the table in docs/systems/reading.md.

    python -m benchmarks.reading_results --out runs/one --seeds 0 1 2 3 4 --articles A.txt B.txt -- --set KEY=VALUE
    python -m benchmarks.reading_results --out runs/many --seeds 0 1 2 3 4 -- --train-articles A/ --eval-articles B/

Each cell is a ``preceptor run reading`` of its own with one thread; several run at once. A cell that has its
``result.json`` is not run again, so a killed sweep goes on. The words after ``--`` are passed to every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from preceptor.report.table import arms_table
from preceptor.run.environment import code_version
from preceptor.run.files import replace_file
from preceptor.systems.reading.result import reading_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then merge and print."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, passed = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells and of the merged result")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--articles", nargs="*", default=[], help="a cell per article; none: one cell per seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args(own)
    cells = [(seed, article) for seed in options.seeds for article in options.articles or [""]]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda cell: _run(options.out, cell[0], cell[1], passed), cells))
    records = [record for result in results for record in result["records"]]
    merged = reading_result(records, config=results[0]["config"], seeds=options.seeds)
    merged["code"], merged["command"] = code_version(), words
    replace_file(options.out / "result.json", json.dumps(merged, indent=2) + "\n")
    Console(width=200).print(arms_table(merged["arms"], title=f"reading: {len(cells)} runs"))
    print(json.dumps(merged["gap_closed"], indent=2))
    print(merged["verdict"])
    return 0


def _run(out: Path, seed: int, article: str, passed: list[str]) -> dict[str, Any]:
    folder = out / f"seed{seed}{'-' + Path(article).stem if article else ''}"
    if not (folder / "result.json").is_file():
        command = ["resume", str(folder)] if (folder / "manifest.json").is_file() else ["run", "reading", *passed]
        if command[0] == "run":
            command += ["--seed", str(seed), "--out", str(folder), *(["--article", article] if article else [])]
            command += ["--threads", "1"]
        print(f"{folder}: {' '.join(command)}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "preceptor", *command, "--no-report"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    sys.exit(main())

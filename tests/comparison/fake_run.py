"""Stands in for ``python -m preceptor``: run | resume of a made-up system, resumable anywhere, its numbers by seed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEPS = int(os.environ.get("FAKE_RUN_STEPS", "4"))


def main(words: list[str]) -> int:
    folder = Path(words[words.index("--out") + 1] if words[0] == "run" else words[1])
    if words[0] == "run" and os.environ.pop("FAKE_RUN_OVERTAKEN", None) == folder.name:
        # A run that an earlier sweep started, and whose folder that of this sweep did not see yet.
        subprocess.Popen([sys.executable, *sys.argv], start_new_session=True)
        while not (folder / "manifest.json").exists():
            time.sleep(0.01)
        print(f"preceptor: error: {folder} already holds a run", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("preceptor: error: in use", file=sys.stderr)
        return 4
    with open(os.environ["FAKE_RUN_STARTS"], "a") as starts:
        starts.write(f"{folder.name} {words[0]}\n")
    if words[0] == "run":
        seed = int(words[words.index("--seed") + 1])
        if f"{seed}" == os.environ.get("FAKE_RUN_REFUSES"):
            print("preceptor: error: `seed` is refused", file=sys.stderr)
            return 2
        if f"{seed}" in os.environ.get("FAKE_RUN_DIVERGES", "").split():
            print("preceptor: error: the loss stayed NaN", file=sys.stderr)
            return 3
        config = json.loads(os.environ["FAKE_RUN_CONFIG"]) | {"seed": seed, "input": words[words.index("--input") + 1]}
        manifest = {
            "schema": 1, "system": "toy", "seed": seed, "streams": [], "save_every": 1, "keep_last": 1, "trackers": [],
            "device": "cpu", "code": {"commit": "c0ffee"}, "config": config, "environment": {"threads": 1},
            "group": next((word.removeprefix("--group=") for word in words if word.startswith("--group=")), None),
        }  # fmt: skip
        replace(folder / "manifest.json", json.dumps(manifest))
    config = json.loads((folder / "manifest.json").read_text())["config"]
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    for step in range(len(rows) + 1, STEPS + 1):
        time.sleep(float(os.environ.get("FAKE_RUN_SECONDS", "0.02")))
        row = {"step": step, "seconds": time.perf_counter(), "reward": seed_of(config) + step}
        if mebibytes := os.environ.get("FAKE_RUN_GPU_MIB"):
            row["peak_memory_mib"] = float(mebibytes)
        rows.append(json.dumps(row))
        replace(metrics, "".join(f"{row}\n" for row in rows))
    records = [
        {
            "arm": arm, "item": config["input"], "split": "train", "seed": config["seed"],
            "score": number(arm, config) + config["bonus"] * (arm == "learned"), "tokens": 100.0,
            "seconds": time.perf_counter(),
        }
        for arm in ("learned", "random", "untrained")
    ]  # fmt: skip
    replace(folder / "result.json", json.dumps({"system": "toy", "records": records}))
    return 0


def number(arm: str, config: dict[str, object]) -> float:
    """In [0, 1), by arm, input and seed."""
    text = f"{arm} {config['input']} {config['seed']}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32


def seed_of(config: dict[str, object]) -> int:
    return int(str(config["seed"]))


def replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

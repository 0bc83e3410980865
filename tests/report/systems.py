"""Finished runs of the systems other than reading, made up, in the form that their training leaves them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

ARMS = ("learned", "shuffled", "evolution", "random", "best_of_n", "joint")
DATASETS = ("code", "manual", "dialogue", "noise")
PROMPTS = tuple(f"{verb} bean or chickpea:" for verb in ("Pick", "Say", "I choose", "Which is it,"))


def write_system_run(folder: Path, system: str, *, num_steps: int, seed: int = 0) -> Path:
    """A finished run of ``num_steps`` steps in ``folder``, which is made."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    rows, decisions, result = {"bandit": bandit, "curriculum": curriculum, "surgery": surgery}[system](
        generator, num_steps
    )
    for name, written in (("metrics", rows), ("decisions", decisions)):
        text = "".join(json.dumps(row) + "\n" for row in written)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    result |= {"system": system, "status": "finished", "seeds": [seed], "verdict": "no difference can be claimed"}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"system": system, "seed": seed, "device": "cpu"}))
    return folder


Written = tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]


def bandit(generator: random.Random, num_steps: int) -> Written:
    rows, decisions = [], []
    for step in range(1, num_steps + 1):
        best = 1 - 0.5 * math.exp(-6 * step / num_steps)
        word = "bean" if generator.random() < best else "chickpea"
        rows.append(
            {
                "step": step, "phase": "rewards", "bandit": "bean/chickpea", "reward": generator.gauss(7, 1),
                "loss": generator.gauss(0, 1), "mean_reward": {"all": 7 * best}, "gradient_norm": generator.random(),
                "seconds": 0.1, "peak_memory_mib": 600.0,
            }
        )  # fmt: skip
        decisions.append(
            {
                "step": step, "arm": "learned", "bandit": "bean/chickpea", "pull": step, "prompt": PROMPTS[step % 4],
                "words": ["bean", "chickpea"], "probabilities": [best, 1 - best], "word": word, "reward": 10.0,
            }
        )  # fmt: skip
    charts = [
        {
            "kind": "matrix", "title": "Crossed contexts", "unit": "probability", "rows": ["bean", "chickpea"],
            "columns": ["learned", "pretrained"], "values": [[0.9, 0.5], [0.1, 0.5]], "low": 0.0, "high": 1.0,
        },
        {"kind": "lines", "title": "Mean reward so far", "unit": "reward/pull", "columns": {"mean_reward.all": "all"}},
    ]  # fmt: skip
    return rows, decisions, {"arms": arms(("learned", "uniform"), ("reward",)), "charts": charts}


def curriculum(generator: random.Random, num_steps: int) -> Written:
    trained = ("learning_progress+ppo", "frozen_policy", "uniform", *(f"static_no_{name}" for name in DATASETS))
    rows: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    for number, arm in enumerate(trained, start=1):
        for step in range(1, num_steps // len(trained) + 1):
            weights = [generator.random() for _ in DATASETS]
            rows.append(
                {
                    "step": len(rows) + 1, "arm": arm, "arm_number": number, "arm_step": step, "tokens": 64 * step,
                    "weights": dict(zip(DATASETS, weights, strict=True)), "seconds": 0.4, "peak_memory_mib": 900.0,
                    **{
                        name: generator.random()
                        for name in (
                            "reward", "kl", "entropy", "policy_loss", "value_loss", "old_policy_kl", "clip_fraction",
                            "gradient_norm", "value_gradient_norm", "cross_entropy", "tokens_per_second",
                        )
                    },
                }
            )  # fmt: skip
            decisions.append(
                {
                    "step": step, "arm": arm, "kind": "rollout", "dataset": "code", "prompt_token_ids": [1] * 16,
                    "token_ids": [2] * 24, "prompt": "def f(x):", "text": "    return x" * 4, "reward": 0.5,
                }
            )  # fmt: skip
    x = list(range(1, num_steps // len(trained) + 1))
    lines = {name: [generator.random() for _ in x] for name in DATASETS}
    charts = [
        {
            "kind": "series", "title": "Weights of the datasets", "unit": "share of tokens", "x_label": "measurement",
            "x": x, "lines": lines,
        }
    ]  # fmt: skip
    return rows, decisions, {"arms": arms(trained, ("loss_fall", "kl")), "charts": charts}


def surgery(generator: random.Random, num_steps: int) -> Written:
    rows: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    for arm in ("no_edit", *ARMS, "gradient", "cross_entropy"):
        for step in range(1, num_steps // 9 + 1):
            inner = {name: generator.random() for name in ("reward", "quality", "loss", "accuracy", "gradient_norm")}
            rows.append(
                {
                    "step": len(rows) + 1, "arm": arm, "phase": "surgery", "stretch_step": step,
                    "reward": inner["reward"], "tokens": 10 * step, "peak_memory_mib": 600.0, arm: inner,
                }
            )  # fmt: skip
            if arm in ARMS:
                quality = {"total": -2.0, "log_prob": -2.2, "repetition": 0.01}
                decisions.append(
                    {
                        "step": len(rows), "arm": arm, "phase": "surgery", "edit": step,
                        "action": [generator.uniform(-1, 1) for _ in range(16)], "reward": inner["reward"],
                        "quality_before": quality, "quality_after": quality, "tested": None, "acceptance": None,
                        "committed": step % 50 == 7,
                    }
                )  # fmt: skip
    config = {
        "edit": {"kind": "singular_values", "roles": ["query", "key", "value", "output"], "layers": [], "rank": 2},
        "student": {"num_heads": 4},
    }
    columns = {f"{arm}.reward": arm for arm in ARMS}
    charts = [{"kind": "lines", "title": "Surgery: reward of each edit", "unit": "reward", "columns": columns}]
    return rows, decisions, {"arms": arms(ARMS, ("quality",)), "charts": charts, "config": config}


def arms(names: tuple[str, ...], metrics: tuple[str, ...]) -> dict[str, Any]:
    """The estimates of one seed, which have no interval."""
    return {
        name: {metric: {"mean": 0.1 * k, "low": None, "high": None, "unit": "nats", "n": 1} for metric in metrics}
        for k, name in enumerate(names)
    }

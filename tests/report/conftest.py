"""A run folder as training leaves it, made up: learning that saturates, a dozen arms, twenty episodes, hostile text."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOSTILE = (
    "<script>document.title='owned'</script>",
    "<!--<script>",
    "</script><img src=x onerror=document.title='owned'>",
    "\u202eright to left\u202c and \u2028 line \u2029 separators",
    "]]></style></textarea></title><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %} & &amp; &lt;b&gt; \"'`",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \U0001f9ea \x00\x07 end",
)
KEYS = (
    "A lighthouse is a tower that guides ships by night.",
    "The first were fires lit on hills above the harbour.",
    "Lenses of ground glass multiplied the light of a single lamp.",
    "Keepers lived in the tower and wound the clockwork each evening.",
    "Fog made the light useless, so bells and horns were added.",
    "Each tower had its own rhythm of flashes by which it was known.",
    "Electric lamps ended the carrying of oil up the stairs.",
    "Most towers are now automatic, and some are museums.",
)
VALUES = (
    "Its lamp stands high enough to be seen from beyond the horizon.",
    "Wood had to be carried up, and rain put many of them out.",
    "With them one flame could be seen from twenty miles away.",
    "The weight sank through the middle of the stairs until dawn.",
    "A horn was heard for a few miles, less against the wind.",
    "Sailors looked the pattern up in a printed list.",
    "A bulb the size of a finger replaced a wick the size of a hat.",
    "Visitors climb the stairs that the keepers used to climb.",
)
ARMS = {
    "exhaustive_oracle": 0.231,
    "beam_oracle": 0.224,
    "learned": 0.198,
    "greedy_oracle": 0.205,
    "best_of_n": 0.121,
    "nearest_chain": 0.043,
    "easy_to_hard": 0.028,
    "mmr": 0.011,
    "untrained": 0.004,
    "random": 0.0,
    "farthest_first": -0.022,
    "hard_to_easy": -0.047,
    "document": -0.061,
    "reverse": -0.118,
}


@pytest.fixture
def build_run() -> Callable[..., Path]:
    """The builder of run folders, :func:`write_run`."""
    return write_run


@pytest.fixture
def hostile() -> tuple[str, ...]:
    """Texts that break a careless page."""
    return HOSTILE


def write_run(
    folder: Path, *, num_steps: int = 400, num_episodes: int = 20, seed: int = 0, payloads: tuple[str, ...] = HOSTILE
) -> Path:
    """Write a finished run of ``num_steps`` steps into ``folder``, which is made; ``payloads`` are seven texts."""
    generator = random.Random(seed)
    folder.mkdir(parents=True)
    articles = {
        "lighthouse": _article("Lighthouse", KEYS, VALUES),
        "hostile": _article(payloads[0], payloads, tuple(reversed(payloads))),
    }
    episodes = [_episode(generator, k, articles, num_episodes, num_steps) for k in range(num_episodes)]
    metrics = [_metrics(generator, step, num_steps) for step in range(1, num_steps + 1)]
    _write_rows(folder / "metrics.jsonl", metrics)
    _write_rows(folder / "decisions.jsonl", episodes)
    _write(folder / "articles.json", articles)
    _write(folder / "result.json", _result(generator))
    _write(
        folder / "manifest.json",
        {"versions": {"preceptor": "0.1.0", "torch": "2.13.0"}, "seeds": [0], "device": "cpu", "note": payloads[2]},
    )
    config = f'system: reading\nseed: 0\narticle: "{payloads[1]}"\nupdate:\n  learning_rate: 1.0e-4\n'
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _article(title: str, keys: tuple[str, ...], values: tuple[str, ...]) -> dict[str, Any]:
    pairs = [{"index": k, "key": key, "value": value} for k, (key, value) in enumerate(zip(keys, values, strict=True))]
    return {"title": title, "pairs": pairs, "probes": []}


def _metrics(generator: random.Random, step: int, num_steps: int) -> dict[str, Any]:
    learned = 1 - math.exp(-4 * step / num_steps)
    reward = -3.1 + 0.2 * learned + generator.gauss(0, 0.05)
    row: dict[str, Any] = {
        "step": step,
        "reward": reward,
        "normalised_reward": 0.18 * learned + generator.gauss(0, 0.04),
        "passed_fraction": min(1.0, max(0.0, 0.35 - 0.2 * learned + generator.gauss(0, 0.08))),
        "policy_loss": 0.4 * math.exp(-2 * step / num_steps) * generator.gauss(0, 1),
        "kl": 0.02 * learned + abs(generator.gauss(0, 0.002)),
        "selection_kl": 0.9 * learned + abs(generator.gauss(0, 0.05)),
        "gradient_norm": math.exp(generator.gauss(-0.5 * learned, 0.4)),
        "query_entropy": 4.9 - 1.6 * learned + generator.gauss(0, 0.15),
        "query_entropy_maximum": math.log(4096),
        "selection_entropy": 0.9 - 0.55 * learned + generator.gauss(0, 0.03),
        "tokens_per_second": 5_200 + generator.gauss(0, 300),
        "peak_memory_mib": 612.0,
        "reward_by_position": [-3.6 + 0.1 * k + 0.2 * learned * (k > 1) + generator.gauss(0, 0.05) for k in range(8)],
        "seconds": 0.7 * step,
    }
    if step % 50 == 0:
        row["gap_closed_train"] = 0.86 * learned + generator.gauss(0, 0.02)
    if step == 118:
        row["reward"] = None  # a skipped step
    return row


def _result(generator: random.Random) -> dict[str, Any]:
    def estimate(mean: float, spread: float, unit: str) -> dict[str, Any]:
        low, high = mean - spread * generator.uniform(0.8, 1.2), mean + spread * generator.uniform(0.8, 1.2)
        return {"mean": mean, "low": low, "high": high, "unit": unit, "n": 25}

    arms = {
        arm: {
            "order_gain": estimate(gain, 0.025, "nats per value token"),
            "selection_gain": estimate(0.6 * gain, 0.04, "nats per probe token"),
            "progress_auc": estimate(-3.4 + 0.3 * gain, 0.03, "nats per probe token"),
            "reward": estimate(-3.0 + gain, 0.05, "nats per value token"),
            "model_calls": {"mean": generator.randint(8, 14_000), "low": None, "high": None, "unit": "calls", "n": 25},
        }
        for arm, gain in ARMS.items()
    }
    gap = {"unit": "share of the gap", "n": 25, "oracle": "exhaustive optimum", "reason": None}
    return {
        "system": "reading",
        "status": "finished",
        "seeds": [0, 1, 2, 3, 4],
        "arms": arms,
        "oracles": [arm for arm in arms if arm.endswith("_oracle")],
        "gap_closed": {
            "train": {"mean": 0.86, "low": 0.71, "high": 0.97, **gap},
            "held_out": {"mean": 0.03, "low": -0.11, "high": 0.18, **gap},
        },
        "verdict": (
            "On 5 training articles (5 seeds; 95 % intervals), "
            "learned is 0.198 nats per value token above random in order gain (0.174 to 0.223). "
            "On 5 held-out articles (5 seeds; 95 % intervals), no difference can be claimed "
            "between learned and random in order gain (0.004 nats per value token (-0.02 to 0.03)). "
            "Share closed of the gap from random to the oracle: in training 86 % (71 to 97) to the exhaustive optimum; "
            "on held-out articles 3 % (-11 to 18) to the exhaustive optimum."
        ),
    }


def _episode(
    generator: random.Random, number: int, articles: dict[str, Any], num_episodes: int, num_steps: int
) -> dict[str, Any]:
    arm = ("learned", "learned", "untrained", "document")[number % 4]
    name = ("lighthouse", "hostile")[number // 4 % 2]
    pairs = articles[name]["pairs"]
    remaining = list(range(len(pairs)))
    asks = arm != "document"
    token = 0
    policy: list[dict[str, Any]] = [{"kind": "prompt", "start": 0, "end": 3, "pair": None}]
    texts = ["Ask for what to read next."]
    reader: list[dict[str, Any]] = []
    probabilities = []
    for position in range(len(pairs)):
        weights = [math.exp(3.0 * number / num_episodes * ((k * 5) % 8) / 8) for k in remaining]
        pair = generator.choices(remaining, weights)[0] if asks else remaining[0]
        row = [0.0] * len(pairs)
        for k, weight in zip(remaining, weights, strict=True):
            row[k] = weight / sum(weights)
        if asks:
            probabilities.append(row)
            log_probs = [-generator.expovariate(0.5) for _ in range(16)]
            policy.append(
                {"kind": "query", "start": token, "end": token + 16, "pair": pair, "sampled_log_probs": log_probs}
            )
            texts.append(
                pairs[position]["key"] if name == "hostile" else "how did the light reach ships before the lamps of"
            )
        remaining.remove(pair)
        length = 14 + 3 * (pair % 4)
        span = {"kind": "value", "start": token, "end": token + length, "pair": pair}
        policy.append(span)
        texts.append(pairs[pair]["value"])
        reference = [-generator.expovariate(0.3) for _ in range(length)]
        log_probs = [min(-0.001, value + 0.25 * position / len(pairs) - 0.1) for value in reference]
        reader.append({**span, "log_probs": log_probs, "reference_log_probs": reference})
        token += length
    reader.append(
        {"kind": "probe", "start": token, "end": token + 4, "pair": None, "log_probs": [-3.0, -2.0, -4.0, -3.0]}
    )
    return {
        "episode": number,
        "step": 1 + number * num_steps // num_episodes,
        "arm": arm,
        "article": name,
        "policy_token_ids": [1, 2, 3],
        "policy_spans": policy,
        "texts": texts,
        "reader_token_ids": [1, 2, 3],
        "reader_spans": reader,
        "temperature": 0.05,
        "selection_probabilities": probabilities,
        "reward": -3.0 + generator.gauss(0, 0.05),
        "normalised_reward": generator.gauss(0.1, 0.05),
        "passed": generator.random() < 0.2,
    }

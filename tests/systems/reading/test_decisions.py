"""decisions.jsonl and the model are enough: every number is computed again with plain Transformers, nothing of ours.

Below the line that says so, only json, torch and transformers are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.cli import main

TINY = (
    "data.num_pairs=3", "data.num_probes=2", "episode.batch_size=4", "episode.query_tokens=3", "evaluation.every=0",
    "evaluation.num_episodes=3", "evaluation.num_orders=3", "evaluation.best_of=2", "evaluation.beam_width=2",
    "save_every=1", "update.learning_rate=1e-3",
)  # fmt: skip
KINDS = {
    "values": ("update.steps=2",),
    "probe": ("update.steps=2", "reward.kind=probe", "episode.budget=2", "episode.temperature=0.7", "episode.top_k=50"),
    "untrained_query": ("update.steps=2", "reward.context=queries", "reward.normalisation=untrained_query"),
    "untrained_reader": ("update.steps=1", "reward.reader=policy", "reward.normalisation=untrained_reader"),
}


def run_on(folder: Path, model: Path, article: Path, *overrides: str) -> list[dict[str, Any]]:
    sets = [argument for override in (*TINY, *overrides) for argument in ("--set", override)]
    arguments = [
        "run",
        "reading",
        "--model",
        str(model),
        "--article",
        str(article),
        "--out",
        str(folder),
        "--no-report",
    ]
    assert main([*arguments, "--threads", "1", *sets]) == 0
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]


# ---- from here on: json, torch, transformers -------------------------------------------------------------------------


class Plain:
    """A model as anyone would load it."""

    def __init__(self, folder: Path, weights: Path | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if weights is not None:  # trained ones, from a checkpoint
            named = dict(self.model.named_parameters())
            prefix = "policy.model."
            saved = {n.removeprefix(prefix): t for n, t in load_file(weights).items() if n.startswith(prefix)}
            assert saved.keys() == named.keys()
            with torch.no_grad():
                for name, tensor in saved.items():
                    named[name].copy_(tensor)

        self._last: tuple[list[int], Tensor] = ([], torch.empty(0))

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        if self._last[0] != tokens:  # the spans of a row come one after another
            self._last = tokens, self.model(input_ids=torch.tensor([tokens])).logits[0].float()
        return self._last[1].clone()

    def log_probs(self, tokens: list[int], start: int, end: int) -> Tensor:
        """Of tokens[start:end], each after everything before it."""
        log_probs = self.logits(tokens).log_softmax(-1)
        return torch.stack([log_probs[at - 1, tokens[at]] for at in range(start, end)])

    def sampling_log_probs(self, tokens: list[int], start: int, end: int, *, temperature: float, top_k: int) -> Tensor:
        """Of the same under the distribution that queries are drawn from: no control tokens, temperature, top-k."""
        logits = self.logits(tokens)
        logits[:, sorted({*self.tokenizer.all_special_ids})] = -torch.inf
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
        log_probs = (logits / temperature).log_softmax(-1)
        return torch.stack([log_probs[at - 1, tokens[at]] for at in range(start, end)])


def close(found: list[float], expected: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), expected, rtol=0, atol=1e-4)


def check_row(
    row: dict[str, Any], reader: Plain, *, config: dict[str, Any], reference: Plain | None, in_training: bool
) -> int:
    """Compares a row with what ``reader`` (and ``reference``) say; returns how many log-probabilities were compared."""
    tokens, compared = row["reader_token_ids"], 0
    values: list[float] = []
    references: list[float] = []
    probe: list[float] = []
    probe_reference: list[float] = []
    queries = [span for span in row["policy_spans"] if span["kind"] == "query"]
    step = -1
    for span in row["reader_spans"]:
        if span["kind"] not in ("value", "probe"):
            assert "log_probs" not in span
            continue
        step += span["kind"] == "value"
        close(span["log_probs"], reader.log_probs(tokens, span["start"], span["end"]))
        compared += len(span["log_probs"])
        (probe if span["kind"] == "probe" else values).extend(span["log_probs"])
        if "reference_log_probs" in span:
            assert reference is not None
            if "reference_query_token_ids" in row:
                # What the untrained model wrote takes the place of the query; what stood before it stays.
                other = row["reference_query_token_ids"][step]
                before = [*row["policy_token_ids"][: queries[step]["start"]], *other]
                read = tokens[span["start"] : span["end"]]
                expected = reference.log_probs([*before, *read], len(before), len(before) + len(read))
            else:
                expected = reference.log_probs(tokens, span["start"], span["end"])
            close(span["reference_log_probs"], expected)
            compared += len(expected)
            (probe_reference if span["kind"] == "probe" else references).extend(span["reference_log_probs"])
    uses_probe = in_training and config["reward"]["kind"] == "probe"
    earned, subtracted = (probe, probe_reference) if uses_probe else (values, references)
    reward = sum(earned) / len(earned)
    assert row["reward"] == pytest.approx(reward, abs=1e-5)
    normalised = reward - (sum(subtracted) / len(subtracted) if subtracted else 0.0)
    assert row["normalised_reward"] == pytest.approx(normalised, abs=1e-5)
    return compared


def check_queries(row: dict[str, Any], policy: Plain, *, config: dict[str, Any]) -> int:
    episode = config["episode"]
    compared = 0
    for span in row["policy_spans"]:
        if span["kind"] == "query":
            expected = policy.sampling_log_probs(
                row["policy_token_ids"],
                span["start"],
                span["end"],
                temperature=episode["temperature"],
                top_k=episode["top_k"],
            )
            close(span["sampled_log_probs"], expected)
            compared += len(expected)
        else:
            assert "sampled_log_probs" not in span
    return compared


def check_all_queries(rows: list[dict[str, Any]], policy: Plain, *, config: dict[str, Any]) -> None:
    for row in rows:
        check_queries(row, policy, config=config)


def check_selection(row: dict[str, Any], num_pairs: int) -> None:
    order = [span["pair"] for span in row["policy_spans"] if span["kind"] == "value"]
    assert len(row["selection_probabilities"]) == len(order)
    for step, probabilities in enumerate(row["selection_probabilities"]):
        assert len(probabilities) == num_pairs
        assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
        assert [probability == 0 for probability in probabilities] == [
            pair in order[:step] for pair in range(num_pairs)
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stories260k", "stories3m"])
def test_everything_can_be_computed_again_from_outside(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    folder, model = tmp_path / "run", test_data / "lm" / name
    rows = run_on(folder, model, test_data / "wiki" / "articles" / "Aikido.txt", *KINDS[kind])
    config = json.loads((folder / "manifest.json").read_text())["config"]
    articles = json.loads((folder / "articles.json").read_text())
    untrained = Plain(model)
    final = Plain(model, folder / "checkpoints" / f"step-{config['update']['steps']:06d}" / "policy.safetensors")
    after_one = Plain(model, folder / "checkpoints" / "step-000001" / "policy.safetensors")
    reader_learns = config["reward"]["reader"] == "policy"
    num_training = config["update"]["steps"] * config["episode"]["batch_size"]
    log_probs = query_log_probs = 0
    assert [row["episode"] for row in rows] == list(range(len(rows)))
    for row in rows:
        in_training = row["episode"] < num_training
        reader = untrained if in_training or not reader_learns else final
        needs_reference = in_training and config["reward"]["normalisation"] != "none"
        assert needs_reference == any("reference_log_probs" in span for span in row["reader_spans"])
        log_probs += check_row(row, reader, config=config, reference=untrained, in_training=in_training)
        if row["arm"] != "learned" or (in_training and row["step"] == 1):
            acting = untrained
        else:
            acting = after_one if in_training else final
        query_log_probs += check_queries(row, acting, config=config)
        check_selection(row, num_pairs=3)
        assert row["article"] in articles
        for span, text in zip(row["policy_spans"], row["texts"], strict=True):
            if span["kind"] == "value":
                assert text.strip() == articles[row["article"]]["pairs"][span["pair"]]["value"]
    assert sum(row["arm"] == "untrained" for row in rows) == 3
    assert log_probs > 1_000
    # Three tokens a query; the budget in training, three pairs in evaluation.
    num_evaluated = len(rows) - num_training
    assert query_log_probs == 3 * ((config["episode"]["budget"] or 3) * num_training + 3 * num_evaluated)
    if kind == "values":
        assert any(row["reader_spans"][-1]["kind"] == "probe" for row in rows)
    # The weights did move: the learned arm's queries at the end are not the untrained model's.
    learned = [row for row in rows if row["arm"] == "learned" and row["episode"] >= num_training]
    with pytest.raises(AssertionError):
        check_all_queries(learned, untrained, config=config)
    capsys.readouterr()

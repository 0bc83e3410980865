"""Recorded orders read again, without the policy: what the frozen reader gives for them beside what was recorded.

The sequences are built from the run's ``articles.json`` and the pairs that each decision names. The reader's recorded
numbers are only compared with. The policy's own probabilities are not recomputed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import DataError, StorageError
from preceptor.lm.load import load_language_model
from preceptor.runs.device import parse_dtype
from preceptor.runs.files import storage_errors
from preceptor.runs.metrics import read_jsonl
from preceptor.systems.base import Replayed, Services
from preceptor.systems.reading.articles import ArticlePairs, TokenizedArticle, TokenSequence
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.rewards import LanguageModelReader, SequenceScores, probe_rewards, value_rewards
from preceptor.systems.reading.setup import kept_markers, tokenize_articles

BATCH = 64
"""Decisions that are scored together."""


def verify(config: ReadingConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Three comparisons for every decision of the run in ``folder``.

    Its reward (nats per token); how many tokens of the policy's and the reader's sequences differ from those that the
    named pairs and queries give (recorded 0); and the largest difference of a token's log-probability (recorded 0).

    Raises:
        DataError: the reader was trained, so that its past weights are gone, or a decision names a pair that the
            article does not have.
        StorageError: a file of the run is missing or damaged.
    """
    if config.episode.pool == "mixed":
        from preceptor.systems.reading.study.verify import verify as verify_study

        yield from verify_study(config, folder)
        return
    if config.reward.reader == "policy":
        raise DataError(
            "the reader of this run was the policy as it learned, whose past weights are gone; "
            "only runs with a frozen reader can be replayed"
        )
    cpu = torch.device("cpu")
    # The text as it was read then: an article on the network may have changed since.
    pairs = _read_articles(folder / "articles.json")
    policy_lm = load_language_model(config.model.name, device=cpu, dtype=parse_dtype(config.model.dtype))
    kept = kept_markers(folder)
    articles = tokenize_articles(pairs, policy_lm, config.model, kept=kept)
    reader = LanguageModelReader(policy_lm)
    if config.reward.reader:
        reader_lm = load_language_model(config.reward.reader, device=cpu)
        reader_articles = tokenize_articles(pairs, reader_lm, config.model, kept=kept)
        reader = LanguageModelReader(reader_lm, policy_lm=policy_lm, articles=reader_articles)
    decisions = read_jsonl(folder / "decisions.jsonl")
    # In batches, as the reader scored them: one at a time would take many times as long.
    while batch := list(islice(decisions, BATCH)):
        sequences = [_sequences(decision, articles, reader) for decision in batch]
        scores = reader.score([reader_sequence for _, reader_sequence in sequences])
        for decision, (policy_sequence, _), each in zip(batch, sequences, scores, strict=True):
            try:
                yield from _comparisons(config, decision, policy_sequence, each)
            except (KeyError, TypeError) as error:
                raise _malformed(decision, error) from error


def _read_articles(path: Path) -> list[ArticlePairs]:
    with storage_errors(f"read {path}"):
        text = path.read_bytes()
    try:
        return [
            ArticlePairs(
                name=name,
                title=article["title"],
                keys=tuple(pair["key"] for pair in article["pairs"]),
                values=tuple(pair["value"] for pair in article["pairs"]),
                probe=" ".join(article["probes"]),
            )
            for name, article in json.loads(text).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is damaged ({error}); restore it from a copy") from error


def _sequences(
    decision: Mapping[str, Any], articles: Mapping[str, TokenizedArticle], reader: LanguageModelReader
) -> tuple[TokenSequence, TokenSequence]:
    """What the policy and the reader saw, from the pairs that were read and the queries that were written."""
    try:
        article = articles[decision["article"]]
        order = [span["pair"] for span in decision["policy_spans"] if span["kind"] == "value"]
        # Negative numbers would be valid indices in Python.
        if not all(isinstance(pair, int) and 0 <= pair < article.num_pairs for pair in order):
            last = article.num_pairs - 1
            raise DataError(f"decisions.jsonl, {_where(decision)}: pairs {order} are not all among 0..{last}")
        queries = [
            decision["policy_token_ids"][span["start"] : span["end"]]
            for span in decision["policy_spans"]
            if span["kind"] == "query"
        ]
        kinds = {span["kind"] for span in decision["reader_spans"]}
        policy_sequence = article.policy_sequence(order, queries)
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(decision, error) from error
    # Which context the reader had is seen from the spans that it recorded.
    readers, with_probe = reader.article(article), "probe" in kinds
    if "query" in kinds:
        own = [reader.query_tokens(query) for query in queries]
        return policy_sequence, readers.policy_sequence(order, own, with_probe=with_probe)
    return policy_sequence, readers.reader_sequence(order, with_probe=with_probe)


def _comparisons(
    config: ReadingConfig, decision: Mapping[str, Any], policy_sequence: TokenSequence, scores: SequenceScores
) -> Iterator[Replayed]:
    where = _where(decision)
    # The final evaluation, whose episodes come after all of training, always uses the reward of the values.
    in_training = decision["episode"] < config.update.steps * config.episode.batch_size
    measure = probe_rewards if in_training and config.reward.kind == "probe" else value_rewards
    recorded = decision["reward"]  # null where it was not finite
    yield Replayed(where, float("nan") if recorded is None else float(recorded), float(measure([scores]).total[0]))

    # Tokens: a changed tokenizer, template or article shows here before it shows in a reward.
    differing = _num_differing(decision["policy_token_ids"], policy_sequence.tokens)
    differing += _num_differing(decision["reader_token_ids"], scores.sequence.tokens)
    yield Replayed(f"{where}: tokens that the pairs do not give", 0.0, float(differing))

    log_probs = [span["log_probs"] for span in decision["reader_spans"] if "log_probs" in span]
    # Numbers that were not finite were written as null.
    recorded = torch.tensor([torch.nan if number is None else number for span in log_probs for number in span])
    recomputed = torch.cat(list(scores.log_probs))
    # Another number of tokens cannot be compared entry by entry; it counts as infinitely far.
    largest = float((recorded - recomputed).abs().max()) if len(recorded) == len(recomputed) else float("inf")
    yield Replayed(f"{where}: largest difference of a token's log-probability", 0.0, largest)


def _malformed(decision: Mapping[str, Any], error: Exception) -> DataError:
    return DataError(f"decisions.jsonl, {_where(decision)}: malformed ({error!r}); restore the file from a copy")


def _num_differing(recorded: Sequence[int], recomputed: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(recorded, recomputed, strict=False)) + abs(len(recorded) - len(recomputed))


def _where(decision: Mapping[str, Any]) -> str:
    return f"step {decision.get('step')}, episode {decision.get('episode')} of {decision.get('arm')}"

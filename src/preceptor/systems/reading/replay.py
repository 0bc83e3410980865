"""Reads the recorded orders again, without the policy, and computes what the frozen reader makes of them.

The rows are built anew from the run's ``articles.json`` and the pairs that each decision names; nothing that was
recorded of the reader is used but to be compared with. What the policy alone can say (its probabilities) is not
recomputed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import DataError, StorageError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.run.device import parse_dtype
from preceptor.run.files import storage_errors
from preceptor.run.metrics import read_jsonl
from preceptor.systems.base import Replayed, Services
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.credit import probe_rewards, value_rewards
from preceptor.systems.reading.material import Material, Reading, Row, encode_reading
from preceptor.systems.reading.reader import LanguageModelReader, Scored

BATCH = 64
"""Decisions that are scored together."""


def replay(config: ReadingConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Three comparisons for every decision of the run in ``folder``.

    Its reward (nats per token); how many tokens of the policy's and the reader's rows are others than the named pairs
    and queries give (recorded 0); and the largest difference of a scored token's log-probability (recorded 0).

    Raises:
        DataError: the reader learned, so that its past weights are gone, or a decision names what there is not.
        StorageError: a file of the run is missing or damaged.
    """
    if config.reward.reader == "policy":
        raise DataError(
            "the reader of this run was the policy as it learned, whose past weights are gone; "
            "only runs with a frozen reader can be replayed"
        )
    cpu = torch.device("cpu")
    policy_lm = load_language_model(config.model.name, device=cpu, dtype=parse_dtype(config.model.dtype))
    materials = _materials(config, folder, policy_lm)
    if config.reward.reader:
        reader_lm = load_language_model(config.reward.reader, device=cpu)
        reader = LanguageModelReader(reader_lm, policy_lm=policy_lm, materials=_materials(config, folder, reader_lm))
    else:
        reader = LanguageModelReader(policy_lm)
    decisions = read_jsonl(folder / "decisions.jsonl")
    while batch := list(islice(decisions, BATCH)):
        rows = [_rows(decision, materials, reader) for decision in batch]
        scored = reader.score([reader_row for _, reader_row in rows])
        for decision, (policy_row, _), read in zip(batch, rows, scored, strict=True):
            try:
                yield from _compared(config, decision, policy_row, read)
            except (KeyError, TypeError) as error:
                raise _malformed(decision, error) from error


def _materials(config: ReadingConfig, folder: Path, lm: LanguageModel) -> dict[str, Material]:
    path = folder / "articles.json"
    with storage_errors(f"read {path}"):
        text = path.read_bytes()
    try:
        readings = [
            Reading(
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
    return {
        reading.name: encode_reading(
            reading, lm, prompt=config.model.prompt, use_chat_template=config.model.use_chat_template
        )
        for reading in readings
    }


def _rows(decision: dict[str, Any], materials: dict[str, Material], reader: LanguageModelReader) -> tuple[Row, Row]:
    """The policy's and the reader's row, from the pairs that were read and the queries that were written."""
    try:
        material = materials[decision["article"]]
        order = [span["pair"] for span in decision["policy_spans"] if span["kind"] == "value"]
        if not all(isinstance(pair, int) and 0 <= pair < material.reading.num_pairs for pair in order):
            last = material.reading.num_pairs - 1
            raise DataError(f"decisions.jsonl, {_where(decision)}: pairs {order} are not all among 0..{last}")
        queries = [
            decision["policy_token_ids"][span["start"] : span["end"]]
            for span in decision["policy_spans"]
            if span["kind"] == "query"
        ]
        kinds = {span["kind"] for span in decision["reader_spans"]}
        policy_row = material.query_row(order, queries)
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(decision, error) from error
    readers, with_probe = reader.material(material), "probe" in kinds
    if "query" in kinds:
        own = [reader.query_tokens(query) for query in queries]
        return policy_row, readers.query_row(order, own, with_probe=with_probe)
    return policy_row, readers.value_row(order, with_probe=with_probe)


def _compared(config: ReadingConfig, decision: dict[str, Any], policy_row: Row, read: Scored) -> Iterator[Replayed]:
    where = _where(decision)
    # The last measurement, whose episodes come after all of training, always pays for values.
    in_training = decision["episode"] < config.update.steps * config.episode.batch_size
    measure = probe_rewards if in_training and config.reward.kind == "probe" else value_rewards
    recorded = decision["reward"]
    yield Replayed(where, float("nan") if recorded is None else float(recorded), float(measure([read]).total[0]))
    others = _num_differing(decision["policy_token_ids"], policy_row.tokens)
    others += _num_differing(decision["reader_token_ids"], read.row.tokens)
    yield Replayed(f"{where}: tokens that the pairs do not give", 0.0, float(others))
    log_probs = [span["log_probs"] for span in decision["reader_spans"] if "log_probs" in span]
    told = torch.tensor([number if number is not None else torch.nan for span in log_probs for number in span])
    computed = torch.cat(list(read.log_probs))
    largest = float((told - computed).abs().max()) if len(told) == len(computed) else float("inf")
    yield Replayed(f"{where}: largest difference of a token's log-probability", 0.0, largest)


def _malformed(decision: dict[str, Any], error: Exception) -> DataError:
    return DataError(f"decisions.jsonl, {_where(decision)}: malformed ({error!r}); restore the file from a copy")


def _num_differing(recorded: Sequence[int], given: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(recorded, given, strict=False)) + abs(len(recorded) - len(given))


def _where(decision: dict[str, Any]) -> str:
    return f"step {decision.get('step')}, episode {decision.get('episode')} of {decision.get('arm')}"

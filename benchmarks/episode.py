"""What a batch of reading episodes costs on one KV cache, beside the naive way, with equal outputs shown first.

Ours is ``preceptor.systems.reading.environment.run_episodes``: all episodes advance together and nothing is encoded
twice. The naive way (``benchmarks/naive_episode.py``) is plain Transformers: one episode at a time, and at every step
``generate()`` on the whole context. Both have the same weights, tokens, orders and threads, and take turns in one
process.

Before anything is timed, both must say the same: identical greedy query tokens, and log-probabilities of the selection
and of sampled queries within 1e-4. The bar: ours costs at most a quarter of the naive way, in wall time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.measurement import alternate
from benchmarks.naive_episode import (
    LAYER,
    NaiveEpisodes,
    naive_episodes,
    naive_key_vectors,
    naive_query_log_probs,
)
from preceptor.errors import NumericError, PreceptorError
from preceptor.lm.embedding import HiddenStates
from preceptor.lm.load import STARTER, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.runs.environment import environment
from preceptor.systems.reading.articles import TokenizedArticle, bundled_article, select_pairs, tokenize_article
from preceptor.systems.reading.config import DataOptions, ModelOptions
from preceptor.systems.reading.environment import Trajectories, check_budget, run_episodes
from preceptor.systems.reading.policy import Keys, Policy

BAR = 0.25
"""Ours may cost this share of the naive wall time."""

TOLERANCE = 1e-4
"""Nats. Sums in another order differ by about 1e-6 a logit in float32; a wrong token, position or mask by far more."""


@dataclass(frozen=True)
class Sizes:
    """How much is read.

    ``value_tokens`` is the length of a value's chunk of the article; encoded again as text, some differ by a token or
    two, so the rows of a batch differ in length as they do in a run.
    """

    episodes: int = 8
    pairs: int = 10
    query_tokens: int = 16
    value_tokens: int = 32


@dataclass(frozen=True)
class Case:
    """Everything that both ways are given.

    Attributes:
        policy: a greedy one, which holds the model.
        article: in the policy's tokens.
        keys: key vectors as the policy makes them.
        naive_keys: the same, made by plain Transformers.
        orders: what each episode reads, a permutation of the pairs.
    """

    policy: Policy
    article: TokenizedArticle
    keys: Keys
    naive_keys: torch.Tensor
    orders: list[list[int]]
    sizes: Sizes
    seed: int


def prepare(model: str | LanguageModel, sizes: Sizes, *, seed: int, copies: int = 1) -> Case:
    """The case that ``sizes`` describe, over the bundled article, or ``copies`` of it one after another.

    Raises:
        PreceptorError: there is no such model, or the sizes do not fit the article or the model's context.
    """
    lm = load_language_model(model, device=torch.device("cpu")) if isinstance(model, str) else model
    options = DataOptions(
        pairing="chunks",
        value_tokens=sizes.value_tokens,
        max_value_tokens=2 * sizes.value_tokens,
        num_pairs=sizes.pairs,
        num_probes=0,
    )
    text = bundled_article()
    text = replace(text, text="\n\n".join([text.text] * copies))
    pairs = select_pairs(text, options, lm, name=text.title)
    article = tokenize_article(pairs, lm, prompt=ModelOptions().prompt, use_chat_template=False)
    check_budget(lm.context_length, article, budget=sizes.pairs, query_tokens=sizes.query_tokens)
    policy = Policy(
        lm,
        sampling=Sampling(temperature=0.0, suppressed=lm.special_tokens),
        embedding=HiddenStates(lm, layer=LAYER),
    )
    keys = policy.embed_keys(article)
    # Scores of order one: without it the softmax is certain of one key, and its log-probabilities hide or blow up
    # every difference.
    policy.temperature = float(keys.vectors.square().sum(-1).mean())
    generator = torch.Generator().manual_seed(seed)
    return Case(
        policy=policy,
        article=article,
        keys=keys,
        naive_keys=naive_key_vectors(lm.model, article.keys, begin=article.begin_token),
        orders=[torch.randperm(sizes.pairs, generator=generator).tolist() for _ in range(sizes.episodes)],
        sizes=sizes,
        seed=seed,
    )


def ours(case: Case, *, sampling: Sampling | None = None) -> Trajectories:
    """The episodes on one KV cache; greedy unless ``sampling`` says otherwise."""
    policy = case.policy
    if sampling is not None:
        policy = Policy(
            policy.lm, sampling=sampling, embedding=policy.embedding, centre=True, temperature=policy.temperature
        )
    return run_episodes(
        policy,
        case.article,
        case.keys,
        num_episodes=case.sizes.episodes,
        budget=case.sizes.pairs,
        query_tokens=case.sizes.query_tokens,
        generators={name: torch.Generator().manual_seed(case.seed) for name in ("query", "selection")},
        orders=case.orders,
    )


def naive(case: Case) -> NaiveEpisodes:
    """The same episodes the naive way."""
    return naive_episodes(
        case.policy.lm.model,
        prompt=case.article.prompt,
        keys=case.naive_keys,
        values=case.article.values,
        orders=case.orders,
        query_tokens=case.sizes.query_tokens,
        temperature=case.policy.temperature,
        suppressed=case.policy.lm.special_tokens,
    )


def largest_differences(case: Case) -> dict[str, float]:
    """The largest difference between both ways in each log-probability, in nats, once greedy tokens are identical.

    The query log-probabilities are those of queries sampled at temperature 1: a greedy draw's is 0 by definition.

    Raises:
        NumericError: a token differs, or a log-probability by more than ``TOLERANCE``.
    """
    greedy, expected = ours(case), naive(case)
    num_different = int((greedy.queries != expected.queries).sum())
    if num_different:
        raise NumericError(
            f"{num_different} of {greedy.queries.numel()} greedy query tokens differ between both ways; one is wrong, "
            "or two logits tie within rounding: try another --seed, and if it persists report it"
        )
    sampled = ours(case, sampling=replace(case.policy.sampling, temperature=1.0))
    query_log_probs = naive_query_log_probs(
        case.policy.lm.model,
        prompt=case.article.prompt,
        values=case.article.values,
        orders=case.orders,
        queries=sampled.queries,
        suppressed=case.policy.lm.special_tokens,
    )
    differences = {}
    for name, found, reference in (
        ("query_log_probs", sampled.query_log_probs, query_log_probs),
        ("selection_log_probs", greedy.selection_log_probs, expected.selection_log_probs),
    ):
        # −inf on both sides is agreement; on one side the difference is infinite, and NaN is never within tolerance.
        difference = (found - reference).abs().masked_fill((found == -torch.inf) & (reference == -torch.inf), 0.0)
        differences[name] = float(difference.max())
        if not differences[name] <= TOLERANCE:
            raise NumericError(
                f"{name} differ by {differences[name]:.2e} nats between both ways, and rounding explains at most "
                f"{TOLERANCE:.0e}; report it"
            )
    return differences


def measure(model: str, sizes: Sizes, *, rounds: int, threads: int, seed: int) -> dict[str, Any]:
    """The row of ``history.jsonl``, but for the commit.

    Raises:
        PreceptorError: the case cannot be made, or both ways do not say the same.
    """
    load_average = os.getloadavg()[0]
    torch.set_num_threads(threads)
    case = prepare(model, sizes, seed=seed)
    differences = largest_differences(case)  # also warms both ways up
    spreads = alternate({"ours": lambda: ours(case), "naive": lambda: naive(case)}, rounds)
    lm, article = case.policy.lm, case.article
    return {
        "benchmark": "episode",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment(lm.device, threads),
        "load_average": load_average,
        "model": Path(model).name,  # a folder of this machine says nothing elsewhere
        "parameters": lm.model.num_parameters(),
        "sizes": asdict(sizes),
        "context_tokens": len(article.prompt)
        + sizes.pairs * sizes.query_tokens
        + sum(len(value) for value in article.values),
        "rounds": rounds,
        "seed": seed,
        "largest_difference": differences,
        "seconds": {
            way: {clock: asdict(spread) for clock, spread in clocks.items()} for way, clocks in spreads.items()
        },
        "ratio": {clock: spreads["ours"][clock].median / spreads["naive"][clock].median for clock in ("wall", "cpu")},
    }


def table(row: Mapping[str, Any]) -> Table:
    """The row for a terminal."""
    sizes = row["sizes"]
    found = Table(
        title=f"{sizes['episodes']} episodes x {sizes['pairs']} pairs x {sizes['query_tokens']} query tokens, contexts "
        f"of {row['context_tokens']} tokens; {row['model']} ({row['parameters'] / 1e6:.1f}M parameters), "
        f"{row['threads']} thread(s)",
        caption=f"median (min-max) of {row['rounds']} rounds; tokens identical, log-probabilities differ by at "
        f"most {max(row['largest_difference'].values()):.1e} nats; load average {row['load_average']:.1f}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("seconds", "ours", "naive", "ours / naive"):
        found.add_column(column, justify="left" if column == "seconds" else "right", no_wrap=True)
    for clock, label in (("wall", "wall"), ("cpu", "process CPU")):
        cells = [
            f"{spread['median']:.2f} ({spread['minimum']:.2f}-{spread['maximum']:.2f})"
            for spread in (row["seconds"][way][clock] for way in ("ours", "naive"))
        ]
        found.add_row(label, *cells, f"{row['ratio'][clock]:.3f}")
    return found


def main(argv: Sequence[str] | None = None, *, root: Path = record.ROOT) -> int:
    """Measure, print and record in the checkout at ``root``; returns the exit code."""
    options = _parser().parse_args(argv)
    sizes = Sizes(options.episodes, options.pairs, options.query_tokens, options.value_tokens)
    try:
        record.require_own_package(root)
        measured = record.revision(root)
        if not options.allow_dirty:
            measured.require_clean()
        row = measure(options.model, sizes, rounds=options.rounds, threads=options.threads, seed=options.seed)
        console = Console()
        console.print(table(row))
        holds = row["ratio"]["wall"] <= BAR
        console.print(f"The bar, at most {BAR:g} of the naive wall time, is {'met' if holds else 'not met'}.")
        if measured.dirty:
            console.print("Not recorded: the checkout has uncommitted changes.")
        else:
            console.print(f"Recorded in {record.append(row, measured, root=root).relative_to(root)}.")
    except PreceptorError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.episode",
        description=__doc__,
        epilog="A measurement of a clean checkout adds a line to benchmarks/history.jsonl. Close what else is running: "
        "on a busy machine the wall times, and less so the ratio, are noise.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes = Sizes()
    for name, default, text in (
        ("episodes", sizes.episodes, "episodes in the batch"),
        ("pairs", sizes.pairs, "pairs of the bundled article, all of which are read"),
        ("query-tokens", sizes.query_tokens, "tokens of a query"),
        ("value-tokens", sizes.value_tokens, "tokens of a value, give or take one"),
        ("rounds", 5, "times that each way is timed"),
        ("threads", 1, "threads of torch, for both ways"),
    ):
        parser.add_argument(
            f"--{name}", metavar="N", type=_positive, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of orders and sampled queries (default 0)")
    parser.add_argument(
        "--model", metavar="M", default=STARTER, help=f"'{STARTER}' (default), a local folder or a hub name"
    )
    parser.add_argument(
        "--allow-dirty", action="store_true", help="measure uncommitted changes too; they are not recorded"
    )
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

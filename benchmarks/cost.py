"""``python -m benchmarks.cost``: what a mixture or the reading loop costs on P processes, and if that is so here.

An update of P processes takes the sum of

    passes     operations / (P · rate); 2 operations a weight and token and those of attention, three times that where
               there is a backward pass
    writing    of tokens one after another: operations / (P · rate · decode share), and at least one reading of all
               weights a token, however few rows a process has
    serial     what one process does while the others wait: drawing rows
    optimizer  AdamW's bytes / memory bandwidth, in every process for all weights: state is replicated
    traffic    bytes / network; gradients are summed, 2 (P - 1) / P times their size in and out of a process

Nothing waits for anything else and nothing is hidden behind anything else, so a real run is slower where processes wait
for the slowest, and faster where traffic is hidden. ``--check`` compares it with runs of one and two processes here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table

from preceptor.errors import PreceptorError

DAY = 86_400.0


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        parameters: all of them; a tied head counts once.
        head: of them in the head, which only scored tokens go through.
        layers: number of them.
        width: of all attention heads of a layer together.
    """

    parameters: float
    head: float
    layers: int
    width: int

    def forward(self, rows: float, length: float, *, scored: float = 1.0) -> float:
        """Operations of one pass over ``rows`` of ``length`` tokens: 2 a weight and token, and causal attention's.

        ``scored`` is the share of tokens whose logits are wanted.
        """
        weights = self.parameters - (1 - scored) * self.head
        return rows * length * (2 * weights + 2 * self.layers * self.width * length)


@dataclass(frozen=True)
class Machines:
    """Equal processes.

    Attributes:
        processes: number of them.
        rate: operations a second of one, as achieved in passes over many tokens.
        decode_share: what share of ``rate`` is achieved while single tokens are written.
        memory_bandwidth: bytes a second of one.
        network: bytes a second in and out of one, during an all-reduce.
        decode_weight: bytes of a weight while tokens are written.
    """

    processes: int
    rate: float
    decode_share: float
    memory_bandwidth: float
    network: float
    decode_weight: int


@dataclass(frozen=True)
class Update:
    """One update of all processes together.

    Attributes:
        tokens: learned from.
        passes: operations of forward and backward passes over many tokens.
        decode: operations of tokens that are written one after another.
        decode_steps: how many are written one after another.
        optimizer_steps: each with a sum of the gradients.
        serial: seconds of one process while the others wait.
        rows_bytes: of rows that the first process hands to every other.
        copies: further ones of the weights that every process holds, such as a reference.
        saved_copies: those of them that a checkpoint holds.
    """

    tokens: float
    passes: float
    decode: float = 0.0
    decode_steps: float = 0.0
    optimizer_steps: int = 1
    serial: float = 0.0
    rows_bytes: float = 0.0
    copies: int = 0
    saved_copies: int = 0


@dataclass(frozen=True)
class Cost:
    """Of one update, in seconds and bytes of one process."""

    passes: float
    writing: float
    serial: float
    optimizer: float
    traffic: float
    gradient_bytes: float
    sent_bytes: float
    state_bytes: float
    checkpoint_bytes: float

    @property
    def seconds(self) -> float:
        return self.passes + self.writing + self.serial + self.optimizer + self.traffic


GRADIENT, WEIGHT, MOMENTS = 4, 4, 8
"""Bytes of a parameter in float32: gradient, weight, and AdamW's two moments."""

OPTIMIZER_BYTES = 7 * 4
"""Bytes that AdamW moves a parameter: reads weight, gradient and moments, writes weight and moments."""

DRAW_SECONDS = 8e-6
"""Of one row by ``MixtureSampler.draw`` on one core; ``python -m benchmarks parts`` has it with collating."""

ROW_BYTES = 3 * 8
"""Bytes of a token that Accelerate sends: input, mask and label in int64."""


def mixture_update(
    shape: Shape, *, batch_tokens: float, row_tokens: int, datasets: int, samples: int, every: int, processes: int
) -> Update:
    """Next-token prediction on a mixture whose weights move after ``samples`` rows a dataset each ``every`` updates."""
    rows = batch_tokens / row_tokens
    measuring = shape.forward(datasets * samples, row_tokens) / every
    return Update(
        tokens=batch_tokens,
        passes=3 * shape.forward(rows, row_tokens) + measuring,
        serial=rows * DRAW_SECONDS,
        rows_bytes=batch_tokens * ROW_BYTES if processes > 1 else 0.0,
    )


def curriculum_update(
    shape: Shape,
    documents: Update,
    *,
    prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    epochs: int,
    minibatches: int,
) -> Update:
    """``documents`` and PPO on ``prompts`` continuations; the value network, which is small, is left out."""
    length = prompt_tokens + continuation_tokens
    scored = continuation_tokens / length
    decode = shape.forward(prompts, length) * scored
    read = shape.forward(prompts, prompt_tokens, scored=0.0)
    whole = shape.forward(prompts, length, scored=scored)
    return replace(
        documents,
        tokens=documents.tokens + prompts * length,
        # The prompts are read, the frozen model scores, and the policy learns in each epoch.
        passes=documents.passes + read + whole + 3 * epochs * whole,
        decode=decode,
        decode_steps=continuation_tokens,
        optimizer_steps=epochs * minibatches,
        copies=1,
        saved_copies=1,
    )


def reading_update(
    shape: Shape, *, episodes: int, prompt: float, pairs: int, query_tokens: int, value_tokens: float
) -> Update:
    """Episodes that write a query and read a value for each pair, scored in two contexts, and learned from."""
    context = prompt + pairs * (query_tokens + value_tokens)
    queries, values = pairs * query_tokens / context, pairs * value_tokens / context
    decode = shape.forward(episodes, context) * queries
    # Values are read between the queries.
    read = shape.forward(episodes, context, scored=0.0) * (1 - queries)
    # The reader scores values among queries and among values alone.
    score = shape.forward(episodes, context, scored=values) + shape.forward(episodes, prompt + pairs * value_tokens)
    # The policy learns from queries, and the untrained model says how far they have moved.
    learn = 4 * shape.forward(episodes, context, scored=queries)
    return Update(
        tokens=episodes * context,
        passes=read + score + learn,
        decode=decode,
        decode_steps=pairs * query_tokens,
        copies=2,  # the reader and the untrained policy
    )


def cost(shape: Shape, update: Update, machines: Machines) -> Cost:
    """Seconds and bytes of one process for ``update``."""
    size, parameters = machines.processes, shape.parameters
    sent = update.optimizer_steps * 2 * (size - 1) / size * GRADIENT * parameters + update.rows_bytes
    weights_read = machines.decode_weight * parameters / machines.memory_bandwidth
    return Cost(
        passes=update.passes / (size * machines.rate),
        writing=max(update.decode / (size * machines.rate * machines.decode_share), update.decode_steps * weights_read),
        serial=update.serial,
        optimizer=update.optimizer_steps * OPTIMIZER_BYTES * parameters / machines.memory_bandwidth,
        traffic=sent / machines.network,
        gradient_bytes=update.optimizer_steps * GRADIENT * parameters,
        sent_bytes=sent,
        state_bytes=(WEIGHT + GRADIENT + MOMENTS + update.copies * WEIGHT) * parameters,
        checkpoint_bytes=(WEIGHT + MOMENTS + update.saved_copies * WEIGHT) * parameters,
    )


# --- 1,000 GPUs and 10^12 tokens --------------------------------------------------------------------------------------

LLAMA_3B = Shape(parameters=3.21e9, head=128_256 * 3_072, layers=28, width=3_072)

GPU = {"rate": 4e14, "decode_share": 1.0, "memory_bandwidth": 3e12, "network": 4e10, "decode_weight": 2}
"""Assumed, and not measured: 40 % of the bfloat16 arithmetic of an H100 or H200, memory at 3 TB/s (an H100's), an
all-reduce at 40 GB/s, and decoding in bfloat16 that memory alone limits."""


def forecasts(*, gpus: int, tokens: float, rows: int) -> dict[str, tuple[Update, Cost, float]]:
    """By name: an update, its cost, and how many updates ``tokens`` take; Llama-3.2-3B's shape.

    Args:
        gpus: processes.
        tokens: to train on.
        rows: of each process in an update: of 4,096 tokens for the mixture, and four episodes each for reading.
    """
    machines = Machines(processes=gpus, **GPU)
    mixture = mixture_update(
        LLAMA_3B, batch_tokens=4_096 * rows * gpus, row_tokens=4_096, datasets=10, samples=64, every=100, processes=gpus
    )
    reading = reading_update(LLAMA_3B, episodes=4 * rows * gpus, prompt=16, pairs=64, query_tokens=16, value_tokens=40)
    return {
        name: (update, cost(LLAMA_3B, update, machines), tokens / update.tokens)
        for name, update in (("mixture", mixture), ("reading", reading))
    }


def forecast_table(*, gpus: int, tokens: float, rows: int) -> Table:
    """The forecasts for a terminal."""
    found = Table(
        title=f"{gpus:,} GPUs, {tokens:.0e} tokens, Llama-3.2-3B's shape", title_justify="left", box=box.SIMPLE_HEAD
    )
    found.add_column("")
    columns = forecasts(gpus=gpus, tokens=tokens, rows=rows)
    for name in columns:
        found.add_column(name, justify="right")
    for label, text in ROWS.items():
        found.add_row(label, *(text(update, price, number, gpus) for update, price, number in columns.values()))
    return found


def readable_bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1_000 or unit == "TB":
            break
        number /= 1_000
    return f"{number:.3g} {unit}"


ROWS = {
    "tokens an update": lambda u, c, n, p: f"{u.tokens:,.0f}",
    "updates": lambda u, c, n, p: f"{n:,.0f}",
    "seconds an update": lambda u, c, n, p: f"{c.seconds:.3g}",
    "  passes": lambda u, c, n, p: f"{c.passes:.3g}",
    "  writing": lambda u, c, n, p: f"{c.writing:.3g}",
    "  drawing rows, in one process": lambda u, c, n, p: f"{c.serial:.3g}",
    "  optimizer, in every process": lambda u, c, n, p: f"{c.optimizer:.3g}",
    "  traffic": lambda u, c, n, p: f"{c.traffic:.3g}",
    "share of passes": lambda u, c, n, p: f"{c.passes / c.seconds:.0%}",
    "days": lambda u, c, n, p: f"{n * c.seconds / DAY:.3g}",
    "GPU hours": lambda u, c, n, p: f"{n * c.seconds * p / 3_600:,.0f}",
    "state of a process": lambda u, c, n, p: readable_bytes(c.state_bytes),
    "sent by a process an update": lambda u, c, n, p: readable_bytes(c.sent_bytes),
    "a checkpoint": lambda u, c, n, p: readable_bytes(c.checkpoint_bytes),
    "tokens in memory, 4 bytes each": lambda u, c, n, p: readable_bytes(4 * n * u.tokens) if u.rows_bytes else "-",
    "a dataset's order, 8 bytes a row": lambda u, c, n, p: (
        readable_bytes(8 * n * u.tokens / 4_096) if u.rows_bytes else "-"
    ),
}
"""Label, and what it shows of an update, its cost, the number of updates and of GPUs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the forecast, or the comparison with this machine; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", metavar="N", type=int, default=1_000, help="default 1,000")
    parser.add_argument("--tokens", metavar="N", type=float, default=1e12, help="default 1e12")
    parser.add_argument("--rows", metavar="N", type=int, default=1, help="rows of a GPU in an update (default 1)")
    parser.add_argument("--check", action="store_true", help="compare with runs of one and two processes, minutes")
    options = parser.parse_args(argv)
    if options.gpus < 1 or options.rows < 1 or not options.tokens >= 1:
        parser.error(
            f"--gpus, --tokens and --rows must be at least 1, got {options.gpus}, {options.tokens}, {options.rows}"
        )
    console = Console(width=110)
    try:
        if options.check:
            from benchmarks.cost_check import check_table  # it needs torch and runs Preceptor

            console.print(check_table())
        else:
            console.print(forecast_table(gpus=options.gpus, tokens=options.tokens, rows=options.rows))
    except PreceptorError as error:
        print(f"cost: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

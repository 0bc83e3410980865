"""The cost model beside runs of reading and of the curriculum in one and two processes of one thread on this machine.

The machine's limits are measured first. How near to them the passes come is taken from other benchmarks of the same
model (docs/benchmarks.md) and is not fitted to what is predicted here.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table

from benchmarks import cost, scale
from benchmarks.limits import arithmetic, bandwidth
from preceptor.lm.load import STARTER, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.articles import bundled_article, select_pairs, tokenize_article
from preceptor.systems.reading.config import DataOptions, ModelOptions

PASSES_SHARE, DECODE_SHARE = 0.6, 0.4
"""Of the measured arithmetic: an update of the starter (63 % by `update`), 32 rows written (41 % by `decode`)."""

LOOPBACK = 1e9
"""Bytes a second of gloo between two processes of one machine, assumed; a hundredth of an update passes there."""

STEPS = 3
"""Updates of a run, of which the first is not timed."""


class Check(NamedTuple):
    """A prediction beside what was measured."""

    what: str
    predicted: float
    measured: float


def check_table(processes: Sequence[int] = (1, 2)) -> Table:
    """Seconds, gradient bytes and checkpoint bytes of both systems, predicted and measured."""
    found = Table(title="Predicted and measured on this machine", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "predicted", "measured", "measured / predicted"):
        found.add_column(column, justify="left" if not column else "right")
    for check in checks(processes):
        cells = [f"{value:.2f}" if "second" in check.what else cost.readable_bytes(value) for value in check[1:]]
        found.add_row(check.what, *cells, f"{check.measured / check.predicted:.2f}")
    return found


def checks(processes: Sequence[int]) -> list[Check]:
    """Of both systems."""
    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    rate, memory = arithmetic(cpu, 1_024, torch.float32), bandwidth(cpu, 2_048)
    found = []
    for system, settings in scale.SYSTEMS.items():
        shape, update = predicted_update(system)
        for size in processes:
            machines = cost.Machines(size, PASSES_SHARE * rate, DECODE_SHARE / PASSES_SHARE, memory, LOOPBACK, 4)
            price = cost.cost(shape, update, machines)
            with tempfile.TemporaryDirectory() as folder:
                found += _measured(system, settings, Path(folder), price, size, sums=update.optimizer_steps)
    return found


def _measured(
    system: str, settings: Sequence[str], folder: Path, price: cost.Cost, size: int, *, sums: int
) -> list[Check]:
    """One run beside ``price``, with so many sums of the gradients in an update."""
    overrides = [*settings, f"update.steps={STEPS}"]
    counted = folder / "traffic.json"
    module = ("benchmarks.traffic", str(counted))
    rows = scale.updates(system, overrides, folder / "run", size=size, module=module)
    name = f"{system}, {size} process{'es' if size > 1 else ''}"
    found = [Check(f"{name}: seconds an update", price.seconds, statistics.mean(row["seconds"] for row in rows))]
    if size > 1:
        # Those of the first method: a curriculum trains others after it.
        summed = sum(json.loads(counted.read_text())["sums"][: STEPS * sums]) / STEPS
        found.append(Check(f"{name}: gradients summed an update", price.gradient_bytes, summed))
    else:
        saved = max((folder / "run" / "checkpoints").glob("step-*"))
        size_on_disk = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
        found.append(Check(f"{name}: a checkpoint", price.checkpoint_bytes, size_on_disk))
    return found


def predicted_update(system: str) -> tuple[cost.Shape, cost.Update]:
    """The starter's shape, and the update that the settings of ``benchmarks.scale`` ask for."""
    lm = load_language_model(STARTER, device=torch.device("cpu"))
    config = lm.model.config
    shape = cost.Shape(
        parameters=lm.model.num_parameters(),
        head=config.vocab_size * config.hidden_size,
        layers=config.num_hidden_layers,
        width=config.num_attention_heads * config.head_dim,
    )
    if system == "reading":
        prompt, values = article_tokens(lm, pairs=12)
        return shape, cost.reading_update(
            shape, episodes=32, prompt=prompt, pairs=12, query_tokens=8, value_tokens=values
        )
    documents = cost.mixture_update(
        shape, batch_tokens=8_192, row_tokens=128, datasets=0, samples=0, every=1, processes=1
    )
    return shape, cost.curriculum_update(
        shape, documents, prompts=32, prompt_tokens=32, continuation_tokens=32, epochs=2, minibatches=2
    )


def article_tokens(lm: LanguageModel, *, pairs: int) -> tuple[int, float]:
    """Tokens of the prompt and, in the mean, of a value of the bundled article as a run of reading takes it."""
    text = bundled_article()
    chosen = select_pairs(text, DataOptions(num_pairs=pairs, num_probes=0), lm, name=text.title)
    article = tokenize_article(chosen, lm, prompt=ModelOptions().prompt, use_chat_template=False)
    return len(article.prompt), statistics.mean(len(value) for value in article.values)

"""The datasets: their documents, what is held out of them, prompts, and how hard each is for a model."""

from __future__ import annotations

import importlib
import random
import string
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.data.corpora.blocks import TokenBlocks, pack_blocks, pad_blocks, split_held_out, tokenise
from preceptor.data.corpora.datasets import read_sources
from preceptor.errors import DataError
from preceptor.lm.generators.base import end_token
from preceptor.lm.model import LanguageModel
from preceptor.runs.scoring import shared_log_probs
from preceptor.runs.world import ALONE, World
from preceptor.systems.curriculum.config import DataOptions, DatasetOptions
from preceptor.systems.curriculum.policy import Prompt

MAX_CHARACTERS = 100_000
"""Of one built-in dataset: enough for a run of minutes."""


@dataclass(frozen=True)
class Corpus:
    """One dataset, split into three parts that share no document.

    Attributes:
        name: as in the configuration.
        target: whether it counts in the macro mean.
        learned_from: whether the mixture draws from it.
        documents: token ids of the training documents, for prompts.
        train, difficulty, validation: rows of token ids.
        validation_documents: token ids of the validation documents, for held-out prompts.
    """

    name: str
    target: bool
    learned_from: bool
    documents: list[list[int]]
    train: TokenBlocks
    difficulty: TokenBlocks
    validation: TokenBlocks
    validation_documents: list[list[int]]


def read_corpora(options: DataOptions, lm: LanguageModel) -> list[Corpus]:
    """The configured datasets, tokenized for ``lm``.

    Raises:
        DataError: names every dataset that is missing, unreadable or too small to be split in three.
    """
    sources = [dataset.source for dataset in options.datasets if dataset.builtin is None]
    documents = read_sources(sources, root=Path(options.root) if options.root else None) if sources else {}
    for dataset in options.datasets:
        if dataset.builtin is not None:
            documents[dataset.name] = builtin_documents(dataset.builtin)
    corpora, too_small = [], []
    for dataset in options.datasets:
        corpus = _corpus(dataset, documents[dataset.name], options, lm)
        corpora.append(corpus)
        if not all(len(part) for part in (corpus.train, corpus.difficulty, corpus.validation)):
            too_small.append(f"{dataset.name} ({len(documents[dataset.name])} documents)")
    if too_small:
        raise DataError(
            f"too few documents to train, measure difficulty and validate on: {', '.join(too_small)}; "
            "give more documents, or larger fractions"
        )
    return corpora


def _corpus(dataset: DatasetOptions, texts: Sequence[str], options: DataOptions, lm: LanguageModel) -> Corpus:
    end = end_token(lm)
    encoded = tokenise(texts, encode=lm.encode, begin=lm.begin_token, end=None if end < 0 else end)
    rest, validation = split_held_out(encoded, fraction=options.validation_fraction)
    # `difficulty_fraction` is a share of all documents, and the validation documents have already been taken out.
    train, difficulty = split_held_out(rest, fraction=options.difficulty_fraction / (1 - options.validation_fraction))

    def blocks(documents: list[list[int]]) -> TokenBlocks:
        return pack_blocks(
            dataset.name,
            documents,
            block_length=options.block_tokens,
            cross_documents=options.cross_documents,
        )

    return Corpus(
        name=dataset.name,
        target=dataset.target,
        learned_from=dataset.train,
        documents=train,
        train=blocks(train),
        difficulty=blocks(difficulty),
        validation=blocks(validation),
        validation_documents=validation,
    )


def evenly_spaced_rows(blocks: TokenBlocks, num_rows: int) -> list[list[int]]:
    """At most ``num_rows`` rows, spread evenly over the dataset; the same at every call."""
    num_rows = min(num_rows, len(blocks))
    return [blocks[index * len(blocks) // num_rows].tolist() for index in range(num_rows)]


def document_losses(
    lm: LanguageModel,
    samples: Sequence[Sequence[Sequence[int]]],
    *,
    max_tokens: int | None = None,
    world: World = ALONE,
) -> list[Float[Tensor, " text"]]:
    """The loss of each sampled row of each dataset in nats per token, given the row's first token; no gradient.

    All rows of all datasets go through the model together, sorted by length, so that there is little padding. Pass the
    result to :func:`preceptor.objectives.document_difficulty`.

    Args:
        lm: the model, usually a frozen copy of the one that is trained.
        samples: rows of token ids for each dataset, each row of two tokens or more.
        max_tokens: padded tokens per forward pass; None: as many as keep the logits within memory.
        world: processes that hold the same model and share the rows; each gets the losses of all of them.

    Returns:
        one float32 tensor per dataset on the CPU, in the order of its rows.

    Raises:
        DataError: a dataset without rows, or a row of fewer than two tokens.
        ModelError: a row is longer than the model's context.
    """
    for index, rows in enumerate(samples):
        if not rows or min(len(row) for row in rows) < 2:
            raise DataError(f"the sample of dataset {index} must hold rows of two tokens or more, to have a loss")
    rows = [row for sample in samples for row in sample]
    # One span per row: every token but the first, which nothing predicts.
    spans = [[(1, len(row))] for row in rows]
    log_probs = shared_log_probs(lm, rows, spans=spans, max_tokens=max_tokens, world=world)
    losses = iter([-values.mean() for values in log_probs])
    return [torch.stack([next(losses) for _ in sample]) for sample in samples]  # per dataset: [rows]


def gradient_alignment(
    lm: LanguageModel,
    samples: Sequence[Sequence[Sequence[int]]],
    targets: Sequence[Sequence[Sequence[int]]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    world: World = ALONE,
) -> tuple[Float[Tensor, " choices"], list[Float[Tensor, " text"]]]:
    """How far a step on each dataset lowers the targets' loss, to first order, and the loss of each sampled row.

        a_k = ⟨∇ mean loss of samples[k], P·∇ mean over the targets of their mean losses⟩

    P divides by the root of Adam's second moments, where ``optimizer`` has them, since it steps in that direction.
    One backward pass for each dataset and target; gradients held in ``.grad`` are left alone.

    Args:
        lm: the model in training.
        samples: rows of token ids for each dataset, each row of two tokens or more.
        targets: the same for each target; at least one.
        optimizer: of the parameters, Adam's or another one; None for P = 1.
        world: processes that hold the same model and share the rows of each sample.

    Returns:
        the alignment of each dataset, float64 on the CPU; for each dataset one loss per row, nats per token.
    """
    parameters = list(lm.trainable_parameters().values())
    target_gradients = [loss_gradient(lm, rows, world=world)[1] for rows in targets]
    losses, gradients = zip(*(loss_gradient(lm, rows, world=world) for rows in samples), strict=True)
    return aligned(gradients, target_gradients, parameters=parameters, optimizer=optimizer), list(losses)


Gradient: TypeAlias = Sequence[Tensor]
"""One tensor for each trainable parameter, in their order."""


def aligned(
    gradients: Sequence[Gradient],
    target_gradients: Sequence[Gradient],
    *,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
) -> Float[Tensor, " choices"]:
    """⟨g_k, P·mean of ``target_gradients``⟩ for each of ``gradients``; see :func:`gradient_alignment`."""
    products = torch.zeros(len(gradients), dtype=torch.float64)
    for place, parameter in enumerate(parameters):
        direction = torch.stack([gradient[place] for gradient in target_gradients]).mean(0)
        if optimizer is not None:
            direction = direction / _adam_scale(optimizer, parameter)
        for index, gradient in enumerate(gradients):
            products[index] += float((gradient[place] * direction).sum())
    return products


def loss_gradient(
    lm: LanguageModel, rows: Sequence[Sequence[int]], *, world: World = ALONE
) -> tuple[Float[Tensor, " text"], Gradient]:
    """The loss of each row in nats per token, and the gradient of their mean over the tokens."""
    parameters = list(lm.trainable_parameters().values())
    num_targets = sum(len(row) - 1 for row in rows)
    mine = rows[world.shard(len(rows))]
    row_losses, gradients = torch.zeros(0), [torch.zeros_like(parameter) for parameter in parameters]
    if mine:
        batch = pad_blocks([torch.as_tensor(row) for row in mine], filler=lm.begin_token)
        tokens, mask = batch.tokens.to(lm.device), batch.token_mask.clone().to(lm.device)
        mask[:, 0] = False  # nothing predicts the first token of a row
        token_losses = -lm.chosen_log_probs(tokens, keep=mask.roll(-1, dims=1), chosen=tokens[mask])  # [targets]
        loss = token_losses.mean() if len(mine) == len(rows) else token_losses.sum() / num_targets
        taken: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
        row_losses = torch.stack([row.mean() for row in token_losses.detach().split(mask.sum(1).tolist())]).cpu()
        gradients = [
            zeros if gradient is None else gradient.float() for gradient, zeros in zip(taken, gradients, strict=True)
        ]
    world.sum_in_place(gradients)
    (row_losses,) = world.gather(len(rows), row_losses)
    return row_losses, gradients


def _adam_scale(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | float:
    """√v̂ + ε of ``parameter``, by which Adam divides its steps; 1 before the first step and for other optimizers."""
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return 1.0
    group = next(group for group in optimizer.param_groups if any(entry is parameter for entry in group["params"]))
    correction = 1 - group["betas"][1] ** float(state["step"])
    scale: Tensor = (state["exp_avg_sq"] / correction).sqrt() + group["eps"]
    return scale


# ---- prompts --------------------------------------------------------------------------------------------------------


def prompt_of(dataset: str, document: Sequence[int], *, prompt_tokens: int, continuation_tokens: int) -> Prompt:
    """The first tokens of a document, at most half of it, and how it goes on."""
    size = max(1, min(prompt_tokens, len(document) // 2))
    return Prompt(dataset, tuple(document[:size]), tuple(document[size : size + continuation_tokens]))


def draw_prompts(
    corpora: Sequence[Corpus],
    weights: Float[Tensor, " choices"],
    *,
    num_prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    generator: torch.Generator,
) -> list[Prompt]:
    """The beginnings of training documents: the dataset is drawn by ``weights``, the document within it uniformly."""
    prompts = []
    # Here a weight is a fraction of the prompts; for documents it is one of the tokens.
    for dataset in torch.multinomial(weights, num_prompts, replacement=True, generator=generator).tolist():
        corpus = corpora[dataset]
        document = corpus.documents[int(torch.randint(len(corpus.documents), (), generator=generator))]
        prompts.append(
            prompt_of(corpus.name, document, prompt_tokens=prompt_tokens, continuation_tokens=continuation_tokens)
        )
    return prompts


def held_out_prompts(
    corpora: Sequence[Corpus], *, num_prompts: int, prompt_tokens: int, continuation_tokens: int
) -> list[Prompt]:
    """The beginnings of validation documents of the targets, taken from each target in turn."""
    targets = [corpus for corpus in corpora if corpus.target]
    prompts = []
    for number in range(num_prompts):
        corpus = targets[number % len(targets)]
        documents = corpus.validation_documents
        document = documents[number // len(targets) % len(documents)]  # starts over where there are too few
        prompts.append(
            prompt_of(corpus.name, document, prompt_tokens=prompt_tokens, continuation_tokens=continuation_tokens)
        )
    return prompts


# ---- built-in datasets ----------------------------------------------------------------------------------------------


def builtin_documents(name: str) -> list[str]:
    """The documents of the built-in dataset ``name``, the same at every call.

    Code, manual and salad are read from the Python that runs, so they differ from version to version.

    Raises:
        DataError: this Python came without the files.
    """
    return _BUILTIN[name]()


def _code() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    documents: list[str] = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        # The longest modules would fill the dataset on their own.
        if 1_000 <= len(text) <= 12_000:
            documents.append(text)
    return _within_budget(documents, f"no source files in {folder}")


def _manual() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            f"this Python has no reference manual ({error}); use another dataset than builtin:manual"
        ) from error
    return _within_budget([text.strip() for _, text in sorted(topics.items())], "pydoc_data.topics is empty")


def _within_budget(documents: list[str], reason: str) -> list[str]:
    kept: list[str] = []
    budget = MAX_CHARACTERS
    for document in documents:
        if budget <= 0:
            break
        kept.append(document[:budget])
        budget -= len(document)
    if not kept:
        raise DataError(f"a built-in dataset has no document: {reason}")
    return kept


def _dialogue() -> list[str]:
    chooser = random.Random(1)
    documents = []
    for _ in range(300):
        lines = []
        for _ in range(3):
            name, other = chooser.sample(("Ada", "Ben", "Chloe", "Dev", "Elif", "Farid"), 2)
            count, price = chooser.randint(2, 9), chooser.randint(2, 9)
            thing = chooser.choice(("apples", "lamps", "maps", "pears", "stamps", "tickets"))
            day = chooser.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"))
            hour = chooser.randint(1, 11)
            lines += chooser.choice(
                (
                    [
                        f"{name}: How much are {count} {thing}?",
                        f"{other}: One is {price} coins, so {count} are {count * price}.",
                    ],
                    [
                        f"{name}: Shall we meet on {day} at {hour}?",
                        f"{other}: On {day} I am late. Let us say {hour + 1}.",
                    ],
                    [
                        f"{name}: I lost my {thing}. Has {other} seen them?",
                        f"{other}: Yes, {name}, {count} {thing} are on the table.",
                    ],
                )
            )
        documents.append("\n".join(lines))
    return documents


def _noise() -> list[str]:
    chooser = random.Random(2)
    return ["".join(chooser.choices(string.ascii_letters + string.digits, k=400)) for _ in range(200)]


def _symbols() -> list[str]:
    chooser = random.Random(3)
    return ["".join(chooser.choices(string.digits + string.punctuation + " ", k=400)) for _ in range(200)]


def _salad() -> list[str]:
    words = " ".join(_manual()).split()
    chooser = random.Random(4)
    return [" ".join(chooser.choices(words, k=60)) for _ in range(200)]


_BUILTIN: dict[str, Callable[[], list[str]]] = {
    "code": _code,
    "manual": _manual,
    "dialogue": _dialogue,
    "noise": _noise,
    "symbols": _symbols,
    "salad": _salad,
}

"""``preceptor pretrain``: a small Llama by cross-entropy on a weighted mixture of texts, resumable bit for bit.

1. Read the sources, leave the held-out articles out, fit the tokenizer, encode.
2. Each step draws windows from the mixture, takes one optimizer step, logs.
3. Now and then: bits per byte on the held-out articles.
4. At the end: the model folder (safetensors in bfloat16), the tokenizer and the measurements.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from preceptor.config import to_dict
from preceptor.data.corpora.corpus import read_documents
from preceptor.errors import DataError
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.pretraining.config import Data, Model, Optimisation, PretrainConfig
from preceptor.pretraining.evaluate import bits_per_byte
from preceptor.runs.checkpoint import load_optimizer, optimizer_state

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

PROGRESS_COLUMNS = {"loss": "loss", "bits_per_byte": "bits/byte", "tokens_per_second": "tokens/s"}


def train(config: PretrainConfig, run: Run, services: Services) -> dict[str, Any]:
    """Train as ``config`` says inside ``run``; gives the measurements on the held-out articles.

    The model folder is ``run.path / "model"``.
    """
    # 1. Texts and tokenizer.
    root = Path(config.data.root)
    held_out = held_out_documents(config.data)
    corpora = [
        _training_documents(root, config.data, source.path, source.adapter, source.join)
        for source in config.data.sources
    ]
    tokenizer = _tokenizer(run.path, corpora, config)
    streams = [_encode(tokenizer, documents) for documents in corpora]
    shares = torch.tensor([source.share for source in config.data.sources])
    # Token counts in the log: a share far above a source's size means many repetitions.
    for source, stream in zip(config.data.sources, streams, strict=True):
        run.notice(f"{source.path}: {len(stream):,} tokens, share {source.share / float(shares.sum()):.2f}")

    # 2. Model and optimizers; the first weights are a function of the seed alone.
    torch.manual_seed(config.seed)
    model = build_model(config.model, tokenizer)
    torch.nn.Module.to(model, run.device)
    optimizers = build_optimizers(model, config.optimisation)
    state = State(model, optimizers)
    # 3. The loop.
    for step in run.loop(config.optimisation.steps, state, columns=PROGRESS_COLUMNS):
        began = time.perf_counter()
        tokens = draw_windows(
            streams,
            shares,
            batch_size=config.optimisation.batch_size,
            length=config.model.context_length,
            begin=tokenizer.bos_token_id,
            generator=run.streams["data"],
        )
        # Step and not a scheduler object: there is no state to save.
        scale = learning_rate_scale(step, config.optimisation)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        loss, gradient_norm = _step(model, tokens.to(model.device), optimizers, config.optimisation)
        row: dict[str, Any] = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": config.optimisation.matrix_learning_rate * scale,
            "tokens": step * tokens.numel(),  # seen so far
            "tokens_per_second": tokens.numel() / (time.perf_counter() - began),
        }
        if held_out and (step % config.evaluate_every == 0 or step == config.optimisation.steps):
            row["bits_per_byte"] = bits_per_byte(model, tokenizer, held_out, context_length=config.model.context_length)
        run.log(step, row)

    # 4. The model as it ships.
    folder = run.path / "model"
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.nn.Module.to(model, torch.float32)  # measured as it ships: rounded to bfloat16, computed in float32
    return {
        "system": "pretrain",
        "status": "finished",
        "config": to_dict(config),
        "parameters": model.num_parameters(),
        "tokens": config.optimisation.steps * config.optimisation.batch_size * config.model.context_length,
        "held_out_bits_per_byte": bits_per_byte(model, tokenizer, held_out, context_length=config.model.context_length)
        if held_out
        else None,
    }


class State:
    """What pretraining changes: the weights and both optimizers."""

    def __init__(self, model: LlamaForCausalLM, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.model = model
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """The weights, and the state of each optimizer by name."""
        optimizers = {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()}
        return {"model": self.model.state_dict(), **optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over :meth:`state_dict`; raises ``CheckpointError`` for another model's."""
        # strict: a missing tensor would keep its random values.
        self.model.load_state_dict(state["model"], strict=True)
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state[name])


def build_model(model: Model, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of the configured size with random weights from the global torch generator; embeddings are tied.

    It has no dropout, so training and evaluation mode are the same.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.width,
            intermediate_size=model.feed_forward_width,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_key_value_heads,
            max_position_embeddings=model.context_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_optimizers(model: torch.nn.Module, optimisation: Optimisation) -> dict[str, torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms (Liu et al. 2025, arXiv 2502.16982)."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # Embeddings have two axes as well, but Muon's orthogonalisation is meant for maps between layers.
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": torch.optim.Muon(
            matrices,
            lr=optimisation.matrix_learning_rate,
            weight_decay=optimisation.weight_decay,
            # Scales Muon's update to AdamW's typical size, so that one weight decay suits both.
            adjust_lr_fn="match_rms_adamw",
        ),
        "adamw": torch.optim.AdamW(
            rest, lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay, betas=(0.9, 0.95)
        ),
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            # The scale of a step multiplies this, never the last step's rate.
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_scale(step: int, optimisation: Optimisation) -> float:
    """Factor in (0, 1] on the learning rates at ``step`` (from 1): linear warm-up, constant, linear decay to zero."""
    decay_steps = optimisation.decay_fraction * optimisation.steps
    # The smallest of the three decides: rising, constant, falling. +1, so that the last step still learns.
    return min(1.0, step / optimisation.warm_up_steps, (optimisation.steps + 1 - step) / decay_steps)


def draw_windows(
    streams: list[Tensor], shares: Tensor, *, batch_size: int, length: int, begin: int, generator: torch.Generator
) -> Tensor:
    """Windows of ``length`` tokens [batch, time], each the begin token and a random stretch of a source drawn by share.

    Sampling has no position of its own, so the generator's state is all that a resume needs.
    """
    sources = torch.multinomial(shares, batch_size, replacement=True, generator=generator)
    rows = []
    for source in sources.tolist():
        stream = streams[source]
        # length − 1 tokens after the begin token, so the last offset is len(stream) − length + 1.
        offset = int(torch.randint(len(stream) - length + 2, (), generator=generator))
        rows.append(torch.cat([torch.tensor([begin], dtype=stream.dtype), stream[offset : offset + length - 1]]))
    return torch.stack(rows).long()


def held_out_documents(data: Data) -> list[str]:
    """The validation articles that ``data`` names.

    Raises:
        DataError: a named file is missing.
    """
    folder = Path(data.root) / data.held_out
    return [document for name in data.held_out_names for document in read_documents(folder / name)]


def _training_documents(root: Path, data: Data, path: str, adapter: str, join: int) -> list[str]:
    source = root / path
    if source.is_dir():
        # By name, in every source: a held-out article may lie in a training folder as well.
        files: Iterable[Path] = sorted(file for file in source.iterdir() if file.name not in data.held_out_names)
    else:
        files = [source]
    documents = list(itertools.chain.from_iterable(read_documents(file, adapter=adapter, join=join) for file in files))
    if not documents:
        raise DataError(f"source {source} has no document; check its path and adapter")
    return documents


def _tokenizer(run_path: Path, corpora: list[list[str]], config: PretrainConfig) -> PreTrainedTokenizerBase:
    """Fitted anew each time: the fit is deterministic and takes seconds, so a resume needs no stored state."""
    return train_bpe_tokenizer(
        itertools.chain.from_iterable(corpora),
        vocab_size=config.model.vocab_size,
        context_length=config.model.context_length,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    """All documents as one stream [time] in int32, each followed by the end token."""
    encoded = tokenizer(documents, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)], dtype=torch.int32)


def _step(
    model: LlamaForCausalLM,
    tokens: Tensor,
    optimizers: dict[str, torch.optim.Optimizer],
    optimisation: Optimisation,
) -> tuple[float, float]:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=optimisation.bf16):
        # Every token but the last is given, every token but the first predicted.
        logits = model(tokens[:, :-1]).logits
    # In float32: a softmax over thousands of entries in bfloat16 loses what the loss measures.
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    # A step with NaN would ruin weights and both optimizers; better to stop.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimisation.clip_norm, error_if_nonfinite=True)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), norm.item()

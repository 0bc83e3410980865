"""Gradient checkpointing: the same numbers, less kept, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.doctor.memory import kept_bytes
from preceptor.lm import model as lm_model
from preceptor.lm.decode import Decoder
from preceptor.lm.embedding import AttentionProjections
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from tests.systems.reading.small import language_model

TOKENS = torch.arange(4 * 12).reshape(4, 12) * 7 % 300
KEEP = torch.ones_like(TOKENS, dtype=torch.bool)


def learning(recomputes: bool) -> tuple[LanguageModel, dict[str, Tensor]]:
    """A model and its gradient, part of which comes from inside a layer, by a captured projection."""
    lm = language_model()
    lm.recomputes = recomputes
    query_module = AttentionProjections(lm, layer=-2).query_module
    output = lm.forward(TOKENS, keep=KEEP, capture=query_module)
    assert output.captured is not None
    (output.logits.logsumexp(-1).sum() + output.captured.square().sum()).backward()
    return lm, {name: p.grad for name, p in lm.model.named_parameters() if p.grad is not None}


def test_the_gradient_is_the_same_to_the_last_bit() -> None:
    _, plain = learning(False)
    lm, again = learning(True)
    assert plain.keys() == again.keys()
    assert len(plain) == 3 * 9 + 3
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
    assert all("forward" not in vars(layer) for layer in lm.layers)


def test_a_layer_keeps_its_input_alone() -> None:
    def kept(recomputes: bool) -> int:
        lm = language_model(num_layers=6)
        lm.recomputes = recomputes
        return kept_bytes(lambda: lm.forward(TOKENS, keep=~KEEP), parameters=lm.model.parameters())

    assert kept(True) < 0.35 * kept(False)


def test_the_second_computation_is_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on a CPU has a kernel of its own, in which the layer must be computed again too."""
    entered: list[object] = []

    class Watched(lm_model.CpuAttention):  # type: ignore[name-defined, misc]
        def __enter__(self) -> Any:
            entered.append(self)
            return super().__enter__()

    monkeypatch.setattr(lm_model, "CpuAttention", Watched)
    learning(False)
    num_passes = len(entered)
    learning(True)
    assert len(entered) - 2 * num_passes == 3  # each layer once more


def test_passes_without_gradient_caches_and_copies_know_nothing_of_it() -> None:
    lm, reference = language_model(), language_model()
    lm.recomputes = True
    with torch.no_grad():
        assert torch.equal(lm.forward(TOKENS, keep=KEEP).logits, reference.forward(TOKENS, keep=KEEP).logits)
    decoders: list[Any] = [Decoder(each, batch_size=2, use_engine=False) for each in (lm, reference)]
    written = []
    for decoder in decoders:
        decoder.append([[1, 2, 3], [4, 5]])
        generator = torch.Generator().manual_seed(0)
        written.append(decoder.generate(5, sampling=Sampling(), generator=generator).tokens)
    assert torch.equal(*written)
    frozen = lm.frozen_copy()
    with torch.no_grad():
        lm.layers[0].mlp.up_proj.weight.add_(1.0)
    assert torch.equal(frozen.forward(TOKENS, keep=KEEP).logits, reference.forward(TOKENS, keep=KEEP).logits)

"""Decoding by a CUDA graph: one launch a token in the place of hundreds, on a cache of fixed size.

A graph replays the same kernels on the same addresses. So the cache is allocated for all tokens at once, new keys and
values are written to the slot that a tensor names, and a mask hides what is not written yet. On a CPU the step is
called and not replayed, which is how its numbers are tested; no graph has been captured yet, for want of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import bandwidth, synchronised
from benchmarks.measurement import OURS, Bar, Comparison, require_equal
from preceptor.lm.cpu.engine import CpuEngine
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling, draw

GRAPH = f"{OURS}, CUDA graph"


class FixedLayer:
    """Keys and values of one layer, ``slots`` of them from the start; :attr:`slot` says where the next go."""

    def __init__(self, shape: tuple[int, int, int, int], slot: Tensor, *, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=slot.device)
        self.values = torch.zeros_like(self.keys)
        self.slot = slot

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All slots, after ``keys`` and ``values`` [batch, kv_heads, 1, width] of one token a row went to theirs."""
        return self.keys.index_copy_(2, self.slot, keys), self.values.index_copy_(2, self.slot, values)


class GraphedDecoder:
    """Rows of equal length that read a prompt by a :class:`Decoder` and write by a step of fixed shape.

    Args:
        lm: a model that has an engine.
        prompts: token ids [batch, time].
        slots: tokens of a row in all.
    """

    def __init__(self, lm: LanguageModel, prompts: Tensor, *, slots: int) -> None:
        engine: Any = lm.engine(dtype=lm.dtype)
        assert isinstance(engine, CpuEngine), f"{lm.name} has no engine"
        self.lm, self.engine, self.prompts = lm, engine, prompts
        batch, device = len(prompts), lm.device
        self.rows = torch.arange(batch, device=device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.every_slot = torch.arange(slots, device=device)
        config = lm.model.config
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        self.cache = [FixedLayer(shape, self.slot, dtype=engine._attention_dtype) for _ in lm.layers]
        self.logits = torch.zeros(batch, lm.vocab_size, device=device)
        self.graph: Any = None

    def read(self) -> None:
        """Reads the prompts; the cache holds them afterwards, and the logits of the next token."""
        decoder = Decoder(self.lm, batch_size=len(self.prompts))
        decoder.append(self.prompts.tolist())
        for layer, read in zip(self.cache, decoder._layers, strict=True):
            length = self.prompts.shape[1]
            assert read.keys is not None
            assert read.values is not None
            layer.keys[:, :, :length] = read.keys[:, :, :length]
            layer.values[:, :, :length] = read.values[:, :, :length]
        self.logits.copy_(decoder._next_logits)
        self.slot.fill_(self.prompts.shape[1])

    @torch.no_grad()
    def step(self) -> None:
        """One token a row from ``token`` into the cache, and the logits of the next; of fixed shapes and addresses."""
        positions = self.slot.expand(len(self.rows), 1)
        visible = (self.every_slot <= self.slot).expand(len(self.rows), 1, -1)
        states = self.engine._embed(self.token, positions)
        # Rows by their number, where `keep` is otherwise a mask: a mask's rows have to be counted, which stops a graph.
        logits, _ = self.engine._forward(
            states, self.rows, visible, self.engine._rotary_factors(positions), self.cache, None
        )
        self.logits.copy_(logits)
        self.slot.add_(1)

    def capture(self) -> None:
        """Records :meth:`step` on a GPU; what it did to the cache in the meantime is read again by :meth:`read`."""
        if self.lm.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are chosen and memory is taken before anything is recorded
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def generate(self, num_tokens: int, *, sampling: Sampling, generator: torch.Generator) -> Tensor:
        """Token ids [batch, token], sampled as a :class:`Decoder` samples."""
        tokens = []
        for _ in range(num_tokens):
            tokens.append(draw(sampling.log_probs(self.logits), generator))
            self.token.copy_(tokens[-1][:, None])
            self.step() if self.graph is None else self.graph.replay()
        return torch.stack(tokens, 1)


def comparisons(lm: LanguageModel, quick: bool) -> Iterator[Comparison]:
    """The batches of ``benchmarks.gpu.decodes``, and one row, which launches bind most."""
    limit = bandwidth(lm.device, 128 if quick else 8_192)
    for batch_size in (2,) if quick else (1, 8):
        yield compare(lm, batch_size, *((4, 4) if quick else (512, 128)), bandwidth=limit)


def compare(lm: LanguageModel, batch_size: int, prompt: int, new: int, *, bandwidth: float) -> Comparison:
    """Reading the prompt is in both; the tokens of both are compared first."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, lm.vocab_size, (batch_size, prompt), generator=generator).to(lm.device)
    graphed = GraphedDecoder(lm, prompts, slots=prompt + new + 8)
    graphed.read()
    graphed.capture()

    def eager(sampling: Sampling = Sampling()) -> Tensor:  # noqa: B008 - frozen
        decoder = Decoder(lm, batch_size=batch_size)
        decoder.append(prompts.tolist())
        return decoder.generate(new, sampling=sampling, generator=torch.Generator().manual_seed(0)).tokens

    def replayed(sampling: Sampling = Sampling()) -> Tensor:  # noqa: B008 - frozen
        graphed.read()
        return graphed.generate(new, sampling=sampling, generator=torch.Generator().manual_seed(0))

    greedy = Sampling(temperature=0.0)
    differing = float((eager(greedy) != replayed(greedy)).double().mean())
    config = lm.model.config
    element = torch.finfo(lm.dtype).bits // 8
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    step_bytes = element * (weights + batch_size * (prompt + new / 2) * kept)
    ways = {OURS: synchronised(eager, lm.device), GRAPH: synchronised(replayed, lm.device)}
    return Comparison(
        benchmark="gpu graphs",
        case=f"{lm.model.num_parameters() / 1e9:.2f}B, batch {batch_size}, {prompt} + {new} tokens",
        ways=ways,
        bars=(Bar(OURS, at_least=1.0, way=GRAPH),),
        # Random weights have near ties, which bfloat16 may decide either way; a row differs from there on.
        agreement={"share of greedy tokens": require_equal("greedy tokens", differing, at_most=0.5)},
        units=dict.fromkeys(ways, batch_size * new),
        ideal_seconds=dict.fromkeys(ways, new * step_bytes / bandwidth),
        device=lm.device,
    )

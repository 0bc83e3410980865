"""The compiled kernels against PyTorch's calls: attention with its gradients, and decode steps of a small model.

Both are measured as this processor builds them and, on x86-64, as one without AVX-512 would: most laptops are such.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import resources
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measurement import OURS, Bar, Comparison, measured_precision, require_equal
from benchmarks.models import H192, random_llama, starter
from preceptor.lm.cpu import attention, engine, kernels
from preceptor.lm.cpu.attention import CpuAttention
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

AVX2 = ("-O3", "-mavx2", "-mfma", "-mno-avx512f", "-std=gnu11", "-fPIC", "-shared", "-fopenmp")
PYTORCH = "PyTorch's calls"
SHAPES = ((8, 8, 8, 512, 24), (32, 8, 8, 96, 24), (8, 4, 2, 512, 64), (4, 8, 8, 1_024, 64))
"""Rows, heads, key-value heads, tokens, width of a head."""


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Every build at every shape, and decoding 8 and 32 rows."""
    lm = starter() if quick else random_llama(H192)
    for build, library in builds().items():
        for shape in ((2, 2, 1, 16, 8),) if quick else SHAPES:
            yield attention_comparison(build, library, shape)
        for batch_size in (2,) if quick else (8, 32):
            yield decode_comparison(build, library, lm, batch_size, tokens=4 if quick else 64)


def builds() -> dict[str, ctypes.CDLL]:
    """The library of this processor and the one for AVX2, where they can be built and run."""
    found = {"this processor": kernels.kernel_library()}
    compiler = shutil.which("cc")
    if compiler is not None and platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        folder = resources.files("preceptor.lm.cpu")
        sources = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in kernels.SOURCES}
        found["AVX2"] = kernels.build_library(compiler, AVX2, sources)
    return {name: library for name, library in found.items() if library is not None}


def attention_comparison(build: str, library: ctypes.CDLL, shape: tuple[int, int, int, int, int]) -> Comparison:
    """Causal attention and its three gradients; PyTorch's kernel at the setting that is fastest for it."""
    rows, heads, num_kv_heads, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(rows, tokens, number, width, generator=generator).transpose(1, 2).requires_grad_()
        for number in (heads, num_kv_heads, num_kv_heads)
    ]
    slopes = torch.randn(parts[0].shape, generator=generator)

    def through(library: ctypes.CDLL | None) -> list[Tensor]:
        with mock.patch.object(attention, "kernel_library", return_value=library), CpuAttention():
            output = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True, enable_gqa=True)
            return [output.detach(), *torch.autograd.grad(output, parts, slopes)]

    ways = {
        OURS: measured_precision(lambda: through(library)),
        PYTORCH: measured_precision(lambda: through(None)),
    }
    difference = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ways[OURS](), ways[PYTORCH](), strict=True)
    )
    return Comparison(
        benchmark="attention",
        case=f"{build}: {rows} rows x {heads} heads ({num_kv_heads} key-value) x {tokens} tokens, width {width}",
        ways=ways,
        bars=(Bar(PYTORCH, at_least=1.0),),
        agreement={"output and gradients": require_equal("output and gradients", difference, at_most=1e-5)},
    )


def decode_comparison(
    build: str, library: ctypes.CDLL, lm: LanguageModel, batch_size: int, *, tokens: int
) -> Comparison:
    """The engine with and without the compiled decode step; greedy tokens are compared first."""
    prompts = torch.randint(3, lm.vocab_size, (batch_size, tokens), generator=torch.Generator().manual_seed(0)).tolist()

    def through(library: ctypes.CDLL | None, dtype: torch.dtype | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with mock.patch.object(engine, "kernel_library", return_value=library):
                decoder = Decoder(lm, batch_size=batch_size, dtype=dtype)
                decoder.append(prompts)
                generator = torch.Generator().manual_seed(0)
                return decoder.generate(tokens, sampling=Sampling(temperature=0.0), generator=generator).tokens

        return measured_precision(run)

    ways = {
        OURS: through(library, None),
        f"{OURS}, bfloat16": through(library, torch.bfloat16),
        PYTORCH: through(None, None),
        f"{PYTORCH}, bfloat16": through(None, torch.bfloat16),
    }
    unlike = float((ways[OURS]() != ways[PYTORCH]()).double().mean())
    return Comparison(
        benchmark="decode step",
        case=f"{build}: batch {batch_size}, {tokens} + {tokens} tokens",
        ways=ways,
        bars=(Bar(PYTORCH, at_least=1.0), Bar(f"{PYTORCH}, bfloat16", at_least=1.0, way=f"{OURS}, bfloat16")),
        # Two logits that tie within rounding may fall either way; from there on a row's tokens differ.
        agreement={"share of greedy tokens": require_equal("greedy tokens", unlike, at_most=0.05)},
        units=dict.fromkeys(ways, batch_size * tokens),
    )

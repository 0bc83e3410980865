"""Tiny models of real families with random weights, and plain Transformers as the reference for all of them."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from preceptor.lm.cpu import kernels
from preceptor.lm.load import Adapter, load_language_model, with_adapter
from preceptor.lm.model import LanguageModel
from preceptor.lm.tokenizer import train_bpe_tokenizer

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")

VOCABULARY = 300
CONTEXT = 96
# Weights are large, so that attention is far from uniform and a wrong mask or position changes every logit.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_GPT2 |= {name: _SHAPE[name] for name in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
_WINDOW = {"sliding_window": 64}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **changes: LlamaConfig(**_SHAPE | changes),  # grouped queries
    "gpt2": lambda **changes: GPT2Config(**_GPT2 | changes),  # learned positions, tied head, fused projections, dropout
    "qwen2": lambda **changes: Qwen2Config(**_SHAPE | changes),  # biases
    "qwen3": lambda **changes: Qwen3Config(**_SHAPE | changes),  # norms of heads
    # Capped attention and capped logits: the head is not linear. Half of the layers see a window.
    "gemma2": lambda **changes: Gemma2Config(**_SHAPE | _WINDOW | {"final_logit_softcapping": 5.0} | changes),
    "mistral": lambda **changes: MistralConfig(**_SHAPE | _WINDOW | changes),  # every layer sees a window
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    texts = ["The keeper of the lighthouse counts 12 ships a day, and none of them counts the keeper."] * 3
    return train_bpe_tokenizer(texts, vocab_size=VOCABULARY, context_length=CONTEXT)


MakeLM = Callable[..., LanguageModel]


@pytest.fixture(scope="session")
def make_lm(tokenizer: PreTrainedTokenizerBase) -> MakeLM:
    """``make_lm(family, attention=…, dtype=…, **changes of the configuration)``: a new model, always the same."""

    def make(
        family: str = "llama", *, attention: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> LanguageModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = FAMILIES[family](**changes)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        # A new model's biases are zero and its norms one; then a wrong place for them would go unnoticed.
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        return LanguageModel(model.to(dtype), tokenizer, name=f"tiny {family}")

    return make


@pytest.fixture(scope="session")
def make_lora(make_lm: MakeLM) -> MakeLM:
    """As ``make_lm``, with a LoRA adapter of rank 2."""
    pytest.importorskip("peft", reason="needs the extra lora")

    def make(family: str = "llama", **changes: Any) -> LanguageModel:
        lm = make_lm(family, **changes)
        return LanguageModel(with_adapter(lm.model, Adapter(rank=2, alpha=4.0)), lm.tokenizer, name=f"{lm.name} + LoRA")

    return make


@pytest.fixture(scope="session")
def real_lm(test_data: Path) -> MakeLM:
    """``real_lm("stories260k")`` or ``real_lm("stories3m")``, loaded once."""
    return cache(lambda name: load_language_model(str(test_data / "lm" / name), device=torch.device("cpu")))


class Plain:
    """One row at a time through plain Transformers: no cache, no mask, no padding."""

    @staticmethod
    @torch.no_grad()
    def logits(lm: LanguageModel, row: list[int]) -> Tensor:
        """Logits at every position of ``row``."""
        return lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()

    @staticmethod
    def log_probs(lm: LanguageModel, row: list[int], start: int = 1, end: int | None = None) -> Tensor:
        """Log-probability of each token of ``row[start:end]`` given all before it."""
        log_probs = Plain.logits(lm, row).log_softmax(-1)
        return torch.stack([log_probs[at - 1, row[at]] for at in range(start, end or len(row))])

    @staticmethod
    @torch.no_grad()
    def output(lm: LanguageModel, module: nn.Module, row: list[int]) -> Tensor:
        """What ``module`` gives at every position of ``row``."""
        seen: list[Tensor] = []
        hook = module.register_forward_hook(
            lambda _module, _inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
        )
        lm.model(input_ids=torch.tensor([row]), use_cache=False)
        hook.remove()
        return seen[0][0]


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    return Plain


@pytest.fixture
def random_tokens() -> Callable[[int], list[int]]:
    """Token ids of text, the same sequence of them in every test."""
    generator = torch.Generator().manual_seed(5)
    return lambda length: torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


@pytest.fixture(scope="session", params=["-mno-avx", "-mavx2 -mfma -mno-avx512f"])
def narrow_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as processors with vectors of four and of eight floats build them."""
    compiler, target = shutil.which("cc"), tmp_path_factory.mktemp("kernels") / "narrow.so"
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C compiler and a processor of this family")
    sources = [str(Path(kernels.__file__).with_name(name)) for name in kernels.SOURCES if name.endswith(".c")]
    options = [*request.param.split(), "-O2", "-std=gnu11", "-fPIC", "-shared", "-o", str(target)]
    subprocess.run([compiler, *options, *sources, "-lm"], check=True)
    return ctypes.CDLL(str(target))

"""What a GPU will hold: every part against tensors of real models on the CPU, and a 3B model that is never loaded."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from preceptor.cli import main
from preceptor.doctor.memory import (
    WORKLOADS,
    Memory,
    Workload,
    fitted,
    forecast_memory,
    kept_bytes,
    memory_checks,
    settings_that_fit,
)
from preceptor.lm.decode import Decoder
from preceptor.lm.load import Adapter, load_language_model, with_adapter
from preceptor.lm.recompute import recomputed
from preceptor.lm.sampling import Sampling
from preceptor.systems import find_system
from preceptor.systems.base import configuration

GIB = 2**30
CLOSE = 0.15
"""Kernels differ between machines in what little they keep besides their operands."""

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 700, "head_dim": 16}
FAMILIES = {
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, tie_word_embeddings=False),
}
LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128_256,
    tie_word_embeddings=True,
    max_position_embeddings=131_072,
)


def folder_of(config: PreTrainedConfig, path: Path) -> str:
    """A folder that holds a configuration and nothing else."""
    config.save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return str(path)


def work(model: str, **changed: Any) -> Workload:
    usual: dict[str, Any] = {"dtype": torch.float32, "rank": 0, "mixed": False, "rows": 4, "row_tokens": 48}
    usual |= {"scored_tokens": 20, "logit_copies": 1, "cache_rows": 3, "cache_tokens": 40, "copies": 1}
    return Workload(model, **usual | changed)


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "rank", "mixed"),
    [
        (torch.float32, 0, False),
        (torch.bfloat16, 0, False),
        (torch.float32, 0, True),
        (torch.float32, 4, False),
        (torch.bfloat16, 4, False),
    ],
    ids=["float32", "bfloat16", "mixed", "lora", "lora on bfloat16"],
)
def test_what_training_holds_is_what_a_real_step_holds(
    family: str, dtype: torch.dtype, rank: int, mixed: bool, tmp_path: Path
) -> None:
    """To catch: a tied head counted twice, an adapter that counts as everything, an optimiser of one moment."""
    config = FAMILIES[family]
    told = forecast_memory(work(folder_of(config, tmp_path), dtype=dtype, rank=rank, mixed=mixed))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if rank:
        model = with_adapter(model, Adapter(rank))
    decoder = model.get_base_model().base_model if rank else model.base_model
    tokens = torch.randint(0, 700, (4, 48), generator=torch.Generator().manual_seed(0))
    made = {}

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            made["states"] = decoder(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]

    measured = kept_bytes(forward, parameters=model.parameters())
    assert told.activations == pytest.approx(measured, rel=CLOSE)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning)
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moments = [tensor for state in optimiser.state.values() for name, tensor in state.items() if name != "step"]
    assert told.weights == pytest.approx(num_bytes([*model.parameters(), *model.buffers()]), rel=0.001)
    assert told.gradients == num_bytes(parameter.grad for parameter in learning)
    assert told.optimiser == num_bytes(moments)


@pytest.mark.parametrize(("rank", "begun"), [(0, 20), (4, 20), (0, 280)])
def test_references_caches_and_logits_are_those_of_the_starter(rank: int, begun: int) -> None:
    lm = load_language_model("starter", device=torch.device("cpu"), adapter=Adapter(rank) if rank else None)
    told = forecast_memory(work("starter", rank=rank, copies=2, logit_copies=3, cache_tokens=begun + 20))
    # The model before training and a snapshot: two copies, or with an adapter a view and a copy of the adapter.
    own = {parameter.untyped_storage()._cdata for parameter in lm.model.parameters()}
    copies = [lm.initial_model(), lm.frozen_copy()]
    further = {p.untyped_storage()._cdata: p for copy in copies for p in copy.model.parameters()}
    assert told.reference == pytest.approx(num_bytes(p for key, p in further.items() if key not in own), rel=0.02)
    decoder = Decoder(lm, batch_size=3)
    decoder.append([[lm.begin_token] * begun] * 3)
    decoder.generate(20, sampling=Sampling(), generator=torch.Generator().manual_seed(0))
    held = {t.data_ptr(): t for layer in decoder._layers for t in (layer.keys, layer.values)}
    assert len(held) > 2
    assert told.kv_cache == pytest.approx(num_bytes(held.values()), rel=CLOSE)
    assert told.logits == 3 * 4 * 20 * lm.vocab_size * 4  # copies · rows · positions · vocabulary · bytes


def test_a_loss_that_works_in_blocks_holds_a_block_of_logits() -> None:
    many, few = (forecast_memory(work("starter", rows=rows, scored_tokens=4_000)) for rows in (400, 200))
    assert many.logits == few.logits == 2**24 * 4
    assert many.activations == 2 * few.activations


# ---- a model of 3B, from its configuration alone ----


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of(LLAMA_3B, tmp_path_factory.mktemp("models") / "llama-3b")


def test_a_3b_model_with_lora_fits_24_gib_at_the_default_setting(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """3,212,749,824 weights of 4 bytes are 11.97 GiB; of 24 episodes memory holds one in a pass, which trials find."""
    words = ["doctor", "reading", "--model", llama, "--set", "model.adapter_rank=8", "--gpu-memory", "24GiB"]
    began = time.monotonic()
    assert main(words) == 0
    assert time.monotonic() - began < 60  # nothing is loaded
    out = capsys.readouterr().out
    assert "ok    GPU memory, weights: 12.0 GiB\n" in out
    assert "ok    GPU memory, KV cache: " in out
    assert "ok    GPU memory, rows in a pass: 1 of 24, found by trial as the run begins\n" in out
    assert "GiB at the peak, of 24.0 GiB: it fits\n" in out
    assert out.endswith("9 ok, 0 warn, 0 fail\n")
    assert main([*words, "--set", "update.micro_batch_size=24"]) == 7  # a number that was given is kept
    out = capsys.readouterr().out
    assert "fail  GPU memory: about " in out
    assert "it fits with --set update.micro_batch_size=1\n" in out


@pytest.mark.parametrize("gib", [24, 40, 80, 200])
def test_trials_find_the_most_rows_that_fit(gib: int, llama: str) -> None:
    config = configuration(find_system("reading"), overrides=[f"model.name={llama}", "model.adapter_rank=8"])
    whole = WORKLOADS["reading"](config)
    found = fitted(whole, gpu_bytes=gib * GIB)
    assert forecast_memory(found).peak <= gib * GIB
    twice = min(24, 2 * found.rows + (found.rows in (1, 12)))  # 24, 12, 6, 3, 1
    assert found.rows == 24 or forecast_memory(replace(whole, rows=twice)).peak > gib * GIB
    assert fitted(replace(whole, by_trial=False), gpu_bytes=gib * GIB).rows == 24


def test_gradient_checkpointing_and_4_bits_are_forecast(llama: str) -> None:
    config = configuration(find_system("reading"), overrides=[f"model.name={llama}", "model.adapter_rank=8"])
    plain = forecast_memory(WORKLOADS["reading"](config))
    settings = [f"model.name={llama}", "model.adapter_rank=8", "model.dtype=bfloat16", "model.quantization=4bit"]
    less = configuration(find_system("reading"), overrides=[*settings, "update.gradient_checkpointing=true"])
    work = WORKLOADS["reading"](less)
    told = forecast_memory(work)
    # 2,818,572,288 weights in layers of 0.5 byte and a scale; 394,177,536 of embeddings and norms of 2 bytes.
    linear = 28 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    assert told.weights == pytest.approx(2 * 394_000_000 + linear * 0.5159 + 4 * 12_000_000, rel=0.02)
    inputs = 24 * work.row_tokens * 3072 * 2 * 28
    assert inputs < told.activations < 0.1 * plain.activations + inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_what_checkpointed_layers_keep_is_what_is_told(family: str, tmp_path: Path) -> None:
    """Their inputs; beside them one layer's own activations are held while its backward pass runs."""
    config = FAMILIES[family]
    folder = folder_of(config, tmp_path)
    told = forecast_memory(work(folder, recomputed=True)).activations
    one_layer = forecast_memory(work(folder)).activations // 3
    model: Any = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 700, (4, 48), generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with recomputed(model.base_model.layers):
            model.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    measured = kept_bytes(forward, parameters=model.parameters())
    assert told - one_layer == pytest.approx(measured, rel=0.3)  # and what is kept outside of layers


@pytest.mark.parametrize(
    ("words", "gib", "settings"),
    [
        ([], 24, ["model.adapter_rank=8"]),
        (["update.micro_batch_size=24"], 24, ["model.adapter_rank=8", "update.micro_batch_size=1"]),
        (["model.adapter_rank=8"], 200, []),  # what fits needs no search: the first candidate changes nothing
        (["model.adapter_rank=8"], 12, ["model.dtype=bfloat16"]),
        (["model.adapter_rank=8"], 4, []),
    ],
)
def test_the_least_change_is_named_first(words: list[str], gib: int, settings: list[str], llama: str) -> None:
    system = find_system("reading")
    config = configuration(system, overrides=[f"model.name={llama}", *words])
    assert settings_that_fit("reading", config, gpu_bytes=gib * GIB) == settings
    if settings:
        fitting = configuration(system, overrides=[f"model.name={llama}", *words, *settings])
        assert list(memory_checks("reading", fitting, gpu_bytes=gib * GIB))[-1].status == "ok"


@pytest.mark.parametrize("system", ["reading", "curriculum"])
def test_the_papers_presets_are_told_and_what_nothing_helps_is_said(system: str, llama: str) -> None:
    config = configuration(find_system(system), preset="paper", overrides=[f"model.name={llama}"])
    *parts, verdict = memory_checks(system, config, gpu_bytes=4 * GIB)
    if system == "reading":
        assert parts.pop(0).figure == f"1 of {config.episode.batch_size}, found by trial as the run begins"
    assert [part.name.removeprefix("GPU memory, ") for part in parts] == [
        *("weights", "gradients", "optimiser", "reference", "activations", "logits", "KV cache")
    ]
    assert verdict.status == "fail"
    assert "even an adapter on bfloat16 weights and one row at a time take" in verdict.remedy
    assert list(memory_checks(system, config, gpu_bytes=500 * GIB))[-1].status == "ok"


def test_what_cannot_be_told_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "bandit", "--gpu-memory", "24GiB"]) == 0
    assert "warn  GPU memory: not told for bandit, only for reading and curriculum" in capsys.readouterr().out
    assert main(["doctor", "reading", "--model", str(tmp_path), "--gpu-memory", "24GiB"]) == 7
    assert "has no config.json" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}")
    assert main(["doctor", "reading", "--model", str(tmp_path), "--gpu-memory", "24GiB"]) == 7
    assert "fail  GPU memory: the configuration of model" in capsys.readouterr().out
    assert main(["doctor", "reading", "--gpu-memory", "24"]) == 2
    assert "must be a size such as 8GiB" in capsys.readouterr().err


def test_activations_and_cache_are_never_held_together() -> None:
    one, other = (Memory(1000, 0, 0, 0, *rest) for rest in ((700, 300, 10), (10, 0, 1000)))
    assert one.peak == other.peak == 600 * 2**20 + 2200


def test_a_study_holds_a_reader_and_a_copy_where_that_learns(tmp_path: Path) -> None:
    llama = folder_of(FAMILIES["llama, tied"], tmp_path)

    def held(*settings: str) -> Memory:
        overrides = ["episode.pool=mixed", "episode.budget=4", "data.num_pairs=4", f"model.name={llama}", *settings]
        config = configuration(find_system("reading"), overrides=overrides)
        return forecast_memory(WORKLOADS["reading"](config))

    frozen, learns = held(), held("study.model_steps=5")
    # A frozen reader has no gradients, and one copy of its weights.
    assert (frozen.gradients, frozen.optimiser, frozen.reference, frozen.kv_cache) == (0, 0, 0, 0)
    assert learns.reference == learns.weights == frozen.weights
    assert 0 < learns.gradients <= learns.weights  # all but buffers
    assert learns.activations > frozen.activations
    # With an adapter the frozen weights are held once.
    adapter = held("study.model_steps=5", "model.adapter_rank=4")
    assert adapter.reference == 0
    assert 0 < adapter.gradients < learns.gradients / 2
    # Fewer texts in a pass hold less, and what the model writes needs a cache.
    assert held("study.model_steps=5", "update.micro_batch_size=2").activations < learns.activations / 10
    assert held("study.channels=[written_query]").kv_cache > 0
